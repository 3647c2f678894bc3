"""The C libraries as Python sees them: loading, backends, and the streaming calls that other processes would make."""

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import sparc3_kernels as kernels
import torch
from sparc3_kernels import native
from torch import Tensor

needs_library = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))


# ---- loading and backends


@needs_library
def test_info_describes_the_library() -> None:
    info = kernels.info()
    root = Path(__file__).parents[2]
    assert f'version = "{info["native"]["cpu"]["version"]}"' in (root / "pyproject.toml").read_text()
    assert info["native"]["cpu"]["isa"] in ("portable", *info["native"]["cpu"]["features"])
    assert info["backends"]["reference"] == info["backends"]["cpu"] == "available"


@needs_library
def test_get_include_and_get_cmake_dir() -> None:
    assert (Path(kernels.get_include()) / "sparc3" / "sparc3.h").is_file()
    assert (Path(kernels.get_cmake_dir()) / "sparc3Config.cmake").is_file()


@needs_library
def test_cuda_library_answers_without_a_gpu() -> None:
    if reason := native.missing("sparc3_cuda"):
        pytest.skip(reason)
    report = kernels.info()["native"]["cuda"]
    assert report["version"] == kernels.info()["native"]["cpu"]["version"]
    assert (report["devices"] == 0) == bool(report["reason"])


@needs_library
def test_unknown_instruction_set() -> None:
    with pytest.raises(native.NativeError, match="lacks the instruction set"):
        native.force_isa("sse9")


@needs_library
@pytest.mark.parametrize(
    ("isa", "reason"), [("portable", "None"), ("sse9", "SPARC3_ISA=sse9 is not on this machine")]
)
def test_instruction_set_from_the_environment(isa: str, reason: str) -> None:
    code = "from sparc3_kernels import native; print(native.missing(), native.info()['cpu'])"
    environment = {**os.environ, "SPARC3_ISA": isa, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.startswith(reason)
    assert isa in result.stdout


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    monkeypatch.setattr(native, "_NATIVE", tmp_path)
    native._load.cache_clear()
    yield tmp_path
    native._load.cache_clear()


def test_everything_runs_without_the_library(no_library: Path) -> None:
    assert kernels.select_flat(torch.tensor([3.0, 1.0, 2.0]), 1).tolist() == [0b101]
    assert kernels.select_nm(torch.tensor([[3.0, 1.0, 2.0, 4.0]]), 2, 4).tolist() == [0b1001]
    stream = kernels.select_stream(lambda: [torch.tensor([3.0]), torch.tensor([1.0, 2.0])], 2)
    assert [bits.tolist() for bits in stream] == [[1], [0]]
    acc = kernels.accumulate_weight_relevance_(
        torch.zeros(1, 1), -torch.ones(1, 1, 1), torch.ones(1, 1, 1), "abs"
    )
    assert acc.item() == 1
    for report in (kernels.info()["native"]["cpu"], kernels.info()["backends"]["cpu"]):
        assert "was not built when the package was installed" in report
    with pytest.raises(kernels.BackendError, match=r"backend 'cpu': .*was not built"), kernels.backend("cpu"):
        pass
    with pytest.raises(kernels.NativeError, match="was not built"):
        kernels.get_include()


def test_a_failed_build_says_why(no_library: Path) -> None:
    (no_library / "build_failed.txt").write_text("cmake is not installed\n")
    assert kernels.info()["native"]["cpu"].endswith("was installed: cmake is not installed")


def test_a_damaged_library_says_so(no_library: Path) -> None:
    (no_library / "lib").mkdir()
    (no_library / "lib" / "libsparc3.so").write_bytes(b"not a library")
    (no_library / "lib" / "libsparc3.dylib").write_bytes(b"not a library")
    told = kernels.info()["native"]["cpu"]
    assert "cannot be loaded" in told
    assert str(no_library) not in told
    assert kernels.select_flat(torch.tensor([3.0, 1.0]), 1).tolist() == [1]


def test_forced_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.tensor([3.0, 1.0], dtype=torch.float64)
    with pytest.raises(kernels.BackendError, match="'gpu': no such backend; choose one of reference, triton"):
        kernels.backend("gpu").__enter__()
    monkeypatch.setenv("SPARC3_BACKEND", "gpu")
    with pytest.raises(kernels.BackendError, match="select_flat: the forced backend 'gpu' cannot run"):
        kernels.select_flat(scores, 1)
    with kernels.backend("reference"):  # the context manager wins
        assert kernels.select_flat(scores, 1).tolist() == [1]
        assert kernels.info()["forced"] == "reference"
    monkeypatch.delenv("SPARC3_BACKEND")
    assert kernels.info()["forced"] is None
    if native.missing() is None:
        with kernels.backend("cpu"), pytest.raises(kernels.BackendError, match=r"not torch\.float64"):
            kernels.select_flat(scores, 1)
    if not torch.cuda.is_available():
        with pytest.raises(kernels.BackendError, match="backend 'cuda': "):
            kernels.backend("cuda").__enter__()


# ---- streaming states: what several processes exchange


def new_state(dtype: torch.dtype = torch.float32) -> Tensor:
    state = native.workspace(native.library().sparc3_select_state_size())
    native.check(native.library().sparc3_select_init(state.data_ptr(), native.DTYPES[dtype]))
    return state


def count(state: Tensor, scores: Tensor) -> None:
    native.check(
        native.library().sparc3_select_count(state.data_ptr(), scores.data_ptr(), scores.numel(), 1, None, 0)
    )


def merge(state: Tensor, other: Tensor) -> None:
    native.check(native.library().sparc3_select_merge(state.data_ptr(), other.data_ptr()))


def refine(state: Tensor, prune: int) -> bool:
    more = ctypes.c_int()
    native.check(native.library().sparc3_select_refine(state.data_ptr(), prune, ctypes.byref(more)))
    return bool(more.value)


def threshold(state: Tensor) -> tuple[int, int]:
    found = native.Threshold()
    native.check(native.library().sparc3_select_threshold(state.data_ptr(), ctypes.byref(found)))
    return found.key, found.keep_equal


def key_of(score: float) -> int:
    """The key of a non-negative score: its bits."""
    return int(torch.tensor(score).view(torch.int32))


@needs_library
def test_counts_beyond_32_bits() -> None:
    # Merging a state with itself doubles every count: 2^31 copies of 5 scores, 2 of them in one upper bin.
    scores, copies = torch.tensor([0.5, 1.0, 1.0 + 2.0**-20, 2.0, 4.0]), 1 << 31
    for rank, score in ((0, 0.5), (1, 1.0), (2, 1.0 + 2.0**-20), (4, 4.0)):
        prune, state, more = rank * copies + 12345, new_state(), True
        while more:
            count(state, scores)
            for _ in range(31):
                merge(state, state.clone())
            more = refine(state, prune)
        assert threshold(state) == (key_of(score), copies - 12345)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_processes_that_merge_agree_with_one(dtype: torch.dtype) -> None:
    scores = torch.randn(3000, generator=torch.Generator().manual_seed(3)).to(dtype)
    parts = [scores[2000:], scores[:7], scores[7:2000]]  # in any order
    alone, more = new_state(dtype), True
    while more:
        count(alone, scores)
        more = refine(alone, 1234)

    state, more = new_state(dtype), True
    while more:
        processes = [state.clone() for _ in parts]  # as if sent over a wire
        for process, part in zip(processes, parts, strict=True):
            count(process, part)
        state = processes[0]
        for other in processes[1:]:
            merge(state, other)
        more = refine(state, 1234)
    assert threshold(state) == threshold(alone)


@needs_library
def test_states_that_do_not_belong_together() -> None:
    state, other, half = new_state(), new_state(), new_state(torch.float16)
    scores = torch.tensor([1.0, 2.0, 3.0])
    for call in (
        lambda: merge(state, half),
        lambda: merge(state, torch.zeros_like(state)),
        lambda: threshold(state),
        lambda: count(torch.zeros_like(state), scores),
    ):
        with pytest.raises(native.NativeError, match="out of order"):
            call()
    count(state, scores)
    count(other, scores)
    assert refine(state, 1)
    assert refine(other, 2)
    for call in (
        lambda: merge(state, other),
        lambda: refine(state, 2),
    ):  # other bins, another number to prune
        with pytest.raises(native.NativeError, match="out of order"):
            call()
    with pytest.raises(native.NativeError, match="not those of the first"):
        refine(state, 1)
    with pytest.raises(native.NativeError, match="size out of range"):
        refine(new_state(), 1)


@needs_library
@pytest.mark.parametrize("threads", [1, 2, 3, 64])
def test_state_and_workspace_stay_under_a_megabyte(threads: int) -> None:
    library = native.library()
    assert library.sparc3_select_state_size() + library.sparc3_select_workspace_size(threads) < 1 << 20
    assert library.sparc3_select_flat_workspace_size(threads) < 1 << 20
