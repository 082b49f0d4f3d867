"""The heads in float16 on a GPU: in force under autocast, close to TF32, within their counted memory, never silent."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from any4d_fast import Any4D, head_loop, memory, use_backend
from any4d_fast.head_loop import run_heads
from any4d_fast.head_precision import head_dtype, use_head_dtype
from any4d_fast.modules import dense_inference
from any4d_fast.modules.dpt import ResidualConvUnit
from any4d_fast.ops.dense_maps import new_flag
from any4d_fast.testing import relative_error
from benchmarks.timing import time_ms
from tests import tf32
from tests.golden_cases import ALL_INPUTS, golden_views, golden_weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device (make test-gpu)"),
]

GRID = (24, 37)  # 336 x 518
ROWS = GRID[0] * GRID[1]
VIEWS = 16


@pytest.fixture(scope="module", params=["random", "golden"])
def model(request: pytest.FixtureRequest) -> Any4D:
    torch.manual_seed(0)
    with torch.device("cuda"):
        made = Any4D.from_preset("any4d").eval()
    if request.param == "golden":
        golden_weights(made, torch.Generator("cuda").manual_seed(0))
    return made


@pytest.fixture(autouse=True)
def tf32_in_convolutions() -> Iterator[None]:
    with tf32.settings(matmul=False, cudnn=True):
        yield


def tokens(views: int) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(1)
    shapes = [(1, views * ROWS + 1, dim) for dim in (1024, 768, 768, 768)]
    return [torch.randn(shape, generator=generator, device="cuda") for shape in shapes]


def heads(model: Any4D, given: list[Tensor], views: int, dtype: torch.dtype | None, step: int | None = None) -> Any:
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16), use_head_dtype(dtype):
        return run_heads(model, given, views, GRID, step)


def test_float16_is_in_force_under_autocast_only() -> None:
    given = torch.zeros(1, device="cuda")
    with torch.no_grad():
        assert head_dtype(given, mixed=True) == torch.float16
        assert head_dtype(given, mixed=False) == torch.float32
        with use_backend("eager"):
            assert head_dtype(given, mixed=True) == torch.float32
        torch.backends.cudnn.allow_tf32 = False
        assert head_dtype(given, mixed=True) == torch.float32
    assert head_dtype(given, mixed=True) == torch.float32  # gradients


def test_float16_errs_about_as_much_as_tf32(model: Any4D) -> None:
    """The heads alone. float16 also rounds sums that TF32 keeps in float32: two roundings in the place of one."""
    given = tokens(4)
    with torch.no_grad(), use_backend("eager"):
        torch.backends.cudnn.allow_tf32 = False
        exact = run_heads(model, given, 4, GRID, None)
        torch.backends.cudnn.allow_tf32 = True
        with torch.autocast("cuda", dtype=torch.bfloat16):
            wide = run_heads(model, given, 4, GRID, None)
    narrow = heads(model, given, 4, None)
    report = {}
    for key, value in exact[0].items():
        if value.is_floating_point():
            all_views = [torch.cat([view[key] for view in outputs]) for outputs in (narrow, wide, exact)]
            report[key] = relative_error(all_views[0], all_views[2]), relative_error(all_views[1], all_views[2])
    print({key: f"{ours:.1e} (TF32 {base:.1e})" for key, (ours, base) in report.items()})
    # Outputs of few numbers, and those that random weights barely move, err by chance.
    assert all(ours <= 4 * base + 2**-13 for ours, base in report.values()), report


@pytest.mark.parametrize(("channels", "size"), [(256, (24, 37)), (32, (18, 24)), (8, (1, 1))])
def test_units_with_cudnns_activation_are_those_without(channels: int, size: tuple[int, int]) -> None:
    """The same sums, of which the hidden map's are rounded once instead of twice; both raise the flag."""
    torch.manual_seed(0)
    unit = ResidualConvUnit(channels).cuda()
    x = torch.randn(3, *size, channels, device="cuda").half()

    def refined(x: Tensor, fused: bool) -> tuple[Tensor, bool]:
        flag = new_flag(x.device)
        with torch.no_grad():
            assert dense_inference.fuses_activation(x)
            weights = dense_inference._unit(unit, torch.float16)
            return dense_inference._refine(x, x.relu(), weights, flag, fused)[0], bool(flag)

    with torch.no_grad():
        exact = unit.double()(x.double().permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    unit.float()
    (ours, flagged), (plain, also) = refined(x, True), refined(x, False)
    assert not flagged and not also
    assert relative_error(ours, exact) <= 1.1 * relative_error(plain, exact)
    with torch.no_grad():
        unit.conv1.bias.fill_(1e5)  # type: ignore[union-attr]
    assert refined(x, True)[1] and refined(x, False)[1]
    with torch.no_grad():
        unit.conv1.bias.fill_(-1e5)  # type: ignore[union-attr]
    assert not refined(x, True)[1], "a ReLU's zero fits, however far below it the sum was"


@pytest.mark.parametrize("step", [1, 4, VIEWS])
def test_the_counted_memory_is_what_is_used(step: int, model: Any4D) -> None:
    given = tokens(VIEWS)
    heads(model, given, VIEWS, None, step)  # weights are converted, workspaces are there
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found = heads(model, given, VIEWS, None, step)
    used = torch.cuda.max_memory_allocated() - before
    outputs = VIEWS * memory.output_bytes(336, 518)
    counted = step * memory.image_bytes(model.config, GRID, 2)
    print(f"{step} views: {(used - outputs) / step / 1e6:.1f} MB a view, counted {counted / step / 1e6:.1f}")
    # Workspaces of cuDNN and the strip of the last stage do not grow with the views.
    assert used <= outputs + 1.1 * counted + 300e6
    assert len(found) == VIEWS


def test_out_of_range_the_outputs_are_those_of_tf32(model: Any4D) -> None:
    given = tokens(2)
    bias = model.dpt_feature_head.scratch.refinenet2.resConfUnit1.conv1.bias
    with torch.no_grad():
        before = bias.clone()
        bias[3] = 1e5
    try:
        expected, found = heads(model, given, 2, torch.float32, 1), heads(model, given, 2, None)
        for view, other in zip(found, expected, strict=True):
            for key, value in other.items():
                # So large a bias overflows the exponential of a depth here and there, in TF32 as well.
                if value.is_floating_point():
                    finite = value.abs() < 1e30
                    # TF32 with other convolution algorithms
                    assert relative_error(view[key][finite], value[finite]) <= 2e-3, key
    finally:
        with torch.no_grad():
            bias.copy_(before)


def all_inputs(views: int) -> list[dict[str, Tensor]]:
    given = golden_views(views, 1, 336, 518, 0, [ALL_INPUTS] * views)
    return [{k: v.cuda() if isinstance(v, Tensor) else v for k, v in view.items()} for view in given]


def test_tokenizers_in_float16_are_as_close_as_in_tf32_and_faster(model: Any4D) -> None:
    x = torch.randn(8, 336, 518, 3, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    module = model.ray_dirs_encoder
    flag = new_flag(x.device)
    with torch.no_grad():
        torch.backends.cudnn.allow_tf32 = False
        exact = module(x)
        torch.backends.cudnn.allow_tf32 = True
        wide, narrow = module(x), module(x, torch.float16, flag)
        times = [time_ms(lambda: module(x))[0], time_ms(lambda: module(x, torch.float16, flag))[0]]
    errors = relative_error(narrow, exact), relative_error(wide, exact)
    print(f"float16 {errors[0]:.1e}, TF32 {errors[1]:.1e}; TF32 {times[0]:.3f} ms, float16 {times[1]:.3f} ms")
    assert not flag.item()
    assert errors[0] <= 4 * errors[1] + 2**-13
    assert times[1] < times[0]


def test_out_of_range_in_a_tokenizer_the_call_runs_again(model: Any4D) -> None:
    views = all_inputs(2)
    bias = model.depth_encoder.encoder[0].conv1.bias
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
        before = bias.clone()
        bias[3] = 1e5
        try:
            with use_head_dtype(torch.float32):
                expected = model(views, cuda_graphs=False)
            for graph in (False, True):
                found = model(views, cuda_graphs=graph)
                for view, other in zip(found, expected, strict=True):
                    assert bool(view["pts3d"].isfinite().all())
                    assert relative_error(view["pts3d"], other["pts3d"]) <= 2e-2
        finally:
            bias.copy_(before)


def test_heads_side_by_side_are_the_heads_one_after_the_other(model: Any4D, monkeypatch: pytest.MonkeyPatch) -> None:
    given = tokens(4)
    alone: list[Any] = []
    for limit in (0, head_loop.PARALLEL_PATCHES):
        monkeypatch.setattr(head_loop, "PARALLEL_PATCHES", limit)
        run = functools.partial(heads, model, given, 4, None)
        for _ in range(20):  # memory that is reused too early would be someone else's by then
            found = run()
            alone = alone or found
            for view, other in zip(found, alone, strict=True):
                assert all(torch.equal(view[key], value) for key, value in other.items())
        torch.cuda.synchronize()
        reserved = torch.cuda.memory_reserved()
        for _ in range(20):
            run()
        assert torch.cuda.memory_reserved() == reserved
        print(f"{limit} patches side by side: {time_ms(run)[0]:.3f} ms")


def test_outputs_move_to_pinned_memory(model: Any4D) -> None:
    generator = torch.Generator().manual_seed(0)
    views = [{"img": torch.randint(0, 256, (336, 518, 3), generator=generator, dtype=torch.uint8)} for _ in range(5)]
    options = {"minibatch_size": 2, "size": (336, 518)}
    expected = model.infer(views, **options)
    found = model.infer(views, outputs_to="cpu", **options)
    for view, other in zip(found, expected, strict=True):
        assert set(view) == set(other)
        for key, value in other.items():
            assert view[key].is_pinned(), key
            assert torch.equal(view[key], value.cpu()), key


def test_a_small_budget_is_kept(model: Any4D) -> None:
    views = [{"img": torch.zeros(336, 518, 3, dtype=torch.uint8)} for _ in range(24)]
    model.infer(views, size=(336, 518))
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    peaks = {}
    for budget in (None, (torch.cuda.memory_allocated() + 1.5e9) / memory.GIB):
        torch.cuda.reset_peak_memory_stats()
        model.infer(views, size=(336, 518), memory_budget=budget, outputs_to="cpu")
        peaks[budget] = torch.cuda.max_memory_allocated()
    print(peaks)
    small = min(peaks.values())
    assert small <= peaks[None]
