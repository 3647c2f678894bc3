"""The paper's experiments (arXiv 2506.13727), one configuration each in sparc3/bundled/paper.

An experiment is a generator of rows, plain JSON values with a key; a row that an earlier run has measured is not
measured again. ``Run`` keeps report.json as rows come in, and writes a Markdown table that holds the paper's figure
beside ours, and a plot.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import yaml

from sparc3.compress import Pruner, evaluate_pruned
from sparc3.errors import InputError
from sparc3.evaluate import check_fits, perplexity
from sparc3.export import write_text
from sparc3.models import Loaded, check_there, load
from sparc3.paper_text import calibration_windows, judging_windows
from sparc3.report import as_json, versions
from sparc3.reproduce_correction import behaviour_of, correction_rows
from sparc3.reproduce_report import markdown, plot
from sparc3.scores import attribute
from sparc3.zero_shot import accuracies, check_installed

EXPERIMENTS = ("table1", "samples", "concentration", "ioi", "toxicity", "repetition")
SCALES = ("paper", "reduced", "smoke")
HELD = (0.5, 0.9, 0.99)
# Settings that say how many rows there are, and those that are words beside them: no row depends on either.
_EXTENT, _WORDS = ("models", "seeds", "counts"), ("title", "source", "open", "paper")

Tell = Callable[[str], None]
Rows = Iterator[dict[str, Any]]


@dataclass
class Run:
    """One experiment at one scale, and what is measured of it.

    Attributes:
        config: the scale's settings over those of the experiment.
        rows: by key.
        told: the settings of all rows, of which earlier runs may have measured more models, seeds and counts.
    """

    experiment: str
    scale: str
    config: dict[str, Any]
    folder: Path
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    told: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, experiment: str, scale: str, folder: str | Path, **changes: Any) -> Run:
        """Begin in a folder, or go on with what an earlier run has left there, which may be of fewer models, seeds or
        counts, or of more.

        Args:
            changes: settings of the scale to replace, None for none.

        Raises:
            InputError: no such experiment, scale, setting or model, or the folder holds something else.
        """
        config = configuration(experiment, scale, **changes)
        run = cls(experiment, scale, config, Path(folder), told=config)
        report = run.folder / "report.json"
        if report.exists():
            earlier, settings, run.rows = _earlier(report)
            if earlier != experiment or _decisive(settings) != _decisive(config):
                raise InputError(
                    f"{folder} holds another experiment or other settings; give another --out, or remove it"
                )
            run.told = _joined(config, settings)
        elif run.folder.exists() and not run.folder.is_dir():
            raise InputError(f"{folder} is a file; give a folder as --out")
        elif run.folder.exists() and any(run.folder.iterdir()):
            raise InputError(f"{folder} exists and holds no report of this experiment; give another --out")
        if not run.folder.parent.is_dir():
            raise InputError(f"the folder {run.folder.parent} does not exist; make it first")
        if config.get("tasks"):
            check_installed()
        # The last of them is loaded when the others are measured, which may be hours later.
        for name in config["models"]:
            check_there(name)
        return run

    def finish(self, tell: Tell = lambda words: None) -> None:
        """Measure what is missing."""
        steps = {
            "table1": table1,
            "samples": samples,
            "concentration": concentration,
            "ioi": ioi,
            "toxicity": correction,
            "repetition": correction,
        }
        for row in steps[self.experiment](self, tell):
            self.rows[row["key"]] = row
            self.write()
        try:
            plot(self.experiment, self.told, self.results, self.folder / "plot.png")
        except OSError as error:
            raise InputError(f"cannot write {self.folder / 'plot.png'}: {error}") from error

    def missing(self, *key: Any) -> str | None:
        """The key of a row, or None where it is there already."""
        name = " | ".join(map(str, key))
        return None if name in self.rows else name

    def write(self) -> None:
        """report.json and table.md, each whole or not at all."""
        report = {
            "experiment": self.experiment,
            "scale": self.scale,
            "settings": self.told,
            "results": list(self.rows.values()),
            **versions(),
        }
        self.folder.mkdir(exist_ok=True)
        write_text(self.folder / "report.json", as_json(report) + "\n")
        write_text(self.folder / "table.md", markdown(self.experiment, self.told, self.results))

    @property
    def results(self) -> list[dict[str, Any]]:
        return list(self.rows.values())


def _earlier(report: Path) -> tuple[str, dict[str, Any], dict[str, dict[str, Any]]]:
    """(experiment, settings, rows by key) of a report.json; InputError where it is not one."""
    try:
        found = json.loads(report.read_text(encoding="utf-8"))
        settings = found["settings"]
        for name in ("models", "seeds"):
            if name not in settings:
                raise KeyError(name)
        return found["experiment"], settings, {row["key"]: row for row in found["results"]}
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{report} is not a report of sparc3 reproduce, or it is damaged ({error}); give another --out, or "
            "remove it"
        ) from error


def _decisive(config: dict[str, Any]) -> dict[str, Any]:
    """What has to be equal for rows to stand beside each other, as report.json holds it."""
    # The numbers removed in a correction are points within its rows.
    rows = {name for name in _EXTENT if not isinstance(config.get(name), dict)}
    settled = {name: value for name, value in config.items() if name not in (*rows, *_WORDS)}
    return json.loads(json.dumps(settled))


def _joined(config: dict[str, Any], earlier: dict[str, Any]) -> dict[str, Any]:
    """Settings with the models, seeds and counts of an earlier run of the same experiment too."""
    both = {"models": [*dict.fromkeys([*earlier["models"], *config["models"]])]}
    both["seeds"] = max(config["seeds"], earlier["seeds"])
    if isinstance(config.get("counts"), list):
        both["counts"] = sorted({*config["counts"], *earlier["counts"]})
    return config | both


def configuration(experiment: str, scale: str, **changes: Any) -> dict[str, Any]:
    """The settings of an experiment; InputError for a name or a change that it does not have."""
    if experiment not in EXPERIMENTS:
        raise InputError(f"experiment {experiment!r} is not known; use {' | '.join(EXPERIMENTS)}")
    if scale not in SCALES:
        raise InputError(f"scale {scale!r} is not known; use {' | '.join(SCALES)}")
    path = resources.files("sparc3") / "bundled" / "paper" / f"{experiment}.yaml"
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    scales = config.pop("scales")
    if scale not in scales:
        raise InputError(f"{experiment} has no scale {scale}; use {' | '.join(scales)}")
    config |= scales[scale]
    for name, value in changes.items():
        if value is None:
            continue
        if name not in config and name not in ("windows", "device"):
            raise InputError(f"{experiment} has no setting {name}")
        config[name] = value
    return config


def _models(run: Run, tell: Tell) -> Iterator[tuple[str, Loaded]]:
    for name in run.config["models"]:
        tell(f"loading {name}")
        yield name, load(name, dtype=run.config["dtype"], device=run.config.get("device", "cpu"))


def _judged(run: Run, loaded: Loaded) -> torch.Tensor:
    config = run.config
    found = judging_windows(loaded.tokenizer, config["judged"], config["length"], config.get("windows"))
    check_fits(loaded.model, found)
    return found


def _pruner(run: Run, loaded: Loaded, count: int, seed: int, settings: dict[str, Any]) -> Pruner:
    config = run.config
    drawn = calibration_windows(loaded.tokenizer, config["calibration"], config["length"], count, seed)
    check_fits(loaded.model, drawn)
    return Pruner(loaded.model, drawn, config["pattern"], **settings)


def table1(run: Run, tell: Tell) -> Rows:
    """{"model", "method", "seed", "perplexity", "accuracy": {task: share}} for every model, seed and method."""
    config = run.config
    for name, loaded in _models(run, tell):
        judged = _judged(run, loaded)
        for seed in range(config["seeds"]):
            for method, settings in {"dense": {}, **config["methods"]}.items():
                # What knows no calibration text is the same for every seed.
                alike = method in ("dense", "magnitude")
                key = run.missing(name, method, seed)
                if key is None or (alike and seed > 0):
                    continue
                tell(f"{name}, {method}, seed {seed}")
                row = {"key": key, "model": name, "method": method, "seed": seed}
                if method == "dense":
                    yield row | _measured(loaded, judged, config["tasks"])
                    continue
                settings = dict(settings)
                pruner = _pruner(run, loaded, config["samples"], seed, _rest(settings))
                mask = pruner.mask(settings["method"], config["sparsity"])
                mask.apply(loaded.model, keep=True)
                try:
                    yield row | _measured(loaded, judged, config["tasks"]) | {"settings": mask.settings}
                finally:
                    mask.undo(loaded.model)


def _rest(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != "method"}


def _measured(loaded: Loaded, judged: torch.Tensor, tasks: list[str]) -> dict[str, Any]:
    accuracy = accuracies(loaded.model, loaded.tokenizer, tasks) if tasks else {}
    return {"perplexity": perplexity(loaded.model, judged).value, "accuracy": accuracy}


def samples(run: Run, tell: Tell) -> Rows:
    """{"model", "method", "seed", "count", "perplexity"}."""
    config = run.config
    for name, loaded in _models(run, tell):
        judged = _judged(run, loaded)
        for count in config["counts"]:
            for seed in range(config["seeds"]):
                for method, settings in config["methods"].items():
                    key = run.missing(name, method, count, seed)
                    if key is None:
                        continue
                    tell(f"{name}, {method}, {count} samples, seed {seed}")
                    pruner = _pruner(run, loaded, count, seed, _rest(settings))
                    mask = pruner.mask(settings["method"], config["sparsity"])
                    found = evaluate_pruned(loaded.model, mask, judged).value
                    row = {"key": key, "model": name, "method": method, "seed": seed, "count": count}
                    yield row | {"perplexity": found}


def concentration(run: Run, tell: Tell) -> Rows:
    """{"model", "method", "seed", "kinds": {kind: {share of the sum: share of the weights}}}."""
    config = run.config
    for name, loaded in _models(run, tell):
        for seed in range(config["seeds"]):
            for method, settings in config["methods"].items():
                key = run.missing(name, method, seed)
                if key is None:
                    continue
                tell(f"{name}, {method}, seed {seed}")
                drawn = calibration_windows(
                    loaded.tokenizer, config["calibration"], config["length"], config["samples"], seed
                )
                scores = attribute(loaded.model, drawn, settings["method"], **_rest(settings))
                yield {
                    "key": key,
                    "model": name,
                    "method": method,
                    "seed": seed,
                    "kinds": carried(scores.tensors),
                }


def carried(scores: dict[str, torch.Tensor]) -> dict[str, dict[str, float]]:
    """For each kind of weight (the last part of its path) the share of weights that holds ``HELD`` of the sum."""
    kinds: dict[str, list[torch.Tensor]] = {}
    for name, tensor in scores.items():
        kinds.setdefault(name.removesuffix(".weight").rpartition(".")[2], []).append(tensor.flatten())
    found = {}
    for kind, parts in kinds.items():
        values = torch.cat(parts)
        # A weight that is zero scores -inf and carries nothing.
        sums = values.abs().masked_fill(values.isneginf(), 0).double().sort(descending=True).values.cumsum(0)
        needed = torch.searchsorted(sums, sums[-1] * torch.tensor(HELD, dtype=torch.float64)) + 1
        found[kind] = {
            f"{share:g}": count / len(sums) for share, count in zip(HELD, needed.tolist(), strict=True)
        }
    return found


def ioi(run: Run, tell: Tell) -> Rows:
    """{"model", "unit", "method", "seed", "curve", "sparsest", "cpr"} as sparc3.circuit measures them."""
    from sparc3.circuit import Search
    from sparc3.models import BUNDLED
    from sparc3.tasks import load_task

    config = run.config
    for name, loaded in _models(run, tell):
        for seed in range(config["seeds"]):
            task = load_task(config["task"], loaded.tokenizer, config["samples"], seed, name in BUNDLED)
            for unit, methods in config["units"].items():
                keys = {method: run.missing(name, unit, method, seed) for method in methods}
                if not any(keys.values()):
                    continue
                tell(f"{name}, {unit}, seed {seed}")
                search = Search(loaded.model, loaded.tokenizer, task, unit)
                for method, key in keys.items():
                    if key is None:
                        continue
                    found = search.find(method, seed=seed).described()
                    row = {"key": key, "model": name, "unit": unit, "method": method, "seed": seed}
                    yield row | {
                        part: found[part] for part in ("curve", "sparsest", "cpr", "cmd", "settings")
                    }


def correction(run: Run, tell: Tell) -> Rows:
    """{"model", "unit", "method", "seed", "prompts", "before", "sweep", "settings"}, see reproduce_correction."""
    # Before any model: a scorer that is not there ends the run.
    behaviour = behaviour_of(run.config)
    for name, loaded in _models(run, tell):
        judged = _judged(run, loaded)
        yield from correction_rows(run.config, behaviour, name, loaded, judged, run.missing, tell)
