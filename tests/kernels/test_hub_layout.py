"""The kernels-hub layout: loaded by the kernels package beside the installed sparc3_kernels, it computes the same."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import sparc3_kernels
import torch
from kernels._rust import Build

from kernels import get_local_kernel

SCRIPT = Path(__file__).parents[2] / "kernels/hub_layout.py"
spec = importlib.util.spec_from_file_location("hub_layout", SCRIPT)
hub_layout = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hub_layout)


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    out = tmp_path_factory.mktemp("hub") / "repository"
    hub_layout.lay_out(out, "someone/sparc3-kernels")
    return out


def sparse(rows=9, columns=70):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    return weight * (torch.rand(rows, columns, generator=torch.Generator().manual_seed(1)) < 0.5)


def test_it_loads_beside_the_installed_package_and_agrees(repository):
    kernel = get_local_kernel(repository)
    assert Path(kernel.__file__).parent == repository / "build/torch-cpu"
    assert kernel.__all__ == sparc3_kernels.__all__
    weight, x = sparse(), torch.randn(2, 70, generator=torch.Generator().manual_seed(2))
    packed = kernel.pack_bitmap(weight)
    for found, expected in zip(packed, sparc3_kernels.pack_bitmap(weight), strict=True):
        assert torch.equal(found, expected)
    # 70 products in fp32 in any order.
    torch.testing.assert_close(kernel.bitmap_linear(x, *packed), x @ weight.T, rtol=1e-5, atol=1e-5)
    assert torch.equal(kernel.select_rows(weight.abs(), 30), sparc3_kernels.select_rows(weight.abs(), 30))
    assert kernel.info()["backends"]["cpu"].endswith("was not built when the package was installed")


def test_its_ops_have_a_namespace_of_their_own(repository, tmp_path):
    kernel = get_local_kernel(repository)
    namespace = json.loads((repository / "build/torch-cpu/metadata.json").read_text())["id"]
    assert re.fullmatch(r"_sparc3_kernels_cpu_[0-9a-f]{8}", namespace)
    assert kernel.bitmap.__name__ == f"{namespace}.bitmap"
    ops = getattr(torch.ops, namespace)
    weight = sparse()
    assert torch.equal(ops.unpack_bitmap(*ops.pack_bitmap(weight), 70), weight)
    torch.library.opcheck(ops.unpack_bitmap, (*ops.pack_bitmap(weight), 70))


def test_no_module_knows_the_installed_package(repository):
    folders = (repository / "torch-ext/sparc3_kernels", *(repository / "build").iterdir())
    assert sorted(folder.name for folder in folders[1:]) == ["torch-cpu", "torch-cuda"]
    for folder in folders:
        names = {file.name for file in folder.glob("*.py")}
        assert names - {"_ops.py"} == {file.name for file in hub_layout.PACKAGE.glob("*.py")}
        for file in folder.glob("*.py"):
            text = file.read_text()
            assert not re.search(r"^\s*(from|import) sparc3_kernels", text, re.M), file
            assert "torch.ops.sparc3" not in text
            assert '"sparc3::' not in text
            compile(text, str(file), "exec")


def test_the_builder_reads_its_description(repository):
    build = Build.open(repository)
    assert {str(backend).removeprefix("Backend.").lower() for backend in build.general.backends} == {
        "cpu",
        "cuda",
    }
    assert "someone/sparc3-kernels" in (repository / "CARD.md").read_text()


def test_an_existing_folder_is_left_alone(repository):
    found = subprocess.run([sys.executable, SCRIPT, repository], capture_output=True, text=True)
    assert found.returncode == 1
    assert found.stderr == f"{repository} exists; give another folder\n"


def test_the_example_of_the_card_runs(repository):
    code = (repository / "CARD.md").read_text().split("```python\n")[1].split("```")[0]
    kernel = get_local_kernel(repository)
    code = code.replace("from kernels import get_kernel\n", "")
    names = {"get_kernel": lambda name, version: kernel}
    exec(code, names)
    assert names["y"].shape == (1, 256)


def test_sparc3_kernels_alone_imports_nothing_of_sparc3():
    code = "import sys, sparc3_kernels; assert not {'sparc3', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
