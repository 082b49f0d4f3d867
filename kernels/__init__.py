"""Triton kernels and their launchers, installed as `any4d_fast.kernels`.

The modules here know nothing of autograd, nn.Module or dispatch. Importing this package imports no Triton:
import the module of the op that is needed.
"""

from __future__ import annotations

import os

_NAME = "any4d_fast.kernels"

# Run from the repository's root, `import kernels` would find this folder in the place of Hugging Face's `kernels`.
if __name__ != _NAME:
    raise ImportError(
        f"this folder was imported as {__name__!r}, but its package is {_NAME!r}: "
        f"write `import {_NAME}`; if you meant another package called {__name__!r}, "
        "take the root of the any4d-fast repository off sys.path"
    )

if os.environ.get("TRITON_INTERPRET", "0") == "1":
    from ._interpreter import install

    install()
