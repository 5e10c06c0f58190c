"""Machine code by loop: what the inner loops of a kernel issue, and the ceilings that follow for a device.

One iteration of a loop by one warp takes a multiprocessor at least the longest of

    issue    n / 4 cycles: four schedulers start one instruction each a cycle
    special  32 lanes of MUFU (exp2, rsqrt, reciprocal) at 16 a cycle
    tensor   the iteration's floating-point operations on the tensor cores at the device's rate a cycle

for as many warps as keep all three busy; latencies, barriers and memory can only make it slower. Of a loop without
matrix products the issue slots bound the bytes a second instead.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", re.MULTILINE)
_KINDS = {  # by the beginning of the opcode, the first that fits
    "tensor": r"HGMMA|[HIQ]MMA|UTC\w*MMA",
    "special": r"MUFU",
    "sync": r"BAR|B2R|WARPSYNC|WARPGROUP|DEPBAR|LDGDEPBAR|UTMA\w*FLUSH|SYNCS|MEMBAR|FENCE|ERRBAR|UTCBAR|ELECT",
    "shared": r"LDS|STS|SHFL|LDTM|STTM|UTCCP",
    "memory": r"LDG|STG|LDL|STL|LD\b|ST\b|RED|ATOM|UTMA|UBLKCP|CCTL",
    "float": r"F(?!LO)|H(ADD|MUL|FMA|MNMX|SET)|I2F|I2FP",
    "control": r"BRA|BSSY|BSYNC|BREAK|NOP|EXIT|RET|CALL|JMP",
}
_KIND = re.compile("|".join(f"(?P<{kind}>{names})" for kind, names in _KINDS.items()))
_WIDTH = re.compile(r"\.(U?8|S8|U?16|S16|64|128|256)\b")
_FEWEST = 12  # instructions of a loop that counts: shorter ones wait for a barrier
MAX_WARPGROUP = 6  # WARPGROUP instructions of a loop; more of them make asynchronous products wait for one another


class Device(NamedTuple):
    """What a GPU has: NVIDIA's white papers of A100, H100 and B200, the SXM form, dense rates in bfloat16."""

    arch: int
    multiprocessors: int
    ghz: float  # boost clock
    tensor: int  # floating-point operations a cycle and multiprocessor
    bandwidth: float  # GB/s


DEVICES = {
    "a100": Device(80, 108, 1.410, 2048, 2039),
    "h100": Device(90, 132, 1.755, 4096, 3350),
    "b200": Device(100, 148, 1.850, 8192, 8000),
}
_ISSUE, _SPECIAL = 4, 16  # instructions, and lanes of MUFU, a cycle and multiprocessor, of all three


@dataclass(frozen=True)
class Loop:
    """An innermost loop: what one warp issues in an iteration."""

    n: int  # instructions
    kinds: dict[str, int] = field(default_factory=dict)
    warpgroup: int = 0  # WARPGROUP instructions
    flops: int = 0  # of a warp on the tensor cores
    bytes: int = 0  # that a warp loads and stores without a bulk copy

    def ceilings(self, device: Device) -> dict[str, float]:
        """TFLOP/s by what limits it, or GB/s by the issue slots for a loop without products."""
        per_second = device.multiprocessors * device.ghz * 1e9
        issue = self.n / _ISSUE
        if not self.flops:
            return {"issue GB/s": self.bytes / issue * per_second / 1e9} if self.bytes else {}
        cycles = {"issue": issue, "special": 32 * self.kinds.get("special", 0) / _SPECIAL}
        cycles["tensor"] = self.flops / device.tensor
        return {f"{name} TFLOP/s": self.flops / n * per_second / 1e12 for name, n in cycles.items() if n}


def whole(sass: str, num_warps: int) -> Loop:
    """All instructions, as if they were one loop: of a kernel without one."""
    code = _parse(sass)
    return _loop([name for _, name, _ in code], sum(_flops(code, num_warps)))


def loops(sass: str, num_warps: int) -> list[Loop]:
    """The innermost loops in the output of `cuobjdump -sass` for one kernel of num_warps, in its order."""
    code = _parse(sass)
    flops = _flops(code, num_warps)
    index = {address: i for i, (address, _, _) in enumerate(code)}
    spans = set()
    for i, (address, name, rest) in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)", rest) if name.startswith("BRA") else None
        if target and int(target[1], 16) < address and int(target[1], 16) in index:
            spans.add((index[int(target[1], 16)], i))
    inner = [
        (a, b) for a, b in spans if not any((a, b) != other and a <= other[0] and other[1] <= b for other in spans)
    ]
    counted = [slice(a, b + 1) for a, b in sorted(inner) if b - a + 1 >= _FEWEST]
    return [_loop([name for _, name, _ in code[span]], sum(flops[span])) for span in counted]


def _parse(sass: str) -> list[tuple[int, str, str]]:
    """(address, opcode, the rest) of each instruction."""
    return [(int(address, 16), name, rest) for address, name, rest in _LINE.findall(sass)]


def _loop(names: list[str], flops: int) -> Loop:
    kinds: Counter[str] = Counter()
    for name in names:
        match = _KIND.match(name)
        kinds[(match and match.lastgroup) or "integer"] += 1
    warpgroup = sum(name.startswith("WARPGROUP") for name in names)
    return Loop(len(names), dict(sorted(kinds.items())), warpgroup, flops, sum(map(_bytes, names)))


def _flops(code: list[tuple[int, str, str]], num_warps: int) -> list[int]:
    """Of one warp, for each instruction. HGMMA.64x64x16 is that of a group of four; HMMA.16816 is 16 x 8 x 16.

    UTCHMMA is issued once for all warps of a block, and its shape lies in a uniform register, set shortly before: PTX
    ISA, "Instruction descriptor" of tcgen05.mma: N / 8 from bit 17, M / 16 from bit 24, the type of A from bit 7.
    """
    constants: dict[str, int] = {}
    flops = [0] * len(code)
    for i, (_, name, rest) in enumerate(code):
        if move := re.match(r"\s*(UR\d+), 0x([0-9a-f]+)\s*$", rest) if name == "UMOV" else None:
            constants[move[1]] = int(move[2], 16)
        elif shape := re.match(r"HGMMA\.(?:SP\.)?(\d+)x(\d+)x(\d+)", name) or re.match(r"HMMA\.(16)(8)(\d+)", name):
            warps = 4 if name.startswith("HG") else 1
            flops[i] = 2 * int(shape[1]) * int(shape[2]) * int(shape[3]) // warps
        elif name == "UTCHMMA" and (register := re.search(r"idesc\[(UR\d+)\]", rest)):
            descriptor = constants.get(register[1], 0)
            M, N, K = (descriptor >> 24 & 31) * 16, (descriptor >> 17 & 63) * 8, 8 if descriptor >> 7 & 7 == 2 else 16
            flops[i] = 2 * M * N * K // num_warps
    return flops


def _bytes(name: str) -> int:
    if not re.match(r"LDG(?!DEP)|STG", name):
        return 0
    width = _WIDTH.search(name)
    return 32 * (int(width[1].lstrip("US")) // 8 if width else 4)
