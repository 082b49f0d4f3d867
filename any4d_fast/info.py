"""What this machine offers: `python -m any4d_fast.info` prints it, for bug reports and for choosing a backend."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from typing import Any

import any4d_fast
from any4d_fast import _toolkit

PACKAGES = (
    "torch",
    "triton",
    "flash-attn",
    "flash-attn-4",
    "numpy",
    "safetensors",
    "huggingface_hub",
    "av",
    "pillow",
    "rerun-sdk",
    "trimesh",
)
VARIABLES = (
    "ANY4D_FAST_BACKEND",
    "ANY4D_FAST_CUDA_GRAPHS",
    "ANY4D_FAST_BUILD_CUDA",
    "ANY4D_FAST_CACHE",
    "TRITON_INTERPRET",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_HOME",
    "CUDA_PATH",
)
NOT_INSTALLED = "not installed"
_GIB = 2.0**30


def collect() -> dict[str, Any]:
    """Versions, devices and backends of this machine, as plain JSON types.

    Nothing here raises for what is missing: an absent package, GPU or compiler is part of the answer.

    Returns:
        `any4d_fast`, `python`, `platform`: str.
        `packages`: name -> version or "not installed".
        `cuda`: `available` (bool), `runtime` and `cudnn` (the versions that torch was built with, str or None),
            `nvcc` (version of the compiler that would build csrc/, str or None).
        `gpus`: one dict a device with `name`, `capability` (such as "9.0"), `memory_gib`, `multiprocessors`.
        `backends`: one dict a backend with `name`, `available` (bool), `reason` (why it is not available, or a remark).
        `environment`: the variables that change what runs -> value, those that are set.
    """
    cuda, gpus = _cuda()
    return {
        "any4d_fast": any4d_fast.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cuda": cuda,
        "gpus": gpus,
        "backends": _backends(),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return NOT_INSTALLED


def _cuda() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    cuda: dict[str, Any] = {"available": False, "runtime": None, "cudnn": None, "nvcc": _nvcc_release()}
    try:
        import torch
    except (ImportError, OSError) as error:
        return {**cuda, "error": f"torch cannot be imported: {error}"}, []
    cudnn = torch.backends.cudnn.version()
    cuda.update(
        available=torch.cuda.is_available(), runtime=torch.version.cuda, cudnn=None if cudnn is None else str(cudnn)
    )
    gpus = []
    for index in range(torch.cuda.device_count() if cuda["available"] else 0):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / _GIB, 1),
                "multiprocessors": properties.multi_processor_count,
            }
        )
    return cuda, gpus


def _nvcc_release() -> str | None:
    try:
        return _toolkit.nvcc_version(_toolkit.find_nvcc())
    except _toolkit.BuildError:
        return None


def _backends() -> list[dict[str, Any]]:
    try:
        from any4d_fast.backends import describe
    except (ImportError, OSError) as error:
        return [{"name": "eager", "available": False, "reason": f"torch cannot be imported: {error}"}]
    return [{"name": name, "available": available, "reason": reason} for name, available, reason in describe()]


def render(info: dict[str, Any]) -> str:
    """The result of `collect` as aligned lines of text."""
    cuda = info["cuda"]
    lines = [
        _line("any4d_fast", info["any4d_fast"]),
        _line("python", info["python"]),
        _line("platform", info["platform"]),
    ]
    lines += [_line(name, version) for name, version in info["packages"].items()]
    lines.append(_line("CUDA", _cuda_summary(cuda)))
    lines += [_line(f"GPU {index}", _gpu_summary(gpu)) for index, gpu in enumerate(info["gpus"])]
    lines += [_line(name, value) for name, value in info["environment"].items()]
    lines += ["", "backends"]
    lines += [
        _line(f"  {backend['name']}", f"{'yes' if backend['available'] else 'no':<4} {backend['reason']}".rstrip())
        for backend in info["backends"]
    ]
    return "\n".join(lines)


def _line(name: str, value: str) -> str:
    return f"{name:<20} {value}"


def _cuda_summary(cuda: dict[str, Any]) -> str:
    if "error" in cuda:
        return str(cuda["error"])
    parts = [f"torch built with CUDA {cuda['runtime']}" if cuda["runtime"] else "torch built for the CPU only"]
    if cuda["cudnn"]:
        parts.append(f"cuDNN {cuda['cudnn']}")
    parts.append(f"nvcc {cuda['nvcc']}" if cuda["nvcc"] else "no nvcc")
    return ", ".join(parts)


def _gpu_summary(gpu: dict[str, Any]) -> str:
    return (
        f"{gpu['name']}, compute capability {gpu['capability']}, {gpu['memory_gib']} GiB, "
        f"{gpu['multiprocessors']} multiprocessors"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; `--json` prints it for programs."""
    parser = argparse.ArgumentParser(prog="python -m any4d_fast.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    arguments = parser.parse_args(argv)
    info = collect()
    print(json.dumps(info, indent=2) if arguments.json else render(info))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
