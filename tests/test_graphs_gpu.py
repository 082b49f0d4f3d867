"""CUDA graphs on a GPU: equal to the calls that they replace, under other inputs, weights, streams and sizes."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from any4d_fast import Any4D
from any4d_fast.config import Any4DConfig, DenseHeadConfig, EncoderConfig, SceneConfig, TransformerConfig
from any4d_fast.head_precision import use_head_dtype
from any4d_fast.modules.derived import Derived
from any4d_fast.testing import relative_error
from tests.golden_cases import ALL_INPUTS, golden_views, golden_weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device (make test-gpu)"),
]

# A vendor library may split a sum otherwise on another stream's workspace: a bfloat16 rounding step here and there.
ROUNDING = 2e-3

Views = list[dict[str, Any]]
Outputs = list[dict[str, Tensor]]


def middle_model(seed: int = 0) -> Any4D:
    """Deep enough to be bound by launches, small enough for hundreds of calls."""
    head = DenseHeadConfig(feature_dim=64, layer_dims=(32, 48, 64, 96))
    config = Any4DConfig(
        encoder=EncoderConfig(size="small", keep_first_n_layers=6),
        transformer=TransformerConfig(depth=6, dim=384, num_heads=6, indices=(2, 4)),
        scene=SceneConfig(geometry_head=head, flow_head=DenseHeadConfig(3, 64, layer_dims=(32, 48, 64, 96))),
    )
    torch.manual_seed(seed)
    model = Any4D.from_config(config)
    golden_weights(model)
    return model.cuda().eval()


def clip(views: int, seed: int = 0, provided: list[str] | None = None, height: int = 112, width: int = 154) -> Views:
    made = golden_views(views, 1, height, width, seed, [provided or []] * views)
    return [{k: v.cuda() if isinstance(v, Tensor) else v for k, v in view.items()} for view in made]


@contextlib.contextmanager
def inference() -> Iterator[None]:
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
        yield


def call(model: Any4D, views: Views, graph: bool | None) -> Outputs:
    with inference():
        return model(views, cuda_graphs=graph)


def differences(a: Outputs, b: Outputs) -> dict[str, float]:
    """Relative error of every output; 0 where all bits agree."""
    found = {}
    for key in a[0]:
        x, y = (torch.cat([view[key].float() for view in outputs]) for outputs in (a, b))
        found[key] = 0.0 if torch.equal(x, y) else relative_error(x, y)
    return found


def assert_equal(a: Outputs, b: Outputs) -> None:
    found = differences(a, b)
    print({key: error for key, error in found.items() if error} or "bit for bit")
    assert all(error <= ROUNDING for error in found.values()), found


@pytest.fixture(scope="module")
def model() -> Any4D:
    return middle_model()


@pytest.fixture(autouse=True)
def fresh(model: Any4D) -> Iterator[None]:
    model._graphs.clear()
    yield
    assert not model._graphs.failures()
    assert not torch.cuda.is_current_stream_capturing()


@pytest.mark.parametrize("provided", [[], ALL_INPUTS])
@pytest.mark.parametrize("views", [1, 2, 5])
def test_replays_equal_eager_calls_for_any_inputs(model: Any4D, views: int, provided: list[str]) -> None:
    for seed in range(3):
        given = clip(views, seed, provided)
        assert_equal(call(model, given, True), call(model, given, False))
    assert len(model._graphs) == 1


def test_full_size() -> None:
    torch.manual_seed(0)
    with torch.device("cuda"):
        big = Any4D.from_preset("any4d").eval()
    for seed in range(2):
        given = clip(2, seed, height=336, width=518)
        assert_equal(call(big, given, True), call(big, given, False))
    assert len(big._graphs) == 1 and not big._graphs.failures()


def test_second_call_captures_by_itself_and_large_sizes_do_not(model: Any4D, monkeypatch: pytest.MonkeyPatch) -> None:
    from any4d_fast import graph_calls

    given = clip(2)
    call(model, given, None)
    assert len(model._graphs) == 0
    call(model, given, None)
    assert len(model._graphs) == 1
    monkeypatch.setattr(graph_calls, "MAX_TOKENS", 10)
    for _ in range(2):
        call(model, clip(3), None)
    assert len(model._graphs) == 1


def test_outputs_are_the_callers(model: Any4D) -> None:
    first = call(model, clip(2, 0), True)
    kept = [{k: v.clone() for k, v in view.items()} for view in first]
    second = call(model, clip(2, 1), True)
    assert all(torch.equal(a[k], b[k]) for a, b in zip(first, kept, strict=True) for k in a)
    assert differences(first, second)["pts3d"] > 1e-3
    for view in second:
        for value in view.values():
            value.zero_()
    assert_equal(call(model, clip(2, 0), True), kept)


def test_changing_weights() -> None:
    model = middle_model(1)
    given = clip(2)
    before = call(model, given, True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.randn_like(p) * p.abs().mean()
        optimizer.step()
        after = call(model, given, True)
        assert_equal(after, call(model, given, False))
        assert differences(before, after)["pts3d"] > 1e-3
    assert len(model._graphs) == 1  # the same graph all along
    model.load_state_dict({k: v * 0.9 for k, v in model.state_dict().items()})
    assert_equal(call(model, given, True), call(model, given, False))
    assert len(model._graphs) == 1
    model.load_state_dict({k: v.clone() * 1.05 for k, v in model.state_dict().items()}, assign=True)
    assert_equal(call(model, given, True), call(model, given, False))
    moved = model.cpu().cuda()
    assert len(moved._graphs) == 0
    assert_equal(call(moved, given, True), call(moved, given, False))


def test_weights_derived_anew_on_another_stream() -> None:
    model, given = middle_model(2), clip(2)
    call(model, given, True)
    for _ in range(5):
        with torch.no_grad():
            torch._foreach_mul_(list(model.parameters()), 1.01)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            expected = call(model, given, False)  # renews the derived weights there
        found = call(model, given, True)
        torch.cuda.synchronize()
        assert_equal(found, expected)


def test_streams(model: Any4D) -> None:
    clips = [clip(2, seed) for seed in range(6)]
    expected = [call(model, given, False) for given in clips]
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    found: list[Outputs] = []
    for i, given in enumerate(clips):
        with torch.cuda.stream(streams[i % 3]):
            found.append(call(model, given, True))
    torch.cuda.synchronize()
    for a, b in zip(found, expected, strict=True):
        assert_equal(a, b)


def test_two_models_in_two_threads() -> None:
    models = [middle_model(seed) for seed in (3, 4)]
    with torch.no_grad():
        for p in models[1].parameters():
            p.mul_(1.1)
    clips = [clip(2, seed) for seed in range(4)]
    expected = [[call(m, given, False) for given in clips] for m in models]
    torch.cuda.synchronize()
    found: list[list[Outputs]] = [[], []]
    errors: list[BaseException] = []

    def work(index: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(5):
                    found[index] = [call(models[index], given, True) for given in clips]
                torch.cuda.current_stream().synchronize()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for a, b in zip(found, expected, strict=True):
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    for m in models:
        assert not m._graphs.failures()


def test_least_recently_used_graphs_are_dropped(model: Any4D) -> None:
    model._graphs.max_graphs = 3
    try:
        for views in (1, 2, 3, 4, 1, 5, 4):
            given = clip(views, views)
            assert_equal(call(model, given, True), call(model, given, False))
            assert len(model._graphs) <= 3
    finally:
        model._graphs.max_graphs = 16


def test_thirty_random_numbers_of_views(model: Any4D) -> None:
    chance = random.Random(0)
    for _ in range(30):
        views = chance.randint(1, 24)
        given = clip(views, chance.randint(0, 99), chance.choice([[], ALL_INPUTS]))
        assert_equal(call(model, given, True), call(model, given, False))


def test_memory_does_not_grow(model: Any4D) -> None:
    """200 calls of random sizes: what is reserved after the first half does not grow in the second."""
    chance = random.Random(1)
    sizes = [(112, 154), (154, 112), (140, 140)]
    reserved = []
    for i in range(200):
        height, width = chance.choice(sizes)
        call(model, clip(chance.randint(1, 12), 0, [], height, width), None)
        if i in (99, 199):
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            reserved.append(torch.cuda.memory_reserved())
    print([f"{r / 2**30:.2f} GiB" for r in reserved], len(model._graphs), f"{model._graphs.bytes() / 2**30:.2f} GiB")
    assert reserved[1] <= reserved[0] + model._graphs._limit() // 8
    assert model._graphs.bytes() <= model._graphs._limit()


def test_first_call_at_a_new_size_is_quick_and_the_compiler_rests(model: Any4D) -> None:
    """After two numbers of views, no kernel is compiled for a third; no first call takes 5 s."""
    import triton

    compiled: list[str] = []

    def hook(*arguments: Any, **named: Any) -> None:
        compiled.append(str(named.get("repr", named.get("key")))[:80])

    for views in (2, 3, 16, 17):  # multiples of 16 and of 2, and neither
        call(model, clip(views), False)
    before = triton.knobs.runtime.jit_post_compile_hook
    triton.knobs.runtime.jit_post_compile_hook = hook
    try:
        for views in (4, 5, 7, 8, 11):
            given = clip(views)
            torch.cuda.synchronize()
            start = time.perf_counter()
            call(model, given, True)
            torch.cuda.synchronize()
            assert time.perf_counter() - start < 5.0
    finally:
        triton.knobs.runtime.jit_post_compile_hook = before
    assert not compiled, compiled


def test_failed_captures_leave_everything_usable(model: Any4D, caplog: pytest.LogCaptureFixture) -> None:
    given = clip(2)
    expected = call(model, given, False)
    original = type(model)._reconstruct

    def reads_back(self: Any4D, views: Views, *rest: Any) -> Outputs:
        outputs = original(self, views, *rest)
        float(outputs[0]["conf"].sum())  # waits for the device, which a capture cannot
        return outputs

    try:
        type(model)._reconstruct = reads_back  # type: ignore[method-assign]
        for _ in range(3):
            assert_equal(call(model, given, True), expected)
    finally:
        type(model)._reconstruct = original  # type: ignore[method-assign]
    assert len(model._graphs) == 0 and len(model._graphs.failures()) == 1
    assert len([r for r in caplog.records if "CUDA graphs" in r.message]) == 1
    assert not torch.cuda.is_current_stream_capturing()
    torch.rand(4, device="cuda")  # the generator is not left in capture mode either
    model._graphs._failed.clear()
    for seed in range(2):
        assert_equal(call(model, clip(2, seed), True), call(model, clip(2, seed), False))
    assert len(model._graphs) == 1


def test_inside_another_capture_no_graph_is_taken(model: Any4D) -> None:
    given = clip(2)
    with use_head_dtype(torch.float32):  # in 16 bits the heads need a look at their flag, which such a graph forbids
        expected = call(model, given, False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(model, given, True)
    assert len(model._graphs) == 0
    graph.replay()
    torch.cuda.synchronize()
    assert_equal(captured, expected)


def test_inference_mode_autocast_cache_and_dtypes(model: Any4D) -> None:
    given = clip(2)
    with inference():  # one autocast context: its cache of weights must not be captured
        eager = model(given, cuda_graphs=False)
        first = model(given, cuda_graphs=True)
    filler = [torch.full((1 << 24,), float("nan"), device="cuda") for _ in range(8)]
    del filler
    assert_equal(first, eager)
    assert_equal(call(model, given, True), eager)
    with torch.inference_mode(), torch.autocast("cuda", dtype=torch.bfloat16):
        assert_equal(model(given, cuda_graphs=True), eager)
        assert_equal(model(given, cuda_graphs=True), eager)
    with torch.no_grad():
        exact = model(given, cuda_graphs=False)
        assert_equal(model(given, cuda_graphs=True), exact)
        with torch.autocast("cuda", dtype=torch.float16):
            half = model(given, cuda_graphs=False)
            assert_equal(model(given, cuda_graphs=True), half)
    assert len(model._graphs) == 4


def test_infer_uses_graphs(model: Any4D) -> None:
    views = [{"img": torch.rand(3, 112, 154)} for _ in range(2)]
    outputs = [model.infer(views, size=(112, 154), cuda_graphs=choice) for choice in (False, True, True)]
    assert len(model._graphs) == 1
    for found in outputs[1:]:
        assert_equal(found, outputs[0])


def test_a_value_outside_float16_is_computed_again(model: Any4D) -> None:
    """The heads' flag is read after the replay, and such a call runs without the graph."""
    given = clip(2)
    call(model, given, True)
    weight = model.dpt_regressor_head.conv1.weight
    with torch.no_grad():
        weight.mul_(1e6)
        found, expected = call(model, given, True), call(model, given, False)
        weight.div_(1e6)
    assert all(torch.isfinite(view["conf"]).all() == torch.isfinite(other["conf"]).all()
               for view, other in zip(found, expected, strict=True))  # fmt: skip
    assert differences(found, expected)["non_ambiguous_mask_logits"] <= ROUNDING


def test_derived_weights_are_on_the_device(model: Any4D) -> None:
    call(model, clip(1), False)
    kept = [
        k for m in model.modules() if isinstance(d := getattr(m, "derived", None), Derived) for k in d._kept.values()
    ]
    assert kept and all(t.is_cuda for k in kept for t in k.tensors)
