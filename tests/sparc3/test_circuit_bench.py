"""bench/circuits.py on a bundled model: what is known is not measured again, and tables hold what the rows say."""

import json
import math

import circuit_tables
import circuits
import numpy as np
import pytest
import scipy.stats

SEEDS = 3


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(circuits, "RESULTS", tmp_path)
    return tmp_path


def tables(**options):
    asked = {"unit": ["neuron"], "method": ["lrp", "magnitude"], "examples": 8, "seeds": SEEDS, **options}
    circuits.main("tables", ["tiny-llama"], **asked)


def read(folder, study):
    path = folder / f"circuits-{study}-tiny-llama.json"
    return json.loads(path.read_text()), path.with_suffix(".md").read_text()


def cells(text, first):
    """Of the table's line with this first cell."""
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def untimed(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_an_interrupted_study_goes_on_and_its_table_has_ratios_and_intervals(results, monkeypatch):
    find, calls = circuits._find, []

    def interrupted(search, method, **settings):
        calls.append((settings["seed"], method))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return find(search, method, **settings)

    monkeypatch.setattr(circuits, "_find", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tables()
    before, _ = read(results, "tables")
    assert len(before["rows"]) == 3
    tables()
    data, text = read(results, "tables")
    # Every row once, but for the one that was interrupted, and the first three as they were.
    wanted = [(seed, method) for seed in range(SEEDS) for method in ("lrp", "magnitude")]
    assert calls == [*wanted[:4], *wanted[3:]]
    assert data["rows"][:3] == before["rows"]
    tables()
    assert len(calls) == len(wanted) + 1
    assert {path.name for path in results.iterdir()} == {
        f"circuits-tables-tiny-llama{ending}" for ending in (".json", ".md", "-neuron-zero.png")
    }

    kept = {(row["method"], row["seed"]): row["sparsest"]["kept"] for row in data["rows"]}
    total = data["rows"][0]["curve"][-1]["kept"]
    logs = np.log([kept["lrp", seed] / kept["magnitude", seed] for seed in range(SEEDS)])
    low, high = scipy.stats.t.interval(0.95, SEEDS - 1, logs.mean(), scipy.stats.sem(logs))
    assert low < high  # seeds differ
    ratio = "{:.2f} ({:.2f}, {:.2f})".format(*np.exp([logs.mean(), low, high]))
    for method, against in (("lrp", ""), ("magnitude", ratio)):
        share = np.exp(np.mean([np.log(kept[method, seed] / total) for seed in range(SEEDS)]))
        means = [
            np.mean([row[name] for row in data["rows"] if row["method"] == method]) for name in ("cpr", "cmd")
        ]
        assert cells(text, method) == [f"{share:.2%}", against, *(f"{mean:.3f}" for mean in means)]


def test_rows_are_those_of_the_whole_study_whatever_it_is_told_to_begin_with(results):
    tables(seeds=1)
    tables(seeds=1, method=["magnitude"], ranked=6)
    tables(seeds=2, method=["magnitude"])
    data, text = read(results, "tables")
    keys = [(row["method"], row["seed"], row["ranked"]) for row in data["rows"]]
    assert keys == [("lrp", 0, 8), ("magnitude", 0, 8), ("magnitude", 0, 6), ("magnitude", 1, 8)]
    # LRP's one seed against the same seed of two; other examples stand in another table, which has no LRP.
    kept = [row["sparsest"]["kept"] for row in data["rows"]]
    lines = [line for line in text.splitlines() if line.startswith("| magnitude |")]
    assert sorted(line.split("|")[3].strip() for line in lines) == ["", f"{kept[0] / kept[1]:.2f}"]


@pytest.mark.parametrize("null", [None, math.nan])
def test_seeds_without_faithfulness_are_left_out_of_its_means(results, null):
    tables(unit=["weight"], method=["magnitude"], seeds=2)
    data, _ = read(results, "tables")

    def undefined(row):
        curve = [point | {"faithfulness": null} for point in row["curve"]]
        return row | {"cpr": null, "cmd": null, "curve": curve}

    first, second = data["rows"]
    data["rows"] = [first, undefined(second)]
    text = circuit_tables.markdown(data)
    assert cells(text, "magnitude")[2:] == [f"{first['cpr']:.3f}", f"{first['cmd']:.3f}"]
    assert (
        "CPR and CMD are of the other seeds than [1]: there the mean logit difference with every weight"
        in text
    )
    data["rows"] = [undefined(first), undefined(second)]
    assert cells(circuit_tables.markdown(data), "magnitude")[2:] == ["-", "-"]
    circuit_tables.plots(data, results / "other.json")
    assert (results / "other-weight-zero.png").read_bytes().startswith(b"\x89PNG")


def test_agreement_is_of_means_over_seeds(results):
    options = {"ablation": ["patch"], "side": ["judging"], "rule": ["attnlrp"], "examples": 4, "seeds": 2}
    circuits.main("agreement", ["tiny-llama"], **options)
    data, text = read(results, "agreement")
    assert [(row["method"], row["seed"]) for row in data["rows"]] == [
        (method, seed) for seed in (0, 1) for method in ("exact", "integrated-gradients", "lrp")
    ]
    circuits.main("agreement", ["tiny-llama"], **options)
    assert read(results, "agreement") == (data, text)

    scores = {(row["method"], row["seed"]): np.array(row["scores"]) for row in data["rows"]}
    for method, name in (("lrp", "lrp (attnlrp)"), ("integrated-gradients", "integrated-gradients")):
        means = []
        # Four blocks of four heads and an MLP.
        for is_mlp in (False, True):
            chosen = [place for place in range(20) if (place % 5 == 4) == is_mlp]
            each = []
            for seed in (0, 1):
                ours, exact = scores[method, seed][chosen], scores["exact", seed][chosen]
                rest = np.argsort(np.abs(exact))[:-2]
                without = scipy.stats.pearsonr(ours[rest], exact[rest])[0] if len(rest) > 2 else math.nan
                each.append(
                    [scipy.stats.pearsonr(ours, exact)[0], scipy.stats.spearmanr(ours, exact)[0], without]
                )
            means.append(np.mean(each, axis=0))
        shown = [" / ".join("-" if np.isnan(value) else f"{value:.3f}" for value in mean) for mean in means]
        assert cells(text, name)[:2] == shown


def test_rules_are_named_by_what_is_not_the_gradients():
    for text, name in (
        (None, ""),
        ("norm=gradient,activation=gradient", "gradient"),
        ("norm=constant,activation=gradient", "norm=constant"),
        (
            "norm=constant,gate=gradient+norm=gradient,activation=identity",
            "norm=constant + activation=identity",
        ),
        ("gate=half + norm=gradient", "gate=half + gradient"),
    ):
        assert circuit_tables.short_rule(text) == name
