"""Kernel of `render_clips` against the float64 oracle: in the interpreter, and on a GPU at a training batch's size."""

from __future__ import annotations

import pytest
import torch

from any4d_fast import backends, testing
from any4d_fast.ops.render_clips import _render, render_clips
from any4d_fast.reference.render_clips import PRIMITIVE_COLUMNS, ClipTables, RenderedClips, slices
from any4d_fast.train.shapes import SHAPES
from any4d_fast.train.stream import Stream
from any4d_fast.train.stream_config import StreamConfig
from any4d_fast.train.textures import TEXTURES
from tests.kernels_common import DEVICE, GPU, gpu_only, kernel_test
from tests.render_tables import moved, stream_tables

if not backends.triton_missing():
    from any4d_fast.kernels import _shapes, _textures
    from any4d_fast.kernels import render_clips as kernels

pytestmark = kernel_test
CROWDED = StreamConfig(num_views=2, moving_objects=(6, 8), static_objects=(4, 6), enclosed=0.5, noise=(0.01, 0.02))
COLUMN = {name: where.start for name, where in slices(PRIMITIVE_COLUMNS).items()}


@pytest.fixture(autouse=True)
def large_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes a second a program, whatever its size."""
    if not GPU:
        monkeypatch.setattr(kernels, "CONFIG", kernels.Config(block=256, warps=1))


def check(tables: ClipTables, height: int, width: int, **options: object) -> RenderedClips:
    """Everything as in float64 but for pixels on outlines, which rounding puts on either side."""
    with testing.poisoned_empty():
        found = render_clips(moved(tables, DEVICE), height, width, backend="triton", **options)  # type: ignore[arg-type]
    exact = render_clips(moved(tables, DEVICE, torch.float64), height, width, backend="eager", **options)  # type: ignore[arg-type]
    plain = render_clips(moved(tables, DEVICE), height, width, backend="eager", **options)  # type: ignore[arg-type]
    same = (found.ids == exact.ids) & (plain.ids == exact.ids)
    assert (~same).sum() <= 2 + 3e-4 * same.numel()
    assert torch.equal(found.hit, found.ids >= 0)
    first = same[:, :1].expand_as(same)
    assert torch.equal(found.flow_mask[first], exact.flow_mask[first])
    assert torch.equal(found.dynamic_mask[first], exact.dynamic_mask[first])
    assert not found.flow[~found.dynamic_mask].any() and not found.flow[:, 0].any()
    assert not found.depth[~found.hit].any()
    testing.assert_within_budget(found.rays, exact.rays, plain.rays)
    for name, mask in (("depth", same), ("flow", first)):
        actual, oracle, baseline = (getattr(x, name)[mask] for x in (found, exact, plain))
        testing.assert_within_budget(actual, oracle, baseline, name=name)
    # A colour sample may fall on the other side of an outline, of a shadow's edge or of a joint between tiles.
    difference = (found.images.double() - exact.images).abs()
    assert (difference > 2e-4).sum() <= 6 + 2e-3 * difference.numel()
    assert difference.median() < 1e-6
    return found


def test_numbers_of_shapes_and_textures() -> None:
    assert [SHAPES.index(n) for n in ("plane", "box", "sphere", "cylinder")] == [
        n.value for n in (_shapes.PLANE, _shapes.BOX, _shapes.SPHERE, _shapes.CYLINDER)
    ]
    numbers = (_textures.CHECKER, _textures.STRIPES, _textures.TILES, _textures.SINES, _textures.NOISE)
    assert [TEXTURES.index(n) for n in ("checker", "stripes", "tiles", "sines", "noise")] == [n.value for n in numbers]


def test_parity() -> None:
    tables = stream_tables(4, 12, 20, CROWDED)
    found = check(tables, 12, 20)
    assert found.dynamic_mask.any() and not found.hit.all()
    kinds = tables.primitives[..., COLUMN["kind"]]
    batch, view = (torch.arange(n).reshape(shape) for n, shape in ((4, (4, 1, 1, 1)), (2, (2, 1, 1))))
    seen = kinds[batch, view, found.ids.clamp(min=0).long().cpu()][found.hit.cpu()]
    assert set(seen.tolist()) == {0.0, 1.0, 2.0, 3.0}


@pytest.mark.parametrize(("height", "width"), [(1, 1), (7, 1), (1, 31), (13, 11)])
def test_sizes(height: int, width: int) -> None:
    check(stream_tables(1, height, width, CROWDED, first=8), height, width, samples=1)


def test_three_samples_and_no_shadows() -> None:
    check(stream_tables(1, 9, 14, CROWDED, first=5), 9, 14, samples=3, shadows=False)


def test_leaving_objects_out_changes_nothing() -> None:
    tables = stream_tables(2, 8, 16, CROWDED)
    every = tables.primitives.clone()
    every[..., COLUMN["eye_tangent"] :] = -torch.inf
    found, expected = (
        render_clips(moved(t, DEVICE), 8, 16, samples=1, backend="triton")
        for t in (tables, tables._replace(primitives=every))
    )
    for actual, other in zip(found, expected, strict=True):
        assert torch.equal(actual, other)


def test_no_clips() -> None:
    tables = ClipTables(*(t[:0] for t in moved(stream_tables(1, 4, 4, CROWDED), DEVICE)))
    found = render_clips(tables, 4, 4, backend="triton")
    assert found.images.shape == (0, 2, 3, 4, 4) and found.ids.shape == (0, 2, 4, 4)


def test_tables_need_not_be_contiguous() -> None:
    tables = moved(stream_tables(2, 5, 6, CROWDED), DEVICE)
    spread = ClipTables(*(torch.stack([t, t], -1)[..., 0] for t in tables))
    for actual, expected in zip(*(render_clips(t, 5, 6, backend="triton") for t in (spread, tables)), strict=True):
        assert torch.equal(actual, expected)


def test_opcheck() -> None:
    tables = moved(stream_tables(1, 3, 4, CROWDED), DEVICE)
    torch.library.opcheck(_render, (*tables, 3, 4, 1, True))


def test_float64_runs_in_eager_mode_only() -> None:
    tables = moved(stream_tables(1, 3, 4, CROWDED), DEVICE, torch.float64)
    with pytest.raises(backends.BackendError, match="tables are torch.float64; the kernel reads float32"):
        render_clips(tables, 3, 4, backend="triton")


class TestGpu:
    """A training batch."""

    pytestmark = gpu_only

    @pytest.mark.parametrize("first", [0, 1000])
    def test_parity(self, first: int) -> None:
        check(stream_tables(16, 126, 168, StreamConfig(), first=first), 126, 168)

    def test_other_configurations(self) -> None:
        tables = moved(stream_tables(4, 126, 168, CROWDED), DEVICE)
        expected = render_clips(tables, 126, 168, backend="triton")
        for block, warps in ((64, 1), (128, 1), (128, 4)):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(kernels, "CONFIG", kernels.Config(block, warps))
                found = render_clips(tables, 126, 168, backend="triton")
            for actual, other in zip(found, expected, strict=True):
                # Another launch may contract products and sums in another way.
                different = ((actual.double() - other.double()).abs() > 1e-3).double().mean()
                assert different < 1e-3

    def test_batches_are_repeatable_and_agree_with_the_cpu(self) -> None:
        config = StreamConfig(sizes=((56, 70),))
        stream, host = Stream(config, 4, "cuda"), Stream(config, 4, "cpu")
        batch, again, other = stream.batch(3), Stream(config, 4, "cuda", ahead=False).batch(3), host.batch(3).to("cuda")
        assert torch.equal(batch.images, again.images) and torch.equal(batch.scene_flow, again.scene_flow)
        agree = batch.depth_mask == other.depth_mask
        assert agree.double().mean() > 0.999
        close = ((batch.depth_along_ray - other.depth_along_ray).abs() < 1e-3).double().mean()
        assert close > 0.998 and (batch.images - other.images).abs().mean() < 1e-3

    def test_a_batch_waits_for_nothing(self) -> None:
        stream = Stream(StreamConfig(sizes=((56, 70),)), 4, "cuda")
        stream.batch(0)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            stream.batch(1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
