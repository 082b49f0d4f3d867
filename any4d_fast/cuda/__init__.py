"""Launchers of the CUDA C++ kernels in csrc/, with the signatures of their twins in `any4d_fast.kernels`.

The modules here check what a kernel needs of its tensors, allocate outputs and hand pointers to `any4d_fast._C`. They
know nothing of autograd, nn.Module or dispatch. Importing this package neither finds nor builds the extension.
"""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}
"""Element types by their number in csrc/dtype.h."""


def pointer(tensor: Tensor | None) -> int:
    """Address of a tensor's first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def stream(device: torch.device) -> int:
    """The current stream of a CUDA device, as the integer that launchers take."""
    return torch.cuda.current_stream(device).cuda_stream


def dtype_code(name: str, tensor: Tensor, *allowed: torch.dtype) -> int:
    """The number of a tensor's dtype in csrc/dtype.h.

    Raises:
        TypeError: the dtype is not one of `allowed` (all that csrc/dtype.h knows, by default).
    """
    allowed = allowed or tuple(DTYPES)
    if tensor.dtype not in allowed:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise TypeError(f"{name}: expected {expected}, got {tensor.dtype}; convert it first")
    return DTYPES[tensor.dtype]


def is_aligned(tensor: Tensor, nbytes: int = 16) -> bool:
    """Whether the tensor's first element lies on a multiple of `nbytes`."""
    return tensor.data_ptr() % nbytes == 0
