"""What the attribution benchmarks time: ours and the ways people do it today, on the same model and tokens.

Every implementation is a function of (model, input_ids [B, T]) that runs one attribution of all prunable weights
and returns nothing. The explained scalar is the summed log-probability of the next tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from real_models import gemma3, smollm2
from torch.nn import functional as F
from transformers import PreTrainedModel

from sparc3.families import prunable
from sparc3.models import Loaded, load
from sparc3.rules import Rule
from sparc3.scores import Accumulators, accumulate

Run = Callable[[], None]
_LOGITS_IN_FLIGHT = 1 << 24


def load_benchmark_model(name: str, dtype: str = "float32") -> Loaded:
    """smollm2, gemma3 (fetched and converted once), or anything that sparc3.models.load takes; dtype as there."""
    fetch = {"smollm2": smollm2, "gemma3": gemma3}.get(name)
    return load(fetch() if fetch else name, dtype=dtype)


def learn_prunable(model: PreTrainedModel) -> list[torch.nn.Parameter]:
    """Weight gradients for exactly the weights that we score."""
    chosen = {id(weight.weight) for weight in prunable(model).values()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
        parameter.grad = None
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def ours(model: PreTrainedModel, ids: torch.Tensor, reduce: str = "abs", memory: int | None = None) -> Run:
    """LRP of all weights through the engine, absolute value per sample."""
    for parameter in model.parameters():
        parameter.grad = None
    weights = prunable(model)
    sink = Accumulators(weights, reduce)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    rule = Rule.parse("attnlrp")
    return lambda: accumulate(model, [batch], rule, "logprob", "all", weights, sink, memory)


def plain_backward(model: PreTrainedModel, ids: torch.Tensor) -> Run:
    """Forward and backward with weight gradients, logits of the whole sequence at once."""
    parameters = learn_prunable(model)

    def run() -> None:
        for parameter in parameters:
            parameter.grad = None
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()

    return run


def plain_backward_chunked(model: PreTrainedModel, ids: torch.Tensor) -> Run:
    """The same with logits in chunks of positions, as a careful user would write it to save memory."""
    parameters = learn_prunable(model)
    base, head = model.base_model, model.get_output_embeddings()
    chunk = max(1, _LOGITS_IN_FLIGHT // (len(ids) * model.config.vocab_size))

    def run() -> None:
        for parameter in parameters:
            parameter.grad = None
        hidden = base(input_ids=ids, use_cache=False).last_hidden_state
        leaf = hidden.detach().requires_grad_()
        positions = torch.arange(ids.shape[1] - 1)
        for some in positions.split(chunk):
            logits = head(leaf[:, some]).float()
            F.cross_entropy(logits.flatten(0, 1), ids[:, some + 1].flatten(), reduction="sum").backward()
        hidden.backward(leaf.grad)

    return run


def accumulate_by_hand(model: PreTrainedModel, ids: torch.Tensor) -> Run:
    """What published reproductions do: backward, then ``acc += (w * w.grad).abs()``, one sample after another."""
    parameters = learn_prunable(model)
    totals = [torch.zeros_like(parameter) for parameter in parameters]

    def run() -> None:
        for sample in ids:
            for parameter in parameters:
                parameter.grad = None
            logits = model(input_ids=sample[None], use_cache=False).logits[:, :-1].float()
            F.cross_entropy(logits.flatten(0, 1), sample[1:], reduction="sum").backward()
            with torch.no_grad():
                for total, parameter in zip(totals, parameters, strict=True):
                    total += (parameter * parameter.grad).abs()

    return run


# The engine keeps what each block computed where it fits into ``memory``, else recomputes it.
IMPLEMENTATIONS: dict[str, Callable[[PreTrainedModel, torch.Tensor], Run]] = {
    "sparc3": ours,
    "sparc3-512MiB": partial(ours, memory=1 << 29),
    "sparc3-recompute": partial(ours, memory=0),
    "plain-backward": plain_backward,
    "plain-backward-chunked-logits": plain_backward_chunked,
    "backward+accumulate": accumulate_by_hand,
}
