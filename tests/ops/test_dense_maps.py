"""`ops.dense_maps` in eager mode: what its functions mean, the flag, and errors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from any4d_fast.ops import dense_maps
from any4d_fast.ops.dense_maps import finish, gelu, narrow, new_flag, padded, patches, upsample
from any4d_fast.testing import ROUNDING, relative_error

CPU = torch.device("cpu")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_a_finished_map_is_a_sum_and_its_relu() -> None:
    value, residual, bias, coarse = (random(2, 5, 7, 4, seed=1), random(2, 5, 7, 4, seed=2), random(4, seed=3),
                                     random(2, 3, 4, 4, seed=4))  # fmt: skip
    flag = new_flag(CPU)
    doubled = F.interpolate(coarse.permute(0, 3, 1, 2), scale_factor=2, mode="bilinear", align_corners=True)
    expected = value + bias + residual + doubled.permute(0, 2, 3, 1)[:, :5, :7]
    total, positive = finish(value, bias, flag, residual=residual, coarse=coarse, relu=True)
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(positive, expected.relu())
    only, nothing = finish(value, None, flag)
    assert torch.equal(only, value) and nothing.numel() == 0
    nothing, only = finish(value, None, flag, out=False, relu=True)
    assert torch.equal(only, value.relu()) and nothing.numel() == 0
    torch.testing.assert_close(upsample(coarse, flag), doubled.permute(0, 2, 3, 1))
    assert flag.item() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_sum_is_rounded_once(dtype: torch.dtype) -> None:
    given = [random(1, 4, 4, 8, seed=s, dtype=dtype) for s in range(2)]
    total = finish(given[0], None, new_flag(CPU), residual=given[1])[0]
    assert torch.equal(total, (given[0].double() + given[1].double()).to(dtype))


def test_rows_are_narrowed_view_by_view() -> None:
    tokens = random(2, 3 * 4 + 1, 5)
    rows = tokens[:, :12].unflatten(1, (3, 4))[:, 1:].transpose(0, 1)  # [2 views, 2 samples, 4, 5]
    found = narrow(rows, torch.float16, new_flag(CPU))
    assert torch.equal(found, rows.reshape(4, 4, 5).half())
    assert relative_error(found, rows.reshape(4, 4, 5)) <= ROUNDING[torch.float16]


def test_gelu_of_a_biased_map_and_a_residual() -> None:
    value, residual, bias = random(2, 3, 5, 4, seed=1), random(2, 3, 5, 4, seed=2), random(4, seed=3)
    flag = new_flag(CPU)
    torch.testing.assert_close(gelu(value, bias, flag), F.gelu(value + bias))
    torch.testing.assert_close(gelu(value, bias, flag, residual=residual), F.gelu(value + bias + residual))
    assert flag.item() == 0


@pytest.mark.parametrize("channels", [1, 3])
def test_patches_become_padded_channels(channels: int) -> None:
    x = random(2, 6, 9, channels)
    found = patches(x, 3, torch.float16, new_flag(CPU))
    assert found.shape == (2, 2, 3, padded(9 * channels)) and found.shape[3] % 8 == 0
    for row in range(2):
        for column in range(3):
            patch = x[:, 3 * row : 3 * row + 3, 3 * column : 3 * column + 3]
            assert torch.equal(found[:, row, column, : 9 * channels], patch.flatten(1).half())
    assert not found[..., 9 * channels :].any()


CALLS: dict[str, Callable[[Tensor, Tensor], object]] = {
    "narrow": lambda x, flag: narrow(x, torch.float16, flag),
    "sum": lambda x, flag: finish(x.half(), None, flag, residual=x.half()),
    "relu": lambda x, flag: finish(x.half(), None, flag, out=False, relu=True),
    "bias": lambda x, flag: finish(torch.zeros_like(x).half(), x[0, 0, 0], flag, out=False, relu=True),
    "patches": lambda x, flag: patches(x, 1, torch.float16, flag),
    "gelu": lambda x, flag: gelu(x.half(), torch.zeros(x.shape[3]).half(), flag),
    "gelu of the residual": lambda x, flag: gelu(
        torch.zeros_like(x).half(), torch.zeros(x.shape[3]).half(), flag, residual=x.half()
    ),
    "coarse": lambda x, flag: finish(torch.zeros(1, 4, 4, 4).half(), None, flag, coarse=x.half()),
    "upsample": lambda x, flag: upsample(x.half(), flag),
}


@pytest.mark.parametrize("large", [1e5, -1e5, float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("name", CALLS)
def test_the_flag_is_set_by_what_does_not_fit(name: str, large: float) -> None:
    x = random(1, 2, 2, 4)
    flag = new_flag(CPU)
    CALLS[name](x, flag)
    assert flag.item() == 0
    x[0, 0, 0, 3] = large
    CALLS[name](x, flag)
    assert flag.item() == 1
    CALLS[name](torch.zeros_like(x), flag)
    assert flag.item() == 1  # it is never cleared


ERRORS: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "rank": (lambda f: finish(torch.zeros(2, 3), None, f), r"value: expected \[N, H, W, C\]"),
    "nothing": (lambda f: finish(torch.zeros(1, 2, 2, 3), None, f, out=False), "out, relu: expected one of them"),
    "bias": (lambda f: finish(torch.zeros(1, 2, 2, 3), torch.zeros(4), f), r"bias: expected \[3\], got \[4\]"),
    "residual": (lambda f: finish(torch.zeros(1, 2, 2, 3), None, f, residual=torch.zeros(1, 2, 2, 3).half()),
                 r"residual: expected \[1, 2, 2, 3\] torch.float32"),
    "coarse": (lambda f: finish(torch.zeros(1, 4, 4, 3), None, f, coarse=torch.zeros(1, 2, 1, 3)),
               "coarse: expected at least half of 4 x 4, got 2 x 1"),
    "coarse channels": (lambda f: finish(torch.zeros(1, 2, 2, 3), None, f, coarse=torch.zeros(1, 1, 1, 4)),
                        r"coarse: expected \[1, 1, 1, 3\]"),
    "flag": (lambda f: finish(torch.zeros(1, 2, 2, 3), None, f.float()), r"flag: expected \[1\] int32 on cpu"),
    "rows": (lambda f: narrow(torch.zeros(2, 3), torch.float16, f), r"x: expected \[views, B, T, C\]"),
    "upsample": (lambda f: upsample(torch.zeros(2, 3), f), r"coarse: expected \[N, h, w, C\]"),
    "gelu": (lambda f: gelu(torch.zeros(2, 3), torch.zeros(3), f), r"value: expected \[N, H, W, C\]"),
    "gelu's bias": (lambda f: gelu(torch.zeros(1, 2, 2, 3), torch.zeros(2), f), r"bias: expected \[3\], got \[2\]"),
    "gelu's residual": (lambda f: gelu(torch.zeros(1, 2, 2, 3), torch.zeros(3), f, residual=torch.zeros(1, 2, 3, 3)),
                        r"residual: expected \[1, 2, 2, 3\]"),
    "patches": (lambda f: patches(torch.zeros(1, 4, 5, 3), 2, torch.float16, f), "multiples of the patch size 2"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_wrong_arguments_are_named(name: str) -> None:
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        call(new_flag(CPU))


def test_the_backend_is_registered() -> None:
    from any4d_fast import backends

    assert backends.registered("dense_maps")[-1] == "eager"
    assert dense_maps._triton_reasons(torch.zeros(1, dtype=torch.float64))
