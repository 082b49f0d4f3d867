"""What a function asks PyTorch to do: operators that would launch something on a GPU, and those that would wait."""

from __future__ import annotations

import traceback
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

# Operators that read the device back, give a size that depends on values, or bring numbers from the host.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "lift_fresh", "equal.default")


class Counted(TorchDispatchMode):
    """Counts operators but views: each is a launch on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.launches += not func.is_view
        return func(*args, **(kwargs or {}))


class Waits(TorchDispatchMode):
    """Notes who would make the host wait on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(func) for name in WAITING):
            frames = [frame for frame in traceback.extract_stack() if "any4d_fast" in frame.filename]
            self.found.append(f"{func} at {frames[-1].filename}:{frames[-1].lineno}" if frames else str(func))
        return func(*args, **(kwargs or {}))
