"""The machinery around CUDA graphs, with a graph on the CPU that replays by running its body again."""

from __future__ import annotations

import contextlib
import copy
import gc
import logging
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from any4d_fast import graphs, use_backend
from any4d_fast.config import ModalityConfig
from any4d_fast.graphs import GraphCache, call_key, cuda_graphs, wanted
from any4d_fast.head_precision import use_head_dtype
from any4d_fast.modules.derived import CaptureError, Derived, defer, recording
from tests.golden_cases import ALL_INPUTS, golden_views
from tests.small_models import small_config, small_model


class FakeGraph:
    """Remembers its body; a replay runs it and writes into the memory of the captured outputs."""

    def __init__(self, body: Callable[[], Any], outputs: list[dict[str, Tensor]]) -> None:
        self.body, self.outputs = body, outputs
        self.replays, self.resets = 0, 0

    def replay(self) -> None:
        assert not self.resets
        self.replays += 1
        with recording(capturing=True), contextlib.suppress(CaptureError):  # stale weights: any output may come out
            for target, source in zip(self.outputs, self.body(), strict=True):
                for name, value in source.items():
                    target[name].copy_(value)

    def reset(self) -> None:
        self.resets += 1


class FakeDevice:
    """A device whose captures are counted and may be told to fail or to take memory."""

    def __init__(self, device: torch.device) -> None:
        self.graphs: list[FakeGraph] = []
        self.fails: Exception | None = None
        self.growth = 0
        self.finished = 0

    def capture(self, body: Callable[[], Any]) -> tuple[FakeGraph, Any, int]:
        if self.fails:
            raise self.fails
        outputs = body()
        for output in outputs:
            for name in output:
                output[name] = output[name].clone()
        self.graphs.append(FakeGraph(body, outputs))
        return self.graphs[-1], outputs, self.growth

    @contextlib.contextmanager
    def ordered(self) -> Iterator[None]:
        yield

    def finish(self) -> None:
        self.finished += 1

    def limit(self) -> int:
        return 1 << 62


class Toy(nn.Module):
    """Outputs that depend on inputs, on a parameter as it is, and on a derived one."""

    def __init__(self) -> None:
        super().__init__()
        self.direct = nn.Parameter(torch.tensor(2.0))
        self.cast = nn.Parameter(torch.tensor(3.0))
        self.derived = Derived()
        self.child = nn.Identity()
        self.calls = 0

    def body(self, views: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
        self.calls += 1
        this = weakref.proxy(self)
        squared = self.derived.get("square", lambda: [this.cast], lambda: [this.cast.detach() ** 2])[0]
        return [{"sum": view["img"] * self.direct.detach() + squared} for view in views]


class Bench:
    """A toy model, its cache, and the fake device that the cache makes."""

    def __init__(self) -> None:
        self.made: list[FakeDevice] = []
        self.settings: dict[str, Any] = {}
        self.model = Toy()
        self.cache = GraphCache(self.make)

    def make(self, device: torch.device) -> FakeDevice:
        self.made.append(FakeDevice(device))
        for name, value in self.settings.items():
            setattr(self.made[-1], name, value)
        return self.made[-1]

    @property
    def device(self) -> FakeDevice:
        return self.made[-1]

    def call(self, value: float, key: Any = "a", **options: Any) -> float:
        views = [{"img": torch.full((2,), value), "name": "kept"}]
        with torch.no_grad():
            return float(self.cache.run(self.model, key, views, self.model.body, **options)[0]["sum"][0])

    def expected(self, value: float) -> float:
        return float(value * self.model.direct.detach() + self.model.cast.detach() ** 2)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_first_call_runs_second_captures_later_ones_replay(bench: Bench) -> None:
    assert bench.call(1.0) == 11 and not bench.made
    assert bench.call(2.0) == 13 and len(bench.device.graphs) == 1
    assert bench.call(5.0) == 19 and len(bench.device.graphs) == 1
    assert bench.device.graphs[0].replays == 2


def test_at_once_captures_at_the_first_call(bench: Bench) -> None:
    assert bench.call(1.0, at_once=True) == 11
    assert len(bench.device.graphs) == 1


def test_another_kind_of_call_has_its_own_graph(bench: Bench) -> None:
    for key in ("a", "a", "b", "b"):
        bench.call(1.0, key)
    assert len(bench.cache) == 2


def test_outputs_belong_to_the_caller(bench: Bench) -> None:
    views = [{"img": torch.ones(2)}]
    with torch.no_grad():
        first = bench.cache.run(bench.model, "a", views, bench.model.body, at_once=True)[0]["sum"]
        kept = first.clone()
        second = bench.cache.run(bench.model, "a", [{"img": torch.zeros(2)}], bench.model.body)[0]["sum"]
    assert torch.equal(first, kept) and not torch.equal(first, second)
    second.zero_()
    assert bench.call(1.0) == 11
    assert torch.equal(views[0]["img"], torch.ones(2))


def test_outputs_that_are_views_of_one_tensor_stay_so() -> None:
    stacked = torch.arange(12.0).view(2, 6)
    outputs = graphs._Outputs([{"x": stacked[0]}, {"x": stacked[1, ::2]}])
    assert len(outputs.flat) == 1
    fresh = outputs.fresh()
    assert torch.equal(fresh[0]["x"], stacked[0]) and torch.equal(fresh[1]["x"], stacked[1, ::2])
    assert fresh[0]["x"].untyped_storage().data_ptr() == fresh[1]["x"].untyped_storage().data_ptr()
    assert fresh[0]["x"].data_ptr() != stacked.data_ptr()


def test_weights_changed_in_place_reach_the_graph(bench: Bench) -> None:
    bench.call(1.0, at_once=True)
    squared = bench.model.derived.get("square", lambda: [bench.model.cast], lambda: [])[0]
    with torch.no_grad():
        bench.model.cast.fill_(4.0)
        bench.model.direct.mul_(10.0)
    assert bench.call(1.0) == 36
    assert len(bench.device.graphs) == 1
    assert squared.item() == 16.0  # renewed where it was
    optimizer = torch.optim.SGD(bench.model.parameters(), lr=1.0)
    bench.model.cast.grad = torch.tensor(1.0)
    optimizer.step()
    assert bench.call(1.0) == 29
    bench.model.load_state_dict({"direct": torch.tensor(0.0), "cast": torch.tensor(1.0)})
    assert bench.call(7.0) == 1
    assert len(bench.device.graphs) == 1


def test_weights_changed_between_warm_up_and_capture(bench: Bench) -> None:
    bench.call(1.0)
    with torch.no_grad():
        bench.model.cast.fill_(1.0)
    assert bench.call(1.0) == 3
    assert len(bench.device.graphs) == 1


def test_exchanged_parameters_and_modules_drop_the_graphs(bench: Bench) -> None:
    bench.call(1.0, at_once=True)
    bench.model.direct = nn.Parameter(torch.tensor(5.0))
    assert bench.call(1.0) == bench.expected(1.0) == 14
    assert len(bench.cache) == 0
    bench.call(1.0, at_once=True)
    bench.model.cast.data = torch.tensor(1.0)
    assert bench.call(1.0) == bench.expected(1.0) == 6
    bench.call(1.0, at_once=True)
    bench.model.extra = nn.Linear(1, 1)
    assert bench.call(1.0) == 6 and len(bench.cache) == 0


def test_a_part_in_another_mode_drops_the_graphs(bench: Bench) -> None:
    """Dropout that stays on in a part of the model is not in a graph of the model without, nor the other way round."""
    bench.call(1.0, at_once=True)
    bench.model.child.eval()
    assert bench.call(1.0) == 11 and len(bench.cache) == 0


def test_hooks_keep_graphs_out(bench: Bench) -> None:
    bench.call(1.0, at_once=True)
    replays = bench.device.graphs[0].replays
    handle = bench.model.child.register_forward_hook(lambda *_: None)
    calls = bench.model.calls
    assert bench.call(2.0) == 13 and bench.call(2.0, "new", at_once=True) == 13
    assert bench.model.calls > calls and len(bench.cache) == 1
    handle.remove()
    assert bench.call(2.0) == 13
    assert bench.device.graphs[0].replays > replays


def test_least_recently_used_graph_goes_first(bench: Bench) -> None:
    bench.cache.max_graphs = 2
    for key in ("a", "b"):
        bench.call(1.0, key, at_once=True)
    bench.call(1.0, "a")
    bench.call(1.0, "c", at_once=True)
    assert [graph.resets for graph in bench.device.graphs] == [0, 1, 0]
    assert bench.device.finished  # nothing is freed while the device may read it
    assert list(bench.cache._entries) == ["a", "c"]


def test_memory_is_bounded(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.settings["growth"] = 400
    bench.cache.max_bytes = 1000
    for key in ("a", "b"):
        assert bench.call(1.0, key, at_once=True) == 11
    assert len(bench.cache) == 2
    assert bench.call(1.0, "c", at_once=True) == 11  # a pool only grows: all but the newest graph are dropped
    assert list(bench.cache._entries) == ["c"] and bench.cache.bytes() < 1000
    bench.cache.max_bytes = 10
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert bench.call(1.0, "d", at_once=True) == 11
    assert len(bench.cache) == 0 and bench.cache.bytes() == 0
    assert len([r for r in caplog.records if "takes more than" in r.message]) == 1


def test_a_failed_capture_runs_without_and_says_why_once(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.settings["fails"] = RuntimeError("operation not permitted when stream is capturing")
    with caplog.at_level(logging.WARNING):
        for value in (1.0, 2.0, 3.0):
            assert bench.call(value) == bench.expected(value)
            assert bench.call(value, "b") == bench.expected(value)
    assert len([r for r in caplog.records if "not permitted" in r.message]) == 1
    assert bench.cache.failures() == ["RuntimeError: operation not permitted when stream is capturing"]
    assert len(bench.made) == 2  # one try for each kind of call


def test_an_error_of_the_caller_is_the_callers(bench: Bench) -> None:
    def body(views: Any) -> Any:
        raise ValueError("views: wrong")

    with pytest.raises(ValueError, match="views: wrong"):
        bench.cache.run(bench.model, "a", [{"img": torch.ones(1)}], body, at_once=True)
    assert not bench.cache.failures()


def test_a_raised_flag_runs_the_call_again_without(bench: Bench) -> None:
    runs: list[str] = []

    def body(views: Any) -> Any:
        flag = (views[0]["img"] > 9).any()
        if not defer(flag) and bool(flag):
            runs.append("wide")
            return [{"sum": views[0]["img"] * 0}]
        return [{"sum": views[0]["img"] * 1}]

    def call(value: float) -> float:
        views = [{"img": torch.full((1,), value)}]
        return float(bench.cache.run(bench.model, "f", views, body, at_once=True)[0]["sum"])

    assert call(1.0) == 1
    entry = next(iter(bench.cache._entries.values()))
    assert len(entry.recorded.flags) == 1
    entry.recorded.flags[0] = torch.tensor(True)  # what the replay would write
    assert call(10.0) == 0 and runs == ["wide"]


def test_deriving_during_a_capture_is_an_error(bench: Bench) -> None:
    derived = Derived()
    with recording(capturing=True), pytest.raises(CaptureError):
        derived.get("x", lambda: [bench.model.cast], lambda: [bench.model.cast])


def test_copies_and_pickles_start_without_graphs(bench: Bench) -> None:
    bench.call(1.0, at_once=True)
    assert len(copy.deepcopy(bench.cache)) == 0
    cache = GraphCache()
    assert len(pickle.loads(pickle.dumps(cache))) == 0


def test_choice_of_argument_context_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert wanted(None) is None
    monkeypatch.setenv("ANY4D_FAST_CUDA_GRAPHS", "0")
    assert wanted(None) is False and wanted(True) is True
    with cuda_graphs(None):
        assert wanted(None) is None
        with cuda_graphs(True):
            assert wanted(None) is True and wanted(False) is False
    first, second = cuda_graphs(False), cuda_graphs(True)
    first.__enter__()
    second.__enter__()  # another thread's
    first.__exit__(None, None, None)
    assert wanted(None) is True
    second.__exit__(None, None, None)
    assert wanted(None) is False
    monkeypatch.setenv("ANY4D_FAST_CUDA_GRAPHS", "yes")
    with pytest.raises(ValueError, match="ANY4D_FAST_CUDA_GRAPHS"):
        wanted(None)


def test_keys_tell_calls_apart() -> None:
    views = golden_views(2, 1, 28, 28, 0, [ALL_INPUTS, []])
    keys = [call_key(views)]
    keys.append(call_key(views[:1]))
    keys.append(call_key(golden_views(2, 1, 28, 42, 0, [ALL_INPUTS, []])))
    keys.append(call_key(golden_views(2, 2, 28, 28, 0, [ALL_INPUTS, []])))
    keys.append(call_key(golden_views(2, 1, 28, 28, 0, [[], ALL_INPUTS])))
    keys.append(call_key([{**v, "img": v["img"].half()} for v in views]))
    keys.append(call_key(views, ModalityConfig(depth_prob=0.0)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        keys.append(call_key(views))
    with use_backend("eager"):
        keys.append(call_key(views))
    with torch.inference_mode():
        keys.append(call_key(views))
    assert len(set(keys)) == len(keys)
    assert call_key(golden_views(2, 1, 28, 28, 1, [ALL_INPUTS, []])) == keys[0]  # other numbers, the same kind


def test_reasons_on_the_cpu() -> None:
    model, views = small_model(), golden_views(1, 1, 28, 28, 0, [[]])
    why_not = graphs.reasons(model, views, model.config.modalities, None)
    assert "images are not on a CUDA device" in why_not and "gradients are enabled" in why_not
    with torch.no_grad():
        assert graphs.reasons(model, views, model.config.modalities, None) == ["images are not on a CUDA device"]
        model.train()
        assert "the model is in training mode" in graphs.reasons(model, views, model.config.modalities, None)
        dropped = ModalityConfig(depth_prob=0.5)
        assert "modalities are drawn at random" in graphs.reasons(model, views, dropped, None)
        with use_backend("eager"):
            assert "the reference backend runs" in graphs.reasons(model, views, dropped, None)


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[FakeDevice]:
    """Graphs on the CPU for whole models: nothing but the missing device speaks against them."""
    made: list[FakeDevice] = []
    original = graphs.reasons

    def reasons(*arguments: Any) -> list[str]:
        return [reason for reason in original(*arguments) if "CUDA device" not in reason]

    def make(device: torch.device) -> FakeDevice:
        made.append(FakeDevice(device))
        return made[-1]

    monkeypatch.setattr(graphs, "reasons", reasons)
    monkeypatch.setattr(graphs.GraphCache.__init__, "__defaults__", (make,))
    return made


@pytest.mark.parametrize("provided", [[], ALL_INPUTS])
def test_whole_model_replays_what_it_computes(captured: list[FakeDevice], provided: list[str]) -> None:
    model = small_model(small_config())
    clips = [golden_views(2, 1, 28, 42, seed, [provided] * 2) for seed in (0, 1)]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        for views in clips:
            plain = model(views, cuda_graphs=False)
            replayed = model(views, cuda_graphs=True)
            for a, b in zip(plain, replayed, strict=True):
                assert a.keys() == b.keys()
                assert all(torch.equal(a[k], b[k]) for k in a)
    assert len(captured) == 1 and len(captured[0].graphs) == 1
    assert captured[0].graphs[0].replays == 2


def test_moving_a_model_drops_its_graphs_and_a_copy_has_none(captured: list[FakeDevice]) -> None:
    model, views = small_model(), golden_views(1, 1, 28, 28, 0, [[]])
    with torch.no_grad():
        model(views, cuda_graphs=True)
        assert len(model._graphs) == 1
        assert len(copy.deepcopy(model)._graphs) == 0
        model.to("cpu")  # moves nothing
        assert len(model._graphs) == 1
        model.double()
        assert len(model._graphs) == 0


def test_a_model_goes_when_its_last_user_lets_it_go(captured: list[FakeDevice]) -> None:
    """No cycle keeps its memory until the next garbage collection."""
    model, views = small_model(), golden_views(1, 1, 28, 28, 0, [[]])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), use_head_dtype(torch.bfloat16):
        model(views, cuda_graphs=True)
    assert len(model._graphs) == 1
    gone = [weakref.ref(m) for m in (model, model.encoder.model, model.info_sharing, model.pose_head)]
    gc.collect()
    gc.disable()
    try:
        for graph in captured[0].graphs:
            graph.body = list  # a real graph does not hold what it was captured from
        del model
        assert [ref() for ref in gone] == [None] * 4
    finally:
        gc.enable()


def test_training_takes_no_graph(captured: list[FakeDevice]) -> None:
    model, views = small_model(), golden_views(1, 1, 28, 28, 0, [[]])
    model(views, cuda_graphs=True)
    with torch.no_grad():
        model.train()(views, cuda_graphs=True)
    assert not captured
