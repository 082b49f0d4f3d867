"""Errors of reading and writing files."""

from __future__ import annotations

import importlib
from types import ModuleType


class MediaError(ValueError):
    """A file cannot be read or written as asked; the message names it and says what to do."""


def require_viz(module: str) -> ModuleType:
    """Import a module of the optional `viz` extra.

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        raise ImportError(f"{name} is not installed ({error}); run `pip install any4d-fast[viz]`") from error
