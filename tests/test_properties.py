"""Random cases: any shape, option, layout and dtype that a kernel says it takes, by the tolerance rule."""

import os

import pytest
import torch
from conftest import HAS_CUDA
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from kernels._proof import LAYOUTS, in_turn, prove
from kernels._registry import all_specs
from kernels._triton import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs triton, which is published for Linux")

SPECS = all_specs()
# bfloat16 arithmetic is silently wrong in the interpreter.
DTYPES = ["float32", "float16", "bfloat16"] if HAS_CUDA else ["float32", "float16"]
# Not the layout whose rows are all one row: gradients that cancel to zero leave nothing but eager's luck to compare
# with. test_kernels has that layout, on the cases that a kernel names.
STRIDED = {"contiguous": lambda t: t} | {k: make() for k, make in LAYOUTS.items() if k not in ("expanded", "mixed")}

DRAWS = 16


def _prove_random_cases(name, device, **options):
    """Runs hypothesis over the kernel's space, each tensor in a layout of its own; returns the rows of each case."""
    spec = SPECS[name]
    cases = []

    # What hypothesis prints of a failure is what it takes to run it again.
    @settings(deadline=None, database=None, **options)
    @given(
        case=st.fixed_dictionaries({key: st.sampled_from(values) for key, values in spec.space.items()}),
        dtype=st.sampled_from(DTYPES),
        layouts=st.permutations(list(STRIDED)),
        seed=st.integers(0, 99),
    )
    def check(case, dtype, layouts, seed):
        def rows(seed):
            return list(
                prove(spec, case, getattr(torch, dtype), device, seed=seed, layout=in_turn(*map(STRIDED.get, layouts)))
            )

        cases.append(rows(seed))
        assert {row.name for row in cases[-1]} >= set(spec.outputs)
        if all(row.passed for row in cases[-1]):
            return
        # A result of one or two elements may be exact in eager by luck: the rule is asked once more, of DRAWS draws of
        # the case as of one large tensor.
        for draws in zip(*(rows(seed + i) for i in range(DRAWS)), strict=True):
            error, allowed = (torch.tensor([getattr(row, key) for row in draws]).max() for key in ("error", "allowed"))
            assert error <= allowed, f"{name} {draws[0].name}: error {error:.3e} > allowed {allowed:.3e}, {draws[0]}"

    check()
    return cases


@pytest.mark.parametrize("examples", [2, pytest.param(16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SPECS)
def test_random_cases(name, examples, device):
    """The same cases every time: a red suite stays red until the kernel is fixed."""
    assert SPECS[name].space, "a kernel declares what random tests may draw"
    _prove_random_cases(name, device, derandomize=True, max_examples=examples, phases=[Phase.generate])


@pytest.mark.long
@pytest.mark.timeout(0)
@pytest.mark.parametrize("name", SPECS)
def test_many_random_cases(name, device, capsys):
    """Other cases every time, EXAMPLES of them for each kernel; hypothesis prints the smallest one that fails."""
    phases = [Phase.generate, Phase.shrink]
    cases = _prove_random_cases(name, device, max_examples=int(os.environ.get("EXAMPLES", 300)), phases=phases)
    worst = max((row for rows in cases for row in rows), key=lambda row: row.ratio)
    again = sum(not all(row.passed for row in rows) for rows in cases)
    with capsys.disabled():
        print(f"\n{name}: {len(cases)} cases, {again} of them judged by {DRAWS} draws; closest to the limit:", end=" ")
        print(f"{worst.name} at {worst.ratio:.2f} of it, {worst.case}")
