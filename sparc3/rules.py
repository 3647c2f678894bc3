"""LRP rules for the parts of a transformer, as the numbers that the backward pass needs.

LRP is computed as input x gradient in a graph whose backward is modified part by part (AttnLRP, Achtibat et
al. 2024, arXiv 2402.05602; the rules that arXiv 2506.13727 uses):

========== ============ ==========================================================================
part       choice       backward
========== ============ ==========================================================================
norm       constant     the scale 1/rms or 1/std is a constant: R_x = R_y (centring stays linear)
           gradient     the plain derivative
qknorm     as norm      the norms of queries and keys inside the attention; follows ``norm``
activation identity     R_x = R_y, that is dx = dy f(x)/x in closed form (SiLU: sigmoid, GELU: Phi)
           gradient     the plain derivative
gate       half         each factor of act(gate) * up takes half; so do router weight x expert output
           gradient     the plain product rule (each factor takes all)
           up           all to up, none to act(gate) (CP-LRP)
attention  half         both bilinear products split evenly: q and k take 1/4 each, v takes 1/2
           gradient     the plain derivative
           value        all to v; the attention pattern is a constant (CP-LRP)
========== ============ ==========================================================================

The linear layers, residual sums and rotary embeddings need no rule: the gradient is the epsilon rule with
epsilon = 0. Softmax and logit soft-caps keep their plain derivative.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparc3.errors import InputError

_CHOICES: dict[str, tuple[str, ...]] = {
    "norm": ("constant", "gradient"),
    "qknorm": ("constant", "gradient"),
    "activation": ("identity", "gradient"),
    "gate": ("half", "gradient", "up"),
    "attention": ("half", "gradient", "value"),
}
_PRODUCT_SCALES = {"half": (0.5, 0.5), "gradient": (1.0, 1.0), "up": (0.0, 1.0)}
_ATTENTION_SCALES = {"half": (0.25, 0.25, 0.5), "gradient": (1.0, 1.0, 1.0), "value": (0.0, 0.0, 1.0)}


@dataclass(frozen=True)
class Rule:
    """One choice per part; see the table above. ``Rule()`` is AttnLRP."""

    norm: str = "constant"
    qknorm: str = "constant"
    activation: str = "identity"
    gate: str = "half"
    attention: str = "half"

    @classmethod
    def parse(cls, text: str | Rule) -> Rule:
        """``attnlrp``, ``cp``, ``gradient``, or choices such as ``norm=gradient,attention=half``.

        Parts that are not named are AttnLRP's; ``qknorm`` follows ``norm``. A preset may come first:
        ``gradient,attention=half``. Raises InputError on a name that does not exist.
        """
        if isinstance(text, Rule):
            return text
        first, *rest = (word.strip() for word in text.split(","))
        if first in PRESETS:
            parts = {name: getattr(PRESETS[first], name) for name in _CHOICES}
        else:
            parts, rest = {name: getattr(PRESETS["attnlrp"], name) for name in _CHOICES}, [first, *rest]
        given = {}
        for word in rest:
            name, _, choice = word.partition("=")
            if choice not in _CHOICES.get(name, ()):
                options = "; ".join(f"{part}={'|'.join(names)}" for part, names in _CHOICES.items())
                raise InputError(f"rule {word!r} is not known; use {' | '.join(PRESETS)} or {options}")
            given[name] = choice
        if "norm" in given and "qknorm" not in given:
            given["qknorm"] = given["norm"]
        return cls(**{**parts, **given})

    @property
    def norm_scale_gradient(self) -> float:
        """Share of the gradient that flows through a norm's scale: 0 (constant) or 1 (gradient)."""
        return float(self.norm == "gradient")

    @property
    def qknorm_scale_gradient(self) -> float:
        """The same for the norms of queries and keys."""
        return float(self.qknorm == "gradient")

    @property
    def activation_identity(self) -> bool:
        """Whether the activation passes relevance on unchanged, dx = dy f(x)/x."""
        return self.activation == "identity"

    @property
    def product_scales(self) -> tuple[float, float]:
        """Factors on the gradient of (act(gate), up), and of (router weight, expert output)."""
        return _PRODUCT_SCALES[self.gate]

    @property
    def attention_scales(self) -> tuple[float, float, float]:
        """Factors on the gradient of (q, k, v) where they enter the attention function."""
        return _ATTENTION_SCALES[self.attention]

    def zero_parts(self) -> list[str]:
        """The weights that get exactly zero relevance by construction; empty unless a CP choice is on."""
        parts = []
        if self.attention == "value":
            parts.append("query and key projections (attention=value)")
        if self.gate == "up":
            parts.append("gate projections (gate=up)")
        return parts

    def __str__(self) -> str:
        for name, preset in PRESETS.items():
            if self == preset:
                return name
        return ",".join(f"{name}={getattr(self, name)}" for name in _CHOICES)


PRESETS = {
    "attnlrp": Rule(),
    "cp": Rule(gate="up", attention="value"),
    "gradient": Rule("gradient", "gradient", "gradient", "gradient", "gradient"),
}
