"""Components of a model: groups of channels that are kept or ablated together, from single neurons to whole layers.

Whatever a component is, it writes to the residual stream through the linear that ends its attention or its MLP. So
it is a set of channels that enter one of these linears, and to ablate it is to overwrite its channels there, at all
positions, with something else (sparc3.ablation).

======= ================================================ =====================
unit    a component is                                   name
======= ================================================ =====================
neuron  a hidden neuron of an MLP                        m3.n17
head    a query head                                     a3.h2
kv-head a key-value head with all of its query heads     a3.kv1
mlp     an MLP                                           m3
node    a head or an MLP                                 a3.h2, m3
layer   the attention and the MLP of a block             l3
======= ================================================ =====================
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from sparc3_kernels.select import pack_bits
from torch import nn
from transformers import PreTrainedModel

from sparc3.errors import InputError
from sparc3.families import Prunable, blocks_of, family_of, find, prunable
from sparc3.mask import Mask, fingerprint

UNITS = ("neuron", "head", "kv-head", "mlp", "node", "layer")


@dataclass(frozen=True)
class Site:
    """The linear that ends an attention or an MLP, and which component each of the channels that enter it is of.

    Attributes:
        name: the linear's path in the model.
        layer: index of its block.
        module: that linear.
        component: [channels] int64, indices into ``Components.names``, on the model's device.
        makers: the weights whose rows make these channels and nothing else (a neuron's gate and up); none for heads.
        norm: what stands between the linear and the residual stream, if anything.
    """

    name: str
    layer: int
    module: nn.Module
    component: torch.Tensor
    makers: tuple[Prunable, ...]
    norm: nn.Module | None


@dataclass(frozen=True)
class Components:
    """The components of one unit: their names, layer by layer, and where their channels are."""

    unit: str
    names: tuple[str, ...]
    sites: tuple[Site, ...]

    def gather(self, channels: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Sums [..., n] over each component's channels; channels: {site: [..., channels]}."""
        first = next(iter(channels.values()))
        total = first.new_zeros(*first.shape[:-1], len(self.names))
        for site in self.sites:
            total.index_add_(-1, site.component, channels[site.name])
        return total

    def sharing(self, other: Components, chosen: torch.Tensor) -> set[str]:
        """Names of components that have a channel of those of ``other`` that are chosen [n] bool."""
        channels = {site.name: chosen.to(site.component.device)[site.component] for site in other.sites}
        return {
            self.names[index]
            for site in self.sites
            if site.name in channels
            for index in site.component[channels[site.name]].unique().tolist()
        }

    def first_ablated(self, keep: torch.Tensor, default: int) -> int:
        """The first block with a component that is not kept [n] bool; ``default`` where all are."""
        layers = [site.layer for site in self.sites if not keep[site.component.cpu()].all()]
        return min(layers, default=default)

    def mask(self, model: PreTrainedModel, keep: torch.Tensor) -> Mask:
        """The weights of the components that are kept [n] bool: a mask whose zeros ablate the others.

        A component's weights are the columns by which it enters its site, and the rows that make its neurons. A
        bias stays, as under ``ablated``.
        """
        weights = prunable(model)
        kept = {
            name: torch.ones_like(weight.weight, dtype=torch.bool)
            for name, weight in weights.items()
            if any(self._holds(site, weight) for site in self.sites)
        }
        for site in self.sites:
            channels = keep.to(site.component.device)[site.component]
            weight = weights[f"{site.name}.weight"]
            weight.canonical(kept[weight.name]).mul_(channels)
            for maker in site.makers:
                rows = maker.canonical(kept[maker.name])
                # A linear that holds gate and up both has every neuron's row twice.
                rows.mul_(channels.repeat(len(rows) // len(channels))[:, None])
        return Mask(
            {name: pack_bits(bits) for name, bits in kept.items()},
            {name: tuple(bits.shape) for name, bits in kept.items()},
            fingerprint(model, {name: weights[name].weight for name in kept}),
            {"unit": self.unit},
        )

    @staticmethod
    def _holds(site: Site, weight: Prunable) -> bool:
        return weight.module is site.module or any(maker.name == weight.name for maker in site.makers)


def components(model: PreTrainedModel, unit: str) -> Components:
    """The components of a unit, in the order of the model.

    Raises:
        InputError: no such unit, an unknown architecture, or fused experts where the unit has MLPs.
    """
    if unit not in UNITS:
        raise InputError(f"unit {unit!r} is not known; use weight | {' | '.join(UNITS)}")
    family, weights = family_of(model), prunable(model)
    heads = model.config.num_attention_heads
    groups = getattr(model.config, "num_key_value_heads", None) or heads
    numbers: dict[str, int] = {}
    sites: list[Site] = []

    def add(
        layer: int, name: str, labels: Sequence[str], norm: nn.Module | None, makers: Sequence[Prunable] = ()
    ) -> None:
        """Split the channels of a site evenly into components of these names; one that is known takes more."""
        weight = weights[f"{name}.weight"]
        own = torch.tensor([numbers.setdefault(label, len(numbers)) for label in labels])
        component = own.repeat_interleave(_inputs(weight) // len(labels)).to(weight.weight.device)
        sites.append(Site(name, layer, weight.module, component, tuple(makers), norm))

    for layer, block in enumerate(blocks_of(model)):
        prefix = f"{family.blocks}.{layer}"
        of_attention = {
            "head": [f"a{layer}.h{head}" for head in range(heads)],
            "node": [f"a{layer}.h{head}" for head in range(heads)],
            "kv-head": [f"a{layer}.kv{head}" for head in range(groups)],
            "layer": [f"l{layer}"],
        }
        if unit in of_attention:
            norm = find(block, family.attention_norm)
            add(layer, f"{prefix}.{family.attention_output}", of_attention[unit], norm)
        if unit in ("head", "kv-head"):
            continue
        if find(block, family.mlp_output) is None:
            raise InputError(
                f"unit {unit} needs MLPs, and block {layer} has fused experts; use weight, head or kv-head"
            )
        name = f"{prefix}.{family.mlp_output}"
        labels = [f"l{layer}" if unit == "layer" else f"m{layer}"]
        if unit == "neuron":
            labels = [f"m{layer}.n{neuron}" for neuron in range(_inputs(weights[f"{name}.weight"]))]
        inner = (f"{name}.weight", f"{prefix}.{family.attention}.")
        makers = [
            weight
            for key, weight in weights.items()
            if key.startswith(f"{prefix}.") and not key.startswith(inner)
        ]
        add(layer, name, labels, find(block, family.mlp_norm), makers)
    return Components(unit, tuple(numbers), tuple(sites))


def _inputs(weight: Prunable) -> int:
    return weight.canonical(weight.weight).shape[1]


@contextmanager
def at_sites(found: Components, visit: Callable[[Site, torch.Tensor], torch.Tensor | None]) -> Iterator[None]:
    """Within the context ``visit`` sees what enters each site, [..., channels], and may return something else."""

    def hook(site: Site, module: nn.Module, args: tuple[Any, ...]) -> Any:
        changed = visit(site, args[0])
        return None if changed is None else (changed, *args[1:])

    handles = [site.module.register_forward_pre_hook(partial(hook, site)) for site in found.sites]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def at_outputs(
    modules: Mapping[str, nn.Module], visit: Callable[[str, torch.Tensor], None]
) -> Iterator[None]:
    """Within the context ``visit`` sees what leaves each of these modules, by its name."""

    def hook(name: str, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        visit(name, output)

    handles = [module.register_forward_hook(partial(hook, name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def ablated(
    found: Components, keep: torch.Tensor, instead: Mapping[str, torch.Tensor] | None = None
) -> Iterator[None]:
    """Within the context the components that are not kept are overwritten.

    Args:
        keep: [n] bool.
        instead: {site: what to put there, of the shape that enters it}; None: zeros.
    """
    kept = {site.name: keep.to(site.component.device)[site.component] for site in found.sites}

    def visit(site: Site, x: torch.Tensor) -> torch.Tensor:
        other = x.new_zeros(()) if instead is None else instead[site.name]
        return torch.where(kept[site.name], x, other)

    with at_sites(found, visit):
        yield


@contextmanager
def recorded(found: Components) -> Iterator[dict[str, torch.Tensor]]:
    """Yields a dict that holds what entered each site in the forward run within the context."""
    seen: dict[str, torch.Tensor] = {}

    def visit(site: Site, x: torch.Tensor) -> None:
        seen[site.name] = x.detach()

    with at_sites(found, visit):
        yield seen
