"""The mutants of `make mutants` still fit the kernels."""

import ast

import pytest
from mutants import CONCERNS, MUTANTS, ROOT


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.op}: {m.name}")
def test_mutant_applies(mutant):
    """To one line of one file, and what comes out is Python."""
    ast.parse(mutant.text())


def test_every_kernel_has_mutants():
    files = {path.stem for path in (ROOT / "kernels").glob("*.py") if not path.stem.startswith("_")}
    assert files <= {mutant.op for mutant in MUTANTS} and {mutant.op for mutant in MUTANTS} == set(CONCERNS)
