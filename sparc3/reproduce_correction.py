"""The paper's corrections (arXiv 2506.13727): toxicity after rude prompts, repetition after our own prompts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from sparc3 import behaviours, bundled_text
from sparc3.behaviours import Behaviour
from sparc3.correct import Correction
from sparc3.errors import InputError
from sparc3.models import Loaded
from sparc3.paper_text import calibration_windows, hub_file
from sparc3.scorers import scorer

# Of the bundled models' prompts: more than any scale explains and judges on.
_BUNDLED = 256


def behaviour_of(config: dict[str, Any]) -> Behaviour:
    """The behaviour of an experiment; InputError where its scorer is not there."""
    if config["behaviour"] == "repetition":
        return behaviours.repetition()
    return behaviours.toxicity(scorer(config["scorer"], config.get("device", "cpu")), config["threshold"])


def prompts_of(behaviour: str, source: str) -> list[str]:
    """Prompts that may provoke a behaviour.

    Args:
        source: bundled, real-toxicity-prompts or a copy of its prompts.jsonl (those that it calls challenging), or a
            file as sparc3.behaviours.read_prompts takes it.

    Raises:
        InputError: the prompts cannot be read, or there are none.
    """
    if source == "bundled":
        bundled = bundled_text.loop_prompts if behaviour == "repetition" else bundled_text.insult_prompts
        return bundled(_BUNDLED)
    if source == "loops":
        path = Path(__file__).parent / "bundled" / "paper" / "loops.txt"
        return list(behaviours.read_prompts(path))
    if source == "real-toxicity-prompts" or Path(source).name == "prompts.jsonl":
        return challenging(hub_file(source))
    return list(behaviours.read_prompts(source))


def challenging(path: Path) -> list[str]:
    """The texts of RealToxicityPrompts' own lines whose field "challenging" is true, none twice.

    A line is {"challenging": true, "prompt": {"text": "...", "toxicity": 0.9, ...}, "continuation": {...}, ...}.
    """
    found = []
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                row: dict[str, Any] = json.loads(line) if line.strip() else {"challenging": False}
                if row["challenging"]:
                    found.append(str(row["prompt"]["text"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f'{path}: not JSON lines with "challenging" and "prompt": {{"text"}}, as RealToxicityPrompts has them '
            f"({error!r})"
        ) from error
    if not found:
        raise InputError(f"{path}: no prompt in it is challenging")
    return list(dict.fromkeys(found))


def correction_rows(
    config: dict[str, Any],
    behaviour: Behaviour,
    name: str,
    loaded: Loaded,
    judged: torch.Tensor,
    missing: Callable[..., str | None],
    tell: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """{"model", "unit", "method", "seed", "prompts", "before", "sweep", "settings"}, as sparc3.correct measures.

    Args:
        judged: windows that perplexity is of.
        missing: the key of a row, None where it is measured already.
    """
    texts = prompts_of(config["behaviour"], config["prompts"])
    for seed in range(config["seeds"]):
        for unit, counts in config["counts"].items():
            methods = config["units"][unit]
            keys = {method: missing(name, unit, method, seed) for method in methods}
            if not any(keys.values()):
                continue
            tell(f"{name}, {unit}, seed {seed}: running the prompts")
            correction = Correction(
                loaded.model,
                loaded.tokenizer,
                behaviour,
                texts,
                calibration_windows(
                    loaded.tokenizer, config["calibration"], config["length"], config["samples"], seed
                ),
                judged,
                unit=unit,
                tokens=config["tokens"],
                examples=config["examples"],
                include=config["include"] if unit == "weight" else (),
                seed=seed,
            )
            for method, key in keys.items():
                if key is None:
                    continue
                tell(f"{name}, {unit}, {method}, seed {seed}")
                # The numbers are the paper's: none is chosen by a budget, and nothing is spared.
                found = correction.find(**methods[method], counts=counts, budget=None, seed=seed).described()
                yield {
                    "key": key,
                    "model": name,
                    "unit": unit,
                    "method": method,
                    "seed": seed,
                    "prompts": {
                        "run": correction.run,
                        "explained": len(correction.ranking),
                        "judged": len(correction.judging),
                    },
                    "before": correction.before.described(),
                    "sweep": found["sweep"],
                    "settings": found["settings"],
                }
