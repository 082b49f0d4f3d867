"""The heads in 16 bits: the function of float32, weights that follow the parameters, a range that is watched."""

from __future__ import annotations

import contextlib
import copy
import logging
import pickle
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from any4d_fast import head_loop, head_precision
from any4d_fast.config import DenseHeadConfig
from any4d_fast.head_precision import head_dtype, use_head_dtype
from any4d_fast.modules import dense_inference
from any4d_fast.modules.dense_inference import CastStore
from any4d_fast.modules.derived import recording
from any4d_fast.modules.dpt import DPTFeatures, DPTRegressor
from any4d_fast.modules.heads import PoseHead
from any4d_fast.ops.dense_maps import new_flag
from any4d_fast.testing import relative_error
from tests.golden_cases import ALL_INPUTS, golden_views, golden_weights
from tests.small_models import small_model

Grid = tuple[int, int]
SMALL = DenseHeadConfig(output_dim=6, feature_dim=16, layer_dims=(8, 12, 16, 20))
CASES: dict[str, tuple[DenseHeadConfig, tuple[int, ...], Grid]] = {
    "encoder map first": (SMALL, (20, 12, 12, 12), (2, 4)),
    "odd grid": (SMALL, (20, 12, 12, 12), (3, 5)),
    "one row": (SMALL, (12, 12, 12, 12), (1, 3)),
    "one patch": (SMALL, (12, 12, 12, 12), (1, 1)),
    "hooks permuted": (DenseHeadConfig(output_dim=3, feature_dim=16, hooks=(3, 1, 0, 2), layer_dims=(8, 12, 16, 20)),
                       (12, 12, 12, 12), (3, 2)),
    "hidden dims": (DenseHeadConfig(output_dim=1, feature_dim=16, layer_dims=(8, 8, 8, 8), hidden_dims=(10, 6)),
                    (12, 12, 12, 12), (2, 3)),
}  # fmt: skip
# Half a step of rounding is made at each of the dozen layers, with independent signs: a few steps in the end.
ROUNDING_STEPS = 6
STEP = {torch.float32: 2.0**-23, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def head(config: DenseHeadConfig = SMALL, dims: tuple[int, ...] = (12, 12, 12, 12)) -> nn.Sequential:
    made = nn.Sequential(DPTFeatures(config, dims), DPTRegressor(config)).eval()
    golden_weights(made)
    return made


def token_maps(dims: tuple[int, ...], grid: Grid, images: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(images, dim, *grid, generator=generator) for dim in dims]


@torch.no_grad()
def run(module: nn.Sequential, maps: list[Tensor], dtype: torch.dtype | None = None) -> tuple[Tensor, bool]:
    """Result of a head, in 32 bits without a dtype; and whether it left the range."""
    size = (14 * maps[0].shape[2], 14 * maps[0].shape[3])
    if dtype is None:
        return module[1](module[0](maps), size), False
    flag = new_flag(torch.device("cpu"))
    narrow = [m.to(dtype).contiguous(memory_format=torch.channels_last) for m in maps]
    return module[1](module[0](narrow, flag), size, flag), bool(flag.item())


@pytest.mark.parametrize("dtype", STEP)
@pytest.mark.parametrize("name", CASES)
def test_a_dense_head_is_the_same_function(name: str, dtype: torch.dtype) -> None:
    config, dims, grid = CASES[name]
    module, maps = head(config, dims), token_maps(dims, grid)
    expected, _ = run(module, maps)
    found, left = run(module, maps, dtype)
    assert found.dtype == torch.float32 and found.shape == expected.shape
    assert not left
    assert relative_error(found, expected) <= ROUNDING_STEPS * STEP[dtype]


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_levels_in_two_calls_are_the_head(name: str) -> None:
    config, dims, grid = CASES[name]
    features, maps = head(config, dims)[0], token_maps(dims, grid)
    flag = new_flag(torch.device("cpu"))
    narrow = [m.half().contiguous(memory_format=torch.channels_last) for m in maps]
    whole = features(narrow, flag)
    coarse = features(narrow, flag, coarse_only=True)
    parts = [features([m[i : i + 1] for m in narrow], flag, coarse=coarse[i : i + 1]) for i in range(len(whole))]
    assert relative_error(torch.cat(parts), whole) <= STEP[torch.float16]
    assert not flag.item()


@pytest.mark.parametrize("dtype", STEP)
@pytest.mark.parametrize("blocks", [0, 2])
def test_the_pose_head_is_the_same_function(blocks: int, dtype: torch.dtype) -> None:
    module = PoseHead(12, 2, blocks).eval()
    golden_weights(module)
    tokens = torch.randn(3, 7, 12, generator=torch.Generator().manual_seed(0))
    flag = new_flag(tokens.device)
    with torch.no_grad():
        found = module(tokens.to(dtype), flag)
        assert relative_error(found, module(tokens)) <= ROUNDING_STEPS * STEP[dtype]
        assert not flag.item()
        with_large = tokens.clone()
        with_large[1, 2] = 6e4
        module(with_large.half(), flag)
    assert flag.item()


def with_large_weight(name: str, size: float) -> nn.Sequential:
    module = head()
    with torch.no_grad():
        weight = module.get_parameter(name)
        weight.mul_(size / weight.abs().max())
    return module


@pytest.mark.parametrize(
    "name",
    [
        "0.input_process.0.0.0.weight",
        "0.input_process.1.0.1.weight",
        "0.input_process.3.0.1.weight",
        "0.scratch.layer2_rn.weight",
        "0.scratch.refinenet3.resConfUnit1.conv1.weight",
        "0.scratch.refinenet1.resConfUnit2.conv2.weight",
        "0.scratch.refinenet2.out_conv.weight",
        "1.conv1.weight",
        "1.conv2.0.weight",
        "1.conv2.2.weight",
    ],
)
def test_a_value_beyond_float16_at_any_layer_is_seen(name: str) -> None:
    maps = token_maps((12, 12, 12, 12), (3, 2))
    assert not run(head(), maps, torch.float16)[1]
    for size in (1e2, 1e3, 1e4, 6e4):  # within float16's range; what they make of the map may not be
        module = with_large_weight(name, size)
        wide, _ = run(module, maps)
        found, left = run(module, maps, torch.float16)
        assert left or relative_error(found, wide) <= ROUNDING_STEPS * STEP[torch.float16]
        assert not run(module, maps, torch.bfloat16)[1]  # it has float32's range
    assert left or name == "1.conv2.2.weight"  # whose results are float32


def test_nothing_is_kept_in_the_state_dict_or_in_copies() -> None:
    module, maps = head(), token_maps((12, 12, 12, 12), (2, 2))
    names = set(module.state_dict())
    expected, _ = run(module, maps, torch.float16)
    assert len(module[0].derived) == len(module[1].derived) == 1
    assert set(module.state_dict()) == names
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert len(other[0].derived) == len(other[1].derived) == 0
        assert torch.equal(run(other, maps, torch.float16)[0], expected)


def test_weights_follow_the_parameters() -> None:
    module, maps = head(), token_maps((12, 12, 12, 12), (2, 2))

    def check() -> Tensor:
        found = run(module, maps, torch.float16)[0]
        fresh = copy.deepcopy(module)
        assert torch.equal(found, run(fresh, maps, torch.float16)[0])
        return found

    before = check()
    assert torch.equal(check(), before)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    stepped = check()
    assert not torch.equal(stepped, before)
    module.load_state_dict(head().state_dict())
    assert torch.equal(check(), before)
    module.double().float()
    check()
    module[1].conv1.weight = nn.Parameter(module[1].conv1.weight.detach() * 2)
    assert not torch.equal(check(), before)
    module.load_state_dict({k: v * 1.5 for k, v in module.state_dict().items()}, assign=True)
    check()


def test_weights_are_converted_once() -> None:
    module, maps = head(), token_maps((12, 12, 12, 12), (2, 2))
    run(module, maps, torch.float16)
    with torch.no_grad():
        for part in module:
            part.derived.weights(part, torch.float16, lambda *_: pytest.fail("converted again"))


def test_threads_that_meet_in_the_first_call_share_what_is_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one comes when the first has tensors and not yet their tree."""
    regressor, others = head()[1], []
    original = CastStore.get

    def slowly(self: Any, *arguments: Any) -> list[Tensor]:
        found = original(self, *arguments)
        if threading.current_thread().name.startswith("first"):
            others.append(second.submit(run))
            wait(others, timeout=0.2)
        return found

    def run() -> Any:
        with torch.no_grad():
            return regressor.derived.weights(regressor, torch.float16, dense_inference.pack_regressor)

    monkeypatch.setattr(CastStore, "get", slowly)
    with ThreadPoolExecutor(1, "first") as first, ThreadPoolExecutor(1, "second") as second:
        found = first.submit(run).result()
        assert len(others) == 1 and others[0].result() is found


def test_moving_the_model_lets_go_of_what_was_converted() -> None:
    model = small_model()
    with torch.no_grad(), use_head_dtype(torch.float16):
        model(model_inputs())
    stores = [model.dpt_feature_head.derived, model.pose_head.derived]
    assert all(len(store) == len(store._trees) == 1 for store in stores)
    model.to(torch.float64)
    assert all(len(store) == len(store._trees) == 0 for store in stores)


def model_inputs() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"img": torch.randn(2, 3, 28, 42, generator=generator)} for _ in range(3)]


@pytest.mark.parametrize("minibatch_size", [None, 2])
def test_the_whole_model_in_float16(minibatch_size: int | None) -> None:
    """float16 rounds eight times as finely as bfloat16: how much errors grow on their way is the model's affair."""
    model, views = small_model(), model_inputs()
    with torch.no_grad():
        expected = model(views)
        found = {}
        for dtype in head_precision.NARROW:
            with use_head_dtype(dtype):
                found[dtype] = model(views, minibatch_size=minibatch_size)
    for view, coarse, other in zip(found[torch.float16], found[torch.bfloat16], expected, strict=True):
        assert set(view) == set(other)
        for key, value in other.items():
            if value.is_floating_point():
                assert view[key].dtype == torch.float32
                limit = max(relative_error(coarse[key], value) / 3, 4 * STEP[torch.float16])
                assert relative_error(view[key], value) <= limit, key
        assert (view["non_ambiguous_mask"] != other["non_ambiguous_mask"]).float().mean() <= 0.01


def test_out_of_range_the_heads_run_again_in_float32(fresh_warning: None, caplog: pytest.LogCaptureFixture) -> None:
    model, views = small_model(), model_inputs()
    with torch.no_grad():
        model.scene_flow_dpt_feature_head.scratch.layer2_rn.weight.mul_(1e5)
        expected = model(views, minibatch_size=1)
        with caplog.at_level(logging.WARNING, logger="any4d_fast"), use_head_dtype(torch.float16):
            for _ in range(2):
                found = model(views, minibatch_size=2)
                for view, other in zip(found, expected, strict=True):
                    for key, value in other.items():
                        torch.testing.assert_close(view[key], value, rtol=1e-5, atol=1e-5)
    assert sum("left the range" in record.getMessage() for record in caplog.records) == 1


def test_during_a_capture_the_flag_is_left_to_whoever_replays(fresh_warning: None) -> None:
    model, views = small_model(), model_inputs()
    with torch.no_grad(), use_head_dtype(torch.float16):
        model(views)
        with recording(capturing=True) as notes:
            model(views)
        assert [bool(flag) for flag in notes.flags] == [False]
        model.dpt_regressor_head.conv1.bias.fill_(1e5)
        model(views)
        with recording(capturing=True) as notes:
            model(views)
        assert [bool(flag) for flag in notes.flags] == [True]


def all_inputs() -> list[dict[str, Any]]:
    return golden_views(2, 2, 28, 42, 0, [ALL_INPUTS] * 2)


def test_the_tokenizers_run_in_16_bits_with_the_heads() -> None:
    model, views = small_model(), all_inputs()
    dtypes: list[torch.dtype | None] = []
    for name in ("ray_dirs_encoder", "depth_encoder", "scene_flow_encoder"):
        hook = lambda module, args: dtypes.append(args[1] if len(args) > 1 else None)  # noqa: E731
        getattr(model, name).register_forward_pre_hook(hook)
    with torch.no_grad():
        expected = model(views)
        with use_head_dtype(torch.float16):
            found = model(views)
            assert dtypes == [None] * 3 + [torch.float16] * 3
            model.train()(views)  # drawn at random: not to be drawn twice
    assert dtypes[6:] == [None] * 3
    for view, other in zip(found, expected, strict=True):
        for key, value in other.items():
            if value.is_floating_point():
                assert relative_error(view[key], value) <= 0.02, key


@pytest.mark.parametrize("heads_too", [False, True])
def test_out_of_range_in_a_tokenizer_the_call_runs_again(
    fresh_warning: None, caplog: pytest.LogCaptureFixture, heads_too: bool
) -> None:
    model, views = small_model(), all_inputs()
    chunks: list[int] = []

    def finish(first: int, outputs: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        chunks.append(first)
        return outputs

    with torch.no_grad():
        model.depth_encoder.encoder[0].conv1.weight.mul_(1e6)
        if heads_too:
            model.scene_flow_dpt_feature_head.scratch.layer2_rn.weight.mul_(1e5)
        expected = model(views)
        with caplog.at_level(logging.WARNING, logger="any4d_fast"), use_head_dtype(torch.float16):
            found = model.run(views, model.config.modalities, None, finish)
            with recording(capturing=True) as notes:
                model(views)
    assert [bool(flag) for flag in notes.flags] == [True]
    assert chunks.count(0) == (3 if heads_too else 2)
    assert sum("geometric inputs left the range" in record.getMessage() for record in caplog.records) == 1
    for view, other in zip(found, expected, strict=True):
        for key, value in other.items():
            if value.is_floating_point():
                assert relative_error(view[key], value) <= (1e-5 if heads_too else 0.02), key


class FakeStream:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log, self.cuda_stream = name, log, 0

    def wait_stream(self, other: FakeStream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


class FakeResult:
    def __init__(self, log: list[str]) -> None:
        self.log = log

    def record_stream(self, stream: FakeStream) -> None:
        self.log.append(f"in use on {stream.name}")


@pytest.mark.parametrize("fails", [False, True])
def test_parts_side_by_side_start_and_end_with_the_current_stream(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    log: list[str] = []
    main, *others = (FakeStream(name, log) for name in ("main", "one", "two"))

    @contextlib.contextmanager
    def on(stream: FakeStream) -> Iterator[None]:
        log.append(f"on {stream.name}")
        yield

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(head_loop, "_side_streams", lambda device, handle, count: others[:count])

    def part() -> list[Any]:
        if fails and log[-1] == "on one":
            raise torch.OutOfMemoryError
        return [FakeResult(log)]

    start, end = ["one waits for main", "two waits for main"], ["main waits for one", "main waits for two"]
    if fails:  # what the part had launched may still read the maps that are freed next
        with pytest.raises(torch.OutOfMemoryError):
            head_loop.side_by_side([part] * 3, torch.device("cpu"))
        assert log == [*start, "on main", "on one", *end]
    else:
        assert len(head_loop.side_by_side([part] * 3, torch.device("cpu"))) == 3
        assert log == [*start, "on main", "on one", "on two", *end, "in use on main", "in use on main"]


def test_when_the_heads_run_in_16_bits() -> None:
    tokens = torch.zeros(1, 3, 8)
    with torch.no_grad():
        assert head_dtype(tokens, mixed=True) == torch.float32  # not on a GPU
        with use_head_dtype(torch.bfloat16):
            assert head_dtype(tokens, mixed=False) == torch.bfloat16
            with use_head_dtype(None):
                assert head_dtype(tokens, mixed=True) == torch.float32
    with pytest.raises(ValueError, match="dtype: expected torch.float32"), use_head_dtype(torch.float64):
        pass


def test_gradients_are_not_lost_where_16_bits_are_asked_for() -> None:
    model = small_model().train()
    with use_head_dtype(torch.float16):
        outputs = model(model_inputs())
    outputs[0]["pts3d"].sum().backward()
    assert model.dpt_regressor_head.conv1.weight.grad is not None
