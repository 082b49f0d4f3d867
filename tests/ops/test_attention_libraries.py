"""The attention op's library backends without a GPU: what the packages are called with, and why they are not."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from any4d_fast import backends
from any4d_fast.ops import _attention_libraries as libraries
from any4d_fast.ops.attention import Segments, attention
from any4d_fast.reference.attention import attention as reference_attention
from any4d_fast.testing import assert_within_budget, gradients

PACKAGES = ("flash_attn", "flash_attn_4")
SEGMENTS = {
    "global": (Segments.global_(2, 7), 14),
    "frame": (Segments.frame(1, 3, 5), 16),
    "frame of two samples": (Segments.frame(2, 3, 5), 32),
    "batched": (Segments.batched(3, 4), 12),
    "gap cut off": (Segments(length=3, count=2, stride=5, groups=2, group_stride=8, start=1), 17),
}


class Calls:
    """Stands in for both packages: computes with PyTorch and keeps what it was called with."""

    def __init__(self) -> None:
        self.given: list[tuple[tuple[Tensor, ...], dict[str, Any]]] = []

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        scores = torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float()) * scale
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.float()).to(q.dtype)

    def flash_attn_qkvpacked_func(self, qkv: Tensor, **options: Any) -> Tensor:
        self.given.append(((qkv,), options))
        return self.attend(*qkv.unbind(2), options["softmax_scale"])

    def flash_attn_func(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, None]:
        self.given.append(((q, k, v), options))
        return self.attend(q, k, v, options["softmax_scale"]), None


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Both packages installed, and this machine taken for one with a GPU of compute capability 9.0."""
    found = Calls()
    package, cute = ModuleType("flash_attn"), ModuleType("flash_attn.cute")
    package.flash_attn_qkvpacked_func = found.flash_attn_qkvpacked_func  # type: ignore[attr-defined]
    cute.flash_attn_func = found.flash_attn_func  # type: ignore[attr-defined]
    package.cute = cute  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.cute", cute)
    monkeypatch.setattr(backends, "PACKAGES", dict.fromkeys(PACKAGES))
    monkeypatch.setattr(backends, "not_on_cuda", lambda runner, *tensors: [])
    monkeypatch.setattr(backends, "capability", lambda index: (9, 0))
    libraries._try_import.cache_clear()
    return found


@pytest.fixture(autouse=True)
def forget_imports() -> Any:
    yield
    libraries._try_import.cache_clear()


def sample(rows: int, heads: int = 2, head_dim: int = 16, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, 3, heads, head_dim, generator=generator).to(dtype)


def exact(qkv: Tensor, segments: Segments) -> Tensor:
    found = reference_attention(qkv, segments, 0.3)
    assert isinstance(found, Tensor)
    return found


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("layout", SEGMENTS)
@pytest.mark.parametrize("backend", PACKAGES)
def test_arguments_and_results(calls: Calls, backend: str, layout: str, deterministic: bool) -> None:
    segments, rows = SEGMENTS[layout]
    qkv = sample(rows)

    def ours(x: Tensor) -> Any:
        return attention(x, segments=segments, scale=0.3, backend=backend, deterministic=deterministic)

    found = ours(qkv)
    ((given, options),) = calls.given
    assert options == {"softmax_scale": 0.3, "deterministic": deterministic}
    heads = (3, 2, 16) if backend == "flash_attn" else (2, 16)
    assert [tuple(t.shape) for t in given] == [(segments.total, segments.length, *heads)] * len(given)
    assert found.dtype == qkv.dtype
    assert_within_budget(found, exact(qkv.double(), segments), exact(qkv, segments))
    grad = torch.ones_like(found)
    (ours_grad,) = gradients(ours, [qkv], [grad])
    (oracle_grad,) = gradients(lambda x: exact(x, segments), [qkv.double()], [grad])
    (baseline_grad,) = gradients(lambda x: exact(x, segments), [qkv], [grad])
    assert ours_grad is not None and oracle_grad is not None and baseline_grad is not None
    assert_within_budget(ours_grad, oracle_grad, baseline_grad)


@pytest.mark.parametrize("layout", ["global", "frame", "batched"])
@pytest.mark.parametrize("backend", PACKAGES)
def test_rows_are_read_in_place(calls: Calls, backend: str, layout: str) -> None:
    segments, rows = SEGMENTS[layout]
    wide = sample(rows, heads=4)
    qkv = wide[:, :, 1:3]  # heads of a wider projection
    attention(qkv, segments=segments, backend=backend)
    ((given, _),) = calls.given
    first, last = qkv.data_ptr(), wide.data_ptr() + wide.numel() * wide.element_size()
    for index, tensor in enumerate(given):
        assert tensor.data_ptr() == first + index * qkv.stride(1) * qkv.element_size() < last
        assert tensor.stride()[1] == qkv.stride(0) and tensor.stride()[-2:] == qkv.stride()[-2:]


def reasons(backend: str, qkv: Tensor, **options: Any) -> str:
    with pytest.raises(backends.BackendError, match=f"attention: backend='{backend}' cannot run this call") as error:
        attention(qkv, segments=options.pop("segments", Segments(qkv.shape[0])), backend=backend, **options)
    return str(error.value)


@pytest.mark.parametrize("backend", PACKAGES)
def test_reasons(calls: Calls, backend: str) -> None:
    name = backend.replace("_", "-")
    assert "dtype torch.float32 is not bfloat16 or float16" in reasons(backend, sample(4, dtype=torch.float32))
    largest = {"flash_attn": 256, "flash_attn_4": 128}[backend]
    for head_dim in (12, largest + 8):
        expected = f"head_dim {head_dim} is not a multiple of 8 up to {largest}"
        assert expected in reasons(backend, sample(4, head_dim=head_dim))
    assert "there is no row to attend" in reasons(backend, sample(4), segments=Segments.batched(3, 0))
    assert f"the log-sum-exp is not asked of {name}" in reasons(backend, sample(4), return_lse=True)
    odd = sample(4, head_dim=17)
    for misaligned in (odd[..., :16], odd.flatten()[1:193].view(4, 3, 1, 16)):
        assert "do not start at multiples of 16 bytes" in reasons(backend, misaligned)
    assert not calls.given


@pytest.mark.parametrize(
    ("backend", "capability", "expected"),
    [
        ("flash_attn", (7, 5), "compute capability 7.5 is older than 8.0"),
        ("flash_attn_4", (8, 0), "compute capability 8.0 is older than 9.0"),
        ("flash_attn_4", (12, 0), "flash-attn-4 has no deterministic backward for compute capability 12"),
    ],
)
def test_reasons_of_the_device(
    calls: Calls, monkeypatch: pytest.MonkeyPatch, backend: str, capability: tuple[int, int], expected: str
) -> None:
    monkeypatch.setattr(backends, "capability", lambda index: capability)
    assert expected in reasons(backend, sample(4), deterministic=True)


@pytest.mark.parametrize("backend", PACKAGES)
def test_absent_package_is_a_reason(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    absent = backends.package_missing("a-package-that-nobody-wrote", (1, 0), (2, 0))
    assert absent == "the package a-package-that-nobody-wrote is not installed"
    monkeypatch.setattr(backends, "PACKAGES", dict.fromkeys(PACKAGES, absent))
    assert reasons(backend, sample(4)).endswith(absent)
    assert {(backend, False, absent)} <= set(backends.describe())


@pytest.mark.parametrize("version", ["2.5.0", "2.8.3.post2", "2.10"])
def test_versions_that_will_do(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda distribution: version)
    assert backends.package_missing("flash-attn", (2, 5), (3, 0)) is None


@pytest.mark.parametrize("version", ["2.4.3", "3.0.0b1", "unknown"])
def test_version_is_a_reason(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda distribution: version)
    expected = f"flash-attn {version} is installed, and 2.5 or later, before 3.0 is expected"
    assert backends.package_missing("flash-attn", (2, 5), (3, 0)) == expected


@pytest.mark.parametrize("backend", PACKAGES)
def test_broken_package_is_a_reason(calls: Calls, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    module = {"flash_attn": "flash_attn", "flash_attn_4": "flash_attn.cute"}[backend]
    monkeypatch.setitem(sys.modules, module, ModuleType(module))
    expected = f"{backend.replace('_', '-')} is installed and cannot be imported: AttributeError"
    assert expected in reasons(backend, sample(4))


@pytest.mark.parametrize("backend", PACKAGES)
def test_needs_cuda(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.setattr(backends, "PACKAGES", dict.fromkeys(PACKAGES))
    assert f"tensors are on cpu; {backend.replace('_', '-')} runs on CUDA devices" in reasons(backend, sample(4))


def test_packages_come_last_in_automatic_choice(calls: Calls) -> None:
    order = backends.registered("attention")
    assert order[-3:] == ["flash_attn", "flash_attn_4", "eager"]
    assert order.index("cudnn") < order.index("flash") < order.index("flash_attn")


def test_torch_compile_traces_flash_attn_and_is_refused_flash_attn_4(calls: Calls) -> None:
    def call(backend: str) -> Callable[[Tensor], Any]:
        return lambda x: attention(x, segments=Segments.global_(1, x.shape[0]), backend=backend)

    qkv = sample(6)
    compiled = torch.compile(call("flash_attn"), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(qkv), call("flash_attn")(qkv))
    with pytest.raises(Exception, match="torch.compile cannot trace flash-attn-4"):
        torch.compile(call("flash_attn_4"), fullgraph=True, backend="aot_eager")(qkv)


def test_importing_the_op_imports_no_package() -> None:
    code = (
        "import sys, any4d_fast.ops.attention; sys.exit(any(m.partition('.')[0] == 'flash_attn' for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
