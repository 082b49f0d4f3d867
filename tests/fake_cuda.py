"""A CUDA toolkit and a csrc/ that need neither CUDA nor time: nvcc is a script around g++ that counts its calls."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from any4d_fast import _build, _ext

NVCC = """#!/bin/bash
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
case "$*" in
  *--version*) echo "Cuda compilation tools, release VERSION, VVERSION.88"; exit ;;
  *--list-gpu-code*) printf 'sm_%s\\n' 75 80 86 89 90 100 120; exit ;;
  *--dryrun*) echo "#\\$ _HERE_=$here" >&2; exit ;;
esac
arguments=()
while [ $# -gt 0 ]; do
  case "$1" in
    -MF|-o) arguments+=("$1" "$2"); shift ;;
    -MD|-c) arguments+=("$1") ;;
    *.cu) source=$1 ;;
  esac
  shift
done
echo "$(basename "$source")" >> "$here/../calls"
sleep "${FAKE_NVCC_SECONDS:-0}"
exec g++ -fPIC -x c++ "$source" "${arguments[@]}"
"""

BINDINGS = """#include <Python.h>
#include "build_info.h"
#include "tiny.h"

static PyObject* architectures(PyObject*, PyObject*) { return PyUnicode_FromString(any4d::build_architectures()); }
static PyObject* sources_key(PyObject*, PyObject*) { return PyUnicode_FromString(any4d::build_sources_key()); }
static PyObject* runtime_version(PyObject*, PyObject*) { return PyLong_FromLong(13000); }
static PyObject* driver_version(PyObject*, PyObject*) { return PyLong_FromLong(0); }
static PyObject* answer(PyObject*, PyObject*) { return PyLong_FromLong(tiny()); }

static PyMethodDef functions[] = {
    {"architectures", architectures, METH_NOARGS, ""}, {"sources_key", sources_key, METH_NOARGS, ""},
    {"runtime_version", runtime_version, METH_NOARGS, ""}, {"driver_version", driver_version, METH_NOARGS, ""},
    {"answer", answer, METH_NOARGS, ""}, {nullptr, nullptr, 0, nullptr}};
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", "", -1, functions};
PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&definition); }
"""

SOURCES = {
    "bindings.cpp": BINDINGS,
    "build_info.h": (Path(__file__).resolve().parents[1] / "csrc" / "build_info.h").read_text(),
    "tiny.h": "int tiny();\n",
    "answer.cuh": "constexpr int kAnswer = 42;\n",
    "tiny.cu": '#include "answer.cuh"\n#include "tiny.h"\nint tiny() { return kAnswer; }\n',
    "other.cu": "int other() { return 1; }\n",
    "attention_sm90.cu": "int attention() { return 1; }\n",
}


def make_toolkit(folder: Path, version: str = "13.0") -> Path:
    """A folder that CUDA_HOME can name."""
    for name in ("bin", "include", "lib64"):
        (folder / name).mkdir(parents=True)
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text(NVCC.replace("VERSION", version))
    nvcc.chmod(0o755)
    (folder / "include" / "cuda_runtime_api.h").write_text("#pragma once\n")
    subprocess.run(["ar", "rc", folder / "lib64" / "libcudart_static.a"], check=True)
    return folder


def make_sources(folder: Path) -> Path:
    """A csrc/ whose extension answers 42."""
    folder.mkdir(parents=True)
    for name, text in SOURCES.items():
        (folder / name).write_text(text)
    return folder


def calls(toolkit: Path) -> list[str]:
    """The sources that nvcc has compiled so far."""
    path = toolkit / "calls"
    return sorted(path.read_text().split()) if path.is_file() else []


def pretend(sources: Path, capability: tuple[int, int] = (9, 0), patch: pytest.MonkeyPatch | None = None) -> None:
    """Let `_ext` see one GPU, these sources, and no extension that was built ahead of time."""
    patch = patch or pytest.MonkeyPatch()
    patch.setattr(_build, "source_folder", lambda: sources)
    patch.setattr(_ext, "_visible_gpus", lambda: ([capability], 13000))
    patch.setattr(_ext, "_prebuilt_file", lambda: None)
    patch.setattr(_ext, "_OUTCOME", [])


def environment(toolkit: Path, cache: Path, **more: str) -> dict[str, str]:
    """Of a process that builds with this toolkit, into this cache."""
    dropped = ("CUDA_PATH", "ANY4D_FAST_BUILD_CUDA", "ANY4D_FAST_CUDA_ARCHS", "XDG_CACHE_HOME")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return {**kept, "CUDA_HOME": str(toolkit), "ANY4D_FAST_CACHE": str(cache), **more}
