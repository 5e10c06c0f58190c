"""Every exhibit of the museum turns the proof red; that the kernel as it is keeps it green is shown by test_kernels."""

import importlib
import shutil
import sys

import pytest
import torch
from museum import EXHIBITS, PAGE, page
from mutants import ROOT

from kernels._proof import FAMILIES
from kernels._triton import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs triton, which is published for Linux")


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """A copy of the package with an exhibit in it, under a name of its own, which its operators take too."""

    def load(exhibit):
        package = "museum_" + "".join(c if c.isalnum() else "_" for c in exhibit.source)
        folder = tmp_path / package
        shutil.copytree(ROOT / "kernels", folder, ignore=shutil.ignore_patterns("__pycache__"))
        (folder / f"{exhibit.op}.py").write_text(exhibit.text())
        monkeypatch.syspath_prepend(tmp_path)
        return importlib.import_module(f"{package}._proof"), importlib.import_module(f"{package}._registry")

    before = set(sys.modules)
    yield load
    for name in set(sys.modules) - before:
        if name.startswith("museum_"):
            del sys.modules[name]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of NaN and overflow
@pytest.mark.parametrize("exhibit", EXHIBITS, ids=lambda e: e.source)
def test_exhibit_turns_its_family_red(exhibit, broken, device):
    proof, registry = broken(exhibit)
    spec = registry.all_specs()[exhibit.name]
    rows = proof.prove_family(exhibit.family, spec, spec.cases[exhibit.case], getattr(torch, exhibit.dtype), device)
    if exhibit.raises:
        with pytest.raises(RuntimeError, match=exhibit.raises):
            list(rows)
    else:
        rows = list(rows)
        assert rows and not all(row.passed for row in rows)


def test_page_is_that_of_the_data():
    """python tests/museum.py > kernels/MUSEUM.md"""
    assert PAGE.read_text() == page()


def test_every_family_has_a_find():
    assert {exhibit.family for exhibit in EXHIBITS} == set(FAMILIES)
    assert len({exhibit.source for exhibit in EXHIBITS}) == len(EXHIBITS) >= 20
