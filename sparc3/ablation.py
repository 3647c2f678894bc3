"""What a model says with a part of it ablated: logit differences of circuits and of single components.

A component is ablated by overwriting its channels x (sparc3.units) with x':

======== ================================================================================
ablation x'
======== ================================================================================
zero     0
mean     the mean of x over all tokens of the prompts that components are ranked on
patch    x at the same token of the corrupted prompt (Wang et al. 2022, arXiv 2211.00593)
======== ================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from transformers import PreTrainedModel

from sparc3.engine import Blocks, model_inputs
from sparc3.mask import Mask
from sparc3.targets import Batch
from sparc3.tasks import counterpart, logit_difference
from sparc3.units import Components, ablated, recorded
from sparc3.wrap import frozen

ABLATIONS = ("zero", "mean", "patch")

# {site: x', of a shape that broadcasts to what enters it} for a batch; None: zeros.
Replacement = Callable[[Batch], Mapping[str, torch.Tensor] | None]
Progress = Callable[[int], None]


def replacement(
    model: PreTrainedModel, found: Components, ablation: str, ranking: Sequence[Batch]
) -> Replacement:
    """What components are overwritten with; ranking: the batches that "mean" is taken over."""
    if ablation == "mean":
        means = _means(model, found, ranking)
        return lambda batch: means
    if ablation == "patch":
        return lambda batch: activations(model, found, counterpart(batch))
    return lambda batch: None


def activations(model: PreTrainedModel, found: Components, batch: Batch) -> dict[str, torch.Tensor]:
    """What enters each site, of the shape that the model has there."""
    with torch.no_grad(), recorded(found) as seen:
        model.base_model(**model_inputs(batch), use_cache=False)
    return seen


def _means(model: PreTrainedModel, found: Components, batches: Sequence[Batch]) -> dict[str, torch.Tensor]:
    """[channels] of each site, in the model's dtype."""
    sums = {
        site.name: torch.zeros(len(site.component), dtype=torch.float64, device=site.component.device)
        for site in found.sites
    }
    tokens = 0
    with frozen(model):
        for batch in batches:
            real = batch["attention_mask"].reshape(-1, 1)
            tokens += int(real.sum())
            for name, x in activations(model, found, batch).items():
                sums[name] += (x.reshape(-1, x.shape[-1]).double() * real).sum(0)
    return {name: (total / tokens).to(model.dtype) for name, total in sums.items()}


@torch.no_grad()
def differences(model: PreTrainedModel, batches: Sequence[Batch]) -> torch.Tensor:
    """Logit differences [N] of the model as it is, on the CPU."""
    with frozen(model):
        rows = []
        for batch in batches:
            logits = model(**model_inputs(batch), use_cache=False, logits_to_keep=1).logits
            rows.append(logit_difference(logits, batch).cpu())
        return torch.cat(rows)


@torch.no_grad()
def ablated_differences(
    model: PreTrainedModel,
    found: Components,
    batches: Sequence[Batch],
    keeps: Sequence[torch.Tensor],
    replace: Replacement,
    progress: Progress | None = None,
) -> torch.Tensor:
    """Logit differences [len(keeps), N] with the components that are not kept [n] bool ablated.

    What lies below the first ablated block is run once for all of them.
    """
    blocks = Blocks(model)
    last = torch.tensor([-1], device=model.device)
    starts = [found.first_ablated(keep, len(blocks.blocks)) for keep in keeps]
    columns = []
    with frozen(model):
        for batch in batches:
            instead = replace(batch)
            hidden, calls = blocks.record(batch)
            streams = [hidden]
            for index in range(max(starts)):
                streams.append(blocks.run(index, streams[-1], calls[index]))
            column = []
            for keep, first in zip(keeps, starts, strict=True):
                hidden = streams[first]
                with ablated(found, keep, instead):
                    for index in range(first, len(calls)):
                        hidden = blocks.run(index, hidden, calls[index])
                column.append(logit_difference(blocks.logits(hidden, batch, last), batch).cpu())
                if progress is not None:
                    progress(1)
            columns.append(torch.stack(column))
    return torch.cat(columns, 1)


@torch.no_grad()
def masked_differences(
    model: PreTrainedModel, masks: Sequence[Mask], batches: Sequence[Batch]
) -> torch.Tensor:
    """Logit differences [len(masks), N] under each mask; the weights are back afterwards, bit for bit."""
    names = sorted({name for mask in masks for name in mask.shapes})
    # One copy for all masks: to gather and scatter what each of them prunes takes longer than the model does.
    dense = {name: model.get_parameter(name).detach().clone() for name in names}
    rows = []
    for mask in masks:
        try:
            mask.apply(model)
            rows.append(differences(model, batches))
        finally:
            for name, values in dense.items():
                model.get_parameter(name).copy_(values)
    return torch.stack(rows)
