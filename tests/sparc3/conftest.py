"""For every test here: helpers importable, transformers quiet, one thread (sums in one order)."""

import sys
from pathlib import Path

import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent))  # oracle.py, tiny.py, whatever pytest's import mode

# from_config prints each tiny model's generation config.
transformers.logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Folder of a tiny Llama of random weights with a tokenizer of bytes."""
    import commands

    return commands.saved(commands.llama(), tmp_path_factory.mktemp("models") / "base")


@pytest.fixture
def room(tmp_path, monkeypatch):
    """A working folder with text to score with and text to judge on; names in messages stay short."""
    (tmp_path / "train.txt").write_text("".join(f"the {n}th cat sat on mat {n * n}\n" for n in range(60)))
    (tmp_path / "held.txt").write_text("".join(f"a dog ran {n} times round {n + 7}\n" for n in range(60)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def masks(room, base):
    """Magnitude at 30 % and at 50 %: the second keeps a part of the first."""
    import commands

    for name, share in (("thirty", 0.3), ("fifty", 0.5)):
        commands.succeed(
            "prune", base, "--method", "magnitude", "--pattern", "layer", "--sparsity", share, "--out", name
        )
    return room / "thirty/mask.safetensors", room / "fifty/mask.safetensors"
