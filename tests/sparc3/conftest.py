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
