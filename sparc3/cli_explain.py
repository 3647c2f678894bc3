"""sparc3 explain: which tokens, heads and neurons a model's next token comes from, and where the rest went."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

import sparc3
from sparc3 import console
from sparc3.console import AsJson, Device, Dtype, Force, Model
from sparc3.errors import InputError

if TYPE_CHECKING:
    import torch

    from sparc3.conservation import Conservation
    from sparc3.models import Loaded
    from sparc3.rules import Rule

# The model's own most likely next tokens, beside the one that is explained.
_PREDICTIONS = 5


def explain(
    model: Model,
    text: Annotated[str, typer.Argument(help="What the model reads; its next token is explained.")],
    answer: Annotated[
        str | None,
        typer.Option(
            help="The next token to explain, as it would follow the text: with its space, as ' Mary'. Default: the "
            "model's own most likely one."
        ),
    ] = None,
    target: Annotated[
        str, typer.Option(help="What of it is explained: logit | logit-mean | lead | logprob | max-logit.")
    ] = "logit",
    rule: Annotated[
        str, typer.Option(help="attnlrp | cp | gradient, or choices such as norm=gradient,attention=half.")
    ] = "attnlrp",
    top: Annotated[
        int, typer.Option(min=1, help="So many of the most relevant tokens, heads and neurons.")
    ] = 10,
    out: Annotated[Path | None, typer.Option(help="HTML file to write; it must not exist.")] = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Show which tokens, heads and neurons a model's next token comes from, and where the rest of it went."""
    from sparc3.rules import Rule
    from sparc3.targets import check_target

    parsed = Rule.parse(rule)
    check_target(target, "last")
    if not text:
        raise InputError("the text is empty; give some for the model to read")
    for what, given in (("the text", text), ("--answer", answer or "")):
        if given != given.encode(errors="replace").decode():
            raise InputError(f"{what} is not valid UTF-8")
    if answer is not None and target == "max-logit":
        raise InputError(
            "--target max-logit explains the model's own choice; leave --answer out or take logit"
        )
    if out is not None:
        console.check_apart(model, out)
        console.check_new_file(out, force)
    console.begin()
    with console.progress(f"loading {model}") as update:
        loaded = sparc3.load(model, dtype=dtype, device=device)
        update(description="explaining")
        found = explanation(loaded, text, answer, target, parsed, top)
    if out is not None:
        from sparc3.export import write_text

        write_text(out, _page(found))
    if as_json:
        console.show_json({**found, "out": None if out is None else str(out)})
        return
    _show(found)
    if out is not None:
        console.show(f"Saved {out}")


def explanation(
    loaded: Loaded, text: str, answer: str | None, target: str, rule: Rule, top: int
) -> dict[str, Any]:
    """All that is printed and saved, as plain JSON values."""
    import torch

    from sparc3.conservation import conservation
    from sparc3.page import spell
    from sparc3.samples import prompts

    model, tokenizer = loaded.model, loaded.tokenizer
    batch = {name: value.to(model.device) for name, value in prompts(tokenizer, [text]).items()}
    ids = batch["input_ids"][0].tolist()
    config: Any = model.config
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and len(ids) > limit:
        raise InputError(
            f"the text has {len(ids)} tokens (BOS included), but the model has {limit} positions"
        )
    if max(ids) >= config.vocab_size:
        raise InputError(f"token {max(ids)} is outside the model's vocabulary of {config.vocab_size}")
    with torch.no_grad():
        logits = model(**batch, use_cache=False, logits_to_keep=1).logits[0, -1].float()
    ranking = logits.argsort(descending=True, stable=True).tolist()
    explained = ranking[0] if answer is None else _answer_id(loaded, text, ids, answer)
    if explained >= len(ranking):
        raise InputError(f"--answer {answer!r} is outside the model's vocabulary of {len(ranking)}")
    labels = torch.full_like(batch["input_ids"], -100)
    labels[0, -1] = explained
    found, flow = conservation(model, batch | {"labels": labels}, rule, target)
    relevance = found.tokens[0].tolist()
    if not (torch.isfinite(found.tokens).all() and torch.isfinite(found.value).all()):
        raise InputError(f"the relevance overflows in {model.dtype}; take --dtype float32 or bfloat16")
    heads = {layer: of_layer[0].sum(0) for layer, of_layer in found.heads.items()}
    neurons = {layer: of_layer[0].sum(0) for layer, of_layer in found.neurons.items()}
    chances = logits.softmax(-1).tolist()
    words = spell(tokenizer, [*ids, explained, *ranking[:_PREDICTIONS]])
    special = set(tokenizer.all_special_ids)
    return {
        "model": {"name": loaded.name, "origin": loaded.origin, "note": loaded.note},
        "architecture": config.model_type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "rule": str(rule),
        "target": target,
        "text": text,
        "answer": {
            "id": explained,
            "token": words[len(ids)],
            "probability": chances[explained],
            "rank": ranking.index(explained) + 1,
        },
        "predictions": [
            {"id": token, "token": word, "probability": chances[token]}
            for token, word in zip(ranking, words[len(ids) + 1 :], strict=False)
        ],
        "tokens": [
            {"index": index, "id": token, "token": word, "special": token in special, "relevance": value}
            for index, (token, word, value) in enumerate(zip(ids, words, relevance, strict=False))
        ],
        "heads": _largest(heads, "head", top),
        "neurons": _largest(neurons, "neuron", top),
        "heads_by_block": [heads[layer].tolist() for layer in sorted(heads)],
        "top": top,
        "conservation": _plain(flow),
    }


def _answer_id(loaded: Loaded, text: str, ids: list[int], answer: str) -> int:
    """The one token of ``answer`` after the text."""
    from sparc3.page import spell
    from sparc3.samples import prompts

    whole = prompts(loaded.tokenizer, [text + answer])["input_ids"][0].tolist()
    # Where it merges with the text's end, it is taken by itself.
    after = whole[len(ids) :] if whole[: len(ids)] == ids else None
    alone = loaded.tokenizer(answer, add_special_tokens=False)["input_ids"] if after is None else after
    if len(alone) != 1:
        parts = ", ".join(map(repr, spell(loaded.tokenizer, alone)))
        raise InputError(
            f"--answer {answer!r} is {len(alone)} tokens of this model ({parts}); give exactly one token"
        )
    return alone[0]


def _largest(by_layer: dict[int, torch.Tensor], kind: str, count: int) -> list[dict[str, Any]]:
    """The components of the largest relevance, for or against."""
    found = [
        {"block": layer, kind: index, "relevance": value}
        for layer, values in by_layer.items()
        for index, value in enumerate(values.tolist())
    ]
    return sorted(found, key=lambda row: -abs(row["relevance"]))[:count]


def _plain(flow: Conservation) -> dict[str, Any]:
    head = len(flow.rows) - 1
    return {
        "value": flow.value,
        "inputs": flow.inputs,
        "taken": flow.taken,
        "must_be_zero": list(flow.zero),
        "broken": [{"block": _block_name(block, head), "part": part} for block, part in flow.broken],
        "blocks": [
            {
                "block": _block_name(row.block, head),
                "above": row.above,
                "below": row.below,
                "taken": row.taken,
                "rounding": row.rounding,
            }
            for row in flow.rows
        ],
    }


def _block_name(block: int, head: int) -> int | str:
    return "head" if block == head else block


def _headline(found: dict[str, Any]) -> list[str]:
    answer, flow = found["answer"], found["conservation"]
    likely = ", ".join(f"{one['token']!r} {one['probability']:.1%}" for one in found["predictions"])
    note = found["model"]["note"]
    return [
        f"The {found['target']} of the next token {answer['token']!r} is {flow['value']:.5g} "
        f"(probability {answer['probability']:.2%}, rank {answer['rank']}; most likely: {likely})",
        *([f"Note: the model is {note}"] if note else []),
    ]


def _balance(found: dict[str, Any]) -> list[list[str]]:
    """Rows of the conservation table: what, relevance, share of the value."""
    flow = found["conservation"]
    took = {part: value for part, value in flow["taken"].items() if part not in _silent(found)}
    rows = {"explained": flow["value"], "reached the tokens": flow["inputs"]}
    rows |= {f"{part} took": value for part, value in took.items()}
    whole = flow["value"]
    return [[name, f"{value:+.4g}", f"{value / whole:.1%}" if whole else ""] for name, value in rows.items()]


def _silent(found: dict[str, Any]) -> list[str]:
    """The parts that took nothing, by rule or since the model has none."""
    flow = found["conservation"]
    broken = {one["part"] for one in flow["broken"]}
    return [
        part
        for part, value in flow["taken"].items()
        if value == 0.0 or (part in flow["must_be_zero"] and part not in broken)
    ]


def _verdict(found: dict[str, Any]) -> str:
    flow = found["conservation"]
    if flow["broken"]:
        where = ", ".join(f"{one['part']} (block {one['block']})" for one in flow["broken"])
        return (
            f"WRONG: relevance was taken where nothing may be under {found['rule']}: {where}. The declaration of "
            f"{found['architecture']!r} in sparc3.families does not fit this model."
        )
    silent = [part for part in flow["must_be_zero"] if part != "unaccounted"]
    rule = f"{', '.join(silent)} took nothing, as {found['rule']} asks; " if silent else ""
    return f"Conserved: {rule}nothing is unaccounted for."


def _top_tokens(found: dict[str, Any]) -> list[dict[str, Any]]:
    return sorted(found["tokens"], key=lambda row: -abs(row["relevance"]))[: found["top"]]


def _scale(found: dict[str, Any]) -> float:
    from sparc3.page import full_scale

    tokens = found["tokens"]
    return full_scale([one["relevance"] for one in tokens], [one["special"] for one in tokens])


def _components(found: dict[str, Any]) -> list[tuple[list[str], list[list[str]]]]:
    """(columns, rows) of the tables of the most relevant tokens, heads and neurons."""
    tokens = [
        [f"{one['token']!r}", str(one["index"]), f"{one['relevance']:+.4g}"] for one in _top_tokens(found)
    ]
    tables = [(["token", "at", "relevance"], tokens)]
    for kind in ("head", "neuron"):
        rows = [[str(one["block"]), str(one[kind]), f"{one['relevance']:+.4g}"] for one in found[f"{kind}s"]]
        if rows:
            tables.append((["block", kind, "relevance"], rows))
    return tables


def _show(found: dict[str, Any]) -> None:
    from sparc3.page import coloured_text

    tokens = found["tokens"]
    words, values = [one["token"] for one in tokens], [one["relevance"] for one in tokens]
    side_by_side = Table.grid(padding=(0, 3))
    side_by_side.add_row(*(_rich_table(*one) for one in _components(found)))
    balance = _rich_table(["where it went", "relevance", "share"], _balance(found))
    console.show(
        *_headline(found),
        "",
        coloured_text(words, values, _scale(found)),
        "",
        side_by_side,
        "",
        balance,
        _verdict(found),
    )


def _rich_table(columns: list[str], rows: list[list[str]]) -> Table:
    out = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for index, column in enumerate(columns):
        out.add_column(column, justify="right" if index else "left", overflow="fold")
    for row in rows:
        out.add_row(*row)
    return out


def _page(found: dict[str, Any]) -> str:
    from sparc3.page import coloured_html, heat_map, page, paragraph, table

    tokens, flow = found["tokens"], found["conservation"]
    words, values = [one["token"] for one in tokens], [one["relevance"] for one in tokens]
    parts = [part for part in flow["taken"] if part not in _silent(found)]
    blocks = [
        [str(row["block"]), *(f"{row['taken'][part]:+.4g}" for part in parts), f"{row['below']:+.4g}"]
        for row in flow["blocks"]
    ]
    legend = (
        f"Red speaks for it, blue against it; the colour is full at {_scale(found):.3g}. Point at a token for its "
        "number."
    )
    sections = [
        (
            "Tokens",
            [
                *map(paragraph, _headline(found)),
                coloured_html(words, values, _scale(found)),
                paragraph(legend, "note"),
            ],
        ),
        ("Most relevant", [table(*one) for one in _components(found)]),
        ("Attention heads by block", [heat_map(found["heads_by_block"], "head", "block")]),
        (
            "Where the relevance went",
            [
                table(["where it went", "relevance", "share"], _balance(found)),
                paragraph(_verdict(found)),
                table(["block", *(f"{part} took" for part in parts), "handed down"], blocks),
            ],
        ),
        (
            "How it was made",
            [
                table(
                    ["setting", "value"],
                    [
                        ["model", found["model"]["name"]],
                        *[[key, str(found[key])] for key in ("architecture", "dtype", "rule", "target")],
                        ["sparc3", sparc3.__version__],
                    ],
                )
            ],
        ),
    ]
    return page(f"What {found['answer']['token']!r} comes from", sections)
