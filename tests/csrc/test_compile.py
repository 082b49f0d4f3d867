"""Every CUDA source, compiled for every architecture without a GPU: resources, linking, and importing."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from any4d_fast import _build, _ext, _toolkit
from tests.csrc import resources, sass, toolkits

pytestmark = [pytest.mark.nvcc, pytest.mark.slow, pytest.mark.timeout(1500)]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def plan() -> _build.Plan:
    try:
        return _build.make_plan(toolkit=toolkits.chosen())
    except _toolkit.BuildError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("objects")


@pytest.fixture(scope="module")
def library(plan: _build.Plan, folder: Path) -> Path:
    """Compiled from nothing, so that ptxas reports on everything."""
    output = folder / "package" / "_C.so"
    _build.build(plan, output, folder, folder / "build.log")
    return output


def test_every_architecture(plan: _build.Plan) -> None:
    assert plan.architectures == _build.ARCHITECTURES
    compiled = {step.source.name for step in plan.steps}
    assert compiled == {path.name for path in plan.folder.iterdir() if path.suffix in (".cu", ".cpp")}


def test_resources(plan: _build.Plan, library: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    usages = resources.read(plan, folder)
    with capsys.disabled():
        print(f"\n\nCUDA {plan.toolkit.version}, {plan.tools.cxx_version}\n{resources.table(usages)}")
    found = resources.violations(usages)
    if plan.toolkit.release == resources.RELEASE:
        assert not found
    elif found:
        warnings.warn("\n".join(found), stacklevel=1)
    for step in plan.steps:
        if step.rule == "nvcc":
            own = {usage.architecture for usage in usages if usage.source == step.source.name}
            assert own == {flag.rpartition("sm_")[2] for flag in step.flags if flag.startswith("-gencode")}


def test_no_matrix_product_is_serialized(plan: _build.Plan, library: Path, folder: Path) -> None:
    found = resources.serialized(plan, folder)
    if plan.toolkit.release == resources.RELEASE:
        assert not found
    elif found:
        warnings.warn("\n".join(found), stacklevel=1)


def test_no_loop_of_matrix_products_spills(plan: _build.Plan, library: Path, folder: Path) -> None:
    tool = sass.disassembler()
    if tool is None:
        pytest.skip("no cuobjdump: it comes with a whole CUDA toolkit and with Triton")
    found = {}
    for step in plan.steps:
        if step.rule == "nvcc" and "sm_90a" in "".join(step.flags):
            for name, code in sass.functions(tool, folder / step.object):
                if loops := sass.spilling_loops(code):
                    found[name] = loops
    if plan.toolkit.release == resources.RELEASE:
        assert not found
    elif found:
        warnings.warn(str(found), stacklevel=1)


def test_allowances_are_needed(plan: _build.Plan, library: Path, folder: Path) -> None:
    usages = resources.read(plan, folder)
    for source, kernel, bound, reason in resources.ALLOWANCES:
        own = [usage for usage in usages if resources.bound_of(usage) is bound]
        assert own and reason, f"{source} {kernel}: no kernel needs this bound"


def test_imports_without_a_gpu(plan: _build.Plan, library: Path) -> None:
    code = """
import sys
import warnings
from pathlib import Path
from any4d_fast import _ext
extension = _ext._load(Path(sys.argv[1]))
print(extension.architectures(), extension.sources_key(), extension.runtime_version())
assert "torch" not in sys.modules
"""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code, library], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    architectures, key, version = done.stdout.split()
    assert architectures == ",".join(_build.ARCHITECTURES)
    assert key == _build.sources_key(plan.folder)
    major, minor = plan.toolkit.release
    assert int(version) == 1000 * major + 10 * minor


def test_imports_without_the_sources_for_hopper(plan: _build.Plan, tmp_path: Path) -> None:
    """As a machine with another GPU builds it just in time: nothing may refer to what was left out."""
    small = _build.make_plan(("80",), plan.toolkit)
    assert len(small.steps) < len(plan.steps)
    output = tmp_path / "_C.so"
    _build.build(small, output, tmp_path, tmp_path / "build.log")
    extension = _ext._load(output)
    assert extension.architectures() == "80"


def test_no_torch_header(plan: _build.Plan) -> None:
    for path in plan.folder.iterdir():
        if path.suffix in (".cu", ".cuh", ".h", ".cpp"):
            text = path.read_text()
            assert not any(name in text for name in ("<torch/", "<ATen/", "<c10/")), path.name


@pytest.fixture(scope="module")
def plan_12_8(tmp_path_factory: pytest.TempPathFactory) -> _build.Plan:
    try:
        toolkit = toolkits.cuda_12_8(tmp_path_factory.mktemp("cuda-12.8"))
    except _toolkit.BuildError as error:
        pytest.skip(str(error))
    # One architecture of every generation that the kernels tell apart.
    return _build.make_plan(("80", "90a", "100", "120"), toolkit)


def test_cuda_12_8(plan_12_8: _build.Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With CUDA 12.8's headers, device library and assembler.

    The package registry has no CUDA 12.8 compiler: nvidia-cuda-nvcc-cu12 holds ptxas, libnvvm, libdevice and headers,
    but not the programs nvcc, cicc, cudafe++ and fatbinary, and no package of 12.x holds libcudart_static.a. So the
    front end is 13.0's here, and nothing is linked. `make build-matrix CUDA_HOME=/path/to/cuda-12.8` runs this file
    with a whole toolkit.
    """
    objects = [step.object for step in plan_12_8.steps]
    _build.run_ninja(plan_12_8, tmp_path, tmp_path / "build.log", *objects)
    usages = resources.read(plan_12_8, tmp_path)
    assert {usage.architecture for usage in usages} == set(plan_12_8.architectures)
    remarks = [*resources.violations(usages), *resources.serialized(plan_12_8, tmp_path)]
    with capsys.disabled():
        # Speed is only promised with 13.0, so these are no failures.
        print("\n\nCUDA 12.8's assembler, beyond the bounds of 13.0:", *(remarks or ["nothing"]), sep="\n  ")
