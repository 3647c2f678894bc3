"""Relevance of heads, MLPs and neurons in the formats of other tools: TransformerLens' names and MIB's submissions.

components.safetensors holds one tensor for each of TransformerLens' hooks at which a component's output stands:

========================= ======== ===========================================
name                      shape    a score for each
========================= ======== ===========================================
blocks.L.attn.hook_z      [H]      query head
blocks.L.hook_mlp_out     [1]      MLP
blocks.L.mlp.hook_post    [I]      neuron, where neurons were ranked
========================= ======== ===========================================

mib.json is a graph as MIB's circuit track (arXiv 2504.13151) and EAP-IG's ``Graph.from_json`` read it, with scores of
nodes and none of edges: ``graph.apply_topn(n, level="node")`` ranks by them. The input has no score there, which
keeps it in every circuit.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from sparc3.units import Components

_HOOKS = {
    "head": "blocks.{}.attn.hook_z",
    "mlp": "blocks.{}.hook_mlp_out",
    "neuron": "blocks.{}.mlp.hook_post",
}


def hook_scores(found: Components, scores: torch.Tensor) -> dict[str, torch.Tensor]:
    """{TransformerLens hook: scores fp32} of heads, MLPs or neurons [n]; units with other names give nothing."""
    rows: dict[str, list[float]] = {}
    for name, score in zip(found.names, scores.tolist(), strict=True):
        block, _, part = name.partition(".")
        if (block[0] == "a" and part.startswith("kv")) or block[0] == "l":
            continue
        kind = "head" if block[0] == "a" else "neuron" if part else "mlp"
        rows.setdefault(_HOOKS[kind].format(block[1:]), []).append(score)
    return {name: torch.tensor(row) for name, row in rows.items()}


def write_hook_scores(path: Path, *parts: tuple[Components, torch.Tensor]) -> None:
    """Write components.safetensors, see the module."""
    tensors: dict[str, torch.Tensor] = {}
    for found, scores in parts:
        tensors |= hook_scores(found, scores)
    save_file(tensors, path, metadata={"format": "pt", "scores": "sparc3 circuit"})


def write_mib(
    path: Path, model: PreTrainedModel, found: Components, scores: torch.Tensor, ablated: Collection[str]
) -> None:
    """Write mib.json, see the module; found: unit node. ablated: names of nodes outside the circuit."""
    config: Any = model.config
    nodes: dict[str, Any] = {"input": {"in_graph": True}}
    for name, score in zip(found.names, scores.tolist(), strict=True):
        nodes[name] = {"in_graph": name not in ablated, "score": score}
    nodes["logits"] = {"in_graph": True}
    graph = {
        "cfg": {
            "n_layers": config.num_hidden_layers,
            "n_heads": config.num_attention_heads,
            "parallel_attn_mlp": bool(getattr(config, "use_parallel_residual", False)),
            "d_model": config.hidden_size,
        },
        "nodes": nodes,
        "edges": {},
    }
    path.write_text(json.dumps(graph, indent=1) + "\n")
