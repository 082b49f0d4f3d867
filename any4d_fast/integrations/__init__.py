"""Other people's models on these kernels: `accelerate(model)` and `deaccelerate(model)`."""

from __future__ import annotations

from .accelerate import Kept, Report, Swapped, accelerate, deaccelerate

__all__ = ["Kept", "Report", "Swapped", "accelerate", "deaccelerate"]
