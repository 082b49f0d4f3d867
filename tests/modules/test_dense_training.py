"""Dense heads in float16 with gradients: against float64, in parts, and where a value leaves the range."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from any4d_fast import head_precision
from any4d_fast.config import DenseHeadConfig
from any4d_fast.head_precision import never_wait, training_dtype, use_head_dtype
from any4d_fast.modules import dense_inference, dense_training
from any4d_fast.modules.dense_training import LARGEST, LARGEST_SUM, dense_head, plain_head, scale
from any4d_fast.modules.dpt import DPTFeatures, DPTRegressor
from any4d_fast.testing import relative_error
from tests.golden_cases import golden_weights
from tests.small_models import small_model

CONFIG = DenseHeadConfig(output_dim=6, feature_dim=32, layer_dims=(8, 12, 16, 20))
DIMS, GRID, SIZE = (20, 12, 12, 12), (3, 4), (42, 56)
STEP = 2.0**-11  # of float16's rounding
Loss = Callable[[Tensor], Tensor]


def head(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    ours = nn.Sequential(DPTFeatures(CONFIG, DIMS), DPTRegressor(CONFIG))
    golden_weights(ours)
    return ours.to(dtype).train()


def maps(images: int = 3, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    made = [torch.randn(images, dim, *GRID, generator=generator) for dim in DIMS]
    return [m.to(dtype).to(memory_format=torch.channels_last).requires_grad_() for m in made]


def cotangent(images: int = 3) -> Tensor:
    return torch.randn(images, *SIZE, 6, generator=torch.Generator().manual_seed(8))


def narrow(
    ours: nn.Module, given: list[Tensor], grad: Tensor, wait: bool = True, dtype: torch.dtype = torch.float16
) -> tuple[Tensor, list[Tensor]]:
    """The head's channels, and gradients of its maps and parameters."""
    features, regressor = ours.children()
    assert isinstance(features, DPTFeatures) and isinstance(regressor, DPTRegressor)
    out, left_range = dense_head(features, regressor, given, SIZE, dtype, wait=wait)
    assert out.dtype == torch.float32 and not left_range
    return out.detach(), list(torch.autograd.grad(out, [*given, *ours.parameters()], grad))


def oracle(ours: nn.Module, given: list[Tensor], grad: Tensor) -> tuple[Tensor, list[Tensor]]:
    wide = copy.deepcopy(ours).double()
    features, regressor = wide.children()
    leaves = [m.detach().double().requires_grad_() for m in given]
    out = regressor(features(leaves), SIZE)
    return out.detach(), list(torch.autograd.grad(out, [*leaves, *wide.parameters()], grad.double()))


def whole(gradients: list[Tensor]) -> Tensor:
    return torch.cat([g.double().flatten() for g in gradients])


def with_large_gradients(ours: nn.Sequential) -> nn.Sequential:
    """Weights that keep values within float16's range, and take gradients of a constant out of it."""
    with torch.no_grad():
        ours[1].conv1.weight.mul_(1e-4)
        ours[1].conv2[0].weight.mul_(3e4)
        ours[1].conv2[2].weight.mul_(300)
    return ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channels_and_gradients_against_float64(dtype: torch.dtype) -> None:
    """Of a loss that wants the same of neighbours: what rounding does to ReLUs near zero hardly matters to it."""
    ours, given, grad = head(), maps(dtype=dtype), cotangent().abs()
    out, gradients = narrow(ours, given, grad)
    expected, others = oracle(ours, given, grad)
    assert relative_error(out, expected) < 4 * STEP
    for found, like in zip(gradients, [*given, *ours.parameters()], strict=True):
        assert found.dtype == like.dtype and found.shape == like.shape
    assert relative_error(whole(gradients), whole(others)) < 10 * STEP


def test_gradients_that_cancel_err_less_than_in_bfloat16() -> None:
    """They are made of what ReLUs near zero let through, of which rounding eight times as coarse moves eight times as
    many; the error is the square root of that."""
    ours, given, grad = head(), maps(), cotangent()
    _, others = oracle(ours, given, grad)
    errors = [
        relative_error(whole(narrow(ours, given, grad, dtype=dtype)[1]), whole(others))
        for dtype in (torch.float16, torch.bfloat16)
    ]
    assert errors[0] < errors[1] / 2


@pytest.mark.parametrize("too_large", [False, True])
def test_a_backward_pass_under_autocast_is_the_same(too_large: bool) -> None:
    """It would run matrix products in bfloat16; also those of the second attempt, in float32."""
    ours, given, grad = head(), maps(), cotangent()
    if too_large:
        ours, grad = with_large_gradients(ours), torch.ones_like(grad)
    features, regressor = ours.children()
    assert isinstance(features, DPTFeatures) and isinstance(regressor, DPTRegressor)
    found = []
    for enabled in (False, True):
        out, _ = dense_head(features, regressor, given, SIZE, torch.float16, wait=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(torch.autograd.grad(out, [*given, *ours.parameters()], grad))
    for outside, inside in zip(*found, strict=True):
        assert torch.equal(outside, inside)


@pytest.mark.parametrize("exponent", [-100, -40, 40, 100])
def test_gradients_do_not_depend_on_how_large_the_loss_is(exponent: int) -> None:
    ours, given, grad = head(), maps(), cotangent()
    _, gradients = narrow(ours, given, grad)
    factor = 2.0**exponent
    _, scaled = narrow(ours, given, grad * factor)
    limit = torch.finfo(torch.float32).tiny
    for found, other in zip(scaled, gradients, strict=True):
        wanted = other.double() * factor
        normal = (wanted.abs() > limit) & (wanted.abs() < torch.finfo(torch.float32).max)
        assert torch.equal(found.double()[normal], wanted[normal])


def test_a_gradient_of_zero_is_zero() -> None:
    _, gradients = narrow(head(), maps(), torch.zeros(3, *SIZE, 6))
    assert all(not g.any() for g in gradients)


def test_the_power_of_two_bounds_sums_and_values() -> None:
    grad = cotangent() * 1e-9
    scaled, inverse = scale(grad, iter([slice(0, 2), slice(2, 3)]))
    assert torch.equal(scaled * inverse, grad)
    assert float(inverse.log2()) == round(float(inverse.log2()))
    sums = scaled[:2].abs().sum((0, 1, 2)).amax()
    assert LARGEST_SUM / 2 < sums <= LARGEST_SUM and scaled.abs().max() <= LARGEST
    spike = torch.zeros_like(grad)
    spike[0, 0, 0, 0] = 3.0
    assert LARGEST / 2 < scale(spike, iter([slice(0, 3)]))[0].max() <= LARGEST


@pytest.mark.parametrize("recompute", [False, True])
def test_images_in_parts(recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts round sums elsewhere; recomputing changes no bit."""
    ours, given, grad = head(), maps(5), cotangent(5)
    at_once, once = narrow(ours, given, grad)
    for name in ("PIXELS_AT_ONCE", "RECOMPUTED_AT_ONCE"):
        monkeypatch.setattr(dense_training, name, 2 * SIZE[0] * SIZE[1])
    out, gradients = narrow(ours, given, grad)
    assert relative_error(out, at_once) < STEP
    assert all(relative_error(found, other) < 4 * STEP for found, other in zip(gradients, once, strict=True))
    if recompute:
        for module in ours.children():
            module.checkpoint_gradient = True
        again_out, again = narrow(ours, given, grad)
        assert torch.equal(again_out, out)
        assert all(torch.equal(found, other) for found, other in zip(again, gradients, strict=True))


def test_no_pass_of_a_training_takes_inferences_shorter_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """They round once where the recomputed pass rounds twice: its gradients would be those of another forward pass."""

    def asked(x: Tensor) -> bool:
        raise AssertionError("a pass without gradients asked whether cuDNN takes its activation")

    monkeypatch.setattr(dense_inference, "fuses_activation", asked)
    ours = head()
    for module in ours.children():
        module.checkpoint_gradient = True  # type: ignore[assignment]
    narrow(ours, maps(), cotangent())


def test_recomputing_keeps_only_what_it_is_given() -> None:
    ours, given = head(), maps()
    known = {t.untyped_storage().data_ptr() for t in (*given, *ours.parameters())}
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            kept.append(tensor)
        return tensor

    features, regressor = ours.children()
    counts = []
    for recompute in (False, True):
        features.checkpoint_gradient = regressor.checkpoint_gradient = recompute  # type: ignore[assignment]
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            dense_head(features, regressor, given, SIZE, torch.float16, wait=True)  # type: ignore[arg-type]
        counts.append(len(kept))
    assert counts[0] > 20 and counts[1] == 0


def test_a_second_backward_pass_finds_its_graph_again() -> None:
    ours, given = head(), maps()
    features, regressor = ours.children()
    out, _ = dense_head(features, regressor, given, SIZE, torch.float16, wait=True)  # type: ignore[arg-type]
    out.sum().backward(retain_graph=True)
    first = [p.grad.clone() for p in ours.parameters() if p.grad is not None]
    out.sum().backward()  # the graph inside was used up
    for parameter, once in zip(ours.parameters(), first, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, 2 * once, rtol=0, atol=0)


def test_frozen_parts_take_no_gradient() -> None:
    ours, given = head(), maps()
    given[1].requires_grad_(False)
    ours[0].scratch.layer2_rn.weight.requires_grad_(False)
    features, regressor = ours.children()
    out, _ = dense_head(features, regressor, given, SIZE, torch.float16, wait=True)  # type: ignore[arg-type]
    out.backward(cotangent())
    expected = dict(zip([f"map {i}" for i in range(4)] + [n for n, _ in ours.named_parameters()],
                        narrow(head(), maps(), cotangent())[1], strict=True))  # fmt: skip
    named = {**{f"map {i}": m for i, m in enumerate(given)}, **dict(ours.named_parameters())}
    for name, tensor in named.items():
        if tensor.requires_grad:
            assert tensor.grad is not None
            torch.testing.assert_close(tensor.grad, expected[name], rtol=0, atol=0)
        else:
            assert tensor.grad is None


@pytest.mark.parametrize("change", ["hook", "adapter", "parametrization"])
def test_a_head_that_is_more_than_its_weights_runs_layer_by_layer(change: str) -> None:
    """What somebody has put into a layer has its say, and trains."""

    class Adapter(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer, self.factor = layer, nn.Parameter(torch.tensor(2.0))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(x)
            return out * self.factor

    class Half(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight / 2

    model = small_model().train()
    views = [{"img": torch.randn(1, 3, 28, 42, generator=torch.Generator().manual_seed(0))}]
    assert plain_head(model.dpt_feature_head, model.dpt_regressor_head)
    before = gradients_of(model, views)[0]
    head, seen = model.dpt_regressor_head, []
    if change == "hook":
        head.conv1.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    elif change == "adapter":
        head.conv1 = Adapter(head.conv1)  # type: ignore[assignment]
    else:
        nn.utils.parametrize.register_parametrization(head.conv1, "weight", Half())
    assert not plain_head(model.dpt_feature_head, head)
    expected = gradients_of(model, views)[0]
    seen.clear()
    with use_head_dtype(torch.float16):
        loss = gradients_of(model, views)[0]
    torch.testing.assert_close(loss, expected, rtol=2e-3, atol=0)
    assert seen == ([torch.float32] if change == "hook" else [])
    assert change == "hook" or abs(loss - before) > 0.01 * before
    assert change != "adapter" or head.conv1.factor.grad is not None


def test_a_weight_that_two_layers_share_gets_both_gradients() -> None:
    model = small_model().train()
    unit = model.dpt_feature_head.scratch.refinenet1.resConfUnit1
    unit.conv2.weight = unit.conv1.weight
    views, found = [{"img": torch.randn(1, 3, 28, 42, generator=torch.Generator().manual_seed(0))}], []
    for dtype in (torch.float32, torch.float16):
        with use_head_dtype(dtype):
            gradients_of(model, views)
        found.append(unit.conv1.weight.grad)
    torch.testing.assert_close(found[1], found[0], rtol=0.02, atol=float(found[0].abs().max()) * 0.02)


def test_second_derivatives_are_refused() -> None:
    ours, given = head(), maps()
    features, regressor = ours.children()
    out, _ = dense_head(features, regressor, given, SIZE, torch.float16, wait=True)  # type: ignore[arg-type]
    (first,) = torch.autograd.grad(out.square().sum(), given[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("wait", [True, False])
def test_a_gradient_out_of_range_is_computed_again(wait: bool) -> None:
    """The finest map's projection sees the sum of what all pixels want, times a large activation."""
    ours, given, grad = with_large_gradients(head()), maps(), torch.ones(3, *SIZE, 6)
    out, gradients = narrow(ours, given, grad, wait)
    expected, others = oracle(ours, given, grad)
    assert relative_error(out, expected) < 8 * STEP
    if wait:
        assert all(relative_error(found, other) < 1e-4 for found, other in zip(gradients, others, strict=True))
    else:
        assert not all(bool(g.isfinite().all()) for g in gradients)


def too_large() -> tuple[nn.Module, list[dict[str, Tensor]]]:
    model = small_model().train()
    with torch.no_grad():
        model.scene_flow_dpt_feature_head.scratch.layer2_rn.weight.mul_(1e5)
    generator = torch.Generator().manual_seed(0)
    return model, [{"img": torch.randn(1, 3, 28, 42, generator=generator)} for _ in range(2)]


def gradients_of(model: nn.Module, views: list[dict[str, Tensor]]) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    outputs = model(views)
    loss: Tensor = sum(v.square().mean() for o in outputs for v in o.values() if v.is_floating_point())
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters() if p.grad is not None]


def test_out_of_range_in_the_forward_pass_the_head_runs_again(
    fresh_warning: None, caplog: pytest.LogCaptureFixture
) -> None:
    model, views = too_large()
    loss, expected = gradients_of(model, views)
    with caplog.at_level(logging.WARNING, logger="any4d_fast"), use_head_dtype(torch.float16):
        found_loss, found = gradients_of(model, views)
    assert sum("dense heads left the range" in record.getMessage() for record in caplog.records) == 1
    torch.testing.assert_close(found_loss, loss, rtol=1e-2, atol=0)
    assert relative_error(whole(found), whole(expected)) < 0.01


def test_without_waiting_such_a_step_has_no_finite_gradient() -> None:
    model, views = too_large()
    with use_head_dtype(torch.float16), never_wait():
        _, found = gradients_of(model, views)
    assert not bool(whole(found).isfinite().all())


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool], None]]:
    capturing = [False]
    monkeypatch.setattr(head_precision.backends, "select", lambda *_: "triton")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    yield lambda value: capturing.__setitem__(0, value)


class OnGpu:
    is_cuda = True


def test_when_heads_train_in_float16(on_a_gpu: Callable[[bool], None]) -> None:
    like: Tensor = OnGpu()  # type: ignore[assignment]
    assert training_dtype(like, mixed=True) == torch.float16
    assert training_dtype(like, mixed=False) == torch.float32
    with use_head_dtype(torch.float32):
        assert training_dtype(like, mixed=True) == torch.float32
    on_a_gpu(True)
    assert training_dtype(like, mixed=True) == torch.float32  # nobody could wait to see what left the range
    with never_wait():
        assert training_dtype(like, mixed=True) == torch.float16
