"""sparc3 generate: continue a text with any model, packed or not, and tell the speed."""

from __future__ import annotations

from collections import Counter
from typing import Annotated

import typer

import sparc3
from sparc3 import console
from sparc3.console import AsJson, Device


def generate(
    model: Annotated[
        str, typer.Argument(help="A folder (packed or dense), a hub id, a .gguf file, tiny-llama.")
    ],
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to add, at most.")] = 64,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the likeliest token; above, tokens are drawn.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the drawing.")] = 0,
    device: Device = "cpu",
    dtype: Annotated[
        str, typer.Option(help="auto (as the model is stored) | float32 | bfloat16 | float16.")
    ] = "auto",
    as_json: AsJson = False,
) -> None:
    """Continue a text; the speed of reading the prompt and of each further token is printed apart."""
    import torch

    from sparc3.generation import generate as continue_text
    from sparc3.runtime import SparseLinear

    console.begin()
    with console.progress(f"loading {model}"):
        loaded = sparc3.load(model, dtype=dtype, device=device)

    def show(text: str) -> None:
        print(text, end="", flush=True)

    result = continue_text(
        loaded.model, loaded.tokenizer, prompt, max_new_tokens, temperature, seed, None if as_json else show
    )
    packed = Counter(one.format for one in loaded.model.modules() if isinstance(one, SparseLinear))
    document = {
        "model": loaded.name,
        "note": loaded.note,
        "packed": dict(packed),
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "prompt": prompt,
        "text": result.text,
        "prefill": {
            "tokens": result.prompt_tokens,
            "seconds": result.prefill_seconds,
            "tokens_per_second": result.prefill_speed,
        },
        "decode": {
            "tokens": result.new_tokens - 1,
            "seconds": result.decode_seconds,
            "tokens_per_second": result.decode_speed,
        },
    }
    if as_json:
        console.show_json(document)
        return
    decode = "" if result.decode_speed is None else f", decode {result.decode_speed:.1f} tokens/s"
    console.show(
        f"\n\nprefill {result.prefill_speed:.1f} tokens/s ({result.prompt_tokens} tokens){decode} "
        f"({result.new_tokens} new tokens)",
        *console.notes(loaded),
    )
