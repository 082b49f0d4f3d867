"""The whole model on a GPU with its kernels: golden outputs, mixed-precision budget, gradients, memory layout."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from any4d_fast import Any4D, use_backend
from any4d_fast.config import Any4DConfig, EncoderConfig, TransformerConfig
from any4d_fast.testing import relative_error
from tests import tf32
from tests.golden_cases import ALL_INPUTS, CASES, golden_views, golden_weights, load_case, load_outputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device (make test-gpu)"),
]

WEIGHTS, CLIPS = 4, 3
# Two runs in bf16 that round at different places differ by chance: over all gradients the ratio of their errors
# scatters by a few percent around 1.
CHANCE = 1.1


@pytest.fixture(autouse=True)
def full_float32() -> Iterator[None]:
    with tf32.settings(matmul=False, cudnn=False):
        yield


def to_cuda(views: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v.cuda() if isinstance(v, Tensor) else v for k, v in view.items()} for view in views]


@contextmanager
def mixed_precision() -> Iterator[None]:
    torch.backends.cudnn.allow_tf32 = True  # upstream allows TF32 in the heads
    with torch.autocast("cuda", dtype=torch.bfloat16):
        yield
    torch.backends.cudnn.allow_tf32 = False


def errors(outputs: list[dict[str, Tensor]], exact: list[dict[str, Tensor]]) -> dict[str, float]:
    return {
        key: relative_error(torch.cat([o[key] for o in outputs]), torch.cat([e[key] for e in exact]))
        for key in exact[0]
        if exact[0][key].is_floating_point()
    }


@pytest.mark.parametrize("name", CASES)
def test_golden_outputs_with_triton_kernels(name: str) -> None:
    case, expected = load_case(name), load_outputs(name)
    model = Any4D(**case["config"]).eval()
    golden_weights(model)
    model.cuda()
    with torch.no_grad():
        outputs = model(to_cuda(golden_views(**case["views"])))
    for i, view in enumerate(outputs):
        for key, value in view.items():
            want = expected[f"view{i}.{key}"]
            if value.dtype == torch.bool:
                assert torch.equal(value.cpu(), want), key
            else:
                assert relative_error(value, want) <= 1e-5, (i, key)


@pytest.mark.parametrize("weights", ["random", "golden"])
def test_mixed_precision_errs_no_more_than_plain_autocast(weights: str) -> None:
    """Full-size model, 4 views of 518 x 336: errors against the float32 model, over several weights and clips.

    Per output, the geometric mean of the ratio to plain autocast: a clip's cameras hang on few numbers, so that one
    ratio says little (it lies between 0.5 and 2), and errors of different weights differ in size.
    """
    means: dict[str, list[float]] = {}  # one value for each set of weights, whose clips err alike
    for seed in range(WEIGHTS):
        model = full_size_model(weights, seed)
        logs: dict[str, list[float]] = {}
        for clip in range(CLIPS):
            views = to_cuda(golden_views(4, 1, 336, 518, 100 * seed + clip, [[]] * 4))
            with torch.no_grad():
                with use_backend("eager"):
                    exact = model(views)
                    with mixed_precision():
                        plain = errors(model(views), exact)
                with mixed_precision():
                    ours = errors(model(views), exact)
            for key in plain:
                logs.setdefault(key, []).append(math.log(ours[key] / plain[key]))
        for key, values in logs.items():
            means.setdefault(key, []).append(statistics.fmean(values))
    ratios = {key: math.exp(statistics.fmean(values)) for key, values in means.items()}
    # Three standard errors of the mean: what chance does to a ratio of 1.
    chance = {key: math.exp(3 * statistics.stdev(values) / len(values) ** 0.5) for key, values in means.items()}
    report = {key: f"{ratios[key]:.3f} (chance {chance[key]:.3f})" for key in ratios}
    print(weights, report)
    assert all(ratios[key] <= CHANCE * chance[key] for key in ratios), report


def full_size_model(weights: str, seed: int) -> Any4D:
    """The released architecture on the GPU: PyTorch's initialisation, or the golden rule's with another generator."""
    torch.manual_seed(seed)
    with torch.device("cuda"):
        model = Any4D.from_preset("any4d").eval()
    if weights == "golden":
        golden_weights(model, torch.Generator("cuda").manual_seed(seed))
    return model


def test_training_step_matches_the_reference_gradients() -> None:
    """Gradients of every parameter with all inputs given, in mixed precision, against the float32 reference."""
    config = Any4DConfig(
        encoder=EncoderConfig(size="small", keep_first_n_layers=4),
        transformer=TransformerConfig(depth=4, dim=192, num_heads=3, indices=(1, 2)),
    )
    torch.manual_seed(0)
    model = Any4D.from_config(config)
    golden_weights(model)
    model.cuda().train()
    views = to_cuda(golden_views(3, 2, 70, 98, 5, [ALL_INPUTS] * 3))

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        outputs = model(views)
        generator = torch.Generator("cuda").manual_seed(1)
        loss = sum(
            (v.float() * torch.randn(v.shape, generator=generator, device="cuda")).sum() / v.numel()
            for view in outputs
            for v in view.values()
            if v.is_floating_point()
        )
        assert isinstance(loss, Tensor)
        loss.backward()
        return {n: p.grad.float().clone() for n, p in model.named_parameters() if p.grad is not None}

    with use_backend("eager"):
        exact = gradients()
        with mixed_precision():
            plain = gradients()
    with mixed_precision():
        ours = gradients()
    assert set(ours) == set(exact)
    whole = torch.cat([exact[n].flatten() for n in exact])
    error = relative_error(torch.cat([ours[n].flatten() for n in exact]), whole)
    base = relative_error(torch.cat([plain[n].flatten() for n in exact]), whole)
    print(f"gradient error {error:.3e}, plain autocast {base:.3e}")
    assert error <= CHANCE * base
    worst = {n: (relative_error(ours[n], exact[n]), relative_error(plain[n], exact[n])) for n in exact}
    bad = {n: e for n, e in worst.items() if not e[0] <= 2 * e[1] + 2**-8}
    assert not bad, bad


def test_float32_gradients_match_the_reference() -> None:
    case = load_case("all_inputs")
    model = Any4D(**case["config"])
    golden_weights(model)
    model.cuda().train()
    views = to_cuda(golden_views(**case["views"]))

    def gradients() -> Tensor:
        model.zero_grad()
        outputs = model(views)
        loss = torch.stack([v.float().square().mean() for o in outputs for v in o.values() if v.is_floating_point()])
        loss.sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    with use_backend("eager"):
        exact = gradients()
    assert relative_error(gradients(), exact) <= 1e-4  # float32 sums in another order, through the whole depth


def test_ten_training_steps_agree_among_backends() -> None:
    """Losses of ten AdamW steps: CUDA, Triton and plain autocast stay as near to each other as to the float32 run."""
    config = Any4DConfig(
        encoder=EncoderConfig(size="small", keep_first_n_layers=4),
        transformer=TransformerConfig(depth=4, dim=192, num_heads=3, indices=(1, 2)),
    )
    views = to_cuda(golden_views(3, 1, 98, 126, 7, [ALL_INPUTS] * 3))
    generator = torch.Generator("cuda").manual_seed(1)
    targets = [torch.randn(1, 98, 126, 3, generator=generator, device="cuda") for _ in views]

    def losses(backend: str) -> Tensor:
        torch.manual_seed(0)
        model = Any4D.from_config(config)
        golden_weights(model)
        model.cuda().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
        found = []
        with use_backend(backend):
            for _ in range(10):
                outputs = model(views)
                loss = torch.stack(
                    [
                        (o["pts3d_cam"].float() - t).abs().mean() + (o["scene_flow"].float() - t).abs().mean()
                        for o, t in zip(outputs, targets, strict=True)
                    ]
                ).sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                found.append(loss.detach())
        return torch.stack(found)

    exact = losses("eager")
    with mixed_precision():
        plain, triton, cuda = losses("eager"), losses("triton"), losses("cuda")
    print(exact.tolist(), plain.tolist(), triton.tolist(), cuda.tolist(), sep="\n")
    assert exact[-1] < exact[0]  # it learns
    # How far rounding alone takes a run from the float32 one: AdamW divides small gradients by their own size, so that
    # larger steps than these would be a matter of chance.
    spread = torch.maximum((plain - exact).abs(), (triton - exact).abs()).cummax(0).values
    assert bool(((cuda - triton).abs() <= 2 * spread + 2**-8 * exact).all())
