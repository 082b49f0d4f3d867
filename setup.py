"""The part of the build that pyproject.toml cannot state: packages, their folders, and a build that starts clean."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

# `kernels/` is any4d_fast.kernels: a top-level package called `kernels` would overwrite Hugging Face's.
ROOT = "any4d_fast"
KERNELS = f"{ROOT}.kernels"


class CleanBuildPy(build_py):
    """Empties the package in build/lib first: setuptools would ship every file that an earlier build left there."""

    def run(self) -> None:
        built = Path(self.build_lib, ROOT).resolve()
        if not self.editable_mode and built != Path(__file__).resolve().parent / ROOT:
            shutil.rmtree(built, ignore_errors=True)
        super().run()


setup(
    packages=[
        *find_packages(include=[ROOT, f"{ROOT}.*"]),
        KERNELS,
        *(f"{KERNELS}.{name}" for name in find_packages("kernels")),
    ],
    package_dir={ROOT: ROOT, KERNELS: "kernels"},
    package_data={ROOT: ["py.typed", "**/*.json"]},
    cmdclass={"build_py": CleanBuildPy},
)
