"""Moving finished outputs to pinned host memory while the GPU computes the next ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Outputs = dict[str, Tensor]

ALIGNMENT = 512  # bytes: any dtype, and whole lines of a copy
AHEAD = 2  # chunks that may wait for their copy: the device holds the outputs of so many, and of the one computed


class HostCopies:
    """Copies on a stream of their own. The result of `add` is valid after `wait`.

    The outputs of one `add` share one block of pinned memory, which is freed when the last of them is.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._events: list[torch.cuda.Event] = []

    def add(self, outputs: Sequence[Outputs]) -> list[Outputs]:
        """The same dictionaries with tensors in host memory; a tensor that occurs twice is copied once."""
        if self._stream is None:
            return [dict(view) for view in outputs]
        unique = list({id(t): t for view in outputs for t in view.values()}.values())
        copies = dict(zip(map(id, unique), carved(unique, pinned=True), strict=True))
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for tensor in unique:
                copies[id(tensor)].copy_(tensor, non_blocking=True)
                tensor.record_stream(self._stream)  # its memory is not reused before the copy is done
        self._events.append(self._stream.record_event())
        if len(self._events) > AHEAD:
            self._events.pop(0).synchronize()
        return [{key: copies[id(tensor)] for key, tensor in view.items()} for view in outputs]

    def wait(self) -> None:
        """Wait until everything added is there."""
        while self._events:
            self._events.pop(0).synchronize()


def carved(like: Sequence[Tensor], *, pinned: bool) -> list[Tensor]:
    """Uninitialised contiguous tensors in host memory, of the shapes and dtypes of others, out of one allocation."""
    places = [0]
    for tensor in like:
        size = tensor.numel() * tensor.element_size()
        places.append(places[-1] + -(-size // ALIGNMENT) * ALIGNMENT)
    block = torch.empty(places[-1], dtype=torch.uint8, pin_memory=pinned)
    return [
        block[start : start + t.numel() * t.element_size()].view(t.dtype).view(t.shape)
        for start, t in zip(places[:-1], like, strict=True)
    ]
