"""Finding loops in machine code."""

from __future__ import annotations

import pytest

from tests.csrc import sass

CODE = """
        /*0000*/                   STL [R1+0x1c], RZ ;                /* 0x00001cff01007387 */
        /*0010*/              @!P0 BRA 0xa0 ;                         /* 0x000000ac00648947 */
        /*0020*/                   LDL R5, [R1+0x14] ;                /* 0x0000140001057983 */
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT ; /* 0x01 */
        /*0040*/              @!P1 BRA 0xb0 ;                         /* 0x00 */
        /*0050*/                   FFMA R0, R1, R2, R3 ;              /* 0x00 */
        /*0060*/               @P2 BRA 0x30 ;                         /* 0x00 */
        /*0070*/              @!P1 BRA 0xe0 ;                         /* 0x00 */
        /*0080*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT ; /* 0x01 */
        /*0090*/               @P3 BRA 0x20 ;                         /* 0x00 */
        /*00a0*/                   EXIT ;                             /* 0x00 */
        /*00b0*/                   NANOSLEEP 0x10 ;                   /* 0x00 */
        /*00c0*/              @!P1 BRA 0xb0 ;                         /* 0x00 */
        /*00d0*/                   BRA 0x50 ;                         /* 0x00 */
        /*00e0*/                   LDL R5, [R1+0x14] ;                /* 0x00 */
        /*00f0*/                   BRA 0x80 ;                         /* 0x00 */
        /*0100*/                   BRA 0x100 ;                        /* 0x00 */
"""


def test_local_memory_around_the_inner_loop() -> None:
    code = sass.parse(CODE)
    assert len(code) == 17
    (loop,) = sass.loops_of_products(code)
    # With the long way of its wait, which lies behind the end.
    assert [i.address for i in loop] == [0x30, 0x40, 0x50, 0x60, 0xB0, 0xC0, 0xD0]
    assert sass.spilling_loops(code) == []


@pytest.mark.parametrize("inside", ["FFMA R0, R1, R2, R3", "NANOSLEEP 0x10"])
def test_local_memory_inside(inside: str) -> None:
    code = sass.parse(CODE.replace(inside, "LDL.LU R156, [R1+0x4]"))
    assert sass.spilling_loops(code) == ["0x30-0xd0"]


def test_loop_with_two_entries() -> None:
    code = sass.parse(CODE.replace("BRA 0xa0 ", "BRA 0xb0 ").replace("@P3 BRA 0x20", "@P3 BRA 0xa0"))
    (loop,) = sass.loops_of_products(code)
    assert [i.address for i in loop] == [0x30, 0x40, 0x50, 0x60, 0xB0, 0xC0, 0xD0]


def test_no_code() -> None:
    assert sass.loops_of_products([]) == []
