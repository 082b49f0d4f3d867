"""Where kernel tests run: in Triton's interpreter on the CPU, or for real on a GPU."""

from __future__ import annotations

import pytest
import torch

from any4d_fast import backends

INTERPRETING = backends.interpreting()
GPU = torch.cuda.is_available() and not INTERPRETING
DEVICE = "cuda" if GPU else "cpu"
KERNEL_BACKENDS = ["triton", "cuda"] if GPU else ["triton"]
"""Backends with kernels of their own that can run here, for `parametrize`."""

kernel_test = [
    pytest.mark.interpret,
    pytest.mark.gpu,
    pytest.mark.skipif(not (INTERPRETING or GPU), reason="needs TRITON_INTERPRET=1 or a CUDA device"),
]
"""Marks of a test that runs in the interpreter and on a GPU alike."""

gpu_only = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs a CUDA device (make test-gpu)")]
"""Marks of a test whose sizes or instructions only a GPU can run."""
