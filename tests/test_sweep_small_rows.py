"""Which layout the sweep over few rows chooses."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from any4d_fast.kernels._linear import MANY_ROWS, LinearTile  # noqa: E402

from benchmarks.sweep_small_rows import LAYERS, TILES, best, by_rows, label, table  # noqa: E402

DEFAULT, SMALL, TINY = TILES[0], TILES[1], TILES[2]
GELU = [layer for layer in LAYERS if layer.gelu]


def times(**us: float) -> dict[str, float]:
    named: dict[str, LinearTile] = {"default": DEFAULT, "small": SMALL, "tiny": TINY}
    return {"cuBLAS": 9.0, **{label(named[name]): value for name, value in us.items()}}


def test_neighbours_with_one_layout_are_one_line() -> None:
    at = {
        888: times(default=10, small=8, tiny=7),
        1777: times(default=20, small=15, tiny=18),
        1778: times(default=20, small=15),
        3553: times(default=30, small=29.9),
        7105: times(default=50, small=60),
    }
    found = {(layer, rows): here for layer in GELU for rows, here in at.items()}
    chosen = by_rows(found, [DEFAULT, SMALL, TINY], DEFAULT)
    assert chosen == [(888, TINY), (1778, SMALL), (MANY_ROWS, DEFAULT)]
    assert best(at[888]) == (label(TINY), 7)


def test_the_table_counts_a_gain_against_what_the_model_uses() -> None:
    plain = next(layer for layer in LAYERS if not layer.gelu)
    found = {(plain, 888): times(default=10, small=8), (GELU[0], 888): times(default=10, small=8)}
    lines = table(found, label(DEFAULT), 790.0)
    assert lines[1].endswith(f"{label(SMALL)}; {24 * (9 - 8)}") and lines[2].endswith(
        f"{label(SMALL)}; {24 * (10 - 8)}"
    )
