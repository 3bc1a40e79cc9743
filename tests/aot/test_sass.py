"""Reading machine code; the compiler's own is read by `tests/kernels/test_pallas_triton.py`."""

import pytest

from rcm_jax.aot import sass
from rcm_jax.aot.gpus import find_gpu

# Two loops with products, the shorter one first, and one without; one instruction that never runs.
CODE = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
        /*0020*/               @P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0030*/              @!PT LDS RZ, [RZ] ;
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R88, gdesc[UR16], RZ, !UPT ;
        /*0050*/                   MUFU.EX2 R4, R5 ;
        /*0060*/                   STL.64 [R1], R4 ;
        /*0070*/                   LDL R6, [R1] ;
        /*0080*/                   HGMMA.64x128x16.F32.BF16 R24, R120, gdesc[UR8].tnspB, R24, gsb0 ;
        /*0090*/                   LDGSTS.E.BYPASS.128 [R103], desc[UR20][R88.64], P4 ;
        /*00a0*/               @P1 BRA `(.L_x_1) ;
.L_x_2:
        /*00b0*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*00c0*/                   FADD R1, R2, R3 ;
        /*00d0*/                   FADD R1, R2, R3 ;
        /*00e0*/                   FADD R1, R2, R3 ;
        /*00f0*/                   FADD R1, R2, R3 ;
        /*0100*/                   FADD R1, R2, R3 ;
        /*0110*/                   FADD R1, R2, R3 ;
        /*0120*/              @!P2 BRA `(.L_x_2) ;
        /*0130*/                   BRA `(.L_x_3) ;
.L_x_3:
        /*0140*/                   EXIT ;
"""


def test_loops_are_found_and_counted():
    first, second = sass.find_loops(CODE, warps=8, architecture=90)
    assert [i.kind for i in first.body] == ["HGMMA", "MUFU", "STL", "LDL", "HGMMA", "LDGSTS", "BRA"]
    assert first.spilled == 8 + 4
    assert first.loaded == 16 * 8 * 32
    assert first.products == {"HGMMA.64x64x16.F32.BF16": 2, "HGMMA.64x128x16.F32.BF16": 2}
    assert first.flops == 2 * 2 * 64 * (64 + 128) * 16
    assert second.products == {"HMMA.16816.F32.BF16": 8}
    assert second.flops == 8 * 2 * 16 * 8 * 16


def test_the_model_of_a_turn():
    first, second = sass.find_loops(CODE, warps=8, architecture=90)
    assert first.tensor_cycles == 2 * (32 + 64)
    assert first.vector_cycles == 8 * 2  # one MUFU a warp, eight cycles each, two warps a scheduler
    assert first.share(first.flops) == (192 / (192 + 16), 1)
    assert first.share(first.flops / 2) == (96 / (192 + 16), 0.5)
    assert second.vector_cycles == 8 * 2  # eight issue slots
    assert second.tensor_cycles == pytest.approx(8 * 2 * 16 * 8 * 16 / 4096 / sass.HMMA_ON_90)


def test_operands_in_shared_memory_hold_narrow_products_up():
    narrow = CODE.replace("64x64x16", "64x32x16")
    [wide, *_], [slow, *_] = (sass.find_loops(code, warps=4, architecture=90) for code in (CODE, narrow))
    assert wide.tensor_cycles == 32 + 64
    assert slow.tensor_cycles == (64 + 32) * 16 * 2 / 128 + 64  # 24 cycles of reading for 16 of multiplying


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "blocks"),
    [(255, 256, 0, 1), (128, 256, 0, 2), (129, 256, 0, 1), (32, 128, 100_000, 2), (16, 1024, 0, 2)],
)
def test_blocks_that_a_multiprocessor_holds(registers, threads, shared, blocks):
    kernel = sass.Assembled(registers, 0, threads, False, ())
    assert sass.blocks_on_core(find_gpu("h100"), kernel, shared) == blocks


def test_what_is_missing_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(sass.sysconfig, "get_paths", lambda: {"purelib": str(tmp_path)})
    sass.find_tool.cache_clear()
    with pytest.raises(RuntimeError, match=r"needs nvdisasm, which is not under .*pip install 'rcm_jax\[aot\]'"):
        sass.find_tool("nvdisasm")
    sass.find_tool.cache_clear()
    with pytest.raises(ValueError, match="no loop with a product"):
        _ = sass.Assembled(32, 0, 128, False, ()).main_loop
