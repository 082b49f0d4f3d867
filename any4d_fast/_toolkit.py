"""What building csrc/ needs: a CUDA toolkit, a C++ compiler, Python's headers, pybind11 and ninja; or why it is absent.

Only the standard library is imported at the top, and no torch anywhere: setup.py uses this in an isolated environment.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MINIMUM_CUDA = (12, 8)
"""Oldest release that knows every architecture the extension is built for."""

_PIP_PACKAGES = "nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm nvidia-cuda-runtime nvidia-cuda-cccl"
_DEFAULT = Path("/usr/local/cuda/bin/nvcc")
_INCLUDES = ("include", "targets/x86_64-linux/include", "targets/sbsa-linux/include")
_LIBRARIES = ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib", "lib/x86_64-linux-gnu")
# A distribution's own package has its compiler in a folder of its own, and the rest here.
_DISTRIBUTION = (Path("/usr/include"), Path("/usr/lib/x86_64-linux-gnu"))


class BuildError(RuntimeError):
    """The extension cannot be built; the message is the reason."""


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit that can compile and link the extension."""

    nvcc: Path
    version: str
    """Of the compiler, such as "13.0.88"."""
    include: Path
    cudart: Path
    """The static library of the runtime."""

    @property
    def release(self) -> tuple[int, int]:
        major, minor = self.version.split(".")[:2]
        return int(major), int(minor)


@dataclass(frozen=True)
class Tools:
    """Everything else."""

    cxx: str
    cxx_version: str
    ninja: str
    python_include: Path
    pybind11_include: Path
    pybind11_version: str


def find_toolkit() -> Toolkit:
    """The CUDA toolkit of the nvcc that `find_nvcc` finds.

    Raises:
        BuildError: there is none, it does not run, it is too old, or it lacks headers or the static runtime.
    """
    return inspect(find_nvcc())


def inspect(nvcc: Path) -> Toolkit:
    """The toolkit that a compiler belongs to.

    Raises:
        BuildError: as of `find_toolkit`.
    """
    nvcc = nvcc.absolute()  # ninja runs elsewhere
    version = nvcc_version(nvcc)
    if tuple(int(part) for part in version.split(".")[:2]) < MINIMUM_CUDA:
        oldest = ".".join(map(str, MINIMUM_CUDA))
        raise BuildError(f"{nvcc} is CUDA {version}; expected {oldest} or later (CUDA_HOME chooses another)")
    home = _home(nvcc)
    include = _first(home, _INCLUDES, "cuda_runtime_api.h").parent
    return Toolkit(nvcc, version, include, _first(home, _LIBRARIES, "libcudart_static.a"))


def find_nvcc() -> Path:
    """The compiler of CUDA_HOME or CUDA_PATH, on PATH, in /usr/local/cuda, or in pip's packages.

    Raises:
        BuildError: there is none.
    """
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            nvcc = Path(os.environ[name], "bin", "nvcc")
            if not nvcc.is_file():
                raise BuildError(f"{name}={os.environ[name]} has no bin/nvcc; name a CUDA toolkit, or unset it")
            return nvcc
    for nvcc in _installed():
        return nvcc
    raise BuildError(
        "no CUDA compiler: CUDA_HOME is not set, and nvcc is not on PATH, in /usr/local/cuda or in pip's packages; "
        f"install a CUDA toolkit, or the packages {_PIP_PACKAGES} of one release"
    )


def nvcc_version(nvcc: Path) -> str:
    """Such as "13.0.88".

    Raises:
        BuildError: the compiler does not run, or does not say.
    """
    match = re.search(r"\bV(\d+\.\d+(?:\.\d+)*)", output_of(str(nvcc), "--version"))
    if match is None:
        raise BuildError(f"{nvcc} --version names no version; install the CUDA toolkit again")
    return match[1]


def _installed() -> Iterator[Path]:
    on_path = shutil.which("nvcc")
    if on_path:
        yield Path(on_path)
    if _DEFAULT.is_file():
        yield _DEFAULT
    yield from sorted((nvcc for folder in _pip_folders() for nvcc in folder.glob("cu*/bin/nvcc")), reverse=True)


def _pip_folders() -> list[Path]:
    """Where pip puts NVIDIA's packages: the folders of the namespace package `nvidia`."""
    spec = importlib.util.find_spec("nvidia")
    return [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []


def _home(nvcc: Path) -> Path:
    """The toolkit's folder, of which nvcc itself knows best: what is on PATH may be a link or a script."""
    command = [str(nvcc), "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull]
    match = re.search(r"^#\$ _HERE_=(.+)$", output_of(*command), re.MULTILINE)
    return (Path(match[1]) if match else nvcc.resolve().parent).parent


def _first(home: Path, folders: tuple[str, ...], name: str) -> Path:
    for folder in (*(home / part for part in folders), *_DISTRIBUTION):
        if (folder / name).is_file():
            return folder / name
    raise BuildError(f"the CUDA toolkit in {home} has no {name}; install its development files, or set CUDA_HOME")


def output_of(*command: str) -> str:
    """What a command prints, errors last.

    Raises:
        BuildError: it cannot be run, or fails.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{command[0]} does not run: {error}") from error
    if done.returncode != 0:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["it prints nothing"]
        raise BuildError(f"{' '.join(command)} fails with exit code {done.returncode}: {last[0]}")
    return done.stdout + done.stderr


def find_tools() -> Tools:
    """The C++ compiler (of CXX, or g++), ninja, pybind11 and Python's headers.

    Raises:
        BuildError: one of them is absent; the message says how to get it.
    """
    cxx = shutil.which(os.environ.get("CXX") or "g++")
    if cxx is None:
        raise BuildError(f"no C++ compiler: {os.environ.get('CXX') or 'g++'} is not on PATH; install g++, or set CXX")
    include = Path(sysconfig.get_path("include"))
    if not (include / "Python.h").is_file():
        raise BuildError(f"Python's headers are not in {include}; install them (on Debian and Ubuntu: python3-dev)")
    try:
        import pybind11
    except ImportError as error:
        raise BuildError("the package pybind11 is not installed; pip install pybind11") from error
    pybind11_include = Path(pybind11.get_include())
    cxx = os.path.abspath(cxx)  # ninja runs elsewhere
    return Tools(
        cxx, output_of(cxx, "--version").splitlines()[0], _ninja(), include, pybind11_include, pybind11.__version__
    )


def _ninja() -> str:
    beside_python = str(Path(sys.executable).parent)
    found = shutil.which("ninja") or shutil.which("ninja", path=beside_python)
    if found:
        return found
    try:
        import ninja
    except ImportError as error:
        raise BuildError("ninja is not installed; pip install ninja") from error
    return str(Path(ninja.BIN_DIR) / "ninja")
