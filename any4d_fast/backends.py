"""Which backend runs which call, and why the others do not.

Every op registers its backends, fastest first, each with a function that returns the reasons why it cannot run
a given call (no reasons: it can). `select` takes the first one that can; a backend that the caller names must run
or the call raises with the reasons.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("any4d_fast")

Reasons = Callable[..., list[str]]

_REGISTRY: dict[str, dict[str, Reasons]] = {}
_OVERRIDE: list[list[str]] = []  # a list of its own for every block, to be found again by identity
_LOGGED: set[tuple[str, str]] = set()

EAGER = "eager"


class BackendError(RuntimeError):
    """A backend was named that cannot run this call; the message lists the reasons."""


def register(op: str, **reasons: Reasons) -> None:
    """Register the backends of an op, fastest first by recorded measurement. `eager` is always there, last."""
    _REGISTRY[op] = dict(reasons)


def registered(op: str) -> list[str]:
    """Backends of an op, in the order in which they are tried."""
    return [*_REGISTRY[op], EAGER]


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Run every op inside on one backend (`"triton"`, `"cuda"`, `"eager"`, ...); `None` restores automatic choice.

    Ops that do not have that backend keep choosing for themselves.

    Raises:
        BackendError: from the op, when it has the backend but the backend cannot run the call, or when no op has it.
    """
    own = [name or "auto"]
    _OVERRIDE.append(own)
    try:
        yield
    finally:  # not the last one: other threads' blocks need not be inside of this one
        _OVERRIDE[:] = [block for block in _OVERRIDE if block is not own]


def _requested(op: str, backend: str | None) -> tuple[str | None, bool]:
    """The backend asked for, and whether the op must have it."""
    if backend is not None:
        return (None if backend == "auto" else backend), True
    name = _OVERRIDE[-1][0] if _OVERRIDE else os.environ.get("ANY4D_FAST_BACKEND", "auto")
    return (None if name in ("auto", "") else name), False


def in_force() -> str | None:
    """The backend that `use_backend` or ANY4D_FAST_BACKEND asks of every op; None: each chooses for itself."""
    return _requested("", None)[0]


def select(op: str, backend: str | None, *args: Any, first: Sequence[str] = (), **kwargs: Any) -> str:
    """Name of the backend that runs this call.

    Args:
        op: registered op name.
        backend: what the caller asked for; None means `use_backend`, then ANY4D_FAST_BACKEND, then automatic.
        *args, **kwargs: handed to the reasons functions.
        first: backends that automatic choice tries before the registered order, where measurement depends on the call.

    Raises:
        BackendError: the backend asked for cannot run the call, or the op (or, where all ops are asked, none) has it.
    """
    table = _REGISTRY[op]
    name, strict = _requested(op, backend)
    if name is not None:
        if name == EAGER:
            return EAGER
        if name in table:
            why_not = table[name](*args, **kwargs)
            if why_not:
                raise BackendError(f"{op}: backend={name!r} cannot run this call: {'; '.join(why_not)}")
            return name
        if strict:
            raise BackendError(f"{op}: backend: expected one of {registered(op)} or 'auto', got {name!r}")
        if not any(name in backends for backends in _REGISTRY.values()):
            known = sorted({EAGER}.union(*_REGISTRY.values()))
            raise BackendError(
                f"use_backend or ANY4D_FAST_BACKEND: expected 'auto' or one of {known}, got {name!r}, which no op has"
            )
    order = [*first, *(name for name in table if name not in first)]
    for candidate in order:
        if candidate == EAGER:
            return EAGER
        why_not = table[candidate](*args, **kwargs)
        if not why_not:
            return candidate
        _log_once(op, candidate, why_not)
    return EAGER


def select_backward(op: str, backend: str | None, forward: str, faster: str, *args: Any, **kwargs: Any) -> str:
    """Name of the backend of a call's backward pass: the forward's, but `faster` where choice is automatic and it can.

    Args:
        op, backend, *args, **kwargs: as given to `select`.
        forward: what `select` chose.
        faster: the backend that measured faster in the backward pass.
    """
    automatic = _requested(op, backend)[0] is None or _requested(op, backend)[0] not in _REGISTRY[op]
    if forward == EAGER or not automatic or _REGISTRY[op][faster](*args, **kwargs):
        return forward
    return faster


def _log_once(op: str, backend: str, why_not: list[str]) -> None:
    if torch.compiler.is_compiling():
        return
    if (op, backend) not in _LOGGED:
        _LOGGED.add((op, backend))
        logger.info("%s: backend %s not used: %s", op, backend, "; ".join(why_not))


# All are looked up once, here: `torch.compile` traces through `select` and cannot trace the look-ups.
_INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"
_TRITON_MISSING = (
    "the package triton is not installed (it comes with PyTorch's CUDA wheels)"
    if importlib.util.find_spec("triton") is None
    else None
)


def package_missing(distribution: str, first: tuple[int, int], before: tuple[int, int]) -> str | None:
    """Why an optional package cannot be used, by its metadata (nothing is imported), or None.

    Args:
        distribution: its name for pip.
        first, before: (major, minor) of the first version that will do, and of the first that is not known to.
    """
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return f"the package {distribution} is not installed"
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or not first <= (int(numbers[1]), int(numbers[2])) < before:
        expected = f"{first[0]}.{first[1]} or later, before {before[0]}.{before[1]}"
        return f"{distribution} {version} is installed, and {expected} is expected"
    return None


PACKAGES = {
    # 2.5 is the first series whose backward takes `deterministic` everywhere.
    "flash_attn": package_missing("flash-attn", (2, 5), (3, 0)),
    "flash_attn_4": package_missing("flash-attn-4", (4, 0), (5, 0)),
}
"""Backends that are packages of their own, and why each cannot be used, or None; looked up once as well."""


def interpreting() -> bool:
    """Whether Triton kernels run in its CPU interpreter (the flag is read once, as Triton does)."""
    return _INTERPRETING


def triton_missing() -> str | None:
    """Why Triton cannot be imported, or None."""
    return _TRITON_MISSING


def triton_reasons(*tensors: Tensor | None) -> list[str]:
    """What every Triton backend needs of its tensors: one CUDA device of compute capability 8.0 or later."""
    missing = triton_missing()
    if missing:
        return [missing]
    if interpreting():
        return []
    why_not = not_on_cuda("Triton kernels run", *tensors)
    if why_not:
        return why_not
    first = next((t for t in tensors if t is not None), None)
    if first is not None:
        why_not += too_old(first)
    if len({t.device for t in tensors if t is not None}) > 1:
        why_not.append("tensors are on several devices")
    return why_not


def cuda_reasons(
    *tensors: Tensor | None, minimum: tuple[int, int] = (8, 0), architecture: str | None = None
) -> list[str]:
    """What every kernel of csrc/ needs of its tensors: one CUDA device, and an extension built for it.

    Args:
        *tensors: the call's tensors.
        minimum: oldest compute capability that the kernel runs on.
        architecture: the only one that the kernel exists for, such as "90a"; by default all.
    """
    why_not = not_on_cuda("CUDA kernels run", *tensors)
    if why_not:
        return why_not
    first = next((t for t in tensors if t is not None), None)
    if len({t.device for t in tensors if t is not None}) > 1:
        return ["tensors are on several devices"]
    why_no_code = _no_code_for(-1 if first is None else first.device.index or 0, minimum, architecture)
    return [] if why_no_code is None else [why_no_code]


@torch.compiler.assume_constant_result
def _no_code_for(index: int, minimum: tuple[int, int], architecture: str | None) -> str | None:
    """Why the extension has no code for a device: for `torch.compile`, which cannot trace the look-up, a constant."""
    return _look_up_code_for(index, minimum, architecture)


@functools.cache
def _look_up_code_for(index: int, minimum: tuple[int, int], architecture: str | None) -> str | None:
    from . import _build, _ext

    own = capability(index) if index >= 0 else None
    if own is not None and own < minimum:
        return f"compute capability {own[0]}.{own[1]} is older than {minimum[0]}.{minimum[1]}"
    if own is not None and architecture not in (None, _build.architecture_for(own)):
        return f"the kernel is for sm_{architecture} only, and this GPU's compute capability is {own[0]}.{own[1]}"
    missing = _ext.missing()
    if missing:
        return f"the CUDA extension is missing: {missing}"
    built = _ext.module().architectures().split(",")
    if own is not None and _build.architecture_for(own, built) is None:
        return (
            f"the CUDA extension was built for {', '.join(f'sm_{name}' for name in built)}, and this GPU's compute "
            f"capability is {own[0]}.{own[1]}; set ANY4D_FAST_CUDA_ARCHS and install the package again"
        )
    return None


def not_on_cuda(runner: str, *tensors: Tensor | None) -> list[str]:
    """The reason why `runner` ("cuDNN runs") cannot take tensors that are not on a CUDA device, if there is one."""
    for tensor in tensors:
        if tensor is not None and not tensor.is_cuda:
            return [f"tensors are on {tensor.device.type}; {runner} on CUDA devices"]
    return []


def too_old(tensor: Tensor) -> list[str]:
    """The reason why a CUDA tensor's device cannot run kernels for compute capability 8.0, if there is one.

    `torch.compile` cannot trace the look-up: there, a kernel for an older device fails when it is built.
    """
    if torch.compiler.is_compiling() or capability(tensor.device.index or 0) >= (8, 0):
        return []
    return [f"compute capability {capability(tensor.device.index or 0)} is older than 8.0"]


@functools.cache
def capability(index: int) -> tuple[int, int]:
    """Compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(index)


def describe() -> list[tuple[str, bool, str]]:
    """(backend, available, reason) for every kind of backend on this machine; builds nothing."""
    from . import _ext

    missing = triton_missing()
    no_gpu = None if torch.cuda.is_available() else "no CUDA device is visible to PyTorch"
    cuda_ready, cuda_what = _ext.status()
    if cuda_ready and no_gpu:
        cuda_ready, cuda_what = False, f"{no_gpu} ({cuda_what})"
    triton_why = missing or (None if interpreting() else no_gpu)
    return [
        ("eager", True, "plain PyTorch, any device"),
        ("triton", triton_why is None, triton_why or ("CPU interpreter" if interpreting() else "ready")),
        ("cuda", cuda_ready, cuda_what),
        ("cudnn", no_gpu is None, no_gpu or "PyTorch's attention and convolutions"),
        ("flash", no_gpu is None, no_gpu or "through PyTorch's scaled_dot_product_attention"),
        *((name, (why := absent or no_gpu) is None, why or "installed") for name, absent in PACKAGES.items()),
    ]
