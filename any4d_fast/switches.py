"""PyTorch's switches of float arithmetic, which belong to the process: read, and for a while in another position."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import torch

State = TypeVar("State")


class _Switch(Generic[State]):
    """Blocks nest within a thread. Of several threads, the last to leave puts back what the first one found.

    Each on its own would put back what another thread had set, and leave it so.
    """

    def __init__(self, read: Callable[[], State], write: Callable[[State], None]) -> None:
        self._read, self._write = read, write
        self._lock, self._own = threading.Lock(), threading.local()
        self._open = 0
        self._found: State | None = None

    @contextlib.contextmanager
    def at(self, wanted: Callable[[State], State]) -> Iterator[None]:
        """In the position that `wanted` makes of the present one."""
        with self._lock:
            before = self._read()
            if not self._open:
                self._found = before
            self._open += 1
            self._own.open = getattr(self._own, "open", 0) + 1
            self._change(wanted(before))
        try:
            yield
        finally:
            with self._lock:
                self._open -= 1
                self._own.open -= 1
                if self._own.open:
                    self._change(before)
                elif not self._open:
                    assert self._found is not None
                    self._change(self._found)

    def _change(self, state: State) -> None:
        if state != self._read():
            self._write(state)


def matmul_allows_tf32() -> bool:
    """Whether float32 matmuls may run in TF32, whichever of PyTorch's two interfaces said so."""
    try:
        return torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:  # the older one raises where the newer one says something else
        return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


def cudnn_allows_tf32() -> bool:
    """The same for cuDNN's convolutions."""
    try:
        return torch.backends.cudnn.allow_tf32
    except RuntimeError:
        return bool(torch.backends.cudnn.conv.fp32_precision == "tf32")  # type: ignore[attr-defined]


def _read_tf32() -> tuple[bool, str]:
    """Positions in the older and in the newer interface."""
    precision = torch.backends.cuda.matmul.fp32_precision
    try:
        return torch.backends.cuda.matmul.allow_tf32, precision
    except RuntimeError:  # they contradict each other
        return precision != "tf32", precision


def _write_tf32(state: tuple[bool, str]) -> None:
    matmul = torch.backends.cuda.matmul
    matmul.allow_tf32 = state[0]  # sets both
    if matmul.fp32_precision != state[1]:
        matmul.fp32_precision = state[1]


_TF32 = _Switch(_read_tf32, _write_tf32)


def _tf32_as(allowed: bool) -> Callable[[tuple[bool, str]], tuple[bool, str]]:
    def wanted(before: tuple[bool, str]) -> tuple[bool, str]:
        same = before[0] == allowed == (before[1] == "tf32")
        return before if same else (allowed, "tf32" if allowed else "ieee")

    return wanted


@contextlib.contextmanager
def matmul_tf32(allowed: bool) -> Iterator[None]:
    """Allow TF32 to float32 matmuls, or not. Both of PyTorch's interfaces say so inside."""
    if not torch.compiler.is_compiling():
        with _TF32.at(_tf32_as(allowed)):
            yield
        return
    before = torch.backends.cuda.matmul.allow_tf32  # locks cannot be traced
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _read_cudnn() -> tuple[bool, str, str]:
    """The older interface's position, and the newer one's for convolutions and recurrent layers."""
    cudnn = torch.backends.cudnn
    newer = cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision  # type: ignore[attr-defined]
    try:
        return cudnn.allow_tf32, *newer
    except RuntimeError:  # they contradict each other
        return newer[0] != "tf32", *newer


def _write_cudnn(state: tuple[bool, str, str]) -> None:
    cudnn = torch.backends.cudnn
    cudnn.allow_tf32 = state[0]  # sets all
    for part, precision in zip((cudnn.conv, cudnn.rnn), state[1:], strict=True):  # type: ignore[attr-defined]
        if part.fp32_precision != precision:
            part.fp32_precision = precision


_CUDNN = _Switch(_read_cudnn, _write_cudnn)


def cudnn_tf32(allowed: bool) -> contextlib.AbstractContextManager[None]:
    """Allow TF32 to cuDNN, or not."""
    return _CUDNN.at(lambda before: (allowed, *("tf32" if allowed else "ieee",) * 2))


def _read_sums() -> tuple[bool, bool | None]:
    """Whether sums, and those of a split matmul, may be in float16; None: not in this PyTorch."""
    matmul = torch.backends.cuda.matmul
    split = getattr(matmul, "allow_fp16_reduced_precision_reduction_split_k", None)
    return matmul.allow_fp16_reduced_precision_reduction, split


def _write_sums(state: tuple[bool, bool | None]) -> None:
    setting = state[0] if state[1] is None else state
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = setting


_SUMS = _Switch(_read_sums, _write_sums)


def float32_sums() -> contextlib.AbstractContextManager[None]:
    """No partial sums in float16 between the parts of a split matmul: they would round, and overflow, too early."""
    return _SUMS.at(lambda before: (False, None if before[1] is None else True))
