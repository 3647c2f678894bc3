"""sparc3 correct: remove the few weights, neurons or heads behind an undesired behaviour."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

import sparc3
from sparc3 import console
from sparc3.console import AsJson, Device, Dtype, Force, Length, Model
from sparc3.errors import InputError

if TYPE_CHECKING:
    from sparc3.behaviours import Behaviour
    from sparc3.correct import Correction, Found
    from sparc3.mask import Mask
    from sparc3.models import Loaded
    from sparc3.sweep import Measured


def correct(
    out: Annotated[
        Path,
        typer.Option(help="Folder for the corrected model, its mask, report.json and page; must not exist."),
    ],
    model: Model = "tiny-llama",
    behaviour: Annotated[
        str,
        typer.Option(
            help="repetition (at most half of the tokens are different) | insults (of the bundled models) | toxicity "
            "(see --scorer) | answers (texts that --undesired names)."
        ),
    ] = "insults",
    undesired: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Prompts that provoke it: a text file, one a line, or .jsonl with the fields prompt and, for "
            "answers, undesired (a text or a list). Bundled models have their own for insults and repetition.",
        ),
    ] = None,
    general: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SOURCE",
            help="Text that is to stay as it is: a .txt or .jsonl file, bundled, c4, wikitext2 or hf:NAME. "
            "Repeatable.",
        ),
    ] = None,
    eval_text: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SOURCE", help="Held-out text to measure perplexity on; without it, a half of --general."
        ),
    ] = None,
    unit: Annotated[str, typer.Option(help="What is removed: weight | neuron | head.")] = "neuron",
    method: Annotated[
        str, typer.Option(help="lrp | gradient | random, and for neurons and heads activation.")
    ] = "lrp",
    contrast: Annotated[
        str,
        typer.Option(
            help="difference (general minus undesired relevance, lowest first) | set-difference | absolute (what "
            "general text needs at single tokens counts)."
        ),
    ] = "difference",
    compare: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,C",
            help="Methods to measure beside --method, as gradient,random or lrp:set-difference.",
        ),
    ] = None,
    count: Annotated[
        int | None, typer.Option(min=1, help="Remove so many. Without --count or --fraction N is chosen.")
    ] = None,
    fraction: Annotated[float | None, typer.Option(help="Remove this share.")] = None,
    budget: Annotated[
        float, typer.Option(min=0, help="Where N is chosen: perplexity may be worse by this share.")
    ] = 0.01,
    spare: Annotated[
        bool,
        typer.Option(
            help="Leave out what costs perplexity more than its share of --budget, measured on a few windows."
        ),
    ] = True,
    points: Annotated[
        int,
        typer.Option(
            min=1,
            help="How many N to measure, each half the next; the plot has them all. Where N is chosen, up to three "
            "more, each twice the last, while --budget holds and the behaviour is shown, and three where it ends.",
        ),
    ] = 6,
    rule: Annotated[
        str | None,
        typer.Option(
            help="LRP rule, as in prune. Default: attnlrp, for weights and --contrast absolute "
            "gradient,activation=identity."
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="What lrp and gradient explain of the undesired tokens: logit | logit-mean | logprob | lead (over "
            "the best other token). Default: logit, lead for --contrast absolute."
        ),
    ] = None,
    scorer: Annotated[
        str | None,
        typer.Option(
            help="For toxicity: MODULE:FUNCTION (texts to numbers in [0, 1], as profanity_check:predict_prob), a "
            "classifier's folder or hub id (default unitary/toxic-bert), or perspective (a service; key in "
            "PERSPECTIVE_API_KEY)."
        ),
    ] = None,
    compression: Annotated[
        Path | None,
        typer.Option(
            metavar="MASK", help="A mask of prune for the same model: measured with the correction too."
        ),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a continuation; 50, for insults 12.")
    ] = None,
    examples: Annotated[
        int, typer.Option(min=1, help="Continuations to explain, and other ones to judge on, at most.")
    ] = 64,
    samples: Annotated[
        int, typer.Option(min=2, help="Windows of --general, and of --eval-text, at most.")
    ] = 128,
    length: Length = None,
    include: Annotated[
        list[str] | None,
        typer.Option(help="Unit weight: only tensors whose name matches, as '*mlp*'. Repeatable."),
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Leave these tensors whole. Repeatable.")] = None,
    seed: Annotated[
        int, typer.Option(help="Which prompts and windows, and the order of --method random.")
    ] = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Remove the few weights, neurons or heads behind an undesired behaviour, and measure what else changes.

    The prompts are run; of those that show the behaviour one half explains it and the other judges. The model that is
    saved is corrected by --method, whatever else is compared; sparc3 mask undo puts the weights back.
    """
    from sparc3.contrast import check_contrast
    from sparc3.correct import Correction
    from sparc3.correction_report import correction_report, draw
    from sparc3.export import check_new, save_pretrained
    from sparc3.mask import Mask
    from sparc3.sweep import halvings

    console.check_apart(model, out)
    check_new(out, force)
    methods = _methods(method, contrast, compare)
    for name, how in methods:
        check_contrast(unit, name, how, "attnlrp" if rule is None else rule, target or "logit")
    if count is not None and fraction is not None:
        raise InputError("--count and --fraction say the same; give one of them")
    if fraction is not None and not 0 < fraction < 1:
        raise InputError(f"--fraction {fraction} is not a share: it must be in (0, 1)")
    wanted, texts = _behaviour(behaviour, undesired, scorer, model, device)
    sources, judged_sources = _sources(general, eval_text, model)
    documents = console.documents_of(sources, model, "--general")
    judged_documents = sparc3.read_documents(judged_sources) if judged_sources else []
    compressed = Mask.load(compression) if compression else None
    tokens = tokens or (12 if behaviour == "insults" else 50)

    console.begin()
    with console.progress(f"loading {model}") as update:
        loaded = sparc3.load(model, dtype=dtype, device=device)
        if compressed is not None:
            compressed.check(loaded.model)
        size = console.window_length(loaded.model.config, loaded.tokenizer, length)
        windows = sparc3.windows(loaded.tokenizer, documents, size, samples, seed)
        judged = (
            sparc3.windows(loaded.tokenizer, judged_documents, size, samples) if judged_documents else None
        )
        update(description="running the prompts", total=len(texts))
        correction = Correction(
            loaded.model,
            loaded.tokenizer,
            wanted,
            texts,
            windows,
            judged,
            unit=unit,
            tokens=tokens,
            examples=examples,
            include=include or [],
            exclude=exclude or [],
            seed=seed,
            progress=lambda done: update(advance=done),
        )
        last = count or (max(1, round(fraction * correction.total)) if fraction else None)
        found = [
            correction.find(
                name,
                contrast=how,
                rule=rule,
                target=target,
                counts=None if last is None else halvings(last, points),
                points=points,
                budget=budget if last is None else None,
                spare=budget if spare else None,
                seed=seed,
                tell=lambda words, done, of: update(description=words, completed=done, total=of),
            )
            for name, how in methods
        ]
        _check_found(found[0], unit, budget)
        combined = _combined(correction, found[0], compressed)
        mask = found[0].mask
        mask.settings |= {
            "model": loaded.name,
            "origin": loaded.origin,
            "note": loaded.note,
            "general": sources,
            "undesired": str(undesired) if undesired else "bundled",
        }
        report = correction_report(loaded, correction, found, combined, budget if last is None else None)
        update(description=f"writing {out}")
        save_pretrained(
            loaded.model,
            mask,
            out,
            loaded.tokenizer,
            report,
            force,
            loaded.note,
            lambda folder: draw(report, folder),
        )
    if as_json:
        console.show_json({"out": str(out), **report})
    else:
        _show(loaded, report, last, out)


def _methods(method: str, contrast: str, compare: str | None) -> list[tuple[str, str]]:
    """(method, contrast) of each that is measured, the first is saved."""
    found = [(method, contrast)]
    for word in console.words(compare):
        name, _, how = word.partition(":")
        found.append((name, how or "difference"))
    return list(dict.fromkeys(found))


def _behaviour(
    name: str, undesired: Path | None, scorer: str | None, model: str, device: str
) -> tuple[Behaviour, list[str]]:
    """The behaviour, and the prompts that may provoke it."""
    from sparc3 import behaviours, bundled_text
    from sparc3.models import BUNDLED
    from sparc3.scorers import DEFAULT
    from sparc3.scorers import scorer as find_scorer

    if name not in behaviours.BEHAVIOURS:
        raise InputError(f"behaviour {name!r} is not known; use {' | '.join(behaviours.BEHAVIOURS)}")
    if scorer is not None and name != "toxicity":
        raise InputError(f"--scorer scores toxicity, not {name}")
    bundled = {"insults": bundled_text.insult_prompts, "repetition": bundled_text.loop_prompts}
    prompts: dict[str, tuple[str, ...]] = {}
    if undesired is not None:
        prompts = behaviours.read_prompts(undesired)
    elif model in BUNDLED and name in bundled:
        prompts = dict.fromkeys(bundled[name](512), ())
    else:
        raise InputError(f"no prompts that provoke {name}: give a file as --undesired")
    if name == "answers":
        return behaviours.answers(prompts), list(prompts)
    if name == "toxicity":
        return behaviours.toxicity(find_scorer(scorer or DEFAULT, device)), list(prompts)
    return (behaviours.insults() if name == "insults" else behaviours.repetition()), list(prompts)


def _sources(
    general: list[str] | None, eval_text: list[str] | None, model: str
) -> tuple[list[str], list[str]]:
    from sparc3.models import BUNDLED

    if general is None and model in BUNDLED:
        return [console.BUNDLED_TEXT], eval_text or [console.BUNDLED_HELD_OUT]
    return general or [], eval_text or []


def _check_found(found: Found, unit: str, budget: float) -> None:
    """InputError where nothing can be removed, or the model does not survive it."""
    if not found.sweep:
        raise InputError(
            f"each {unit} that was tried costs more than its share of --budget {budget:g}; nothing is pruned: give "
            "--no-spare, a larger --budget or another --unit"
        )
    point = found.chosen or found.sweep[0]
    if not math.isfinite(point.perplexity):
        raise InputError(
            f"without {point.count} {unit}s the model breaks (perplexity {point.perplexity:g}); nothing is pruned; "
            "remove fewer, leave --no-spare out, and where it overflows give --dtype float32"
        )
    if found.chosen is None:
        raise InputError(
            f"to remove even {point.count} {unit}s makes perplexity {point.increase:.2%} worse, more than --budget "
            f"{budget:g}; nothing is pruned: give --count, a larger --budget or another --unit"
        )


def _combined(correction: Correction, found: Found, compressed: Mask | None) -> dict[str, Measured]:
    """The compressed model, and the one that is corrected as well; count and fraction are of weights."""
    if compressed is None or found.chosen is None:
        return {}
    masks = {"compressed": compressed, "compressed and corrected": found.mask.combine(compressed)}
    return {
        name: replace(correction.measure(mask, round(mask.sparsity * mask.total)), fraction=mask.sparsity)
        for name, mask in masks.items()
    }


def _show(loaded: Loaded, report: dict[str, Any], asked: int | None, out: Path) -> None:
    from sparc3.correction_report import cells, combined_rows, method_label

    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column("method")
    for column in ("removed", "share", "shown", "score", "tokens", "distinct", "perplexity", "change"):
        table.add_column(column, justify="right")

    def row(name: str, point: dict[str, Any]) -> None:
        removed, *others = cells(point)
        table.add_row(name, removed, f"{point['fraction']:.3%}", *others)

    row("whole model", report["before"])
    for result in report["results"]:
        for point in result["sweep"]:
            row(method_label(result["settings"]) + (" *" if point == result["chosen"] else ""), point)
    for name, point in combined_rows(report):
        row(name, point)
    prompts, budget, count = report["prompts"], report["budget"], report["after"]["count"]
    spared = (
        f"Note: {asked} were to be removed, but only {count} cost no more than their share of --budget; --no-spare "
        "removes all of them"
    )
    unmoved = (
        "Note: the behaviour is shown as often as before; give a larger --count, or another --unit, --method or "
        "--contrast"
    )
    console.show(
        table,
        f"{report['behaviour']['name']}: {prompts['run']} prompts run; explained on {prompts['explained']} that show "
        f"it, judged on {prompts['judged']} others",
        "* saved" + ("" if budget is None else f": the largest with perplexity at most {budget:.2%} worse"),
        *([spared] if asked is not None and count < asked else []),
        *([unmoved] if report["after"]["shown"] >= report["before"]["shown"] else []),
        *console.notes(loaded),
        console.saved(out),
    )
