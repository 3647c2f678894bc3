"""What a run was and what came out: JSON that any reader takes, a table by perplexity, a plot with its lines."""

import json
import math
import xml.etree.ElementTree as ElementTree
from importlib import metadata
from io import StringIO
from pathlib import Path

import matplotlib
import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console
from tiny import build

from sparc3.models import Loaded
from sparc3.report import (
    as_json,
    describe,
    plot_faithfulness,
    plot_perplexity,
    table,
    tensor_sparsity,
    versions,
    write_report,
)
from sparc3.scores import attribute

RESULTS = [
    {"method": "wanda", "pattern": "row", "sparsity": 0.5, "perplexity": 12.0, "seconds": 0.04},
    {
        "method": "lrp",
        "pattern": "row",
        "sparsity": 0.49996,
        "perplexity": 10.24999,
        "seconds": 63.25,
        "interval": [-0.15, -0.2994, 0.0004],
    },
    {"method": "random", "pattern": "row", "sparsity": 0.5, "perplexity": math.inf, "seconds": None},
    {"method": "magnitude", "pattern": "2:4", "sparsity": 0.5, "perplexity": 123456.0},
]


def rows(found):
    return list(zip(*[list(column.cells) for column in found.columns], strict=True))


def test_rows_come_best_first_and_read_well():
    found = table(RESULTS, 8.0)
    assert [column.header for column in found.columns] == [
        "method",
        "pattern",
        "sparsity",
        "perplexity",
        "x dense",
        "against Wanda, nats (95 %)",
        "seconds",
    ]
    assert rows(found) == [
        ("lrp", "row", "50.0%", "10.25", "1.28", "-0.150 (-0.299, +0.000)", "63.2"),
        ("wanda", "row", "50.0%", "12", "1.50", "", "0.0"),
        ("magnitude", "2:4", "50.0%", "1.235e+05", "15432.00", "", ""),
        ("random", "row", "50.0%", "inf", "inf", "", ""),
    ]
    console = Console(file=StringIO(), width=120)
    console.print(found)
    text = console.file.getvalue()
    assert text.index("lrp") < text.index("wanda") < text.index("magnitude") < text.index("random")


def test_what_is_not_known_is_left_empty():
    assert [row[4] for row in rows(table(RESULTS))] == ["", "", "", ""]
    unjudged = [{"method": "lrp", "pattern": "row", "sparsity": 0.25}]
    for dense in (None, 8.0):
        assert rows(table(unjudged, dense)) == [("lrp", "row", "25.0%", "", "", "", "")]
    assert rows(table([], 8.0)) == []


# The plot


def figure_of(monkeypatch, results, dense=8.0):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **rest: figures.append((figure, args, rest)))
    plot_perplexity(results, "plot.png", "a title", dense)
    ((figure, args, rest),) = figures
    assert args == ("plot.png",)
    assert rest["dpi"] == 150
    return figure


def test_one_line_a_method_that_begins_at_the_dense_model(monkeypatch):
    results = [
        {"method": method, "pattern": "row", "sparsity": sparsity, "perplexity": base + 10 * sparsity}
        for method, base in (("lrp", 9.0), ("wanda", 9.5), ("mine", 20.0))
        for sparsity in (0.7, 0.5, 0.6)
    ]
    (axes,) = figure_of(monkeypatch, results).axes
    *methods, dense = axes.get_lines()
    assert [line.get_label() for line in methods] == ["lrp", "wanda", "mine"]
    for line, base in zip(methods, (9.0, 9.5, 20.0), strict=True):
        assert list(line.get_xdata()) == [0.0, 0.5, 0.6, 0.7]
        assert list(line.get_ydata()) == [8.0, base + 5, base + 6, base + 7]
    assert len({line.get_color() for line in methods}) == 3
    # A line that coincides with lrp's lies on it, and lrp's is seen on both of its sides.
    for other in methods[1:]:
        assert methods[0].get_linewidth() > 2 * other.get_linewidth()
        assert methods[0].get_zorder() < other.get_zorder()
    assert list(dense.get_ydata()) == [8.0, 8.0]
    assert dense.get_linestyle() == "--"
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["lrp", "wanda", "mine", "dense (8)"]
    assert axes.get_yscale() == "log"
    assert axes.get_title() == "a title"
    assert axes.get_xlabel() == "weights pruned"
    assert axes.get_ylabel().startswith("perplexity")
    assert axes.xaxis.get_major_formatter()(0.5) == "50%"


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_file_is_what_its_ending_says(tmp_path, ending):
    path = tmp_path / f"plot.{ending}"
    plot_perplexity(RESULTS, path, "a title", 8.0)  # an infinite perplexity among them
    if ending == "png":
        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    else:
        assert ElementTree.parse(path).getroot().tag.endswith("svg")
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("faithfulness", "measure", "levels"),
    [
        ([0.25, 1.0], "faithfulness", {"whole model": 1.0, "all ablated": 0.0}),
        ([math.nan, math.nan], "accuracy", {"whole model": 0.75}),
        ([None, None], "accuracy", {"whole model": 0.75}),  # as report.json holds it
    ],
)
def test_accuracy_is_drawn_where_faithfulness_is_undefined(monkeypatch, faithfulness, measure, levels):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **rest: figures.append(figure))
    points = [
        {"fraction": fraction, "faithfulness": value, "accuracy": accuracy}
        for fraction, value, accuracy in zip((0.1, 1.0), faithfulness, (0.5, 0.75), strict=True)
    ]
    plot_faithfulness({"lrp": points}, "plot.png", "a title", "weights")
    (axes,) = figures[0].axes
    line, *dashed = axes.get_lines()
    assert list(line.get_xdata()) == [0.1, 1.0]
    assert list(line.get_ydata()) == [point[measure] for point in points]
    assert {one.get_label(): one.get_ydata()[0] for one in dashed} == levels
    assert axes.get_ylabel() == f"{measure} on held-out examples"


def test_plotting_leaves_matplotlib_as_it_was(tmp_path):
    before = dict(matplotlib.rcParams)
    plot_perplexity(RESULTS[:2], tmp_path / "plot.png", "a title", 8.0)
    assert dict(matplotlib.rcParams) == before


# report.json


def test_versions_are_plain_json_and_true():
    found = versions()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["packages"]["torch"] == metadata.version("torch")
    assert found["packages"]["sparc3"] == metadata.version("sparc3")
    assert set(found["packages"]) == {"sparc3", "torch", "transformers", "safetensors", "numpy"}
    assert found["machine"]["cores"] >= 1
    assert found["python"].startswith("3.")


def test_a_package_that_is_not_there_has_no_version(monkeypatch):
    def version(name):
        if name == "sparc3":
            raise metadata.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(metadata, "version", version)
    found = versions()["packages"]
    assert found["sparc3"] is None
    assert found["torch"] == "1"


def test_without_proc_the_processor_is_asked_for(monkeypatch):
    read = Path.read_text

    def missing(path, *args, **kwargs):
        if path.parts[:2] == ("/", "proc"):
            raise FileNotFoundError(path)
        return read(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", missing)
    assert isinstance(versions()["machine"]["processor"], str)


def test_numbers_that_json_lacks_are_null(tmp_path):
    value = {"a": [1.5, math.inf, (-math.inf, math.nan)], "b": {"c": None, "d": True, "e": 3, "f": "é"}}
    expected = {"a": [1.5, None, [None, None]], "b": value["b"]}

    def refuse(name):
        raise AssertionError(name)

    assert json.loads(as_json(value), parse_constant=refuse) == expected
    path = write_report(tmp_path, value)
    assert path == tmp_path / "report.json"
    assert path.read_text(encoding="utf-8") == as_json(value) + "\n"


@pytest.mark.parametrize("pattern", ["row", "layer", "global", "2:4"])
@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_sparsity_is_told_for_each_tensor(name, pattern):
    model = build(name)
    mask = attribute(model, [], "random").select(None if pattern == "2:4" else 0.3, pattern)
    found = tensor_sparsity(mask)
    assert list(found) == list(mask.bits)
    for key, told in found.items():
        kept = mask.kept(key)
        assert told["shape"] == list(kept.shape) == list(model.get_parameter(key).shape)
        assert told["requested"] == {"global": None, "2:4": 0.5}.get(pattern, 0.3)
        assert told["achieved"] == pytest.approx((~kept).double().mean().item(), abs=1e-12)


def test_the_description_names_the_model_the_settings_and_the_machine():
    model = build("llama")
    mask = attribute(model, [], "random", seed=3).select(0.3, "layer")
    found = describe(Loaded(model, None, "mine", "/models/mine", "dequantised"), mask)
    assert found["model"] == {"name": "mine", "origin": "/models/mine", "note": "dequantised"}
    assert found["settings"] == mask.settings
    assert found["settings"]["seed"] == 3
    assert found["sparsity"]["requested"] == 0.3
    pruned = sum(int((~mask.kept(name)).sum()) for name in mask.bits)
    total = sum(torch.Size(shape).numel() for shape in mask.shapes.values())
    assert found["sparsity"]["achieved"] == pytest.approx(pruned / total, abs=1e-12)
    assert found["tensors"] == tensor_sparsity(mask)
    assert found["packages"] == versions()["packages"]
    assert json.loads(as_json(found)) == found
