"""Which backend is asked for: by blocks that nest, and by those of several threads."""

from __future__ import annotations

import pytest
import torch

from any4d_fast import ops
from any4d_fast.backends import BackendError, in_force, use_backend


def test_blocks_nest_and_none_restores_automatic_choice() -> None:
    with use_backend("eager"):
        with use_backend(None):
            assert in_force() is None
        assert in_force() == "eager"
    assert in_force() is None


def test_a_thread_that_leaves_its_block_leaves_other_threads_alone() -> None:
    first, second = use_backend("eager"), use_backend("triton")
    first.__enter__()
    second.__enter__()  # another thread's
    first.__exit__(None, None, None)
    assert in_force() == "triton"
    second.__exit__(None, None, None)
    assert in_force() is None


def test_a_backend_that_no_op_has_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(2, 4, 4)
    message = (
        "use_backend or ANY4D_FAST_BACKEND: expected 'auto' or one of .*'triton'.*, got 'trition', which no op has"
    )
    with use_backend("trition"), pytest.raises(BackendError, match=message):
        ops.layer_norm(x, torch.ones(4), torch.zeros(4))
    monkeypatch.setenv("ANY4D_FAST_BACKEND", "trition")
    with pytest.raises(BackendError, match=message):
        ops.layer_norm(x, torch.ones(4), torch.zeros(4))


def test_a_backend_of_other_ops_leaves_an_op_to_its_own_choice() -> None:
    x = torch.randn(2, 4, 4)
    with use_backend("cudnn"):
        out = ops.layer_norm(x, torch.ones(4), torch.zeros(4))
    torch.testing.assert_close(out, torch.nn.functional.layer_norm(x, (4,), eps=1e-6))
