"""The attention benchmark without a GPU: what its oracle sees of long segments, absent backends, the time budget."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from any4d_fast import ops
from any4d_fast.ops.attention import Segments
from benchmarks import bench_attention, conftest, harness
from benchmarks.harness import Case, Session, Sizes

TINY = Sizes(views=(3, 2, 1), height=28, width=42, device="cpu")
ROWS = 25


@pytest.fixture
def cases(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Case]]:
    """Cases with one long segment of 25 rows, of which the oracle takes three."""
    for name, value in (("LONG_VIEWS", 4), ("SAMPLED_FROM", 20), ("SAMPLED_QUERIES", 3)):
        monkeypatch.setattr(bench_attention, name, value)
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    yield bench_attention.cases(TINY)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = before


def test_all_queries_of_short_segments_are_sampled(cases: list[Case]) -> None:
    assert bench_attention.sampled(Segments.global_(1, 19)) == list(range(19))
    assert bench_attention.sampled(Segments.global_(1, ROWS)) == [0, 12, 24]


@pytest.mark.parametrize(("row", "seen"), [(0, True), (12, True), (13, False), (24, True)])
def test_long_attention_is_checked_at_the_sampled_queries(cases: list[Case], row: int, seen: bool) -> None:
    def wrong(qkv: Tensor) -> Any:
        out: Any = ops.attention(qkv, segments=Segments.global_(1, ROWS), backend="eager")
        return out + torch.nn.functional.one_hot(torch.tensor(row), ROWS)[:, None, None] * qkv[:, 0]

    forward, backward = (c for c in cases if f" global {ROWS}x12x64" in str(c))
    assert forward.oracle is not None and backward.oracle is None and backward.gate is not None
    for case, wrap in ((forward, harness.forward), (backward.gate, harness.backward)):
        checks = Session(replace(case, providers={**case.providers, "wrong": wrap(wrong)})).check("wrong")
        assert any(error > budget for error, budget in checks) == seen


def test_oracle_takes_blocks_of_queries(cases: list[Case], monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = [c for c in cases if "frame" in str(c) or "global 19x" in str(c)]
    whole = [Session(case)._exact for case in chosen]
    monkeypatch.setattr(bench_attention, "SCORES_AT_ONCE", 50)
    for case, expected in zip(chosen, whole, strict=True):
        for a, b in zip(Session(case)._exact, expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("provider", ["flash_attn:flash_attn", "flash4:flash_attn_4", "any4d_fast:cuda"])
def test_a_backend_that_a_machine_lacks_is_unavailable(cases: list[Case], provider: str) -> None:
    case = next(c for c in cases if str(c).startswith("attention fwd frame"))
    with pytest.raises(harness.Unavailable, match="attention: backend="):
        case.providers[provider](case.inputs())()


def test_budget_of_seconds_lets_a_begun_case_finish(cases: list[Case], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(conftest.time, "monotonic", lambda: now[0])
    current = conftest._Current(10.0)
    assert not current.begins_too_late(cases[0])
    current.of(cases[0])
    now[0] = 11.0
    assert not current.begins_too_late(cases[0]) and current.begins_too_late(cases[1])
