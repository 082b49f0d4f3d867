"""The families at the sizes at which they are used: bfloat16 autocast on a GPU."""

from __future__ import annotations

import pytest

from any4d_fast.integrations import checks
from tests import tf32
from tests.accelerate_cases import REAL, pair, parameters
from tests.kernels_common import gpu_only

pytestmark = gpu_only


@pytest.fixture(autouse=True)
def kernels_at_every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of the sizes are those at which the modules would decline."""
    monkeypatch.setattr(checks, "LAUNCH_BOUND", 0)


@pytest.mark.parametrize("name", parameters())
@pytest.mark.parametrize("train", [False, True])
def test_outputs_and_gradients(name: str, train: bool) -> None:
    with tf32.settings(matmul=False, cudnn=False):
        pair(name, REAL, "cuda", train).check_autocast()
