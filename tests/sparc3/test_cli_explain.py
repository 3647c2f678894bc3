"""sparc3 explain: its figures against sparc3.relevance and plain autograd in fp64, its page, and what it refuses."""

import re
from functools import partial
from xml.etree import ElementTree

import commands
import pytest
import torch
import words
from commands import POSITIONS, llama, run, saved, succeed, succeed_json
from oracle import residual_gradients
from test_cli_refusals import refuse
from tiny import build

import sparc3
from sparc3 import page, rules, targets
from sparc3.conservation import PARTS, conservation
from sparc3.rules import Rule

TEXT = "the cat <script>alert('1 & 2')</script> s"
IDS = [words.BOS, *words.ids(TEXT)]
TOLERANCE = 1e-5  # see test_families.py


def labelled(answer):
    ids = torch.tensor([IDS])
    labels = torch.full_like(ids, -100)
    labels[0, -1] = answer
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def likely(model):
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0, -1].softmax(-1)


@pytest.mark.parametrize("rule", ["attnlrp", "cp", "norm=gradient"])
@pytest.mark.parametrize("target", targets.TARGETS)
def test_figures_equal_relevance_and_plain_autograd(base, target, rule):
    model = sparc3.load(base).model
    chances = likely(model)
    answer = chances.argmax().item()
    found = succeed_json("explain", base, TEXT, "--target", target, "--rule", rule, "--top", 7)
    assert found["answer"]["id"] == answer
    assert found["answer"]["rank"] == 1
    assert found["answer"]["probability"] == pytest.approx(chances[answer].item(), rel=TOLERANCE)
    assert [one["id"] for one in found["predictions"]] == chances.topk(5).indices.tolist()
    assert [one["id"] for one in found["tokens"]] == IDS
    assert "".join(one["token"] for one in found["tokens"]) == "<s>" + TEXT
    assert [one["special"] for one in found["tokens"]] == [True] + [False] * (len(IDS) - 1)

    scalar = partial(targets.target_value, target=target, positions="last")
    stream, gradient = residual_gradients(model, labelled(answer), Rule.parse(rule), scalar)[0]
    terms = (stream * gradient)[0]
    ours = torch.tensor([one["relevance"] for one in found["tokens"]], dtype=torch.float64)
    assert (ours - terms.sum(-1)).norm() <= TOLERANCE * terms.abs().sum(-1).norm()

    with sparc3.relevance(model, rule, target, weights=False) as r:
        r.backward(labelled(answer))
    assert found["conservation"]["value"] == pytest.approx(r.value.item(), rel=TOLERANCE)
    for kind, by_layer in (("head", r.heads), ("neuron", r.neurons)):
        whole = torch.stack([by_layer[layer][0].sum(0) for layer in range(2)])
        expected = whole.flatten().abs().sort(descending=True).values[:7]
        rows = found[f"{kind}s"]
        values = torch.tensor([row["relevance"] for row in rows])
        # Views in the graph change the order of sums, so not to the last bit.
        near = partial(torch.testing.assert_close, rtol=TOLERANCE, atol=TOLERANCE * whole.abs().max().item())
        near(values, torch.stack([whole[row["block"], row[kind]] for row in rows]))
        near(values.abs(), expected)
        if kind == "head":
            near(torch.tensor(found["heads_by_block"]), whole)


def test_conservation_is_reported_and_adds_up(base):
    found = succeed_json("explain", base, TEXT)["conservation"]
    model = sparc3.load(base).model
    _, flow = conservation(model, labelled(likely(model).argmax().item()))
    assert (found["value"], found["inputs"], found["taken"]) == (flow.value, flow.inputs, flow.taken)
    assert found["value"] == pytest.approx(found["inputs"] + sum(found["taken"].values()), abs=1e-9)
    assert [row["block"] for row in found["blocks"]] == ["head", 1, 0]
    for row, below in zip(found["blocks"], [*found["blocks"][1:], None], strict=True):
        assert row["above"] == pytest.approx(row["below"] + sum(row["taken"].values()), abs=1e-9)
        assert tuple(row["taken"]) == PARTS
        assert below is None or below["above"] == row["below"]
    assert found["broken"] == []
    shown = succeed("explain", base, TEXT)
    assert "Conserved: target, norms, products took nothing, as attnlrp asks" in shown
    balance = {
        line.rsplit(maxsplit=2)[0]: line.split()[-2]
        for line in shown.splitlines()
        if line.rstrip().endswith("%")
    }
    assert set(balance) == {"explained", "reached the tokens", "softmax took"}
    parts = float(balance["reached the tokens"]) + float(balance["softmax took"])
    assert float(balance["explained"]) == pytest.approx(parts, rel=2e-3)  # of four digits each


def test_a_wrong_declaration_is_said(base, monkeypatch):
    monkeypatch.setattr("sparc3.wrap.scale_gradient", lambda x, scale: x)
    found = succeed_json("explain", base, TEXT)["conservation"]
    assert found["broken"] == [{"block": block, "part": "products"} for block in (1, 0)]
    shown = succeed("explain", base, TEXT)
    assert "WRONG: relevance was taken where nothing may be under attnlrp: products (block 1)" in shown
    assert "products took" in shown


def test_an_answer_is_the_token_that_follows_the_text(base):
    found = succeed_json("explain", base, TEXT, "--answer", "q")
    model = sparc3.load(base).model
    chances, token = likely(model), 3 + ord("q")
    assert found["answer"]["id"] == token
    assert found["answer"]["token"] == "q"
    assert found["answer"]["rank"] == (chances > chances[token]).sum().item() + 1
    with torch.no_grad():
        logit = model(torch.tensor([IDS])).logits[0, -1, token].item()
    assert found["conservation"]["value"] == pytest.approx(logit, rel=TOLERANCE)
    assert "The logit of the next token 'q' is" in succeed("explain", base, TEXT, "--answer", "q")


def test_models_with_experts_and_learned_positions(room):
    for name in ("mixtral", "opt"):
        changes = {"vocab_size": words.VOCABULARY, "max_position_embeddings": POSITIONS}
        saved(build(name, **changes), room / name)
        found = succeed_json("explain", name, "abc", "--out", f"{name}.html")
        assert found["conservation"]["broken"] == []
        assert bool(found["neurons"]) == (name == "opt")
        ElementTree.parse(room / f"{name}.html")


# The page


def spans(root):
    return [element for element in root.iter("span") if element.get("class") == "token"]


def test_the_page_holds_every_token_with_its_value(room, base):
    found = succeed_json("explain", base, TEXT, "--out", "page.html")
    assert found["out"] == "page.html"
    assert [path.name for path in room.glob("*page*")] == ["page.html"]  # and nothing beside it
    source = (room / "page.html").read_text(encoding="utf-8")
    root = ElementTree.fromstring(source)
    tokens = spans(root)
    assert [token.text for token in tokens] == [one["token"] for one in found["tokens"]]
    assert [float(token.get("data-value")) for token in tokens] == [
        one["relevance"] for one in found["tokens"]
    ]
    assert [int(token.get("data-index")) for token in tokens] == list(range(len(IDS)))
    assert "<script" not in source
    assert "&lt;</span>" in source
    for one in (*found["heads"], *found["neurons"]):
        assert f"{one['relevance']:+.4g}" in source
    numbers = {cell.text for cell in root.iter("td")}
    for row in found["conservation"]["blocks"]:
        assert f"{row['below']:+.4g}" in numbers
        assert f"{row['taken']['softmax']:+.4g}" in numbers


def test_the_page_loads_nothing(room, base):
    succeed("explain", base, TEXT, "--out", "page.html")
    root = ElementTree.parse(room / "page.html").getroot()
    kinds = {element.tag for element in root.iter()}
    assert not kinds & {"script", "link", "img", "iframe", "object", "embed", "base", "svg", "video", "audio"}
    for element in root.iter():
        assert not {"src", "href", "srcset", "action", "data", "poster"} & set(element.attrib)
        assert not [name for name in element.attrib if name.startswith("on")]
        assert "url(" not in element.get("style", "")
    (style,) = root.iter("style")
    assert not re.search(r"url\(|@import|https?:", style.text)
    policy = next(meta.get("content") for meta in root.iter("meta") if meta.get("http-equiv"))
    # Pages of circuits hold their plots as data; nothing is fetched for those either.
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_names_and_notes_are_escaped(room):
    saved(llama(), room / "a <b> & 'c'")
    (room / "a <b> & 'c'/sparc3_note.txt").write_text("<script>note</script>")
    stdout = succeed("explain", "a <b> & 'c'", "x", "--out", "page.html")
    assert "Note: the model is <script>note</script>" in stdout
    root = ElementTree.parse(room / "page.html").getroot()
    assert not list(root.iter("script"))
    assert "a <b> & 'c'" in {cell.text for cell in root.iter("td")}


def test_what_cannot_be_printed_is_made_visible(room, base):
    text = "a\n\t\x1b[31m\x00[bold]é"
    found = succeed_json("explain", base, text, "--out", "page.html")
    # Bytes of a part of a character are spelled as in the vocabulary.
    symbols = [words.symbols()[byte] for byte in "é".encode()]
    expected = ["<s>", *"a\u240a\u2409\u241b[31m\u2400[bold]", *symbols]
    assert [one["token"] for one in found["tokens"]] == expected
    root = ElementTree.parse(room / "page.html").getroot()
    assert [token.text for token in spans(root)] == expected
    assert len(list(root.iter("br"))) == 1
    shown = succeed("explain", base, text)
    assert "\x1b" not in shown
    assert "a\u240a\u2409\u241b[31m\u2400[bold]" in shown


def test_force_replaces_the_page(room, base):
    succeed("explain", base, "a", "--out", "page.html")
    before = (room / "page.html").read_text()
    refuse(room, "page.html exists; give another --out", "explain", base, "b", "--out", "page.html")
    succeed("explain", base, "b", "--out", "page.html", "--force")
    assert (room / "page.html").read_text() != before
    assert (room / "page.html").stat().st_mode & 0o044 == 0o044


# The colours


def test_colours_follow_sign_and_size():
    assert page.colour(0.0, 1.0) == (255, 255, 255)
    for sign, (strong, weak) in ((1, (0, 2)), (-1, (2, 0))):
        full, half = page.colour(sign * 1.0, 1.0), page.colour(sign * 0.5, 1.0)
        assert full[strong] > full[weak]  # red for, blue against
        assert all(a <= b <= 255 for a, b in zip(full, half, strict=True))
        assert page.colour(sign * 9.0, 1.0) == full


@pytest.mark.parametrize(
    ("values", "special", "scale"),
    [
        ([5.0, -2.0, 1.0], [True, False, False], 2.0),
        ([5.0, 0.0], [True, False], 5.0),
        ([5.0], [True], 5.0),
        ([0.0, 0.0], [True, False], 1.0),
        ([], [], 1.0),
    ],
)
def test_the_scale_is_of_the_text(values, special, scale):
    assert page.full_scale(values, special) == scale


def test_a_terminal_gets_the_colours():
    text = page.coloured_text(["<s>", " [b]"], [1.0, -1.0], 1.0)
    assert text.plain == "<s> [b]"
    assert [span.style for span in text.spans] == [
        f"black on rgb({','.join(map(str, page.colour(value, 1.0)))})" for value in (1.0, -1.0)
    ]


class SentencePiece:
    """Decodes as SentencePiece does: a token that begins a text loses its space."""

    entries = ("\u2581Mary", "a", "<0xC3>", "\u2581")

    def convert_ids_to_tokens(self, ids):
        return [self.entries[index] for index in ids]

    def decode(self, ids, clean_up_tokenization_spaces):
        return {0: "Mary", 1: "a", 2: "\ufffd", 3: ""}[ids[0]]


def test_sentencepiece_tokens_keep_their_space():
    assert page.spell(SentencePiece(), [0, 1, 2, 3]) == [" Mary", "a", "<0xC3>", " "]


# What is refused


@pytest.mark.parametrize(
    ("message", "text", "arguments"),
    [
        ("the text is empty", "", ()),
        ("the text is not valid UTF-8", "a\udcff", ()),
        ("--answer is not valid UTF-8", "a", ("--answer", "\udcff")),
        ("--answer 'Mary' is 4 tokens of this model ('M', 'a', 'r', 'y')", "a", ("--answer", "Mary")),
        ("--answer '' is 0 tokens", "a", ("--answer", "")),
        ("rule 'lxt' is not known", "a", ("--rule", "lxt")),
        ("target 'loss' is not known", "a", ("--target", "loss")),
        ("leave --answer out", "a", ("--target", "max-logit", "--answer", "b")),
        ("the text has 49 tokens (BOS included), but the model has 48 positions", "a" * 48, ()),
        ("device 'gpu' cannot be used", "a", ("--device", "gpu")),
        ("dtype 'int8' is not known", "a", ("--dtype", "int8")),
        ("there is a folder", "a", ("--out", "there")),
        ("train.txt exists", "a", ("--out", "train.txt")),
        ("the folder nowhere does not exist", "a", ("--out", "nowhere/page.html")),
    ],
)
def test_refused(room, base, message, text, arguments):
    (room / "there").mkdir()
    refuse(room, message, "explain", base, text, *arguments)


def test_the_longest_text_is_explained(base):
    assert len(succeed_json("explain", base, "a" * (POSITIONS - 1))["tokens"]) == POSITIONS


def test_models_that_cannot_be_explained(room):
    refuse(room, "no such folder here", "explain", "no/such/model", "a")
    saved(llama(vocab_size=40), room / "small")
    refuse(room, "token 100 is outside the model's vocabulary of 40", "explain", "small", "a")
    refuse(room, "is outside the model's vocabulary of 40", "explain", "small", "#", "--answer", "a")
    model = llama()
    model.model.norm.weight.data *= 1e3  # the product of the two is beyond fp16's 65504
    model.lm_head.weight.data *= 1e3
    saved(model, room / "huge")
    refuse(room, "overflows in torch.float16", "explain", "huge", "a", "--dtype", "float16")


def test_a_full_disk_leaves_nothing(room, base, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sparc3.export.os.replace", full)
    refuse(room, "cannot write page.html", "explain", base, "a", "--out", "page.html")


def test_help_names_every_choice():
    stdout = run("explain", "--help").stdout
    for choice in (*targets.TARGETS, *rules.PRESETS):
        assert choice in stdout
    assert commands.run("explain").exit_code == 2
