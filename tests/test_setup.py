"""Wheels with and without the CUDA extension, from a copy of the repository whose csrc/ and toolkit are made up."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests import fake_cuda

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {f"any4d_fast/csrc/{name}" for name in fake_cuda.SOURCES}


@pytest.fixture(scope="module")
def toolkit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_cuda.make_toolkit(tmp_path_factory.mktemp("toolkit") / "cuda")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    folder.mkdir()
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    for name in ("any4d_fast", "kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    fake_cuda.make_sources(folder / "csrc")
    return folder


def build_wheel(repository: Path, toolkit: Path, **variables: str) -> tuple[subprocess.CompletedProcess[str], Path]:
    """pip's isolated build; returns it and the folder of wheels."""
    folder = repository.parent / "wheels"
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-v", "-w", str(folder), str(repository)]
    environment = fake_cuda.environment(toolkit, repository.parent / "cache", **variables)
    done = subprocess.run(
        command, cwd=repository.parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return done, folder


def contents(folder: Path) -> tuple[str, set[str]]:
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return wheel.name, {name for name in archive.namelist() if "_C." in name or "/csrc/" in name}


def test_with_a_compiler(repository: Path, toolkit: Path) -> None:
    # What an earlier build left in the source tree must not be shipped.
    (repository / "any4d_fast" / "_C.cpython-399-x86_64-linux-gnu.so").touch()
    done, folder = build_wheel(repository, toolkit, ANY4D_FAST_CUDA_ARCHS="80;90a")
    assert done.returncode == 0, done.stdout
    assert "compiling for sm_80, sm_90a with CUDA 13.0.88" in done.stdout
    name, files = contents(folder)
    (extension,) = files - SOURCES
    assert SOURCES < files
    assert extension.startswith("any4d_fast/_C.cpython-3") and "-399-" not in extension
    assert f"cp3{sys.version_info.minor}-cp3{sys.version_info.minor}-" in name
    with zipfile.ZipFile(folder / name) as archive:
        archive.extract(extension, folder)
    code = "import sys; from any4d_fast import _ext; from pathlib import Path; m = _ext._load(Path(sys.argv[1])); "
    code += "print(m.answer(), m.architectures())"
    ran = subprocess.run([sys.executable, "-c", code, folder / extension], cwd=ROOT, capture_output=True, text=True)
    assert ran.stdout == "42 80,90a\n", ran.stderr


def test_without_a_compiler(repository: Path, toolkit: Path) -> None:
    done, folder = build_wheel(repository, toolkit, CUDA_HOME="/nowhere")
    assert done.returncode == 0, done.stdout
    assert "any4d_fast._C is not built ahead of time: CUDA_HOME=/nowhere has no bin/nvcc" in done.stdout
    name, files = contents(folder)
    assert name.endswith("-py3-none-any.whl")
    assert files == SOURCES


def test_sources_that_do_not_compile(repository: Path, toolkit: Path) -> None:
    (repository / "csrc" / "tiny.cu").write_text("int tiny() { return nobody_declared_this; }\n")
    done, folder = build_wheel(repository, toolkit)
    assert done.returncode == 0, done.stdout
    assert "nobody_declared_this" in done.stdout
    assert contents(folder)[1] == SOURCES
    done, _ = build_wheel(repository, toolkit, ANY4D_FAST_BUILD_CUDA="1")
    assert done.returncode != 0
    assert "any4d_fast._C: compiling failed: " in done.stdout


def test_demanded_and_impossible(repository: Path, toolkit: Path) -> None:
    done, folder = build_wheel(repository, toolkit, ANY4D_FAST_BUILD_CUDA="1", CUDA_HOME="/nowhere")
    assert done.returncode != 0 and not list(folder.glob("*.whl"))
    assert "any4d_fast._C: CUDA_HOME=/nowhere has no bin/nvcc" in done.stdout


def test_unknown_mode(toolkit: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "setup.py"), "--version"],
        cwd=tmp_path,
        env=fake_cuda.environment(toolkit, tmp_path, ANY4D_FAST_BUILD_CUDA="yes"),
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "ANY4D_FAST_BUILD_CUDA: expected auto, 0 or 1, got 'yes'" in done.stderr


def test_editable_install_builds_beside_the_package(repository: Path, toolkit: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(tmp_path / "site"), "-e"]
    environment = fake_cuda.environment(toolkit, tmp_path / "cache")
    done = subprocess.run([*command, str(repository)], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    (extension,) = (repository / "any4d_fast").glob("_C.*so")
    environment["PYTHONPATH"] = str(repository)
    code = "from any4d_fast import _ext; print(_ext.status()); print(_ext.module().answer())"
    run = [sys.executable, "-c", code]
    ran = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.stdout.splitlines()[1:] == ["42"] and "built ahead of time" in ran.stdout, ran.stderr
    (repository / "csrc" / "answer.cuh").write_text("constexpr int kAnswer = 43;\n")
    ran = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert f"{extension} is not used: " in ran.stdout and "has changed since it was built" in ran.stdout
