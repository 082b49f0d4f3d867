"""The families on Triton's kernels: in the interpreter, and on a GPU."""

from __future__ import annotations

import pytest

from tests import tf32
from tests.accelerate_cases import Size, pair, parameters
from tests.kernels_common import DEVICE, kernel_test

pytestmark = kernel_test

# The interpreter takes a second for a kernel: one of each kind, without the variants.
FAMILIES = parameters("uniception transformer", "uniception dense head", "timm", "vggt")


@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_and_gradients(name: str) -> None:
    size = Size(depth=2 if name == "uniception transformer" else 1, grid=(1, 2), views=1)
    with tf32.settings(matmul=False, cudnn=False):
        pair(name, size, DEVICE).check_float32()
