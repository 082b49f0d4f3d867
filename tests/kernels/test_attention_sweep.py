"""attention's kernels over random shapes, and under everything that a training loop does around a call."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from any4d_fast import backends
from any4d_fast.ops.attention import Segments, attention
from any4d_fast.reference.attention import attention as reference_attention
from any4d_fast.testing import assert_within_budget, poisoned_empty
from tests.attention_checks import DTYPES, SCALE, SEGMENTS, check, sample, skip_unless_offered
from tests.kernels_common import DEVICE, GPU, KERNEL_BACKENDS, gpu_only, kernel_test

pytestmark = kernel_test

SHAPES, PER_TEST = (1_000, 50) if GPU else (6, 3)
MOST_ROWS = 4_000 if GPU else 60
FEW_KEYS = 16


@pytest.fixture(params=KERNEL_BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    skip_unless_offered(name)
    return name


@dataclass(frozen=True)
class Shape:
    """One random call. `layout` is how the rows lie in memory."""

    segments: Segments
    rows: int
    heads: int
    dtype: torch.dtype
    layout: str
    scale: float
    deterministic: bool
    with_lse: bool

    @staticmethod
    def draw(index: int, backend: str) -> Shape:
        generator = random.Random(index)
        pick = generator.randint
        while True:
            length = generator.choice([pick(1, 40), pick(1, 5) * 64 + pick(-1, 1), pick(1, 700), pick(880, 900)])
            count, groups = pick(1, 5), pick(1, 3)
            stride = length + generator.choice([0, 0, 1, pick(0, 9)])
            span = (count - 1) * stride + length
            gap = generator.choice([0, 1, pick(0, 70)])
            segments = Segments(length, count, stride, groups, span + gap, generator.choice([0, pick(0, 9)]))
            rows = segments.end + generator.choice([0, 1, pick(0, 80)])
            if rows <= MOST_ROWS:
                break
        return Shape(
            segments,
            rows,
            heads=pick(1, 6 if GPU else 2),
            dtype=generator.choice(DTYPES if backend == "triton" else DTYPES[1:]),
            layout=generator.choice(["packed", "every other row", "wider heads", "q, k, v apart"]),
            scale=generator.uniform(0.02, 0.3),
            deterministic=generator.random() < 0.5,
            with_lse=generator.random() < 0.5,
        )

    def qkv(self, seed: int) -> Tensor:
        """[rows, 3, heads, 64], NaN in every row of no segment and between the rows."""
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(self.rows, 3, self.heads, 64, generator=generator)
        members = torch.zeros(self.rows, dtype=torch.bool)
        s = self.segments
        for group, i in itertools.product(range(s.groups), range(s.count)):
            first = s.start + group * s.group_stride + i * s.stride
            members[first : first + s.length] = True
        values[~members] = float("nan")
        values = values.to(DEVICE, self.dtype)

        def within(shape: tuple[int, ...]) -> Tensor:
            return torch.full(shape, float("nan"), device=DEVICE, dtype=self.dtype)

        if self.layout == "every other row":
            view = within((2 * self.rows, 3, self.heads, 64))[::2]
        elif self.layout == "wider heads":
            view = within((self.rows, 3, self.heads, 96))[..., 16:80]
        elif self.layout == "q, k, v apart":
            view = within((3, self.heads, self.rows, 64)).permute(2, 0, 1, 3)
        else:
            return values
        return view.copy_(values)


def check_shape(shape: Shape, qkv: Tensor, backend: str) -> None:
    """`check` on the rows of segments; the reference would carry NaN from the others into its sums."""
    check(
        qkv,
        shape.segments,
        backend,
        shape.deterministic,
        shape.with_lse,
        shape.scale,
        few=shape.segments.length < FEW_KEYS,
    )


@pytest.mark.parametrize("chunk", range(SHAPES // PER_TEST))
def test_random_shapes(chunk: int, backend: str) -> None:
    for index in range(chunk * PER_TEST, (chunk + 1) * PER_TEST):
        shape = Shape.draw(index, backend)
        try:
            check_shape(shape, shape.qkv(index), backend)
        except AssertionError as error:
            raise AssertionError(f"shape {index}, {shape}: {error}") from error


def run(
    qkv: Tensor, segments: Segments, backend: str | None, grad: Tensor, deterministic: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, log-sum-exp and gradient."""
    leaf = qkv.detach().requires_grad_()
    with poisoned_empty():
        out, lse = attention(
            leaf, segments=segments, scale=SCALE, backend=backend, deterministic=deterministic, return_lse=True
        )
        (found,) = torch.autograd.grad(out, leaf, grad)
    return out.detach(), lse.detach(), found


def cotangent(qkv: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(qkv.shape[0])
    return torch.randn(qkv.shape[0], *qkv.shape[2:], generator=generator).to(qkv.device, qkv.dtype)


REPEATED = [*SEGMENTS, *(["frame 8 x 888", "global 1777"] if GPU else [])]
LARGE = {"frame 8 x 888": (Segments.frame(1, 8, 888), 7105), "global 1777": (Segments.global_(1, 1777), 1777)}


@pytest.mark.parametrize("layout", REPEATED)
def test_repeats_are_bitwise_equal(layout: str, backend: str) -> None:
    """The forward always, the backward when it is asked to be."""
    segments, rows = {**SEGMENTS, **LARGE}[layout]
    qkv = sample(rows, 12 if GPU else 1, 64, torch.bfloat16)
    first = run(qkv, segments, backend, cotangent(qkv))
    for deterministic in (True, True, False) if GPU else (True,):
        again = run(qkv, segments, backend, cotangent(qkv), deterministic)
        assert all(torch.equal(a, b) for a, b in zip(first[:2], again[:2], strict=True))
        assert not deterministic or torch.equal(first[2], again[2])


@pytest.mark.parametrize("layout", ["7", "65", "100", "odd"])
def test_neighbours_do_not_leak_into_a_segment(layout: str, backend: str) -> None:
    """NaN in every other segment of the buffer: a tile that reaches over a segment's end must not see it."""
    segments, rows = SEGMENTS[layout]
    clean = sample(rows, 1, 64, torch.bfloat16)
    grad = cotangent(clean)
    expected = run(clean, segments, backend, grad)
    starts = [
        segments.start + g * segments.group_stride + i * segments.stride
        for g in range(segments.groups)
        for i in range(segments.count)
    ]
    for start in {starts[0], starts[len(starts) // 2], starts[-1]}:
        own = slice(start, start + segments.length)
        poisoned = torch.full_like(clean, float("nan"))
        poisoned[own] = clean[own]
        out, lse, found = run(poisoned, segments, backend, grad)
        assert torch.equal(out[own], expected[0][own]) and torch.equal(lse[:, own], expected[1][:, own])
        assert torch.equal(found[own], expected[2][own])


def misaligned() -> dict[str, Tensor]:
    """Rows that 16-byte loads cannot read: by their address, by their rows' stride, by their heads'."""
    shape = (9, 3, 2, 64)
    by_address = torch.empty(9 * 3 * 2 * 64 + 1, device=DEVICE, dtype=torch.bfloat16)[1:].view(shape)
    by_row = torch.empty(9, 3 * 2 * 64 + 4, device=DEVICE, dtype=torch.bfloat16)[:, :-4].view(shape)
    by_head = torch.empty(9, 3, 2, 65, device=DEVICE, dtype=torch.bfloat16)[..., :-1]
    values = sample(9, 2, 64, torch.bfloat16)
    return {k: v.copy_(values) for k, v in (("address", by_address), ("row", by_row), ("head", by_head))}


@pytest.mark.parametrize("which", ["address", "row", "head"])
def test_misaligned_rows_fall_back(which: str) -> None:
    qkv, segments = misaligned()[which], Segments.batched(3, 3)
    check(qkv, segments, "triton", few=True)
    if "cuda" in KERNEL_BACKENDS:
        skip_unless_offered("cuda")
        with pytest.raises(backends.BackendError, match="multiples of 16 bytes"):
            attention(qkv, segments=segments, backend="cuda")
        automatic, named = (attention(qkv, segments=segments, backend=b) for b in (None, "triton"))
        assert isinstance(automatic, Tensor) and isinstance(named, Tensor)
        assert torch.equal(automatic, named)


class TestOnTheDevice:
    """What only a device has: graphs, streams, several of them."""

    pytestmark = gpu_only
    segments = Segments.frame(1, 3, 100)

    def inputs(self, seed: int) -> tuple[Tensor, Tensor]:
        qkv = sample(301, 3, 64, torch.bfloat16, seed)
        return qkv, cotangent(qkv) * (1 + seed)

    @pytest.mark.parametrize("deterministic", [False, True])
    def test_graph_replays_on_new_values(self, backend: str, deterministic: bool) -> None:
        qkv, grad = (t.clone() for t in self.inputs(0))
        leaf = qkv.requires_grad_()

        def step() -> tuple[Tensor, Tensor]:
            out = attention(leaf, segments=self.segments, scale=SCALE, backend=backend, deterministic=deterministic)
            assert isinstance(out, Tensor)
            return out, torch.autograd.grad(out, leaf, grad)[0]

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, found = step()
        for seed in (1, 2):
            new, new_grad = self.inputs(seed)
            with torch.no_grad():
                leaf.copy_(new)
                grad.copy_(new_grad)
            graph.replay()
            expected = run(new, self.segments, backend, new_grad)
            assert torch.equal(out, expected[0])
            # Additions in another order, rounded to bfloat16: a rounding step or two.
            torch.testing.assert_close(found, expected[2], rtol=2**-6, atol=2**-7)

    def test_compiles_by_inductor(self, backend: str) -> None:
        def step(qkv: Tensor, grad: Tensor) -> Tensor:
            out = attention(qkv * 0.5, segments=self.segments, scale=SCALE, backend=backend, deterministic=True)
            assert isinstance(out, Tensor)
            return (out * grad).sum()

        qkv, grad = self.inputs(0)
        found = []
        for call in (step, torch.compile(step, fullgraph=True)):
            leaf = qkv.clone().requires_grad_()
            call(leaf, grad).backward()
            assert leaf.grad is not None
            found.append(leaf.grad)
        torch.testing.assert_close(found[1], found[0])

    def test_other_stream(self, backend: str) -> None:
        """Inputs appear late on a stream of their own: a launch on another stream would read the old ones."""
        new, new_grad = self.inputs(1)
        expected = run(new, self.segments, backend, new_grad)
        qkv, grad = torch.zeros_like(new), torch.zeros_like(new_grad)
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            torch.cuda._sleep(50_000_000)
            qkv.copy_(new)
            grad.copy_(new_grad)
            found = run(qkv, self.segments, backend, grad)
        side.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
    def test_second_device(self, backend: str) -> None:
        qkv, grad = self.inputs(0)
        expected = run(qkv, self.segments, backend, grad)
        assert torch.cuda.current_device() == 0
        found = run(qkv.to("cuda:1"), self.segments, backend, grad.to("cuda:1"))
        assert torch.cuda.current_device() == 0
        assert all(b.device.index == 1 and torch.equal(a, b.to(a.device)) for a, b in zip(expected, found, strict=True))

    @pytest.mark.parametrize("name", ["flash_attn", "flash_attn_4"])
    def test_packages_in_place_and_through_their_gradient(self, name: str) -> None:
        skip_unless_offered(name)
        qkv, grad = self.inputs(0)
        leaf = qkv.requires_grad_()
        out = attention(leaf, segments=self.segments, scale=SCALE, backend=name)
        exact: Any = reference_attention(qkv.detach().double(), self.segments, SCALE)
        assert isinstance(out, Tensor)
        assert_within_budget(out, exact, run(qkv, self.segments, "triton", grad)[0])
        (found,) = torch.autograd.grad(out, leaf, grad)
        # Two kernels' roundings of the same bfloat16 gradient.
        torch.testing.assert_close(found, run(qkv, self.segments, "triton", grad)[2], rtol=2**-5, atol=2**-6)
