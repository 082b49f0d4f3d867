"""Pinned memory in two steps: pages from the system, then the driver; and back when the last tensor is gone."""

from __future__ import annotations

import gc

import pytest
import torch

from any4d_fast import host_pages


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What the driver is asked, in order, where there is none."""
    found: list[tuple[str, int]] = []

    def register(address: int, size: int) -> bool:
        found.append(("register", address))
        return True

    monkeypatch.setattr(host_pages, "register", register)
    monkeypatch.setattr(host_pages, "unregister", lambda address: found.append(("unregister", address)))
    return found


def test_pages_live_as_long_as_the_last_tensor_in_them(calls: list[tuple[str, int]]) -> None:
    block = host_pages.pinned(5000)
    assert block is not None
    assert (block.dtype, block.shape, block.data_ptr() % 4096) == (torch.uint8, (5000,), 0)
    address = block.data_ptr()
    part = block[4096:].view(2, -1)
    del block
    gc.collect()
    assert calls == [("register", address)]
    part.fill_(7)
    assert int(part.sum()) == 7 * (5000 - 4096)
    del part
    gc.collect()
    assert calls == [("register", address), ("unregister", address)]


def test_what_the_driver_refuses_is_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_pages, "register", lambda address, size: False)
    assert host_pages.pinned(5000) is None


def test_memory_that_the_system_has_not_is_left_to_pytorch(calls: list[tuple[str, int]]) -> None:
    assert host_pages.pinned(1 << 62) is None  # more than any address space
    assert calls == []


def test_nothing_needs_no_pages(calls: list[tuple[str, int]]) -> None:
    assert host_pages.pinned(0) is None
    assert calls == []


@pytest.mark.gpu
def test_registered_pages_are_pinned_and_take_copies() -> None:
    block = host_pages.pinned(1 << 22)
    assert block is not None and block.is_pinned()
    source = torch.randint(0, 256, (1 << 22,), dtype=torch.uint8, device="cuda")
    block.copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    assert torch.equal(block, source.cpu())
    address, size = block.data_ptr(), block.numel()
    del block
    gc.collect()
    again = host_pages.pinned(size)  # at the same address as a rule, which must be free for it
    assert again is not None, address
    assert int(again.max()) == 0
