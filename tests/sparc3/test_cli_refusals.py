"""What the command line refuses, and what a failure in the middle leaves behind: nothing."""

import errno
import json

import pytest
import safetensors.torch
import torch
import words
from commands import llama, run, saved, succeed, succeed_json
from transformers import AutoModelForCausalLM, BloomConfig


def listing(folder):
    return {
        path.relative_to(folder): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")
    }


def refuse(room, message, *arguments):
    """Exit code 2, one line on stderr that says it, nothing on stdout, nothing written."""
    before = listing(room)
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("sparc3: error: ")
    assert message in result.stderr
    assert listing(room) == before


TEXT = ("--text", "train.txt")


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("sparsity 1.0 is not a share", ("--sparsity", 1)),
        ("sparsity -0.1 is not a share", ("--sparsity", -0.1)),
        ("sparsity nan is not a share", ("--sparsity", "nan")),
        ("sparsity 1.5 is not a share", ("--sparsities", "0.5,1.5", "--eval-text", "held.txt")),
        ("'half' in --sparsities is not a number", ("--sparsities", "half", "--eval-text", "held.txt")),
        ("sparsity 0.4 contradicts 2:4", ("--pattern", "2:4", "--sparsity", 0.4)),
        ("pattern 'column' is not known", ("--pattern", "column")),
        ("3:10 does not divide model.layers.0.self_attn.q_proj.weight", ("--pattern", "3:10")),
        ("method 'obs' is not known", ("--method", "obs")),
        ("method 'obs' is not known", ("--compare", "wanda,obs", "--eval-text", "held.txt")),
        ("rule cp gives exactly zero relevance to query and key", ("--rule", "cp")),
        ("zero relevance to gate projections", ("--rule", "gate=up")),
        ("rule 'norm=half' is not known", ("--rule", "norm=half")),
        ("target 'loss' is not known", ("--target", "loss")),
        ("positions 'first' are not known", ("--positions", "first")),
        ("reduce 'mean' is not known", ("--reduce", "mean")),
        ("reduce has no effect on wanda", ("--method", "wanda", "--reduce", "abs")),
        ("skip-first has no effect on magnitude", ("--method", "magnitude", "--skip-first")),
        ("dtype 'int8' is not known", ("--dtype", "int8")),
        ("device 'gpu' cannot be used", ("--device", "gpu")),
        ("no weight is left to prune", ("--include", "*nothing*")),
        ("give held-out text with --eval-text", ("--compare", "wanda")),
        ("give held-out text with --eval-text", ("--sparsities", "0.3,0.5")),
        ("missing.txt: no such text file", ("--text", "missing.txt")),
        ("empty.txt: no text in it", ("--text", "empty.txt")),
        ("empty.txt: no text in it", ("--eval-text", "empty.txt")),
        ("the text has 2 tokens and one window takes 47", ("--eval-text", "short.txt")),
        ("windows of 49 tokens (BOS included), but the model has 48 positions", ("--length", 48)),
        ("there exists; give another --out", ("--out", "there")),
        ("the folder nowhere does not exist", ("--out", "nowhere/out")),
        ("train.txt exists", ("--out", "train.txt")),
        ("train.txt is a file", ("--out", "train.txt", "--force")),
        (
            "there holds no model or report (no config.json, no report.json), so --force does not replace it",
            ("--out", "there", "--force"),
        ),
    ],
)
def test_prune_refuses(room, base, message, arguments):
    (room / "empty.txt").write_text("\n \n")
    (room / "short.txt").write_text("x")
    (room / "there").mkdir()
    (room / "there/mine.txt").write_text("mine")
    out = () if "--out" in arguments else ("--out", "out")
    refuse(room, message, "prune", base, *TEXT, *arguments, *out)


@pytest.fixture
def no_work(monkeypatch):
    """Whatever scores or measures is not to be reached."""

    def fail(*arguments, **options):
        raise AssertionError("work was begun")

    for name in ("attribute", "perplexity", "sweep"):
        monkeypatch.setattr(f"sparc3.compress.{name}", fail)
    monkeypatch.setattr("sparc3.evaluate.perplexity", fail)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("3:10 does not divide", ("--pattern", "3:10", "--eval-text", "held.txt")),
        ("window takes 47", ("--eval-text", "short.txt")),
        ("48 positions", ("--length", 48, "--eval-text", "held.txt")),
    ],
)
@pytest.mark.usefixtures("no_work")
def test_what_needs_the_model_is_checked_before_the_work(room, base, message, arguments):
    (room / "short.txt").write_text("x")
    refuse(room, message, "prune", base, *TEXT, *arguments, "--out", "out")


def test_text_shorter_than_a_window_to_score_with(room, base):
    (room / "short.txt").write_text("too short")
    refuse(
        room,
        "the text has 10 tokens and one window takes 47",
        "prune",
        base,
        "--text",
        "short.txt",
        "--out",
        "out",
    )
    refuse(room, "one window takes 47", "evaluate", base, "--text", "short.txt")


def test_a_model_that_is_not_bundled_needs_text(room, base):
    refuse(room, "is not a bundled model", "prune", base, "--out", "out")
    refuse(room, "is not a bundled model", "evaluate", base)
    # A folder that is not there is the first thing to mend; not even a hub id looks like this one.
    refuse(room, "no/such/folder: no such folder here", "prune", "no/such/folder", "--out", "out")
    refuse(room, "no/such/folder: no such folder here", "evaluate", "no/such/folder")
    refuse(room, "missing.gguf: no such GGUF file", "evaluate", "missing.gguf")


def broken_missing(room):
    return "no such folder here"


def broken_empty(room):
    (room / "broken").mkdir()
    return "no config.json in this folder"


def broken_unknown(room):
    saved(llama(), room / "broken")
    config = json.loads((room / "broken/config.json").read_text())
    (room / "broken/config.json").write_text(json.dumps(config | {"model_type": "quantum"}))
    return "quantum"


def broken_undeclared(room):
    config = BloomConfig(vocab_size=words.VOCABULARY, hidden_size=16, n_layer=1, n_head=2)
    saved(AutoModelForCausalLM.from_config(config), room / "broken")
    # It is refused before the weights are read.
    (room / "broken/model.safetensors").write_bytes(safetensors.torch.save({}))
    return "architecture 'bloom' is not declared"


def broken_nan(room):
    model = llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = torch.nan
    saved(model, room / "broken")
    return "NaN or Inf in model.layers.1.mlp.up_proj.weight"


def broken_truncated(room):
    file = saved(llama(), room / "broken") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return "damaged or incomplete safetensors file"


@pytest.mark.parametrize(
    "breaking",
    [broken_missing, broken_empty, broken_unknown, broken_undeclared, broken_nan, broken_truncated],
)
@pytest.mark.parametrize("command", ["prune", "evaluate"])
def test_broken_models(room, monkeypatch, breaking, command):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    message = breaking(room)
    out = ("--out", "out") if command == "prune" else ()
    refuse(room, message, command, "./broken", *TEXT, *out)


def test_masks_of_other_models_and_damaged_ones(room, base, masks):
    mask = masks[0]
    saved(llama(seed=1), room / "other")
    saved(llama(intermediate_size=44), room / "narrow")
    refuse(room, "made for another model", "mask", "apply", "other", mask, "--out", "out")
    refuse(room, "is [44, 32] here, [48, 32] there", "mask", "apply", "narrow", mask, "--out", "out")
    refuse(room, "made for another model", "mask", "undo", "thirty", mask, "--base", "other", "--out", "out")
    refuse(room, "is not", "mask", "undo", "other", mask, "--base", base, "--out", "out")
    # "thirty" is not what the other mask leaves: that one keeps less.
    succeed("prune", "other", "--method", "magnitude", "--out", "theirs")
    refuse(room, "another model", "mask", "diff", mask, "theirs/mask.safetensors")
    refuse(
        room, "another", "mask", "combine", mask, "theirs/mask.safetensors", "--how", "and", "--out", "out"
    )
    refuse(room, "not by 'xor'", "mask", "combine", *masks, "--how", "xor", "--out", "out")
    refuse(room, "exists", "mask", "combine", *masks, "--how", "or", "--out", mask)
    (room / "damaged.st").write_bytes(mask.read_bytes()[:-7])
    for name, message in (
        ("damaged.st", "cannot read a mask"),
        ("train.txt", "cannot read a mask"),
        ("no.st", "cannot read a mask"),
        ("thirty/model.safetensors", "not a mask"),
    ):
        refuse(room, message, "mask", "show", name)
        refuse(room, message, "mask", "apply", base, name, "--out", "out")


def test_the_model_that_is_read_is_never_replaced(room):
    saved(llama(), room / "mine")
    for out in ("mine", room, "mine/../mine"):
        asked = ("--method", "random", "--out", out, "--force")
        refuse(room, "where the model is read from", "prune", "mine", *asked)
    succeed("prune", "mine", "--method", "random", "--out", "out")
    mask = "out/mask.safetensors"
    for model, source, out in (("out", "mine", "mine"), ("out", "mine", "out")):
        asked = ("--base", source, "--out", out, "--force")
        refuse(room, "where the model is read from", "mask", "undo", model, mask, *asked)


def test_a_backend_that_cannot_run_is_refused(room, base, monkeypatch):
    monkeypatch.setenv("SPARC3_BACKEND", "abacus")
    refuse(room, "SPARC3_BACKEND=abacus cannot run", "prune", base, *TEXT, "--out", "out")


def no_space(*arguments, **options):
    raise OSError(errno.ENOSPC, "No space left on device")


# As root, as tests often run, a folder's permissions refuse nothing: the writing itself is made to fail.
@pytest.mark.parametrize(
    "write",
    [
        "sparc3.export.tempfile.mkdtemp",
        "transformers.modeling_utils.safe_save_file",
        "sparc3.mask.save_file",
        "sparc3.export.write_report",
        "matplotlib.figure.Figure.savefig",
        "pathlib.Path.rename",
    ],
)
@pytest.mark.parametrize("force", [False, True])
def test_a_full_disk_leaves_nothing_new(room, base, monkeypatch, write, force):
    asked = ("--method", "magnitude", "--sparsities", "0.3", "--eval-text", "held.txt", "--out", "out")
    if force:
        succeed("prune", base, "--method", "random", "--out", "out")
    with monkeypatch.context() as full:
        full.setattr(write, no_space)
        refuse(room, "No space left on device", "prune", base, *asked, *(["--force"] if force else []))


def test_a_read_only_folder_is_refused_before_the_work(room, base, monkeypatch, no_work):
    monkeypatch.setattr("sparc3.export.os.access", lambda path, mode: False)
    refuse(room, "read-only", "prune", base, *TEXT, "--out", "out")


@pytest.mark.parametrize(
    "step",
    [
        "sparc3.load",
        "sparc3.compress.attribute",
        "sparc3.compress.perplexity",
        "transformers.modeling_utils.safe_save_file",
        "sparc3.mask.save_file",
        "matplotlib.figure.Figure.savefig",
    ],
)
@pytest.mark.parametrize("force", [False, True])
def test_an_interrupt_leaves_nothing_new(room, base, monkeypatch, step, force):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    if force:
        succeed("prune", base, "--method", "random", "--out", "out")
    before = listing(room)
    asked = [*TEXT, "--sparsities", "0.3", "--eval-text", "held.txt", "--samples", 4, "--out", "out"]
    with monkeypatch.context() as patched:
        patched.setattr(step, interrupt)
        result = run("prune", base, *asked, *(["--force"] if force else []))
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "sparc3: interrupted\n")
    assert listing(room) == before


def test_force_replaces_the_folder_as_a_whole(room, base):
    (room / "out").mkdir()
    asked = ("--method", "magnitude", "--out", "out")
    refuse(room, "out exists", "prune", base, *asked)
    succeed("prune", base, *asked, "--force")
    (room / "out/left.txt").write_text("from before")
    succeed("prune", base, *asked, "--sparsity", 0.3, "--force")
    assert not (room / "out/left.txt").exists()
    assert succeed_json("mask", "show", "out/mask.safetensors")["settings"]["sparsity"] == 0.3
    assert {path.name for path in room.iterdir()} == {"train.txt", "held.txt", "out"}
    succeed("mask", "combine", *["out/mask.safetensors"] * 2, "--how", "or", "--out", "m.st")
    succeed("mask", "combine", *["out/mask.safetensors"] * 2, "--how", "or", "--out", "m.st", "--force")
