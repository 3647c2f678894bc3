"""What a circuit is found by unless told otherwise: LRP's rule and reduction of each unit; and what fits together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparc3.ablation import ABLATIONS
from sparc3.errors import InputError
from sparc3.ranking import COMPONENT_METHODS, WEIGHT_METHODS, check_component_settings, check_task_target
from sparc3.rules import Rule
from sparc3.scores import check_settings
from sparc3.select import RANKINGS
from sparc3.units import UNITS

# Agrees best with exact ablation of MLPs and blocks (docs/circuits.md).
DEFAULT_RULE = "gradient,norm=constant"
# And of heads. To zero a head or a neuron changes what later norms divide by, which they must not take for constant.
_IDENTITY = "gradient,activation=identity"
# Better for neurons where a norm stands behind every block's attention and MLP (Gemma), and worse on other models.
_CONSTANTS = "gradient,norm=constant,activation=identity,attention=half"


# Between rules whose scores are averaged, as in "attnlrp + gradient".
AND = "+"


def default_rules(unit: str, ablation: str) -> tuple[str, ...]:
    """The rules of LRP that are compared on ranking examples where none is asked for: see docs/circuits.md."""
    first = default_settings(unit, ablation)["rule"]
    if unit == "weight":
        # The mean first: on average over development seeds it needs the least of both real models' weights.
        return first, DEFAULT_RULE, _IDENTITY
    if unit == "neuron" and ablation == "zero":
        return first, _CONSTANTS
    return (first,)


def default_settings(unit: str, ablation: str) -> dict[str, str]:
    """{"rule", "reduce"} of LRP: see docs/circuits.md; of ``default_rules`` the first."""
    if unit == "weight":
        return {"rule": f"{DEFAULT_RULE} {AND} {_IDENTITY}", "reduce": "square"}
    if unit == "neuron" and ablation == "zero":
        return {"rule": _IDENTITY, "reduce": "abs"}
    if unit in ("head", "kv-head") and ablation != "mean":
        return {"rule": _IDENTITY, "reduce": "signed"}
    return {"rule": DEFAULT_RULE, "reduce": "signed"}


def check_circuit_settings(
    unit: str,
    method: str,
    ablation: str = "zero",
    by: str = "magnitude",
    rule: str | Rule = DEFAULT_RULE,
    reduce: str = "signed",
    target: str = "difference",
) -> None:
    """InputError where ``Search`` would refuse these, whatever the model."""
    if unit not in ("weight", *UNITS):
        raise InputError(f"unit {unit!r} is not known; use weight | {' | '.join(UNITS)}")
    if by not in RANKINGS:
        raise InputError(f"ranking {by!r} is not known; use {' | '.join(RANKINGS)}")
    check_task_target(target)
    rules = parse_rules(rule)
    if unit != "weight":
        check_component_settings(unit, method, ablation, reduce)
        return
    if method not in WEIGHT_METHODS:
        kind = "scores components, not weights" if method in COMPONENT_METHODS else "is not known"
        raise InputError(f"method {method!r} {kind}; use {' | '.join(WEIGHT_METHODS)}")
    if ablation not in ABLATIONS[:1]:
        raise InputError(
            f"weights are ablated by zero alone, not by {ablation!r}: they are the same for any prompt"
        )
    for one in rules:
        check_settings("gradient" if method == "integrated-gradients" else method, rule=one, reduce=reduce)


def parse_rules(text: str | Rule) -> tuple[Rule, ...]:
    """One rule, or several with ``AND`` between them, whose scores are averaged."""
    return (text,) if isinstance(text, Rule) else tuple(map(Rule.parse, text.split(AND)))


def rule_name(rule: str | Rule) -> str:
    """Rules as they are reported."""
    return f" {AND} ".join(map(str, parse_rules(rule)))


def compared(settings: Mapping[str, Any]) -> str:
    """What the rules needed that ``Search.find`` compared, in words, the smallest first."""
    found = sorted(settings["compared"].items(), key=lambda pair: pair[1])
    return (
        ", ".join(f"{share:.2%} {rule}" for rule, share in found)
        or "not compared, these do not show the task"
    )
