"""What launchers of the CUDA kernels do on the host: maps that no one stride walks, rows in no segment."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from any4d_fast import _ext
from any4d_fast.cuda import attention_backward, compose_factors
from any4d_fast.layout import evenly_spaced, like_map, map_strides
from any4d_fast.reference.attention import Segments


def crop(channels: int, planar: bool) -> Tensor:
    """[2, 9, 11, channels], cut out of a larger map whose channels come first in memory if `planar`."""
    if planar:
        return torch.randn(2, channels, 12, 15)[:, :, 1:10, 2:13].permute(0, 2, 3, 1)
    return torch.randn(2, 12, 15, channels)[:, 1:10, 2:13]


@pytest.mark.parametrize("planar", [False, True])
def test_copy_lies_as_its_gradient(planar: bool) -> None:
    given = crop(6, planar)
    copy = evenly_spaced(given)
    assert torch.equal(copy, given)
    assert copy.stride() == like_map(given).stride()
    assert evenly_spaced(copy) is copy


@pytest.mark.parametrize("planar", [False, True])
def test_compose_factors_writes_gradients_as_they_lie(planar: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel writes them contiguous, in the order of channels that it reads (csrc/compose_factors.h)."""
    told: dict[str, Any] = {}
    extension = SimpleNamespace(compose_backward=told.update, compose_backward_chunks=lambda pixels: 4)
    monkeypatch.setattr(_ext, "_OUTCOME", [extension])
    monkeypatch.setattr(compose_factors, "stream", lambda device: 0)
    maps = crop(6, planar), crop(3, planar)
    cotangents = (torch.ones(2, 9, 11, 3), *[None] * 9)
    grads = compose_factors.backward(*maps, torch.ones(2, 4), torch.ones(2, 3), torch.ones(1, 1), cotangents)
    for name, grad in zip(("geometry", "flow"), grads, strict=False):
        assert told[name][1:] == map_strides(grad)


def test_attention_backward_needs_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "any4d_fast.kernels.attention", raising=False)
    qkv, out, lse = torch.ones(5, 3, 2, 64), torch.ones(5, 2, 64), torch.ones(2, 5)
    grad = attention_backward.backward(out, None, qkv, out, lse, Segments(length=0).as_list(), 1.0, False)
    assert grad.shape == qkv.shape and not grad.any()
