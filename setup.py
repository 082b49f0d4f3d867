"""The part of the build that pyproject.toml cannot state: packages, their folders, and the CUDA extension.

ANY4D_FAST_BUILD_CUDA=auto (the default) builds `any4d_fast._C` when a CUDA compiler is there, 1 fails with the reason
when it cannot be built, 0 leaves it out. Without it the package is pure Python and builds csrc/ at first use. torch is
neither imported nor needed here.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

HERE = Path(__file__).resolve().parent
# An isolated build does not have the source tree on its path; importing the package imports nothing else.
sys.path.insert(0, str(HERE))

from any4d_fast import _build  # noqa: E402

# `kernels/` is any4d_fast.kernels: a top-level package called `kernels` would overwrite Hugging Face's.
# `csrc/` is any4d_fast.csrc, and holds no module: an installed package builds it just in time.
ROOT = "any4d_fast"
KERNELS = f"{ROOT}.kernels"
SOURCES = f"{ROOT}.csrc"
EXTENSION = f"{ROOT}._C"


class CleanBuildPy(build_py):
    """Empties the package in build/lib first: setuptools would ship every file that an earlier build left there."""

    def run(self) -> None:
        built = Path(self.build_lib, ROOT).resolve()
        if not self.editable_mode and built != HERE / ROOT:
            shutil.rmtree(built, ignore_errors=True)
        super().run()


class BuildCuda(build_ext):
    """Hands the extension to any4d_fast/_build.py."""

    def run(self) -> None:
        for old in (HERE / ROOT).glob("_C.*so"):
            old.unlink()
        super().run()

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp, "cuda").resolve()
        try:
            plan = _build.make_plan()
            names = ", ".join(f"sm_{name}" for name in plan.architectures)
            print(f"{EXTENSION}: compiling for {names} with CUDA {plan.toolkit.version} in {folder}", flush=True)
            _build.build(plan, output, folder, folder / "build.log")
        except _build.BuildError as error:
            raise CompileError(f"{EXTENSION}: {error}") from error


def extensions() -> list[Extension]:
    """The CUDA extension, if it is wanted here."""
    try:
        mode = _build.build_mode()
    except _build.BuildError as error:
        raise SystemExit(str(error)) from None
    if mode == "0":
        return []
    if mode == "auto":
        try:
            _build.make_plan()
        except _build.BuildError as error:
            print(f"{EXTENSION} is not built ahead of time: {error}", flush=True)
            return []
    # setuptools warns and goes on when an optional extension raises CompileError.
    return [Extension(EXTENSION, sources=[], optional=mode == "auto")]


setup(
    packages=[
        *find_packages(include=[ROOT, f"{ROOT}.*"]),
        KERNELS,
        *(f"{KERNELS}.{name}" for name in find_packages("kernels")),
        SOURCES,
    ],
    include_package_data=False,  # what MANIFEST.in lists is for source distributions
    package_dir={ROOT: ROOT, KERNELS: "kernels", SOURCES: "csrc"},
    package_data={
        ROOT: ["py.typed", "**/*.json", "**/*.toml", "**/*.safetensors", "weights/*.md"],
        SOURCES: ["*.cu", "*.cuh", "*.h", "*.cpp"],
    },
    ext_modules=extensions(),
    cmdclass={"build_py": CleanBuildPy, "build_ext": BuildCuda},
)
