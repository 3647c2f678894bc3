"""Pruned models on disk: plain transformers loads them with the logits of ``mask.apply``, or nothing is there."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tiny import attentions, batch, build, state
from transformers import AutoModelForCausalLM, AutoTokenizer
from words import tokenizer

from sparc3.errors import InputError
from sparc3.export import check_new, new_folder, save_pretrained
from sparc3.mask import Mask
from sparc3.models import NOTE_FILE
from sparc3.scores import attribute

HEAD = "lm_head.weight"
FAILURES = [OSError(28, "No space left on device"), SafetensorError("disk full"), KeyboardInterrupt()]


def mask_of(model, **options):
    return attribute(model, [], "magnitude", **options).select(0.5, "row")


def logits(model):
    with torch.no_grad():
        return model(**batch(), use_cache=False).logits


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fails(error):
    def fail(*args, **kwargs):
        raise error

    return fail


# Linear storage of every kind: plain, transposed, one linear for three, experts fused in memory but not on disk,
# embeddings that are projected.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "phi3", "opt-post", "mixtral", "qwen3_moe"])
def test_plain_transformers_loads_what_apply_makes(tmp_path, name, dtype):
    options = {"dtype": dtype, "attn_implementation": attentions(name)[0]}
    build(name, attentions(name)[0]).save_pretrained(tmp_path / "base")
    # Loaded, as .to(dtype) would round the rotary tables too.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", **options)
    mask = mask_of(model)
    before = state(model)
    save_pretrained(model, mask, tmp_path / "out")
    # transformers writes the architecture and the dtype into the config again, with the values that they had.
    assert (*state(model)[:4], model.config.to_dict()) == (*before[:4], before[5])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", **options)
    pruned = copy.deepcopy(model)
    mask.apply(pruned)
    assert set(loaded.state_dict()) == set(pruned.state_dict())
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, pruned.state_dict()[key]), key
    assert torch.equal(logits(loaded), logits(pruned))
    assert not torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "opt"])
def test_tied_embeddings_stay_tied(tmp_path, name):
    model = build(name, tie_word_embeddings=True)
    mask = mask_of(model, include=["*"])
    assert HEAD in mask.bits
    save_pretrained(model, mask, tmp_path / "out")
    stored = [
        key
        for file in (tmp_path / "out").glob("model*.safetensors")
        for key in load_file(file)
        if key == HEAD or "embed_tokens" in key or key.endswith("wte.weight")
    ]
    assert len(stored) == 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    mask.apply(model)
    assert torch.equal(loaded.get_output_embeddings().weight, model.get_output_embeddings().weight)
    assert torch.equal(logits(loaded), logits(model))


def test_an_untied_head_is_pruned_alone(tmp_path):
    model = build("llama")
    save_pretrained(model, mask_of(model, include=[HEAD]), tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert (loaded.lm_head.weight == 0).sum(1).unique().tolist() == [16]


def test_a_mask_that_is_already_applied(tmp_path):
    model = build("llama")
    mask = mask_of(model)
    save_pretrained(model, mask, tmp_path / "before")
    mask.apply(model)
    save_pretrained(model, mask, tmp_path / "after")
    assert contents(tmp_path / "before") == contents(tmp_path / "after")


def test_without_a_mask_the_model_is_saved_as_it_is(tmp_path):
    model = build("llama")
    save_pretrained(model, None, tmp_path / "out")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model))
    assert not (tmp_path / "out" / "mask.safetensors").exists()
    assert not (tmp_path / "out" / "report.json").exists()


def test_everything_else_lies_beside_the_weights(tmp_path):
    model, report = build("llama"), {"method": "lrp", "results": [{"perplexity": 3.25, "interval": None}]}
    mask = mask_of(model)

    def plot(folder):
        (folder / "plot.svg").write_text("<svg>")

    save_pretrained(model, mask, tmp_path / "out", tokenizer(), report, note="dequantised", extra=plot)
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    found = Mask.load(tmp_path / "out" / "mask.safetensors")
    assert (found.shapes, found.fingerprint, found.settings) == (mask.shapes, mask.fingerprint, mask.settings)
    assert all(torch.equal(found.bits[name], mask.bits[name]) for name in mask.bits)
    assert (tmp_path / "out" / NOTE_FILE).read_text() == "dequantised"
    assert (tmp_path / "out" / "plot.svg").read_text() == "<svg>"
    words = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert words("ab c")["input_ids"] == tokenizer()("ab c")["input_ids"]
    # Everybody may enter the folder, as with save_pretrained of transformers.
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755


def test_a_quantization_config_is_left_out_of_the_dense_model_and_stays_in_memory(tmp_path):
    model = build("llama")
    model.config.quantization_config = {"quant_method": "gguf"}
    save_pretrained(model, None, tmp_path / "out")
    assert model.config.quantization_config == {"quant_method": "gguf"}
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_a_mask_of_another_model_is_refused_and_nothing_written(tmp_path):
    for other, message in ((build("llama", seed=1), "its values differ"), (build("gpt2"), "has no weight")):
        with pytest.raises(InputError, match=message):
            save_pretrained(other, mask_of(build("llama")), tmp_path / "out")
        assert list(tmp_path.iterdir()) == []


# Folders


def test_an_existing_folder_is_refused_and_force_replaces_it(tmp_path):
    out = tmp_path / "out"
    (out / "deep").mkdir(parents=True)
    (out / "deep" / "old.txt").write_text("old")
    before, model = contents(out), build("llama")
    with pytest.raises(InputError, match=r"out exists; give another --out, or --force to replace it"):
        save_pretrained(model, None, out)
    with pytest.raises(InputError, match=r"out holds no model or report .* --force does not replace it"):
        save_pretrained(model, None, out, force=True)
    assert contents(out) == before
    (out / "config.json").write_text("{}")
    save_pretrained(model, None, out, force=True)
    assert not (out / "deep").exists()
    assert json.loads((out / "config.json").read_text())["model_type"] == "llama"
    assert list(tmp_path.iterdir()) == [out]


def test_force_takes_an_empty_folder(tmp_path):
    (tmp_path / "out").mkdir()
    save_pretrained(build("llama"), None, tmp_path / "out", force=True)
    assert (tmp_path / "out" / "config.json").exists()


def test_where_no_folder_can_be(tmp_path):
    file = tmp_path / "file"
    file.write_text("keep")
    for force, path, message in (
        (False, file, "exists"),
        (True, file, "is a file, not a folder"),
        (False, tmp_path / "none" / "out", r"the folder .*none does not exist; make it first"),
        (False, file / "out", "does not exist"),
    ):
        with pytest.raises(InputError, match=message):
            check_new(path, force)
        with pytest.raises(InputError, match=message), new_folder(path, force):
            raise AssertionError("entered")
    assert contents(tmp_path) == {Path("file"): b"keep"}
    check_new(tmp_path / "new")
    check_new(tmp_path / "new", force=True)


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("os.access", lambda path, mode: path != tmp_path)
        with pytest.raises(InputError, match=r"cannot write beside .*out: the folder .* is read-only"):
            check_new(tmp_path / "out")
    monkeypatch.setattr("sparc3.export.tempfile.mkdtemp", fails(PermissionError(13, "Permission denied")))
    with pytest.raises(InputError, match=r"cannot write beside .*out: .*Permission denied"):
        save_pretrained(build("llama"), None, tmp_path / "out")


def test_a_folder_that_appears_meanwhile_is_not_replaced_without_force(tmp_path):
    out = tmp_path / "out"

    def fill(partial):
        (partial / "new").write_text("new")
        out.mkdir()
        (out / "theirs").write_text("theirs")

    with pytest.raises(InputError, match="cannot write"), new_folder(out) as partial:
        fill(partial)
    assert contents(tmp_path) == {Path("out/theirs"): b"theirs"}


# What fails in the middle: the weights half written, the tokenizer, the mask, the report, the last rename.
STEPS = {
    "weights": "transformers.modeling_utils.safe_save_file",
    "tokenizer": "transformers.PreTrainedTokenizerFast.save_pretrained",
    "mask": "sparc3.mask.save_file",
    "report": "pathlib.Path.write_text",
}


@pytest.mark.parametrize("existed", [False, True])
@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("step", STEPS)
def test_a_failure_leaves_nothing_half_written(tmp_path, monkeypatch, step, error, existed):
    out = tmp_path / "out"
    if existed:
        out.mkdir()
        (out / "config.json").write_bytes(b"old")
    model, words = build("llama"), tokenizer()
    mask, before = mask_of(model), state(model)
    monkeypatch.setattr(STEPS[step], fails(error))
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else InputError):
        save_pretrained(model, mask, out, words, {"a": 1}, force=existed)
    monkeypatch.undo()
    assert contents(tmp_path) == ({Path("out/config.json"): b"old"} if existed else {})
    assert len(list(tmp_path.iterdir())) == existed
    assert state(model)[:4] == before[:4]


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
@pytest.mark.parametrize("which", ["old", "new"])
def test_the_old_folder_is_put_back_when_it_cannot_be_replaced(tmp_path, monkeypatch, which, error):
    out, rename, calls = tmp_path / "out", Path.rename, []
    out.mkdir()
    (out / "config.json").write_bytes(b"old")

    def flaky(path, target):
        calls.append(path)
        if len(calls) == {"old": 1, "new": 2}[which]:  # the old one goes aside, the new one takes its place
            raise error
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", flaky)
    with pytest.raises((InputError, KeyboardInterrupt)), new_folder(out, force=True) as partial:
        (partial / "new.txt").write_bytes(b"new")
    monkeypatch.undo()
    assert len(calls) == {"old": 1, "new": 3}[which]
    assert contents(tmp_path) == {Path("out/config.json"): b"old"}
    assert list(tmp_path.iterdir()) == [out]


def test_another_exception_is_passed_on_and_nothing_written(tmp_path):
    def extra(folder):
        assert (folder / "config.json").exists()
        raise ZeroDivisionError("of the caller")

    with pytest.raises(ZeroDivisionError, match="of the caller"):
        save_pretrained(build("llama"), None, tmp_path / "out", extra=extra)
    assert list(tmp_path.iterdir()) == []


def test_a_report_that_is_not_json_writes_nothing(tmp_path):
    with pytest.raises(TypeError):
        save_pretrained(build("llama"), None, tmp_path / "out", report={"value": torch.zeros(1)})
    assert list(tmp_path.iterdir()) == []
