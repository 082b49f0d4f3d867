"""The package as it is built, installed and imported: what the wheel holds, and what an import costs."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

import any4d_fast

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = {"any4d_fast/weights/README.md", "any4d_fast/weights/tiny.safetensors"}
HEAVY = ("triton", "rerun", "trimesh", "matplotlib", "av", "PIL", "typer", "rich", "huggingface_hub")


def run(*command: str | Path, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command outside of this process's import path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # The CUDA extension has tests of its own (test_setup.py): here the package is pure Python with any machine's tools.
    environment["ANY4D_FAST_BUILD_CUDA"] = "0"
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert not check or done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the build reads, so that building leaves nothing behind in the repository."""
    folder = tmp_path_factory.mktemp("source")
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    for name in ("any4d_fast", "kernels", "csrc", "docs", "examples"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built in pip's isolated environment (without torch) over the remains of an older build."""
    stale = source / "build" / "lib" / "any4d_fast" / "deleted_long_ago.py"
    stale.parent.mkdir(parents=True)
    stale.touch()
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, source, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, built in an isolated environment."""
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--sdist", "--outdir", folder, source, cwd=folder)
    (path,) = folder.glob("*.tar.gz")
    return path


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def install_in_new_environment(folder: Path, *arguments: str | Path) -> Path:
    """Install with pip into an empty virtual environment (no torch, no setuptools); returns its interpreter."""
    venv.create(folder / "env", with_pip=False)
    python = folder / "env" / ("Scripts" if os.name == "nt" else "bin") / "python"
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--quiet", "--no-deps", *arguments, cwd=folder)
    return python


def where_kernels_are(python: Path, cwd: Path) -> Path:
    code = "import any4d_fast, any4d_fast.kernels as kernels; print(kernels.__file__)"
    return Path(run(python, "-c", code, cwd=cwd).stdout.strip()).resolve()


def test_wheel_has_one_top_level_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        top_level = {name.split("/")[0] for name in archive.namelist()}
    assert {name for name in top_level if not name.endswith(".dist-info")} == {"any4d_fast"}


def test_wheel_holds_every_module_and_nothing_stale(source: Path, wheel: Path) -> None:
    expected = {path.relative_to(source).as_posix() for path in (source / "any4d_fast").rglob("*.py")}
    expected |= {f"any4d_fast/{path.relative_to(source).as_posix()}" for path in (source / "kernels").rglob("*.py")}
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("any4d_fast/") and name.endswith(".py")}
    assert packed == expected, "a folder of modules without __init__.py is not packed"


def test_wheel_holds_the_cuda_sources(source: Path, wheel: Path) -> None:
    expected = {path.name for path in (source / "csrc").iterdir() if path.suffix in (".cu", ".cuh", ".h", ".cpp")}
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("any4d_fast/csrc/")}
    assert packed == {f"any4d_fast/csrc/{name}" for name in expected}
    assert wheel.name.endswith("-py3-none-any.whl")


def test_wheel_holds_data_and_licenses(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "any4d_fast/py.typed" in names
    assert {Path(name).name for name in names if "/licenses/" in name} == {"LICENSE", "NOTICE"}


def test_wheel_holds_the_weights(source: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name: archive.read(name) for name in archive.namelist() if name.startswith("any4d_fast/weights/")}
    assert set(packed) == WEIGHTS
    assert all(content == (source / name).read_bytes() for name, content in packed.items())
    assert len(packed["any4d_fast/weights/tiny.safetensors"]) <= 30e6, "the packaged weights are at most 30 MB"


def test_sdist_holds_the_weights(source: Path, sdist: Path) -> None:
    root = sdist.name.removesuffix(".tar.gz")
    with tarfile.open(sdist) as archive:
        sizes = {member.name.removeprefix(f"{root}/"): member.size for member in archive if member.isfile()}
    assert {name for name in sizes if name.startswith("any4d_fast/weights/")} == WEIGHTS
    assert all(sizes[name] == (source / name).stat().st_size for name in WEIGHTS)


def test_sdist_holds_what_its_readme_and_tests_name(source: Path, sdist: Path) -> None:
    root = sdist.name.removesuffix(".tar.gz")
    with tarfile.open(sdist) as archive:
        names = {member.name.removeprefix(f"{root}/") for member in archive}
    links = re.findall(r"\]\(([^):#]+)[^):]*\)", (source / "README.md").read_text())
    # Plots are among the benchmarks, which are not copied for these tests.
    assert {link for link in links if not link.startswith("benchmarks/")} <= names
    assert "examples/train_with_ops.py" in names


def test_metadata(metadata: Message) -> None:
    assert metadata["Name"] == "any4d-fast"
    assert metadata["Version"] == any4d_fast.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    requirements = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert any(line.startswith("torch") for line in requirements)
    assert all("<" in line and ">=" in line for line in requirements), "every requirement is bounded on both sides"
    assert set(metadata.get_all("Provides-Extra", [])) == {"dev", "nvcc", "train", "viz"}


def test_wheel_installs_and_imports_without_torch(wheel: Path, tmp_path: Path) -> None:
    python = install_in_new_environment(tmp_path, wheel)
    kernels = where_kernels_are(python, tmp_path)
    assert kernels.parts[-3:] == ("any4d_fast", "kernels", "__init__.py")
    assert (tmp_path / "env").resolve() in kernels.parents


def test_editable_install_finds_kernels_in_the_source_tree(source: Path, tmp_path: Path) -> None:
    python = install_in_new_environment(tmp_path, "--editable", source)
    assert where_kernels_are(python, tmp_path) == source.resolve() / "kernels" / "__init__.py"
    # From the repository's root, where sys.path finds any4d_fast/ without its mapped folder.
    assert where_kernels_are(python, source) == source.resolve() / "kernels" / "__init__.py"
    added = source / "kernels" / "added_after_install.py"
    added.touch()
    try:
        run(python, "-c", "import any4d_fast.kernels.added_after_install", cwd=tmp_path)
    finally:
        added.unlink()


def test_kernels_refuse_another_name() -> None:
    done = run(sys.executable, "-c", "import kernels", cwd=ROOT, check=False)
    assert done.returncode != 0
    assert "ImportError: this folder was imported as 'kernels', but its package is 'any4d_fast.kernels'" in done.stderr


def test_kernels_under_their_name() -> None:
    assert importlib.import_module("any4d_fast.kernels").__name__ == "any4d_fast.kernels"


def test_import_is_light(tmp_path: Path) -> None:
    code = """
import json, sys, time
import torch
before = set(sys.modules)
start = time.perf_counter()
import any4d_fast
print(json.dumps({"seconds": time.perf_counter() - start, "new": sorted(set(sys.modules) - before)}))
"""
    result = json.loads(run(sys.executable, "-c", code, cwd=tmp_path).stdout)
    # 2 s is the project's limit for what the import may add to torch's own.
    assert result["seconds"] < 2.0
    assert {name.split(".")[0] for name in result["new"]}.isdisjoint(HEAVY)


def test_public_names() -> None:
    assert set(any4d_fast.__all__) <= set(dir(any4d_fast))
    assert any4d_fast.__version__
    with pytest.raises(AttributeError, match="module 'any4d_fast' has no attribute 'Any5D'"):
        _ = any4d_fast.Any5D


@pytest.mark.parametrize("name", sorted(set(any4d_fast.__all__) - {"__version__"}))
def test_public_name_resolves(name: str) -> None:
    value = getattr(any4d_fast, name)
    assert getattr(any4d_fast, name) is value
    assert callable(value) or value.__name__ == f"any4d_fast.{name}"
