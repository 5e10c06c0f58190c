"""Reading machine code: its loops, kinds of instructions, and the ceilings that follow."""

import pytest

from kernels import _sass as sass

FILLER = ("IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28]",) * 10


def _code(*instructions):
    """What cuobjdump prints; a target of a branch is the number of an instruction."""
    lines = []
    for i, text in enumerate(instructions):
        if "->" in text:
            name, _, target = text.partition(" -> ")
            text = f"{name} {hex(16 * int(target))}"
        lines.append(f"        /*{16 * i:04x}*/                   {text} ;      /* 0x00000a0000017a02 */\n")
        lines.append("                                                       /* 0x000fe40000000f00 */\n")
    return "".join(lines)


def test_innermost_loops_are_found_in_order():
    # 0..24 encloses 2..13 and 14..25; a jump forward and a wait of three instructions are no loops
    code = [*("NOP",) * 2, *FILLER, "@P0 BRA -> 40", "@!P1 BRA -> 2", *FILLER, "FADD R1, R2, R3", "@P0 BRA -> 14"]
    code += ["@P2 BRA -> 0", "SYNCS.PHASECHK R1", "NOP", "@!P0 BRA -> 27", "EXIT", "BRA -> 31"]
    first, second = sass.loops(_code(*code), 4)
    assert (first.n, second.n) == (12, 12)
    assert first.kinds == {"control": 2, "integer": 10} and second.kinds == {"control": 1, "float": 1, "integer": 10}


@pytest.mark.parametrize(
    ("opcode", "kind"),
    [
        ("HGMMA.64x64x16.F32.BF16", "tensor"), ("HMMA.16816.F32", "tensor"), ("UTCHMMA", "tensor"),
        ("MUFU.EX2", "special"), ("FFMA", "float"), ("FMNMX", "float"), ("F2FP.BF16.F32.PACK_AB", "float"),
        ("HFMA2", "float"), ("FLO.U32", "integer"), ("IMAD.WIDE", "integer"), ("LOP3.LUT", "integer"),
        ("R2UR", "integer"), ("LDG.E.128", "memory"), ("LDGSTS.E.BYPASS.LTC128B.128", "memory"), ("LDGDEPBAR", "sync"),
        ("UTMALDG.4D", "memory"), ("LDS.128", "shared"), ("LDSM.16.M88.4", "shared"), ("SHFL.BFLY", "shared"),
        ("BAR.SYNC.DEFER_BLOCKING", "sync"), ("WARPGROUP.ARRIVE", "sync"), ("SYNCS.PHASECHK", "sync"),
        ("STG.E.U16", "memory"), ("BSSY", "control"),
    ],
)  # fmt: skip
def test_kinds(opcode, kind):
    (loop,) = sass.loops(_code(f"@P0 {opcode} R1, R2", *("NOP",) * 11, "BRA -> 0"), 4)
    assert loop.kinds == ({"control": 13} if kind == "control" else {"control": 12, kind: 1})


def test_work_of_an_iteration():
    code = ["HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8]", "HMMA.16816.F32.BF16 R4, R8", "LDG.E.128 R4, desc[UR4][R2.64]"]
    code += ["LDG.E.U16 R4", "LDG.E R4", "STG.E.64 desc[UR4][R2.64], R4", "LDGDEPBAR", "WARPGROUP.ARRIVE"]
    (loop,) = sass.loops(_code(*code, *FILLER, "BRA -> 0"), 4)
    assert loop.flops == 2 * 64 * 128 * 16 // 4 + 2 * 16 * 8 * 16
    assert loop.bytes == 32 * (16 + 2 + 4 + 8) and loop.warpgroup == 1


def test_products_of_blackwell_take_their_shape_from_a_register():
    code = ["UMOV UR33, 0x8100490", "UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR9], tmem[UR32], idesc[UR33], UPT"]
    code += ["UMOV UR33, 0x4200910", "@P1 UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR9], tmem[UR32], idesc[UR33], !UPT"]
    (loop,) = sass.loops(_code(*code, *FILLER, "BRA -> 0"), 8)
    bf16, tf32 = 2 * 128 * 64 * 16, 2 * 64 * 128 * 8
    assert loop.flops == (bf16 + tf32) // 8 and loop.kinds["tensor"] == 2


def test_ceilings():
    device = sass.Device(90, 100, 1.0, 4096, 3000)
    loop = sass.Loop(400, {"special": 32}, flops=262_144)
    # 100, 64 and 64 cycles for 262,144 FLOP, on 100 multiprocessors at 1 GHz
    assert loop.ceilings(device) == pytest.approx(
        {"issue TFLOP/s": 262.144, "special TFLOP/s": 409.6, "tensor TFLOP/s": 409.6}
    )
    assert sass.Loop(200, bytes=1000).ceilings(device) == pytest.approx({"issue GB/s": 2000})
    assert sass.Loop(200).ceilings(device) == {}
