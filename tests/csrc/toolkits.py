"""The CUDA toolkits of the compile tests: the package registry's 13.0, and what it has of 12.8."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from any4d_fast import _toolkit

PARTS_12_8 = {
    "nvidia-cuda-nvcc-cu12": ("cuda_nvcc", "12.8"),
    "nvidia-cuda-runtime-cu12": ("cuda_runtime", "12.8"),
    "nvidia-cuda-cccl-cu12": ("cuda_cccl", "12.8"),
}

WRAPPER = """#!/bin/bash
# Everything that csrc/ uses was in PTX 8.7 already, CUDA 12.8's version; only the number must be one that it knows.
for argument in "$@"; do
  case "$argument" in *.ptx) sed -i 's/^\\.version 9\\.[0-9]*/.version 8.7/' "$argument" ;; esac
done
exec "{ptxas}" "$@"
"""


def chosen() -> _toolkit.Toolkit:
    """The toolkit of CUDA_HOME; else of pip's packages, so that a machine's own does not change the numbers; else any.

    Raises:
        BuildError: there is none.
    """
    if not os.environ.get("CUDA_HOME"):
        for nvcc in _from_pip("cu13/bin/nvcc"):
            return _toolkit.inspect(nvcc)
    return _toolkit.find_toolkit()


def _from_pip(pattern: str) -> list[Path]:
    return [path for folder in _toolkit._pip_folders() for path in folder.glob(pattern)]


def cuda_12_8(folder: Path) -> _toolkit.Toolkit:
    """CUDA 12.8's headers, device library and assembler behind 13.0's compiler driver and front end.

    Raises:
        BuildError: one of the packages is not installed.
    """
    driver = _from_pip("cu13/bin/nvcc")
    parts = [_from_pip(f"{name}/include") for name, _ in PARTS_12_8.values()]
    if not driver or not all(parts):
        raise _toolkit.BuildError(f"needs the packages {' '.join(PARTS_12_8)} of 12.8 and nvidia-cuda-nvcc of 13.0")
    home = driver[0].parents[1]
    own = parts[0][0].parent
    (folder / "bin").mkdir(parents=True)
    for path in (home / "bin").iterdir():
        # nvcc looks for the others where it is itself, wherever a link leads.
        if path.name in ("nvcc", "nvcc.profile"):
            shutil.copy(path, folder / "bin")
        elif path.name != "ptxas":
            (folder / "bin" / path.name).symlink_to(path)
    wrapper = folder / "bin" / "ptxas"
    wrapper.write_text(WRAPPER.format(ptxas=own / "bin" / "ptxas"))
    wrapper.chmod(0o755)
    for (include,) in parts:
        shutil.copytree(include, folder / "include", dirs_exist_ok=True)
    # What the front end generates calls this header's macros, and they have changed.
    shutil.copy(home / "include" / "crt" / "host_runtime.h", folder / "include" / "crt")
    (folder / "nvvm").mkdir()
    (folder / "nvvm" / "bin").symlink_to(home / "nvvm" / "bin")
    (folder / "nvvm" / "libdevice").symlink_to(own / "nvvm" / "libdevice")
    return _toolkit.Toolkit(folder / "bin" / "nvcc", "12.8", folder / "include", home / "lib" / "libcudart_static.a")
