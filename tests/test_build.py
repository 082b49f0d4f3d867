"""Finding what csrc/ is built with, and the build itself, with a toolkit that is made up."""

from __future__ import annotations

import errno
import fnmatch
import os
import shutil
from pathlib import Path

import pytest

from any4d_fast import _build, _toolkit
from any4d_fast._toolkit import BuildError
from tests import fake_cuda


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = fake_cuda.make_toolkit(tmp_path / "cuda")
    monkeypatch.setenv("CUDA_HOME", str(folder))
    monkeypatch.delenv("ANY4D_FAST_CUDA_ARCHS", raising=False)
    return folder


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = fake_cuda.make_sources(tmp_path / "csrc")
    monkeypatch.setattr(_build, "source_folder", lambda: folder)
    return folder


def build(folder: Path, plan: _build.Plan) -> Path:
    output = folder / "out" / "_C.so"
    _build.build(plan, output, folder / "objects", folder / "build.log")
    return output


def test_toolkit_of_cuda_home(toolkit: Path) -> None:
    found = _toolkit.find_toolkit()
    assert (found.nvcc, found.version, found.release) == (toolkit / "bin" / "nvcc", "13.0.88", (13, 0))
    assert found.include == toolkit / "include"
    assert found.cudart == toolkit / "lib64" / "libcudart_static.a"


def test_relative_paths(toolkit: Path, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ninja runs in the folder of objects."""
    (tmp_path / "cxx").symlink_to(shutil.which("g++") or "/usr/bin/g++")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_HOME", "cuda")
    monkeypatch.setenv("CXX", "./cxx")
    assert build(tmp_path, _build.make_plan()).is_file()


def test_toolkit_behind_a_script_on_path(toolkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "bin" / "nvcc"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {toolkit}/bin/nvcc "$@"\n')
    script.chmod(0o755)
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", f"{script.parent}:/usr/bin:/bin")
    assert _toolkit.find_toolkit().include == toolkit / "include"


def test_toolkit_of_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cu12", "cu13"):
        fake_cuda.make_toolkit(tmp_path / "nvidia" / name)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(_toolkit, "_DEFAULT", tmp_path / "nowhere")
    monkeypatch.setattr(_toolkit, "_pip_folders", lambda: [tmp_path / "nvidia"])
    assert _toolkit.find_nvcc() == tmp_path / "nvidia" / "cu13" / "bin" / "nvcc"


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(_toolkit, "_DEFAULT", tmp_path / "nowhere")
    monkeypatch.setattr(_toolkit, "_pip_folders", lambda: [])
    with pytest.raises(BuildError, match="no CUDA compiler: CUDA_HOME is not set, and nvcc is not on PATH"):
        _toolkit.find_toolkit()


@pytest.mark.parametrize("name", ["CUDA_HOME", "CUDA_PATH"])
def test_wrong_cuda_home(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv(name, "/nowhere")
    with pytest.raises(BuildError, match=f"{name}=/nowhere has no bin/nvcc"):
        _toolkit.find_toolkit()


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("exit 3", "nvcc --version fails with exit code 3: it prints nothing"),
        ("echo 'libtool: broken' >&2; exit 1", "fails with exit code 1: libtool: broken"),
        ("echo hello", "names no version"),
        ("printf 'cass\\351' >&2; exit 1", "fails with exit code 1: cass\ufffd"),
        ("echo V11.8.89", "is CUDA 11.8.89; expected 12.8 or later"),
    ],
)
def test_broken_compiler(toolkit: Path, script: str, message: str) -> None:
    (toolkit / "bin" / "nvcc").write_text(f"#!/bin/sh\n{script}\n")
    with pytest.raises(BuildError, match=message):
        _toolkit.find_toolkit()


def test_toolkit_without_headers(toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (toolkit / "include" / "cuda_runtime_api.h").unlink()
    monkeypatch.setattr(_toolkit, "_DISTRIBUTION", ())
    with pytest.raises(BuildError, match="has no cuda_runtime_api.h"):
        _toolkit.find_toolkit()


def test_missing_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("CXX", "a-compiler-that-nobody-wrote")
        with pytest.raises(BuildError, match="no C\\+\\+ compiler: a-compiler-that-nobody-wrote is not on PATH"):
            _toolkit.find_tools()
    with monkeypatch.context() as patch:
        patch.setattr(_toolkit.sysconfig, "get_path", lambda name: "/nowhere")
        with pytest.raises(BuildError, match="Python's headers are not in /nowhere"):
            _toolkit.find_tools()
    monkeypatch.setitem(_toolkit.sys.modules, "pybind11", None)
    with pytest.raises(BuildError, match="the package pybind11 is not installed"):
        _toolkit.find_tools()


def test_no_ninja(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(_toolkit.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setitem(_toolkit.sys.modules, "ninja", None)
    with pytest.raises(BuildError, match="ninja is not installed"):
        _toolkit._ninja()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", _build.ARCHITECTURES),
        ("80;90a", ("80", "90a")),
        ("9.0 8.0", ("80", "90a")),
        ("sm_120, sm_100", ("100", "120")),
    ],
)
def test_requested_architectures(
    toolkit: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: tuple[str, ...]
) -> None:
    monkeypatch.setenv("ANY4D_FAST_CUDA_ARCHS", text)
    assert _build.requested_architectures(_toolkit.find_toolkit()) == expected


def test_unknown_architecture(toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANY4D_FAST_CUDA_ARCHS", "80;75")
    with pytest.raises(
        BuildError, match="ANY4D_FAST_CUDA_ARCHS: expected some of 80 86 89 90a 100 120 .*got \\['75'\\]"
    ):
        _build.requested_architectures(_toolkit.find_toolkit())


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((7, 5), None),
        ((8, 0), "80"),
        ((8, 6), "86"),
        ((8, 7), "86"),
        ((8, 9), "89"),
        ((9, 0), "90a"),
        ((10, 0), "100"),
        ((10, 3), "100"),
        ((11, 0), None),
        ((12, 1), "120"),
    ],
)
def test_architecture_for(capability: tuple[int, int], expected: str | None) -> None:
    assert _build.architecture_for(capability) == expected


def test_architecture_among_those_built() -> None:
    assert _build.architecture_for((8, 9), ["80", "90a"]) == "80"
    assert _build.architecture_for((8, 0), ["86", "90a"]) is None


def test_exceptions_name_sources_that_exist() -> None:
    names = [path.name for path in _build.source_folder().glob("*.cu")]
    assert all(fnmatch.filter(names, pattern) for pattern in _build.ONLY)


def test_closure_follows_includes(sources: Path) -> None:
    (sources / "answer.cuh").write_text('#include <cuda_bf16.h>\n# include "deep.cuh"\n#include "answer.cuh"\n')
    (sources / "deep.cuh").write_text('#include "not_here.h"\n')
    assert [path.name for path in _build.closure(sources / "tiny.cu")] == [
        "tiny.cu",
        "answer.cuh",
        "deep.cuh",
        "tiny.h",
    ]


def test_builds_and_keeps_what_is_unchanged(toolkit: Path, sources: Path, tmp_path: Path) -> None:
    plan = _build.make_plan()
    first = build(tmp_path, plan)
    assert first.read_bytes()[:4] == b"\x7fELF"
    assert fake_cuda.calls(toolkit) == ["attention_sm90.cu", "other.cu", "tiny.cu"]
    build(tmp_path, plan)
    assert len(fake_cuda.calls(toolkit)) == 3
    (sources / "answer.cuh").write_text("constexpr int kAnswer = 43;\n")
    edited = _build.make_plan()
    assert edited.key != plan.key
    build(tmp_path, edited)
    assert fake_cuda.calls(toolkit) == ["attention_sm90.cu", "other.cu", "tiny.cu", "tiny.cu"]


def test_source_for_one_architecture(toolkit: Path, sources: Path) -> None:
    flags = {step.source.name: " ".join(step.flags) for step in _build.make_plan().steps}
    assert flags["attention_sm90.cu"].count("-gencode") == 1
    assert "code=sm_90a" in flags["attention_sm90.cu"]
    assert flags["tiny.cu"].count("-gencode") == 6
    assert all("-DANY4D_SM90A" in own for own in flags.values())
    flags = {step.source.name: " ".join(step.flags) for step in _build.make_plan(["80"]).steps}
    assert "attention_sm90.cu" not in flags
    assert not any("-DANY4D_SM90A" in own for own in flags.values())


def test_key_covers_what_the_extension_is_made_from(
    toolkit: Path, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    keys = [_build.make_plan().key, _build.make_plan(["80"]).key]
    (sources / "added.cu").write_text("int added() { return 1; }\n")
    keys.append(_build.make_plan().key)
    with monkeypatch.context() as patch:
        patch.setattr(_build, "NVCC_FLAGS", (*_build.NVCC_FLAGS, "-G"))
        keys.append(_build.make_plan().key)
    for name in ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "-G")
            keys.append(_build.make_plan().key)
    with monkeypatch.context() as patch:
        patch.setenv("CUDA_HOME", str(fake_cuda.make_toolkit(tmp_path / "older", "12.8")))
        keys.append(_build.make_plan().key)
    with monkeypatch.context() as patch:
        patch.setattr(_build.sysconfig, "get_config_var", lambda name: "cpython-399-x86_64-linux-gnu")
        keys.append(_build.make_plan().key)
    assert len(set(keys)) == len(keys)
    assert _build.make_plan().key == keys[2]


def test_failure_leaves_nothing_old_in_place(toolkit: Path, sources: Path, tmp_path: Path) -> None:
    output = build(tmp_path, _build.make_plan())
    (sources / "tiny.cu").write_text("int tiny() { return a_name_that_nobody_declared; }\n")
    with pytest.raises(BuildError, match="error: .a_name_that_nobody_declared. was not declared") as raised:
        build(tmp_path, _build.make_plan())
    assert str(tmp_path / "build.log") in str(raised.value)
    assert "a_name_that_nobody_declared" in (tmp_path / "build.log").read_text()
    assert not output.exists()


def test_full_disk_keeps_no_part(toolkit: Path, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def copy(source: Path, target: Path) -> None:
        target.write_bytes(source.read_bytes()[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(_build.shutil, "copyfile", copy)
    with pytest.raises(OSError, match="No space left"):
        build(tmp_path, _build.make_plan())
    assert not list((tmp_path / "out").iterdir())


def test_undefined_symbol_is_not_built_silently(toolkit: Path, sources: Path, tmp_path: Path) -> None:
    (sources / "tiny.cu").write_text("int another_name() { return 1; }\n")
    output = build(tmp_path, _build.make_plan())
    with pytest.raises(ImportError, match="undefined symbol"):
        from any4d_fast import _ext

        _ext._load(output)


def test_paths_with_spaces(toolkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fake_cuda.make_sources(tmp_path / "a folder: $1" / "csrc")
    monkeypatch.setattr(_build, "source_folder", lambda: folder)
    assert build(tmp_path / "an output", _build.make_plan()).is_file()
