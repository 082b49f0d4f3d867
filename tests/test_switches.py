"""Settings of the process: whichever of PyTorch's interfaces made them, and however many threads change them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch

from any4d_fast.graph_calls import call_key
from any4d_fast.head_loop import full_precision
from any4d_fast.ops import resize_conv
from any4d_fast.switches import cudnn_allows_tf32, cudnn_tf32, float32_sums, matmul_allows_tf32, matmul_tf32
from any4d_fast.train.settings import tensor_float
from tests.small_models import small_model

MATMUL, CONVOLUTION = torch.backends.cuda.matmul, torch.backends.cudnn.conv


def seen() -> list[Any]:
    """What a user can read; PyTorch raises where its two interfaces contradict each other."""
    found: list[Any] = [MATMUL.fp32_precision, MATMUL.allow_fp16_reduced_precision_reduction, cudnn_allows_tf32()]
    for read in (lambda: MATMUL.allow_tf32, torch.get_float32_matmul_precision):
        try:
            found.append(read())
        except RuntimeError:
            found.append("raises")
    return found


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    MATMUL.fp32_precision, CONVOLUTION.fp32_precision = "none", "tf32"


POSITIONS = {
    "nothing": (lambda: None, False),
    "older, on": (lambda: setattr(MATMUL, "allow_tf32", True), True),
    "newer, on": (lambda: setattr(MATMUL, "fp32_precision", "tf32"), True),
    "newer, off": (lambda: setattr(MATMUL, "fp32_precision", "ieee"), False),
    "high": (lambda: torch.set_float32_matmul_precision("high"), True),
    "medium": (lambda: torch.set_float32_matmul_precision("medium"), True),
}


@pytest.mark.parametrize("position", POSITIONS)
def test_any_setting_is_read_and_put_back(position: str) -> None:
    make, allowed = POSITIONS[position]
    make()
    before = seen()
    assert matmul_allows_tf32() == allowed
    for wanted in (True, False):
        with matmul_tf32(wanted):
            assert matmul_allows_tf32() == MATMUL.allow_tf32 == wanted
            with matmul_tf32(not wanted):
                assert matmul_allows_tf32() == MATMUL.allow_tf32 == (not wanted)
            assert matmul_allows_tf32() == MATMUL.allow_tf32 == wanted
        # Forbidding TF32 makes PyTorch forget which of its two names for it was given.
        assert seen() == before or position == "medium"


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("mixed", [False, True])
def test_the_model_runs_with_any_setting_and_leaves_it(position: str, mixed: bool) -> None:
    POSITIONS[position][0]()
    CONVOLUTION.fp32_precision = "ieee"
    before = seen()
    model, views = small_model(), [{"img": torch.zeros(1, 3, 14, 14)}]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
        call_key(views)
        model(views)[0]["pts3d"].sum().backward()
    assert seen() == before and not cudnn_allows_tf32()


@pytest.mark.parametrize("newer", [None, "tf32", "ieee"])
@pytest.mark.parametrize("allowed", [True, False])
def test_a_training_run_sets_both_libraries_and_puts_them_back(newer: str | None, allowed: bool) -> None:
    if newer is not None:
        MATMUL.fp32_precision = CONVOLUTION.fp32_precision = newer
    before = [*seen(), CONVOLUTION.fp32_precision, torch.backends.cudnn.rnn.fp32_precision]
    with tensor_float(allowed):
        assert matmul_allows_tf32() == cudnn_allows_tf32() == torch.backends.cudnn.allow_tf32 == allowed
    assert [*seen(), CONVOLUTION.fp32_precision, torch.backends.cudnn.rnn.fp32_precision] == before


def test_an_operator_runs_with_the_newer_interface() -> None:
    MATMUL.fp32_precision = "tf32"
    x, weight3, weight1 = torch.zeros(1, 2, 2, 4), torch.zeros(8, 4, 3, 3), torch.zeros(2, 8, 1, 1)
    assert resize_conv(x, (4, 4), weight3, torch.zeros(8), weight1, torch.ones(2)).sum() == 32


@pytest.mark.parametrize("make", [lambda: matmul_tf32(True), lambda: cudnn_tf32(False), float32_sums])
def test_threads_that_overlap_leave_nothing_behind(make: Callable[[], AbstractContextManager[None]]) -> None:
    before, (first, second) = seen(), (make(), make())
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        one.submit(first.__enter__).result()
        other.submit(second.__enter__).result()
        inside = seen()
        one.submit(first.__exit__, None, None, None).result()
        assert seen() == inside != before  # the second one is still in its block
        other.submit(second.__exit__, None, None, None).result()
    assert seen() == before


def test_full_precision_follows_the_newer_interface() -> None:
    MATMUL.fp32_precision = "tf32"
    with full_precision("cpu"):
        assert MATMUL.allow_tf32
    assert matmul_allows_tf32()
