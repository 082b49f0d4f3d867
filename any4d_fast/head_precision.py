"""Which precision heads and dense tokenizers run in, and what happens where float16 is too narrow.

They follow upstream: float32, with TF32 where the caller runs the model in mixed precision. float16 has TF32's
mantissa and runs 2.5 times as fast, but holds nothing beyond 65,504. So where upstream would use TF32 they run in
float16, and every value that might not fit is looked at on the device, once at the end of a call: if one did not fit in
a head, the heads run once more in TF32; if one did not fit in a tokenizer, the whole call does with the tokenizers in
TF32.

With gradients the dense heads alone run in float16 (`modules.dense_training`), and tokenizers and small heads in TF32.

A head or tokenizer that is more than its weights (an adapter or a parametrization in a layer's place, a hook inside)
runs in float32 as well: with one such head, all heads of a call without gradients.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
from collections.abc import Iterator

import torch
from torch import Tensor

from . import backends
from .modules.derived import defer, deferring
from .switches import cudnn_allows_tf32

logger = logging.getLogger("any4d_fast")

NARROW = (torch.float16, torch.bfloat16)

_CHOSEN: contextvars.ContextVar[torch.dtype | None] = contextvars.ContextVar("head_dtype", default=None)
_WAITS: contextvars.ContextVar[bool] = contextvars.ContextVar("waits", default=True)
_WARNED: set[str] = set()


@contextlib.contextmanager
def use_head_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    """Run heads and tokenizers in float32 (TF32 where allowed), in 16 bits on any device, or (None) by `head_dtype`.

    With gradients that is about the dense heads alone, and under torch.compile everything runs in float32.

    Raises:
        ValueError: `dtype` is none of torch.float32, torch.float16, torch.bfloat16 and None.
    """
    if dtype not in (None, torch.float32, *NARROW):
        raise ValueError(f"dtype: expected torch.float32, torch.float16, torch.bfloat16 or None, got {dtype!r}")
    token = _CHOSEN.set(dtype)
    try:
        yield
    finally:
        _CHOSEN.reset(token)


@contextlib.contextmanager
def never_wait() -> Iterator[None]:
    """In training steps inside, the host does not wait to see whether a head's value left the range of 16 bits.

    Gradients of a step in which one did are not finite: for a caller that looks at them before it uses them, or that
    captures the step in a CUDA graph.
    """
    token = _WAITS.set(False)
    try:
        yield
    finally:
        _WAITS.reset(token)


class Flags:
    """What left the range in one call: two flags in one buffer, so that one read of the device tells both.

    Attributes:
        inputs: [1] int32 for the tokenizers of geometric inputs.
        heads: [1] int32 for the heads.
    """

    def __init__(self, device: torch.device) -> None:
        self._both = torch.zeros(8, dtype=torch.int32, device=device)
        self.inputs, self.heads = self._both[:1], self._both[4:5]  # 16 bytes apart: kernels are compiled for that

    def left_range(self) -> tuple[bool, bool]:
        """Whether a value of the inputs, and one of the heads, was outside; warns once each, waits for the device.

        While a CUDA graph is captured the answer is no, and whoever replays the graph looks at the flags.
        """
        if defer(self._both.any()):
            return False, False
        found = self._both.tolist()
        inputs, heads = bool(found[0]), bool(found[4])
        if inputs:
            _warn("tokenizers of geometric inputs", "the call runs again with them")
        elif heads:
            warn_of_heads()
        return inputs, heads


def warn_of_heads() -> None:
    """Say once that the dense heads have to run again."""
    _warn("dense heads", "the heads of this call run again")


def _warn(where: str, what: str) -> None:
    if where in _WARNED:
        return
    _WARNED.add(where)
    logger.warning(
        "a value in the %s left the range of 16-bit floats; %s in float32 (TF32). If that happens often, "
        "use_head_dtype(torch.float32) saves the first attempt", where, what,
    )  # fmt: skip


def head_dtype(like: Tensor, mixed: bool) -> torch.dtype:
    """Dtype in which heads and dense tokenizers run now.

    Args:
        like: tokens that the heads will read, or images.
        mixed: whether the model runs under autocast.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return torch.float32
    # In a CUDA graph that somebody else captures nobody would look at the flag.
    return _narrowest(like, mixed, unwatched=not deferring())


def training_dtype(like: Tensor, mixed: bool) -> torch.dtype:
    """Dtype in which the dense heads run where gradients are wanted; arguments as `head_dtype`'s."""
    if torch.compiler.is_compiling():
        return torch.float32
    return _narrowest(like, mixed, unwatched=_WAITS.get())


def waits() -> bool:
    """Whether a training step may wait to see if a value left the range; see `never_wait`."""
    return _WAITS.get()


def _narrowest(like: Tensor, mixed: bool, unwatched: bool) -> torch.dtype:
    """float16 where it can stand for TF32; `unwatched`: not while a CUDA graph is captured."""
    chosen = _CHOSEN.get()
    if chosen is not None:
        return chosen
    # Where upstream computes in TF32: under autocast, unless the user has forbidden TF32 to convolutions.
    if not (mixed and like.is_cuda and cudnn_allows_tf32()):
        return torch.float32
    if backends.select("dense_maps", None, like) == backends.EAGER:
        return torch.float32
    if unwatched and torch.cuda.is_current_stream_capturing():
        return torch.float32
    return torch.float16
