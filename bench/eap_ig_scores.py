"""Scores of heads by EAP-IG's own code, for bench/eap_ig_peer.py: runs where TransformerLens 3 is installed.

    python bench/eap_ig_scores.py WORK     # reads WORK/model and WORK/prompts.json, writes WORK/scores.json

``eap`` is found on PYTHONPATH. Needs nothing of SparC3, which has other requirements than TransformerLens. Its scores
are allocated on "cuda" by name: where there is no such device they are sent to the CPU as they are made.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from eap import attribute_node
from eap.graph import Graph
from torch.overrides import TorchFunctionMode
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_llama_weights

# Largest difference of the logits in fp32 that is put down to the order of sums.
_SAME = 1e-2


class OnCpu(TorchFunctionMode):
    """Tensors that are asked for on "cuda" are made on the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device")) == "cuda":
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


def hooked(folder: Path) -> HookedTransformer:
    """A Llama checkpoint as TransformerLens' model, with the hooks that EAP-IG needs.

    Raises:
        ValueError: its logits differ from those of transformers.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    config = model.config
    heads, grouped = config.num_attention_heads, config.num_key_value_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    made = HookedTransformer(
        HookedTransformerConfig(
            n_layers=config.num_hidden_layers,
            d_model=config.hidden_size,
            d_head=width,
            n_heads=heads,
            n_key_value_heads=None if grouped == heads else grouped,
            d_mlp=config.intermediate_size,
            d_vocab=config.vocab_size,
            n_ctx=min(config.max_position_embeddings, 512),
            act_fn=config.hidden_act,
            gated_mlp=True,
            normalization_type="RMS",
            final_rms=True,
            eps=config.rms_norm_eps,
            positional_embedding_type="rotary",
            rotary_adjacent_pairs=False,
            rotary_dim=width,
            rotary_base=config.rope_parameters["rope_theta"],
            dtype=torch.float32,
            device="cpu",
            use_attn_result=True,
            use_split_qkv_input=True,
            use_hook_mlp_in=True,
            ungroup_grouped_query_attention=grouped != heads,
        ),
        move_to_device=False,
    )
    missing, unexpected = made.load_state_dict(convert_llama_weights(model, made.cfg), strict=False)
    # Masks and tables of rotations are made, not loaded.
    lost = [name for name in missing if name.rpartition(".")[2].startswith(("W_", "b_", "w"))]
    # Its backward starts from the embedding's gradient and needs no other weight's.
    for name, weight in made.named_parameters():
        weight.requires_grad_(name == "embed.W_E")
    ids = torch.arange(1, 25).unsqueeze(0)
    with torch.no_grad():
        difference = (made(ids) - model(ids).logits).abs().max().item()
    if lost or unexpected or difference > _SAME:
        raise ValueError(
            f"{folder} is not the same here: {lost}, {unexpected}, logits differ by {difference}"
        )
    return made


def head_scores(model: HookedTransformer, examples: list[dict[str, Any]], steps: int) -> dict[str, float]:
    """{aL.hH: mean change of the logit difference by patching it}, as EAP-IG estimates it."""
    graph = Graph.from_model(model, node_scores=True)
    tokens = {json.dumps(one[side]): one[side] for one in examples for side in ("clean", "corrupted")}

    def tokenized(
        _: HookedTransformer, texts: list[str]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
        """In place of its tokenize_plus, so that both sides score the same tokens."""
        ids = torch.tensor([tokens[text] for text in texts])
        return ids, torch.ones_like(ids), torch.tensor([ids.shape[1]] * len(ids)), ids.shape[1]

    attribute_node.tokenize_plus = tokenized

    def difference(logits: torch.Tensor, _clean: object, _lengths: object, answers: Any) -> torch.Tensor:
        right, wrong = (logits[0, -1, answers[side]].logsumexp(0) for side in ("right", "wrong"))
        return right - wrong

    batches = [
        ([json.dumps(one["clean"])], [json.dumps(one["corrupted"])], one["answers"]) for one in examples
    ]
    with OnCpu():
        found = attribute_node.get_scores_eap_ig(model, graph, batches, difference, steps=steps, quiet=True)
    names = [name for name in graph.nodes if name.startswith("a")]
    # It scores corrupted minus clean, we what is lost by patching.
    return {name: -found[graph.forward_index(graph.nodes[name], attn_slice=False)].item() for name in names}


def main() -> None:
    work = Path(sys.argv[1])
    asked = json.loads((work / "prompts.json").read_text())
    model = hooked(work / "model")
    scores = head_scores(model, asked["examples"], asked["steps"])
    versions = {name: version(name) for name in ("torch", "transformers", "transformer_lens")}
    (work / "scores.json").write_text(json.dumps({"scores": scores, "versions": versions}))


if __name__ == "__main__":
    main()
