"""Any4D's feed-forward metric 4D reconstruction from video, exact and fast."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from any4d_fast import io, ops
    from any4d_fast.backends import use_backend
    from any4d_fast.integrations.accelerate import accelerate, deaccelerate
    from any4d_fast.model import Any4D
    from any4d_fast.pipeline import reconstruct
    from any4d_fast.reconstruction import Reconstruction

__version__ = "0.1.0.dev0"
__all__ = [
    "Any4D",
    "Reconstruction",
    "__version__",
    "accelerate",
    "deaccelerate",
    "io",
    "ops",
    "reconstruct",
    "use_backend",
]

# Public name -> (module, attribute); an attribute of None is the module itself.
_LAZY: dict[str, tuple[str, str | None]] = {
    "Any4D": ("any4d_fast.model", "Any4D"),
    "Reconstruction": ("any4d_fast.reconstruction", "Reconstruction"),
    "accelerate": ("any4d_fast.integrations", "accelerate"),
    "deaccelerate": ("any4d_fast.integrations", "deaccelerate"),
    "io": ("any4d_fast.io", None),
    "ops": ("any4d_fast.ops", None),
    "reconstruct": ("any4d_fast.pipeline", "reconstruct"),
    "use_backend": ("any4d_fast.backends", "use_backend"),
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `import any4d_fast` stays light."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module_name, attribute = _LAZY[name]
    module = importlib.import_module(module_name)
    value = module if attribute is None else getattr(module, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
