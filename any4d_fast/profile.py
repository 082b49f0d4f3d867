"""Where the time of a forward pass goes: measured stage by stage beside what the stage must compute and move."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from . import work
from .graphs import reasons
from .head_precision import NARROW, head_dtype
from .inference import AMP_DTYPES
from .model import Any4D
from .precision import EXACT
from .switches import matmul_tf32

# Longer than Python and Triton take to launch an operator: the device is still asleep when its work is queued, so that
# the events around it enclose nothing else.
HEAD_START_CYCLES = 1_000_000
MATMUL_SIZE = 8192
COPY_BYTES = 1 << 30

LINEARS = ("addmm", "mm", "bmm", "baddbmm", "linear", "convolution", "_addmm_activation", "linear_forward",
           "linear_gelu_forward", "linear_residual_forward", "linear_fp8", "tokenize_forward")  # fmt: skip
VIEWS = ("view", "_unsafe_view", "t", "transpose", "permute", "as_strided", "unsqueeze", "squeeze", "slice", "select",
         "expand", "detach", "alias", "unbind", "split", "split_with_sizes", "chunk", "narrow", "unflatten", "empty",
         "empty_like", "empty_strided", "new_empty", "lift_fresh")  # fmt: skip


@dataclass
class Row:
    """One stage.

    Attributes:
        ms: median over the runs; None where nothing was measured.
        floor_ms: the slower of FLOPs and bytes at the device's measured ceilings; None without them.
        percent_of_floor: how near the stage comes to it.
    """

    stage: str
    ms: float | None
    flops: float
    bytes: float
    floor_ms: float | None = None
    percent_of_floor: float | None = None


@dataclass
class Profile:
    """A table of stages and what it was measured on; times of the whole call are without the profiler's waits."""

    device: str
    views: int
    batch: int
    height: int
    width: int
    dtype: str
    precision: str
    modalities: list[str]
    clock: str
    rows: list[Row] = field(default_factory=list)
    whole_ms: float | None = None
    whole_graph_ms: float | None = None
    why_no_graph: list[str] = field(default_factory=list)
    matmul_tflops: dict[str, float] = field(default_factory=dict)
    copy_tbps: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def make_views(
    batch: int, count: int, height: int, width: int, modalities: Sequence[str], device: torch.device
) -> list[dict[str, Any]]:
    """Random views with the inputs named (`work.MODALITIES`), in the model's keys."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    found = []
    for _ in range(count):
        view: dict[str, Any] = {"img": normal(batch, 3, height, width), "data_norm_type": ["dinov2"]}
        forward = normal(batch, height, width, 3) * 0.3 + torch.tensor([0.0, 0.0, 2.0], device=device)
        rays = nn.functional.normalize(forward, dim=-1)
        depth = normal(batch, height, width, 1).abs() + 0.5
        if "rays" in modalities:
            view["ray_directions_cam"] = rays
        if "depth" in modalities:
            view["depth_along_ray"] = depth
        if "poses" in modalities:
            view["camera_pose_quats"] = nn.functional.normalize(normal(batch, 4), dim=-1)
            view["camera_pose_trans"] = normal(batch, 3)
        if "flow" in modalities:
            view["radial_scene_flow"] = normal(batch, height, width, 3) * 0.1
            view["pts3d_cam"] = rays * depth
            view["valid_mask"] = torch.ones(batch, height, width, dtype=torch.bool, device=device)
        view["is_metric_scale"] = torch.ones(batch, dtype=torch.bool, device=device)
        found.append(view)
    return found


class _Clock:
    """Milliseconds by stage in one run: device events on a GPU, wall time on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []

    @contextmanager
    def span(self, stage: str) -> Iterator[None]:
        if not self._cuda:
            start = time.perf_counter()
            yield
            self._spans.append((stage, start, time.perf_counter()))
            return
        torch.cuda._sleep(HEAD_START_CYCLES)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        yield
        last.record()
        self._spans.append((stage, first, last))

    def read(self) -> dict[str, float]:
        """Wait, and add up by stage."""
        if self._cuda:
            torch.cuda.synchronize()
        found: dict[str, float] = {}
        for stage, first, last in self._spans:
            ms = first.elapsed_time(last) if self._cuda else 1e3 * (last - first)
            found[stage] = found.get(stage, 0.0) + ms
        return found


class _Operators(TorchDispatchMode):
    """Times every operator that launches something, and asks where the model is for its stage."""

    def __init__(self, clock: _Clock, where: _Where) -> None:
        super().__init__()
        self._clock, self._where = clock, where

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[-1].removesuffix("_")
        if name in VIEWS:
            return func(*args, **(kwargs or {}))
        with self._clock.span(self._where.stage(name)):
            return func(*args, **(kwargs or {}))


class _Where:
    """Which part of the model runs, by hooks on modules that keep their inference weights all the same."""

    def __init__(self, model: Any4D) -> None:
        self._region = work.FUSION
        self._block = work.GLOBAL
        parts: dict[str, str] = {
            "encoder": "encoder",
            "info_sharing": "transformer",
            "dpt_feature_head": work.GEOMETRY_HEAD,
            "dpt_regressor_head": work.GEOMETRY_HEAD,
            "scene_flow_dpt_feature_head": work.FLOW_HEAD,
            "scene_flow_dpt_regressor_head": work.FLOW_HEAD,
            "pose_head": work.SMALL_HEADS,
            "scale_head": work.SMALL_HEADS,
        }
        tokenizers = ("ray_dirs", "depth", "depth_scale", "cam_rot", "cam_trans", "cam_trans_scale", "scene_flow")
        parts |= {f"{name}_encoder": work.TOKENIZERS for name in tokenizers}
        self._handles = []
        for name, region in parts.items():
            module = getattr(model, name, None)
            if isinstance(module, nn.Module):
                after = work.FUSION if region in ("encoder", work.TOKENIZERS) else work.COMPOSITION
                self._handles.append(module.register_forward_pre_hook(self._enter(region)))
                self._handles.append(module.register_forward_hook(self._leave(after)))
        alternating = model.config.transformer.kind == "alternating_attention"
        for i, block in enumerate(model.info_sharing.self_attention_blocks):
            kind = work.FRAME if alternating and i % 2 else work.GLOBAL
            self._handles.append(block.register_forward_pre_hook(self._enter_block(kind)))

    def _enter(self, region: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self._region = region

        return hook

    _leave = _enter

    def _enter_block(self, kind: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self._block = kind

        return hook

    def stage(self, name: str) -> str:
        """The stage of an operator that runs now."""
        if name.startswith("fuse_tokens"):
            return work.FUSION
        if self._region not in ("encoder", "transformer"):
            return self._region
        encoder = self._region == "encoder"
        if "attention" in name:
            return work.ENCODER_ATTENTION if encoder else self._block
        if name in LINEARS:
            return work.ENCODER_LINEARS if encoder else work.LINEARS
        return work.ENCODER_NORMS if encoder else work.NORMS

    def restart(self) -> None:
        """A new call begins."""
        self._region = work.FUSION

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


def profile(
    model: Any4D,
    views: int,
    size: tuple[int, int],
    *,
    batch: int = 1,
    modalities: Sequence[str] = (),
    dtype: str = "bf16",
    precision: str = EXACT,
    runs: int = 5,
) -> Profile:
    """Measure a forward pass with random inputs.

    Stages are timed operator by operator, without CUDA graphs, each behind a wait that lets Python launch it in time;
    `norms` of the encoder and the transformer take all that is no matrix product and no attention. On a CPU the table
    has the counted FLOPs and bytes and wall times, and no floor.

    Args:
        model: in evaluation mode, on the device to measure.
        views: views of a sample.
        size: (H, W), multiples of the patch size.
        batch: samples.
        modalities: inputs beside images, of `work.MODALITIES`, for every view.
        dtype: autocast's "bf16" or "fp16", or "fp32" for none; a CPU takes "bf16" and "fp32".
        precision: "exact" or "fp8", as the model takes it; floors are those of `dtype` in either case.
        runs: measured runs, after one that is not; the table holds medians.

    Raises:
        ValueError: an option is wrong.
        PrecisionError: `precision` cannot run here.
    """
    if dtype not in AMP_DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(sorted(AMP_DTYPES))}, got {dtype!r}")
    patch = model.encoder.patch_size
    if any(side < patch or side % patch for side in size) or min(views, batch, runs) < 1:
        raise ValueError(
            f"expected at least one view, sample and run, and a size in multiples of {patch}, got {views} views, "
            f"{batch} samples, {runs} runs, {size[0]} x {size[1]}"
        )
    device = next(model.parameters()).device
    narrow = AMP_DTYPES[dtype]
    mixed = torch.autocast(device.type, dtype=narrow or torch.bfloat16, enabled=narrow is not None)
    given = make_views(batch, views, *size, modalities, device)
    with torch.no_grad(), mixed:
        heads = head_dtype(given[0]["img"], narrow is not None)
        call = work.Call(
            model.config, batch, views, size[0] // patch, size[1] // patch, tuple(modalities),
            item=4 if narrow is None else 2, head_item=2 if heads in NARROW else 4, patch=patch,
        )  # fmt: skip
        counted = work.count(call)
        measured = _stages(model, given, device, runs, precision)
        name, clock = "cpu", "wall time"
        if device.type == "cuda":
            name, clock = torch.cuda.get_device_name(device), "device events"
        found = Profile(name, views, batch, *size, dtype, precision, list(modalities), clock)
        found.whole_ms = _median_ms(lambda: model(given, cuda_graphs=False, precision=precision), device, runs)
        found.why_no_graph = reasons(model, given, model.config.modalities, True)
        if not found.why_no_graph:
            found.whole_graph_ms = _median_ms(lambda: model(given, cuda_graphs=True, precision=precision), device, runs)
            found.why_no_graph = model._graphs.failures()
    if device.type == "cuda":
        del given
        found.matmul_tflops = {name: _matmul_tflops(kind, device) for name, kind in _kinds(call).items()}
        found.copy_tbps = _copy_tbps(device)
    found.rows = [_row(stage, measured.get(stage), part, call, found) for stage, part in counted.items()]
    return found


def _stages(
    model: Any4D, views: list[dict[str, Any]], device: torch.device, runs: int, precision: str
) -> dict[str, float]:
    where = _Where(model)
    times: list[dict[str, float]] = []
    try:
        model(views, cuda_graphs=False, precision=precision)
        for _ in range(runs):
            clock = _Clock(device)
            where.restart()
            with _Operators(clock, where):
                model(views, cuda_graphs=False, precision=precision)
            times.append(clock.read())
    finally:
        where.close()
    stages = dict.fromkeys(stage for run in times for stage in run)
    return {stage: statistics.median(run.get(stage, 0.0) for run in times) for stage in stages}


def _median_ms(function: Callable[[], Any], device: torch.device, runs: int) -> float:
    """Median time of a call in milliseconds, launches included."""
    times = []
    for i in range(runs + 2):
        clock = _Plain(device)
        with clock:
            function()
        if i >= 2:
            times.append(clock.ms)
    return statistics.median(times)


class _Plain(AbstractContextManager["_Plain"]):
    """Times one block, from an idle device to an idle device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.ms = 0.0

    def __enter__(self) -> _Plain:
        self._wait()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: Any) -> None:
        self._wait()
        self.ms = 1e3 * (time.perf_counter() - self._start)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _kinds(call: work.Call) -> dict[str, torch.dtype]:
    """Matmul rates that a call's stages are held against."""
    found = {"16-bit": torch.bfloat16} if 2 in (call.item, call.head_item) else {}
    if 4 in (call.item, call.head_item) or call.modalities:
        found["float32"] = torch.float32
    return found


def _matmul_tflops(dtype: torch.dtype, device: torch.device) -> float:
    """Rate of a large square matmul; float32 with TF32, which upstream allows."""
    a, b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, device=device, dtype=dtype) for _ in range(2))
    with matmul_tf32(True):
        return 2 * MATMUL_SIZE**3 / _event_ms(lambda: a @ b) / 1e9


def _copy_tbps(device: torch.device) -> float:
    source = torch.zeros(COPY_BYTES, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / _event_ms(lambda: target.copy_(source)) / 1e9


def _event_ms(function: Callable[[], Any], runs: int = 11) -> float:
    times = []
    for i in range(runs + 3):
        clock = _Clock(torch.device("cuda"))
        with clock.span("all"):
            function()
        if i >= 3:
            times.append(clock.read()["all"])
    return statistics.median(times)


def _row(stage: str, ms: float | None, part: work.Work, call: work.Call, found: Profile) -> Row:
    row = Row(stage, ms, part.flops, part.bytes)
    heads = (work.GEOMETRY_HEAD, work.FLOW_HEAD, work.SMALL_HEADS, work.TOKENIZERS)
    item = call.head_item if stage in heads else call.item
    rate = found.matmul_tflops.get("16-bit" if item == 2 else "float32")
    if found.copy_tbps and (rate or not part.flops):
        row.floor_ms = max(part.flops / (rate or 1.0) / 1e9, part.bytes / found.copy_tbps / 1e9)
        if ms:
            row.percent_of_floor = 100 * row.floor_ms / ms
    return row


def render(found: Profile) -> str:
    """The table as aligned lines of text."""
    gpu = found.copy_tbps is not None
    kind = found.dtype if found.precision == EXACT else f"{found.dtype} and {found.precision}"
    title = (
        f"{found.device}: {found.views} views x {found.batch}, {found.width} x {found.height}, {kind}, "
        f"images{''.join(f' + {name}' for name in found.modalities)}"
    )
    clock = "device time" if gpu else "CPU wall time; FLOPs and bytes are counted, and no floor is known"
    lines = [title, f"ms: medians of {clock}", ""]
    lines.append(f"{'stage':<31}{'ms':>10}{'GFLOP':>12}{'GB':>9}{'TFLOP/s':>10}{'floor ms':>10}{'of floor':>10}")
    for row in [*found.rows, _sum(found.rows)]:
        rate = f"{row.flops / row.ms / 1e9:.3g}" if row.ms and row.flops else "-"
        lines.append(
            f"{row.stage:<31}{_number(row.ms, '.3f')}{row.flops / 1e9:>12.1f}{row.bytes / 1e9:>9.3f}{rate:>10}"
            f"{_number(row.floor_ms, '.3f')}{_number(row.percent_of_floor, '.0f', ' %')}"
        )
    lines += ["", f"whole call: {_text(found.whole_ms)} ms, with a CUDA graph: {_text(found.whole_graph_ms)} ms"]
    if found.why_no_graph:
        lines.append(f"no CUDA graph: {'; '.join(found.why_no_graph)}")
    if gpu:
        rates = ", ".join(f"{name} matmul {rate:.0f} TFLOP/s" for name, rate in found.matmul_tflops.items())
        lines.append(f"ceilings measured now: {rates}, copy {found.copy_tbps:.2f} TB/s")
    return "\n".join(lines)


def _sum(rows: list[Row]) -> Row:
    ms = [row.ms for row in rows if row.ms is not None]
    floors = [row.floor_ms for row in rows if row.floor_ms is not None]
    found = Row("sum", sum(ms) if ms else None, sum(r.flops for r in rows), sum(r.bytes for r in rows))
    if floors and ms:
        found.floor_ms = sum(floors)
        found.percent_of_floor = 100 * found.floor_ms / sum(ms)
    return found


def _number(value: float | None, form: str, unit: str = "") -> str:
    return f"{'-' if value is None else format(value, form) + unit:>10}"


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
