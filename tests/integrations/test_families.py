"""Every family that `accelerate` knows, without a GPU: outputs and gradients of the original."""

from __future__ import annotations

import pytest

from tests.accelerate_cases import pair, parameters


@pytest.mark.parametrize("name", parameters())
@pytest.mark.parametrize("train", [False, True])
def test_outputs_and_gradients(name: str, train: bool) -> None:
    found = pair(name, train=train)
    assert found.report.swapped and not found.report.kept, str(found.report)
    found.check_float32()


@pytest.mark.parametrize("name", parameters())
def test_autocast(name: str) -> None:
    pair(name).check_autocast()
