"""Which backend is asked for: by blocks that nest, and by those of several threads."""

from __future__ import annotations

from any4d_fast.backends import in_force, use_backend


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
