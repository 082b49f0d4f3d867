"""Pinned host memory that is made in two steps, and goes back to the system when the last tensor in it does.

PyTorch pins by `cudaHostAlloc`: the driver gets every page from the system itself, half a second a GB, whoever launches
kernels waits meanwhile, and the memory stays with PyTorch for later calls. Here the system hands out the pages first,
beside whatever the GPU does, and the driver then registers pages that are there.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import mmap
import weakref

import torch
from torch import Tensor

logger = logging.getLogger("any4d_fast")


def pinned(size: int) -> Tensor | None:
    """[size] bytes, uninitialised and pinned for all devices; None where the system or the driver cannot do this.

    To be called in a thread that launches nothing: an error of the driver would show up at that thread's next launch.
    """
    if size == 0 or not hasattr(mmap, "MAP_ANONYMOUS"):
        return None
    try:
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        logger.warning(
            "the system has no %d bytes of memory to hand out (%s); PyTorch asks it for pinned ones", size, error
        )
        return None
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages: small ones, which take longer
            pages.madvise(mmap.MADV_HUGEPAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    ctypes.memset(address, 0, size)  # now the system hands them out; without Python's lock
    if not register(address, size):
        pages.close()
        return None
    block = (ctypes.c_uint8 * size).from_address(address)
    # The tensor keeps `block`, and the finalizer the pages that it lies in. At exit the process gives back both.
    weakref.finalize(block, _release, pages, address).atexit = False
    return torch.frombuffer(block, dtype=torch.uint8)


def register(address: int, size: int) -> bool:
    """Let the driver pin pages that are there; whether it did."""
    cudart = torch.cuda.cudart()
    found = cudart.cudaHostRegister(address, size, 1)  # 1: pinned for every device's context, cudaHostRegisterPortable
    if found != cudart.cudaError.success:
        logger.warning("%d bytes of host memory cannot be registered (%s); PyTorch pins them instead", size, found)
        return False
    return True


def unregister(address: int) -> None:
    """The opposite of `register`."""
    torch.cuda.cudart().cudaHostUnregister(address)


def _release(pages: mmap.mmap, address: int) -> None:
    unregister(address)
    pages.close()
