"""The folder of a circuit: its page in a browser and as XML, the scores for other tools."""

import json
import xml.etree.ElementTree as ElementTree

import browser
import pytest
import torch
from safetensors.torch import load_file
from tiny import build
from typer.testing import CliRunner

import sparc3
from sparc3.circuit import Search
from sparc3.circuit_export import hook_scores
from sparc3.circuit_page import circuit_page
from sparc3.cli import app
from sparc3.page import heat_map, image, page
from sparc3.tasks import load_task, logit_difference, task_batches
from sparc3.units import components


def found(out, *options):
    words = ["circuit", "tiny-llama", "--examples", "16", "--out", str(out), "--json", *options]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """(folder, report) of a circuit of heads."""
    out = tmp_path_factory.mktemp("circuit") / "out"
    return out, found(out, "--unit", "head", "--keep", "0.25", "--compare", "gradient")


def test_a_browser_draws_the_page_with_its_plots_and_coloured_tokens(heads, tmp_path):
    folder, report = heads
    picture = browser.screenshot(folder / "circuit.html", tmp_path)
    assert picture.shape[:2] == (3000, 1100)
    # The line of LRP in the plot, and tokens that speak for and against at full colour.
    assert browser.has_colour(picture, (209, 73, 91))
    assert browser.has_colour(picture, (226, 106, 120))
    values = [one["relevance"] for row in report["task"]["samples"] for one in row["tokens"]]
    assert min(values) < 0 < max(values)


def test_a_browser_refuses_what_a_page_loads_from_elsewhere(tmp_path):
    path = tmp_path / "page.html"
    path.write_text(page("Title", [("Part", ['<img alt="" src="http://127.0.0.1:9/x.png"/>'])]))
    with pytest.raises(AssertionError, match="violates the following Content Security Policy"):
        browser.screenshot(path, tmp_path)


def test_a_narrow_window_leaves_a_margin(tmp_path):
    path = tmp_path / "page.html"
    path.write_text(page("Title", [("Part", [])]))
    picture = browser.screenshot(path, tmp_path, width=500, height=300)
    # Letters of the headings begin at 1 em, 15 pixels.
    assert (picture[:, :15] == 1).all()
    assert (picture[:, 15:60] < 1).any()


def test_a_heat_map_of_many_heads_scrolls_within_the_page(tmp_path):
    path = tmp_path / "page.html"
    rows = [[(head - 16) * block / 1000 for head in range(32)] for block in range(80)]
    path.write_text(page("Title", [("Heads", [heat_map(rows, "head", "block")])]))
    picture = browser.screenshot(path, tmp_path)
    # The body is 60 em of 15 pixels in the middle of 1100, and some of the map's cells reach its edge.
    assert (picture[:, 1000:] == 1).all()
    assert (picture[:, 970:1000] < 1).any()
    # Blocks run upwards: the last one has the fullest colour on top, against the answer on the left.
    assert browser.has_colour(picture[:400], (98, 152, 208))


def test_the_page_says_what_the_report_says(heads):
    folder, report = heads
    root = ElementTree.fromstring((folder / "circuit.html").read_text().removeprefix("<!DOCTYPE html>"))
    text = " ".join("".join(root.itertext()).split())
    chosen = report["circuit"]
    assert f"{chosen['kept']} of 16 heads (25.00%), ranked by lrp" in text
    assert "Kept: " + ", ".join(chosen["components"]) in text
    assert "blue ones against it (rule attnlrp)" in text
    sources = [one.get("src") for one in root.iter("img")]
    assert len(sources) == 2
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    spans = [one for one in root.iter("span") if one.get("class") == "token"]
    shown = [(one.text, float(one.get("data-value"))) for one in spans]
    expected = [
        (one["token"], one["relevance"]) for row in report["task"]["samples"] for one in row["tokens"]
    ]
    assert shown == expected


@pytest.mark.parametrize(("empty", "said"), [(0.82, True), (0.8, False)])
def test_the_page_says_where_accuracy_cannot_tell_a_circuit_from_nothing(heads, empty, said):
    folder, report = heads
    full, empty_point = ({"accuracy": accuracy, "logit_difference": accuracy} for accuracy in (0.9, empty))
    report = {**report, "full": full, "empty": empty_point}
    text = circuit_page(report, folder / "faithfulness.png", folder / "relevance.png")
    assert (f"with every head ablated the accuracy is still {empty:.3f} of 0.900" in text) == said


def test_samples_are_what_the_whole_model_and_the_circuit_answer(heads):
    _, report = heads
    loaded = sparc3.load("tiny-llama")
    task = load_task("ioi", loaded.tokenizer, 16, 0, bundled=True)
    search = Search(loaded.model, loaded.tokenizer, task, "head")
    keep = torch.tensor([name in report["circuit"]["components"] for name in search.names])
    # One at a time, without padding.
    for example, row in zip(task.judging, report["task"]["samples"], strict=False):
        (batch,) = task_batches(loaded.model, loaded.tokenizer, [example])
        assert row["prompt"] == example.prompt
        for key, kept in (("whole", None), ("circuit", keep)):
            logits = search.logits(batch, kept)
            value = logit_difference(logits[:, None], batch).item()
            assert row[key]["logit_difference"] == pytest.approx(value, abs=1e-3)
            best = row[key]["predictions"][0]
            assert best["probability"] == pytest.approx(logits[0].softmax(0).max().item(), abs=1e-3)
        with sparc3.relevance(loaded.model, "attnlrp", logit_difference, weights=False) as r:
            r.backward(batch)
        values = [one["relevance"] for one in row["tokens"]]
        assert values == pytest.approx(r.tokens[0].tolist(), abs=1e-3)


@pytest.mark.parametrize("unit", ["kv-head", "layer", "neuron"])
def test_heads_and_mlps_are_in_the_graph_where_what_holds_them_is(tmp_path, unit):
    report = found(tmp_path / "out", "--unit", unit, "--keep", "0.25" if unit != "neuron" else "0.001")
    chosen = set(report["circuit"]["components"])
    nodes = json.loads((tmp_path / "out" / "mib.json").read_text())["nodes"]
    for block in range(4):
        heads = {f"a{block}.h{head}" for head in range(4)}
        # Two query heads to a key-value head.
        expected = {
            "kv-head": {f"a{block}.h{head}" for head in range(4) if f"a{block}.kv{head // 2}" in chosen}
            | {f"m{block}"},
            "layer": {*heads, f"m{block}"} if f"l{block}" in chosen else set(),
            "neuron": heads
            | ({f"m{block}"} if any(name.startswith(f"m{block}.") for name in chosen) else set()),
        }[unit]
        assert {name for name in (*heads, f"m{block}") if nodes[name]["in_graph"]} == expected
    assert 0 < len(chosen) < 4


def test_scores_carry_transformer_lens_names_and_mibs_format(heads):
    folder, report = heads
    tensors = load_file(folder / "components.safetensors")
    blocks = range(4)
    assert set(tensors) == {f"blocks.{b}.attn.hook_z" for b in blocks} | {
        f"blocks.{b}.hook_mlp_out" for b in blocks
    }
    graph = json.loads((folder / "mib.json").read_text())
    assert graph["cfg"] == {"n_layers": 4, "n_heads": 4, "parallel_attn_mlp": False, "d_model": 128}
    assert graph["edges"] == {}
    assert "score" not in graph["nodes"]["input"]
    kept = set(report["circuit"]["components"])
    for block in blocks:
        for head in range(4):
            node = graph["nodes"][f"a{block}.h{head}"]
            assert node["in_graph"] == (f"a{block}.h{head}" in kept)
            assert tensors[f"blocks.{block}.attn.hook_z"][head].item() == pytest.approx(node["score"])
        assert graph["nodes"][f"m{block}"]["in_graph"]
        assert tensors[f"blocks.{block}.hook_mlp_out"].tolist() == pytest.approx(
            [graph["nodes"][f"m{block}"]["score"]]
        )


def test_neurons_stand_at_hook_post_in_their_order():
    model = build("llama")
    unit = components(model, "neuron")
    scores = torch.arange(len(unit.names), dtype=torch.float64)
    tensors = hook_scores(unit, scores)
    assert list(tensors) == ["blocks.0.mlp.hook_post", "blocks.1.mlp.hook_post"]
    assert torch.cat(list(tensors.values())).tolist() == scores.tolist()
    assert hook_scores(components(model, "layer"), torch.zeros(2)) == {}


@pytest.mark.parametrize("unit", ["weight", "neuron"])
def test_blocks_add_up_to_what_is_kept(unit, tmp_path):
    report = found(tmp_path / "out", "--unit", unit, "--keep", "0.3")
    rows = report["circuit"]["blocks"]
    assert [row["block"] for row in rows] == [0, 1, 2, 3]
    assert sum(row["kept"] for row in rows) == report["circuit"]["kept"]
    assert sum(row["of"] for row in rows) == report["total"]
    assert set(report["nodes"]) == {f"a{b}.h{h}" for b in range(4) for h in range(4)} | {
        f"m{b}" for b in range(4)
    }


def test_an_image_carries_its_bytes(tmp_path):
    (tmp_path / "x.png").write_bytes(b"\x89PNG<&>")
    assert image(tmp_path / "x.png", 'a "b"') == (
        '<img alt="a &quot;b&quot;" src="data:image/png;base64,iVBORzwmPg=="/>'
    )
