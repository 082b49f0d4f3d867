"""Reading what ptxas prints."""

from __future__ import annotations

import pytest

from tests.csrc import resources
from tests.csrc.resources import Usage

LOG = """
ptxas info    : 0 bytes gmem, 64 bytes cmem[4]
ptxas info    : Compiling entry function '_ZN5any4d6kernelIfEEvPT_' for 'sm_90a'
ptxas info    : Function properties for _ZN5any4d6kernelIfEEvPT_
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 168 registers, used 4 barriers, 16 bytes cumulative stack size, 2304 bytes smem, 64 bytes cmem[4]
ptxas info    : Compile time = 27.5 ms
ptxas info    : Compiling entry function 'plain' for 'sm_100'
ptxas info    : Function properties for plain
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers
"""


def test_parse() -> None:
    assert resources.parse("a.cu", LOG) == [
        Usage("a.cu", "kernel", "90a", 168, 20, 16, 2304),
        Usage("a.cu", "plain", "100", 32, 0, 0, 0),
    ]


def test_unknown_output_is_not_passed_over() -> None:
    with pytest.raises(ValueError, match="ptxas printed something new"):
        resources.parse("a.cu", "Compiling entry function 'plain' for 'sm_100'\nUsed a new format\n")


def test_violations_and_allowances(monkeypatch: pytest.MonkeyPatch) -> None:
    usages = resources.parse("a.cu", LOG)
    assert resources.violations(usages) == [
        "a.cu kernel sm_90a: registers 168, expected <= 128",
        "a.cu kernel sm_90a: spill 20, expected <= 0",
        "a.cu kernel sm_90a: stack 16, expected <= 0",
    ]
    bound = resources.Bound(registers=168, spill=20, stack=16)
    monkeypatch.setattr(resources, "ALLOWANCES", [("a*.cu", "kernel", bound, "one block a multiprocessor")])
    assert resources.violations(usages) == []
    assert "168" in resources.table(usages)


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("void any4d::(anonymous namespace)::forward_kernel<__nv_bfloat16, 3>(any4d::Args)", "forward_kernel"),
        ("any4d::plain_kernel(float*)", "plain_kernel"),
        ("plain", "plain"),
    ],
)
def test_short_name(name: str, short: str) -> None:
    assert resources.short_name(name) == short
