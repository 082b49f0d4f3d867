"""`precision="fp8"` of the released architecture on a GPU: errors, graphs, repeatability."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from any4d_fast import Any4D, use_backend
from any4d_fast.backends import capability
from any4d_fast.graphs import cuda_graphs
from any4d_fast.modules import packing_fp8
from any4d_fast.modules.packing_fp8 import Layers
from any4d_fast.testing import relative_error
from tests.golden_cases import golden_views, golden_weights
from tests.kernels_common import GPU, gpu_only

pytestmark = [
    *gpu_only,
    pytest.mark.skipif(GPU and capability(0) < (9, 0), reason="needs a GPU of compute capability 9.0 or later"),
]

NAMES = ("pts3d", "ray_directions", "depth_along_ray", "cam_trans", "cam_quats", "scene_flow", "conf")
FACTOR = 5.0


@pytest.fixture(autouse=True)
def every_segment_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention in 8 bits at the sizes of a test."""
    monkeypatch.setattr(packing_fp8, "LONG", 1)


@pytest.fixture(scope="module")
def model() -> Any4D:
    model = Any4D.from_preset("any4d")
    golden_weights(model)
    return model.to("cuda").eval()


def views_of(count: int, seed: int = 0) -> list[dict[str, object]]:
    views = golden_views(count, 1, 154, 224, seed, [[]] * count)
    return [{k: v.cuda() if isinstance(v, Tensor) else v for k, v in view.items()} for view in views]


def call(model: Any4D, views: list[dict[str, object]], precision: str, graphs: bool = False) -> list[Tensor]:
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16), cuda_graphs(graphs):
        found = model(views, precision=precision)
    return [torch.cat([view[name].float() for view in found]) for name in NAMES]


@pytest.mark.parametrize("count", [1, 3])
def test_errors_are_within_five_times_those_of_bfloat16(model: Any4D, count: int) -> None:
    views = views_of(count)
    with torch.no_grad(), use_backend("eager"):
        exact = [torch.cat([view[name] for view in outputs]) for outputs in [model(views)] for name in NAMES]
    with use_backend("eager"):
        plain = call(model, views, "exact")
    found = call(model, views, "fp8")
    for name, a, b, c in zip(NAMES, found, plain, exact, strict=True):
        slack = 1.1 + 3 / c.numel() ** 0.5  # as in benchmarks/bench_model.py
        assert relative_error(a, c) <= FACTOR * slack * relative_error(b, c), name
    assert not all(torch.equal(a, b) for a, b in zip(found, call(model, views, "exact"), strict=True))


@pytest.mark.parametrize("layers", [Layers(), Layers(qkv=False), Layers(mlp=False), Layers(attention=False)])
def test_kernels_compute_what_the_emulation_does(model: Any4D, layers: Layers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing_fp8, "ENCODER", layers)
    monkeypatch.setattr(packing_fp8, "TRANSFORMER", layers)
    views = views_of(2, 1)
    exact = call(model, views, "exact")
    found = call(model, views, "fp8")
    with use_backend("eager"):
        emulated = call(model, views, "fp8")
    for name, a, b, c in zip(NAMES, found, emulated, exact, strict=True):
        # Values at a rounding boundary fall on either side: two runs with the same errors, but not the same numbers.
        assert relative_error(a, c) <= 3 * relative_error(b, c) + 5e-3, name


def test_graphs_compute_the_same(model: Any4D) -> None:
    views, others = views_of(2), views_of(2, 3)
    for _ in range(2):
        for given in (views, others):
            for precision in ("fp8", "exact"):
                eager, replayed = call(model, given, precision), call(model, given, precision, graphs=True)
                assert all(torch.equal(a, b) for a, b in zip(eager, replayed, strict=True)), precision
    assert not model._graphs.failures()


def test_infer_in_8_bits(model: Any4D) -> None:
    images = [{"img": torch.randint(0, 256, (154, 224, 3), dtype=torch.uint8)} for _ in range(2)]
    outputs = model.infer(images, precision="fp8", size=(154, 224))
    assert all(value.isfinite().all() for view in outputs for value in view.values() if value.is_floating_point())
