"""Dense heads in float16 with gradients, on a GPU: beside TF32, in a CUDA graph, and where float16 is too narrow."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from any4d_fast import Any4D, use_backend
from any4d_fast.config import DenseHeadConfig
from any4d_fast.head_loop import full_precision
from any4d_fast.head_precision import never_wait, use_head_dtype
from any4d_fast.modules.dense_training import dense_head
from any4d_fast.modules.dpt import DPTFeatures, DPTRegressor
from any4d_fast.testing import relative_error
from any4d_fast.train.settings import tensor_float
from tests.golden_cases import golden_weights

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DIMS, GRID = (64, 48, 48, 48), (6, 8)
SIZE = (84, 112)


def head() -> tuple[DPTFeatures, DPTRegressor]:
    config = DenseHeadConfig(output_dim=6)
    features, regressor = DPTFeatures(config, DIMS), DPTRegressor(config)
    golden_weights(features)
    golden_weights(regressor)
    return features.cuda().train(), regressor.cuda().train()


def maps(seed: int = 0) -> list[Tensor]:
    torch.manual_seed(seed)
    made = [torch.randn(5, dim, *GRID, device="cuda") for dim in DIMS]
    return [m.to(memory_format=torch.channels_last).requires_grad_() for m in made]


def gradients(out: Tensor, given: list[Tensor], *modules: torch.nn.Module) -> Tensor:
    torch.manual_seed(1)
    leaves = [*given, *(p for module in modules for p in module.parameters())]
    return torch.cat([g.flatten() for g in torch.autograd.grad(out, leaves, torch.rand_like(out))])


def test_errors_are_tf32s() -> None:
    """Against float32; both round operands to eleven bits, float16 results as well."""
    features, regressor = head()
    given = maps()
    with tensor_float(False), use_backend("eager"):
        expected = regressor(features(given), SIZE)
        wanted = gradients(expected, given, features, regressor)
    with tensor_float(True), full_precision("cuda"):
        wide = regressor(features(given), SIZE)
        error = relative_error(gradients(wide, given, features, regressor), wanted)
        out, left_range = dense_head(features, regressor, given, SIZE, torch.float16, wait=True)
        found = gradients(out, given, features, regressor)
    assert not left_range
    assert relative_error(out, expected) < 1.5 * relative_error(wide, expected)
    assert relative_error(found, wanted) < 1.5 * error


def views() -> list[dict[str, Tensor]]:
    torch.manual_seed(3)
    return [{"img": torch.randn(2, 3, 56, 84, device="cuda")} for _ in range(3)]


def tiny() -> Any4D:
    model = Any4D.from_preset("tiny")
    golden_weights(model)
    return model.cuda().train()


def step(model: Any4D, given: list[dict[str, Tensor]]) -> Tensor:
    model.zero_grad(set_to_none=True)
    with torch.autocast("cuda", torch.bfloat16):
        outputs = model(given)
    torch.stack([v.square().mean() for o in outputs for v in o.values() if v.is_floating_point()]).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_a_head_takes_less_memory() -> None:
    """Half of what is kept for the backward pass, and of what that works on."""
    features, regressor = head()
    torch.manual_seed(0)
    given = [torch.randn(8, dim, 24, 37, device="cuda") for dim in DIMS]
    given = [m.to(memory_format=torch.channels_last).requires_grad_() for m in given]
    peaks = []
    for dtype in (torch.float32, torch.float16):
        for _ in range(2):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            with tensor_float(True), full_precision("cuda"):
                if dtype == torch.float32:
                    out = regressor(features(given), (336, 518))
                else:
                    out = dense_head(features, regressor, given, (336, 518), dtype, wait=True)[0]
                gradients(out, given, features, regressor)
            del out
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 0.7 * peaks[0]


def test_a_training_step_takes_float16() -> None:
    model, given = tiny(), views()
    with tensor_float(True):
        with use_head_dtype(torch.float32):
            expected = step(model, given)
        assert 0 < relative_error(step(model, given), expected) < 0.05


def test_recomputed_gradients_are_the_same_bits() -> None:
    model, given = tiny(), views()
    with tensor_float(True):
        expected = step(model, given)
        model.recompute_activations("heads")
        assert relative_error(step(model, given), expected) < 1e-3  # elsewhere sums are atomic


def test_a_step_without_waiting_can_be_captured() -> None:
    model, given = tiny(), views()
    with tensor_float(True), never_wait():
        expected = step(model, given)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step(model, given)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                found = step(model, given)
        graph.replay()
        torch.cuda.synchronize()
    assert relative_error(found, expected) < 1e-3


def test_out_of_range_the_head_runs_in_tf32() -> None:
    model, given = tiny(), views()
    with torch.no_grad():
        model.scene_flow_dpt_feature_head.scratch.layer2_rn.weight.mul_(1e5)
    wide = copy.deepcopy(model)
    with tensor_float(True):
        with use_head_dtype(torch.float32):
            expected = step(wide, given)
        assert relative_error(step(model, given), expected) < 0.05
        with never_wait():
            assert not bool(step(model, given).isfinite().all())
