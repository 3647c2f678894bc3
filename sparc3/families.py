"""What SparC3 has to know of an architecture: where its blocks, norms, MLPs, experts and weights are.

A family is a declaration, not code. To support another decoder-only architecture of transformers, declare it:

    sparc3.families.FAMILIES["my_model_type"] = Family(blocks="model.layers", norm="rms", ...)

and run tests/sparc3/test_families.py on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sparc3.errors import InputError


@dataclass(frozen=True)
class Family:
    """Names of a family's parts; paths below a block are relative to it.

    Attributes:
        blocks: path of the decoder blocks from the causal language model.
        norm: "rms" (weight), "rms+1" (1 + weight, Gemma) or "layer".
        attention: attention module of a block.
        attention_output: the linear that the heads' outputs enter.
        attention_norm, mlp_norm: norms between what these put out and the residual stream, if any.
        mlp: module whose forward is down(act(gate) * up), or None where the MLP is plain.
        gate, up: its linears; ``up`` is None where ``gate`` holds both, gate first (Phi-3).
        mlp_output: the linear that the hidden neurons enter.
        activation: the activation module.
        experts: module that holds fused 3-D experts (gate_up_proj, down_proj), if any.
    """

    blocks: str = "model.layers"
    norm: str = "rms"
    attention: str = "self_attn"
    attention_output: str = "self_attn.o_proj"
    attention_norm: str | None = None
    mlp_norm: str | None = None
    mlp: str | None = "mlp"
    gate: str = "gate_proj"
    up: str | None = "up_proj"
    mlp_output: str = "mlp.down_proj"
    activation: str = "mlp.act_fn"
    experts: str | None = None


_LLAMA = Family()
_GEMMA = Family(
    norm="rms+1", attention_norm="post_attention_layernorm", mlp_norm="post_feedforward_layernorm"
)
FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "phi3": Family(gate="gate_up_proj", up=None, activation="mlp.activation_fn"),
    "mixtral": Family(experts="mlp.experts"),
    "qwen3_moe": Family(experts="mlp.experts"),
    "opt": Family(
        blocks="model.decoder.layers",
        norm="layer",
        attention_output="self_attn.out_proj",
        mlp=None,
        mlp_output="fc2",
        activation="activation_fn",
    ),
    "gpt2": Family(
        blocks="transformer.h",
        norm="layer",
        attention="attn",
        attention_output="attn.c_proj",
        mlp=None,
        mlp_output="mlp.c_proj",
        activation="mlp.act",
    ),
    "gpt_neox": Family(
        blocks="gpt_neox.layers",
        norm="layer",
        attention="attention",
        attention_output="attention.dense",
        mlp=None,
        mlp_output="mlp.dense_4h_to_h",
        activation="mlp.act",
    ),
}

_ACTIVATIONS = {
    "ReLU": "relu",
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "QuickGELUActivation": "quick_gelu",
}


@dataclass(frozen=True)
class Prunable:
    """A weight that may be pruned.

    Attributes:
        name: its state-dict key.
        module, attribute: where the parameter is.
        transposed: stored as [in, out] (GPT-2's Conv1D).
    """

    name: str
    module: nn.Module
    attribute: str
    transposed: bool = False

    @property
    def weight(self) -> nn.Parameter:
        """The parameter as stored: [out, in], [in, out] where transposed, or [experts, out, in]."""
        return getattr(self.module, self.attribute)

    def canonical(self, tensor: torch.Tensor) -> torch.Tensor:
        """View of a tensor stored like the weight as [..., out, in]; its own inverse."""
        return tensor.transpose(-1, -2) if self.transposed else tensor


def family_of(model: PreTrainedModel) -> Family:
    """The declaration for a model; InputError for an architecture that has none."""
    return declared(model.config.model_type)


def declared(model_type: str) -> Family:
    """The declaration for transformers' name of an architecture; InputError where there is none."""
    if model_type not in FAMILIES:
        raise InputError(
            f"architecture {model_type!r} is not declared; known: {', '.join(sorted(FAMILIES))}. Declare its "
            f"blocks, norms and MLP with sparc3.families.FAMILIES[{model_type!r}] = sparc3.families.Family(...)"
        )
    return FAMILIES[model_type]


def find(module: nn.Module, path: str | None) -> nn.Module | None:
    """The submodule at a dotted path, or None where there is none."""
    found: Any = module if path else None
    for name in path.split(".") if path else ():
        found = getattr(found, name, None)
        if found is None:
            return None
    return found


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder blocks of a model."""
    blocks: Any = model.get_submodule(family_of(model).blocks)
    return blocks


def activation_name(module: nn.Module) -> str:
    """Key of sparc3_kernels.gated_mlp.RATIO for an activation module; InputError where it has none."""
    if isinstance(module, nn.GELU):
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    name = type(module).__name__
    if name not in _ACTIVATIONS:
        raise InputError(f"activation {name} has no LRP rule; known: {', '.join(sorted(_ACTIVATIONS))}")
    return _ACTIVATIONS[name]


def prunable(
    model: PreTrainedModel, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> dict[str, Prunable]:
    """The weights that may be pruned, by state-dict key, in model order.

    All linears of the decoder blocks and the fused experts, not the routers; the LM head where a pattern of
    ``include`` matches it. Embeddings and norms never.

    Args:
        include: shell patterns on the names; only what matches one of them is taken. Empty: everything.
        exclude: shell patterns on the names to leave out.

    Raises:
        InputError: unknown architecture, or nothing is left.
    """
    family = family_of(model)
    found: dict[str, Prunable] = {}
    for index, block in enumerate(blocks_of(model)):
        prefix = f"{family.blocks}.{index}"
        for path, module in block.named_modules():
            if isinstance(module, nn.Linear | Conv1D):
                name = f"{prefix}.{path}.weight"
                found[name] = Prunable(name, module, "weight", isinstance(module, Conv1D))
        experts = find(block, family.experts)
        for attribute in ("gate_up_proj", "down_proj"):
            if experts is not None and isinstance(getattr(experts, attribute, None), nn.Parameter):
                name = f"{prefix}.{family.experts}.{attribute}"
                found[name] = Prunable(name, experts, attribute)
    head = model.get_output_embeddings()
    if include and isinstance(head, nn.Linear):
        name = next(f"{path}.weight" for path, module in model.named_modules() if module is head)
        found[name] = Prunable(name, head, "weight")
    chosen = {
        name: weight
        for name, weight in found.items()
        if (not include or any(fnmatchcase(name, pattern) for pattern in include))
        and not any(fnmatchcase(name, pattern) for pattern in exclude)
    }
    if not chosen:
        example = next(iter(found), "none")
        raise InputError(
            f"no weight is left to prune with include={list(include)} and exclude={list(exclude)}; "
            f"patterns match names such as {example}"
        )
    return chosen
