"""The whole model: forward at 2 to 200 views of 518 x 336 with random weights, and a training step of 24 views.

Providers: PyTorch in eager mode under bfloat16 autocast (upstream's policy), torch.compile of that with CUDA graphs (at
2, 8 and 41 views: it takes a minute or more to compile), the original code when a checkout is given, and ours: by
itself ("auto", which takes CUDA graphs where they pay), without graphs ("nograph"), on one kind of kernels, and with
float32 weights in host memory ("packed": the same bits; its memory is what it holds on the GPU). Precision fp8 has
cases of its own, whose errors may be five times those of exact ones. Accuracy of every output has a line of its own.
Memory includes weights and inputs. ANY4D_FAST_BENCH_VIEWS=1000 adds a case of so many views, ours only. `--only ", 8
views"` chooses by number, `--only "fwd|step"` and `--only " fp8,"` by text.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from any4d_fast import Any4D, use_backend, work
from any4d_fast.backends import BackendError
from any4d_fast.config import preset as config_of
from any4d_fast.graphs import cuda_graphs
from any4d_fast.modules.derived import Derived
from any4d_fast.profile import make_views as make_given
from any4d_fast.train import fresh
from any4d_fast.train.settings import tensor_float

from . import upstream
from .harness import FULL, Case, Function, Maker, Sizes, Unavailable, random

Views = list[dict[str, Any]]

# Errors of upstream's bfloat16 autocast against float32, random weights, 4 views (DESIGN section 4). An output that
# random weights barely move, or that holds few numbers, errs by chance: its own baseline may be lucky.
UPSTREAM_ERRORS = {
    "pts3d": 3.9e-3,
    "pts3d_cam": 1.2e-3,
    "ray_directions": 1.1e-3,
    "depth_along_ray": 5.6e-4,
    "cam_trans": 8.0e-3,
    "cam_quats": 2.4e-3,
    "scene_flow": 1.0e-3,
    "metric_scaling_factor": 4.6e-4,
    "conf": 2.0e-5,
    "non_ambiguous_mask_logits": 8.7e-4,
}
CHANCE = 1.1  # two bfloat16 runs that round at different places differ by a few percent in their errors
SMALL_SAMPLE = 3.0  # the ratio of two errors over n numbers scatters by 1 / sqrt(n); three standard deviations
PEER_SLACK = 2.0  # a compiler rounds at other places again; its error stands beside its time
FP8_FACTOR = 5.0  # how many times the exact budget `precision="fp8"` may err
TRAINING_VIEWS = 24
RECOMPUTED = ("mlp", "heads")  # `Any4D.recompute_activations`: half of what is kept, for 11 % of the FLOPs
BETWEEN = (24,)  # beside the harness's three numbers of views
MANY = (100, 200)
COMPILED = FULL.views  # each takes a minute or more to compile
GRAPHS_UP_TO = 24  # views that `auto` replays a graph for; beyond, "nograph" would be the same
BACKENDS = ("triton", "cuda")
PACKED = "any4d_fast:packed"
ALL = "all inputs"
GATE_VIEWS = 2  # gradients are checked at few views: a float32 step of 24 would need more memory than the GPU has
# ... of several clips, of the model as a training begins with it. Which clip's gradients suffer most from rounding is
# chance: over eight clips plain autocast erred by 0.007 to 0.054 of each, ours by 0.005 to 0.050 (upstream: 0.017 to
# 0.046), in the geometric mean by 0.025, 0.022 (0.031). Four clips of plain random weights, whose quaternions are near
# zero, gave ratios of 0.9 and 1.1 for the same code.
GATE_CLIPS = 8
CALCULATED_SIZE = (336, 518)


def flops(views: int, sizes: Sizes, preset: str, given: bool = False) -> float:
    """Of a forward pass at 518 x 336: encoder 0.615 TFLOP a view, transformer 0.332, heads 0.408, and 0.0291 TFLOP for
    every pair of views in global attention (12 blocks); the tokenizers of all inputs, where given. 0 at other sizes.

    Upstream's arithmetic is the yardstick for all; ours does 1 % less (1x1 convolutions before the resize).
    """
    if preset != "any4d" or (sizes.height, sizes.width) != CALCULATED_SIZE:
        return 0.0
    call = work.Call(config_of(preset), 1, views, sizes.height // 14, sizes.width // 14, work.MODALITIES * given)
    return 1.355e12 * views + 0.0291e12 * views**2 + work.count(call)[work.TOKENIZERS].flops


@functools.lru_cache(maxsize=1)
def load(preset: str, device: str) -> Any4D:
    torch.manual_seed(0)
    with torch.device(device):
        return Any4D.from_preset(preset).to(device).eval()


@functools.lru_cache(maxsize=1)
def load_packed(preset: str, device: str) -> Any4D:
    return copy.deepcopy(load(preset, device)).pack_weights_()


@functools.lru_cache(maxsize=1)
def load_fresh(preset: str, device: str) -> Any4D:
    """The same weights with heads that begin at usual outputs, as a training from random weights begins."""
    model = copy.deepcopy(load(preset, device))
    torch.manual_seed(0)
    fresh.prepare(model, ())
    return model


def forget(preset: str, device: str) -> None:
    """Drop graphs, gradients and inference weights, so that every provider is charged for its own; end a training."""
    load_packed.cache_clear()
    load_fresh.cache_clear()
    model = load(preset, device).eval()
    model.recompute_activations()
    model.zero_grad(set_to_none=True)
    model._graphs.clear()
    for module in model.modules():
        if isinstance(kept := getattr(module, "derived", None), Derived):
            kept.clear()


def make_views(sizes: Sizes, count: int, given: bool = False, seed: int = 0) -> Views:
    if given:
        return make_given(1, count, sizes.height, sizes.width, work.MODALITIES, torch.device(sizes.device))
    shape, seeds = (1, 3, sizes.height, sizes.width), range(seed, seed + count)
    return [{"img": random(*shape, device=sizes.device, seed=s), "data_norm_type": ["dinov2"]} for s in seeds]


def make_clips(sizes: Sizes, count: int) -> list[Views]:
    return [make_views(sizes, count, seed=count * clip) for clip in range(GATE_CLIPS)]


@contextlib.contextmanager
def float32() -> Iterator[None]:
    """Plain PyTorch without TF32: the oracle."""
    with tensor_float(False), use_backend("eager"):
        yield


@contextlib.contextmanager
def mixed(sizes: Sizes, backend: str | None, graphs: bool | None = None) -> Iterator[None]:
    """Upstream's policy: bfloat16 autocast, and TF32 (which the session allows) for what runs outside of it."""
    device = torch.device(sizes.device).type
    with torch.autocast(device, dtype=torch.bfloat16), use_backend(backend), cuda_graphs(graphs):
        yield


def by_output(found: Views) -> list[Tensor]:
    """[views, ...] of every output in the order of UPSTREAM_ERRORS; the metric scale, the same in all views, once."""
    views = {name: found[:1] if name == "metric_scaling_factor" else found for name in UPSTREAM_ERRORS}
    return [torch.cat([view[name] for view in views[name]]).float() for name in UPSTREAM_ERRORS]


def output_budgets(errors: Sequence[float], outputs: Sequence[Tensor]) -> list[float]:
    bases = [max(pair) for pair in zip(errors, UPSTREAM_ERRORS.values(), strict=True)]
    return [(CHANCE + SMALL_SAMPLE / o.numel() ** 0.5) * base for o, base in zip(outputs, bases, strict=True)]


def fp8_budgets(errors: Sequence[float], outputs: Sequence[Tensor]) -> list[float]:
    return [FP8_FACTOR * budget for budget in output_budgets(errors, outputs)]


def gradient_budgets(errors: Sequence[float], outputs: Sequence[Tensor]) -> list[float]:
    return [CHANCE * error for error in errors]


def resident_gb(preset: str, sizes: Sizes) -> Callable[[Views, str], float]:
    def count(views: Views, name: str) -> float:
        tensors = [t for view in views for t in view.values() if isinstance(t, Tensor)]
        if name != PACKED:  # whose model is made and dropped with its measurement
            tensors += load(preset, sizes.device).state_dict(keep_vars=True).values()
        unique = {t.data_ptr(): t.numel() * t.element_size() for t in tensors}  # heads have aliases
        return sum(unique.values()) / 1e9

    return count


def inference(
    model: Callable[[], Callable[..., Any]],
    sizes: Sizes,
    backend: str | None,
    graphs: bool | None = None,
    **options: Any,
) -> Maker:
    """Provider of a forward pass with these options; `model` is called once a case, outside of what is timed."""
    build = functools.lru_cache(maxsize=1)(model)

    def make(views: Views) -> Function:
        network = build()

        def run() -> Any:
            try:
                with torch.no_grad(), mixed(sizes, backend, graphs):
                    return network(views, **options)
            except BackendError as reason:
                raise Unavailable(str(reason)) from reason

        return run

    return make


def step(model: nn.Module, views: Views, precision: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
    """Forward in a precision, backward outside of it, as PyTorch asks for, into gradients that are None before.

    The loss touches every output, all views of it at once: the model is what is timed.
    """
    with precision():
        outputs = model(views)
        names = [name for name, value in outputs[0].items() if value.is_floating_point()]
        losses = [torch.cat([view[name] for view in outputs]).float().square().mean() for name in names]
        total = torch.stack(losses).sum()
    total.backward()


def start_training(network: nn.Module, recompute: Sequence[str]) -> None:
    network.train()
    if isinstance(network, Any4D):
        network.recompute_activations(*recompute)


@contextlib.contextmanager
def in_training(network: nn.Module, recompute: Sequence[str]) -> Iterator[None]:
    """In training mode, and afterwards without gradients and as it was."""
    start_training(network, recompute)
    try:
        yield
    finally:
        network.zero_grad(set_to_none=True)
        network.eval()
        if isinstance(network, Any4D):
            network.recompute_activations()


def training(model: Callable[[], nn.Module], sizes: Sizes, backend: str | None, recompute: Sequence[str] = ()) -> Maker:
    """Provider of a training step; the network stays in training mode until the next provider's `forget`."""

    def make(views: Views) -> Function:
        network = model()

        def run() -> None:
            step(network, views, functools.partial(mixed, sizes, backend))
            network.zero_grad(set_to_none=True)

        start_training(network, recompute)
        return run

    return make


def training_gate(
    model: Callable[[], nn.Module], sizes: Sizes, backend: str | None, recompute: Sequence[str] = ()
) -> Maker:
    """Provider of the gradients of several clips, each as one vector."""

    def make(clips: list[Views]) -> Function:
        network = model()

        def run() -> list[Tensor]:
            found = []
            with in_training(network, recompute):
                for views in clips:
                    step(network, views, functools.partial(mixed, sizes, backend))
                    found.append(gradients(network))
                    network.zero_grad(set_to_none=True)
            return found

        return run

    return make


def gradients(model: nn.Module) -> Tensor:
    """All of them in one vector, by name and with every alias, so that two implementations have the same order."""
    named = sorted(model.named_parameters(remove_duplicate=False), key=lambda item: item[0])
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten().float() for _, p in named])


def compiled_model(preset: str, device: str) -> Callable[..., Any]:
    compiled = torch.compile(load(preset, device), dynamic=False, mode="reduce-overhead")

    def run(views: Views) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(views)

    return run


def own_providers(ours: Callable[[], Any4D], sizes: Sizes, count: int, preset: str, given: bool) -> dict[str, Maker]:
    """Ours as it chooses by itself, then in parts."""
    found = {"any4d_fast:auto": inference(ours, sizes, None)}
    if count <= GRAPHS_UP_TO:
        found["any4d_fast:nograph"] = inference(ours, sizes, None, False)
    found[PACKED] = inference(lambda: lambda views: load_packed(preset, sizes.device)(views), sizes, None)
    if not given and sizes.device == "cuda":
        found |= {f"any4d_fast:{name}": inference(ours, sizes, name) for name in BACKENDS}
    return found


def forward_case(
    sizes: Sizes, count: int, preset: str, given: bool = False, gate: Case | None = None, peers: bool = True
) -> Case:
    """Forward at `count` views, with `given` of all inputs; checked at the gate's size where that is named."""
    ours = functools.partial(load, preset, sizes.device)
    providers = {"eager": inference(ours, sizes, "eager")}
    if count in COMPILED and not given:
        compile_ours = functools.partial(compiled_model, preset, sizes.device)
        providers["compile"] = inference(compile_ours, sizes, "eager")
    if upstream.requested() and not given:
        providers["upstream"] = inference(lambda: upstream.same_model(ours(), sizes.device), sizes, None)
    own = own_providers(ours, sizes, count, preset, given)
    providers = {**providers, **own} if peers else {"any4d_fast:auto": own["any4d_fast:auto"]}

    def oracle(views: Views) -> list[Tensor]:
        with torch.no_grad(), float32():
            return by_output(ours()(views))

    return Case(
        "any4d",
        "fwd",
        f"{sizes.image} {ALL}" if given else sizes.image,
        functools.partial(make_views, sizes, count, given),
        providers,
        oracle if gate is None else None,
        flops=flops(count, sizes, preset, given),
        views=count,
        suite="model",
        compare=by_output,
        budgets=output_budgets,
        peer_slack=PEER_SLACK,
        outputs=tuple(UPSTREAM_ERRORS) if gate is None else (),
        gate=gate,
        resident_gb=resident_gb(preset, sizes),
        reset=functools.partial(forget, preset, sizes.device),
    )


def fp8_case(sizes: Sizes, count: int, preset: str, gate: Case | None = None) -> Case:
    """Forward in 8 bits at `count` views; the baseline is plain PyTorch's bfloat16, whose budgets are widened."""
    exact = forward_case(sizes, count, preset, gate=gate)
    ours = functools.partial(load, preset, sizes.device)
    fp8 = {"any4d_fast:auto": inference(ours, sizes, None, precision="fp8")}
    if count <= GRAPHS_UP_TO:
        fp8["any4d_fast:nograph"] = inference(ours, sizes, None, False, precision="fp8")
    providers = {"eager": exact.providers["eager"], **fp8}
    return dataclasses.replace(exact, providers=providers, precision="fp8", budgets=fp8_budgets)


def step_case(sizes: Sizes, count: int, preset: str, gate: bool = False) -> Case:
    """A training step, or the gate for it: gradients of several clips of a few views."""
    ours = functools.partial(load_fresh if gate else load, preset, sizes.device)
    provider = training_gate if gate else training
    providers = {"eager": provider(ours, sizes, "eager")}
    if upstream.requested():
        providers["upstream"] = provider(lambda: upstream.same_model(ours(), sizes.device), sizes, None)
    providers["any4d_fast:auto"] = provider(ours, sizes, None)
    providers["any4d_fast:recompute"] = provider(ours, sizes, None, RECOMPUTED)

    def oracle(clips: list[Views]) -> list[Tensor]:
        model, found = ours(), []
        # The backward pass too: what is recomputed there chooses its backend there.
        with in_training(model, ()), float32():
            for views in clips:
                step(model, views, contextlib.nullcontext)
                found.append(gradients(model))
                model.zero_grad(set_to_none=True)
        return found

    return Case(
        "any4d",
        "step",
        sizes.image,
        functools.partial(make_clips if gate else make_views, sizes, count),
        providers,
        oracle if gate else None,
        flops=3 * flops(count, sizes, preset),  # backward is two products for each of the forward's
        views=count,
        suite="model",
        budgets=gradient_budgets,
        pooled=gate,
        peer_slack=PEER_SLACK,
        gate=None if gate else step_case(sizes, GATE_VIEWS, preset, gate=True),
        resident_gb=resident_gb(preset, sizes),
        reset=functools.partial(forget, preset, sizes.device),
    )


def cases(
    sizes: Sizes = FULL,
    preset: str = "any4d",
    training_views: int = TRAINING_VIEWS,
    between: Sequence[int] = BETWEEN,
    many: Sequence[int] = MANY,
) -> list[Case]:
    """Small numbers of views first; a size that float32 does not fit into memory at is checked at a smaller one."""
    largest, some, few = sizes.views
    checked = [forward_case(sizes, count, preset) for count in sorted({few, some, *between, largest})]
    gate = forward_case(sizes, some, preset)
    unchecked = [forward_case(sizes, count, preset, gate=gate) for count in many]
    extra = int(os.environ.get("ANY4D_FAST_BENCH_VIEWS", "0"))
    if extra:
        unchecked.append(forward_case(sizes, extra, preset, gate=gate, peers=False))
    fp8 = [fp8_case(sizes, count, preset) for count in sorted({few, some, *between, largest})]
    fp8_gate = fp8_case(sizes, some, preset)
    fp8 += [fp8_case(sizes, count, preset, gate=fp8_gate) for count in many]
    given = [forward_case(sizes, count, preset, given=True) for count in sorted({few, some, largest})]
    step = step_case(sizes, training_views, preset)
    return [*checked, *given, step, *unchecked, *fp8]


def test_model(case: Case, provider: str, bench: Callable[[Case, str], None]) -> None:
    bench(case, provider)
