"""The device that a caller names, checked before anything is loaded."""

from __future__ import annotations

import torch


def find_device(device: torch.device | str) -> torch.device:
    """The device of this name.

    Raises:
        ValueError: no such device, or a CUDA device that PyTorch does not see.
    """
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device: expected 'cuda', 'cuda:N' or 'cpu', got {device!r}") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: {found} is not available; PyTorch sees {torch.cuda.device_count()} CUDA devices")
    return found


def pick_device(device: torch.device | str | None) -> torch.device:
    """The device asked for, or a GPU where there is one.

    Raises:
        ValueError: no such device, it is not available here, or it is neither a CUDA device nor the CPU.
    """
    chosen = find_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if chosen.type not in ("cuda", "cpu"):
        raise ValueError(f"device: expected 'cuda', 'cuda:N' or 'cpu', got {str(device)!r}; no other kind is supported")
    return chosen
