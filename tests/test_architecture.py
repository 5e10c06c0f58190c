"""The shape of the repository: who imports whom, one kernel a file, and the name `kernels` means ours."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = {"kernels", "model", "bench", "train", "tests"}
MAY_IMPORT = {"kernels": {"kernels"}, "model": {"kernels", "model"}, "bench": {"kernels", "model", "bench"}}


def _imports(path: Path) -> set[str]:
    """Top-level names that a file imports; a relative import counts as its own package."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(path.relative_to(ROOT).parts[0] if node.level else node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_one_way(package):
    files = list((ROOT / package).glob("**/*.py"))
    assert files
    for path in files:
        wrong = _imports(path) & OURS - MAY_IMPORT[package]
        assert not wrong, f"{path.relative_to(ROOT)} imports {', '.join(sorted(wrong))}"


def test_train_imports_model_and_kernels_only():
    assert _imports(ROOT / "train.py") & OURS <= {"kernels", "model"}


def test_every_kernel_file_registers_exactly_one_kernel():
    from kernels._registry import KernelSpec, all_specs

    files = [p.stem for p in (ROOT / "kernels").glob("*.py") if not p.stem.startswith("_")]
    specs = []
    for stem in files:
        module = importlib.import_module(f"kernels.{stem}")
        found = [value for value in vars(module).values() if isinstance(value, KernelSpec)]
        assert len(found) == 1, f"kernels/{stem}.py declares {len(found)} kernels"
        specs += found
    assert {spec.name for spec in specs} == set(all_specs())


def test_kernels_is_ours_and_transformers_works_beside_it():
    """A package on the index is called kernels too; transformers looks for it."""
    code = (
        "import transformers, kernels, pathlib; from transformers import GPT2Config, GPT2LMHeadModel;"
        "GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=16, n_positions=8));"
        "print(pathlib.Path(kernels.__file__).resolve())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.stdout.strip() == str(ROOT / "kernels" / "__init__.py"), done.stderr
