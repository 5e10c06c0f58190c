"""The shape of the repository: who may import whom, no import cycles, one kernel a file, limits of size.

Imports are read by ast, at every depth: an import inside a function counts like one at the top of the file.
"""

import ast
import importlib
import os
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = [ROOT / "train.py", *sorted(p for name in ("kernels", "model", "bench") for p in (ROOT / name).rglob("*.py"))]
MAX_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 600, 80, 12


def _module(path: Path) -> str:
    """model/data/corpus.py -> model.data.corpus; model/data/__init__.py -> model.data."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {_module(path): path for path in SOURCES}


TREES = {path: ast.parse(path.read_text()) for path in SOURCES}


def _imports(tree: ast.Module, package: str) -> set[str]:
    """The modules that a file imports, by dotted name. package: the one it lies in, for relative imports.

    `from package import name` is an import of `package.name` if there is such a module, else of `package`.
    """
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: -(node.level - 1) or None] if node.level else []
            base = ".".join([*parents, *filter(None, [node.module])])
            full = {alias.name: f"{base}.{alias.name}" for alias in node.names}
            names |= {full[name] if full[name] in MODULES else base for name in full}
    return names


def _package(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).parent.parts)


IMPORTS = {name: _imports(TREES[path], _package(path)) for name, path in MODULES.items()}


def _within(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize(
    ("importer", "may_not_import"),
    [
        ("kernels", ["model", "bench", "train"]),
        ("model", ["bench", "train"]),
        ("bench", ["train"]),
        ("train", ["bench"]),
        ("model.data", ["model.training", "model.report"]),
        ("model.training", ["model.report"]),
    ],
)
def test_imports_point_one_way(importer, may_not_import):
    members = [name for name in IMPORTS if _within(name, importer)]
    assert members
    for name in members:
        wrong = sorted(used for used in IMPORTS[name] if _within(used, *may_not_import, "tests"))
        assert not wrong, f"{name} imports {', '.join(wrong)}"


def test_top_of_model_needs_no_training_and_no_report():
    """What a reader of GPT-2 looks for stands alone; evaluation runs in several processes."""
    for path in (ROOT / "model").glob("*.py"):
        used = {name for name in IMPORTS[_module(path)] if _within(name, "model.training", "model.report")}
        assert used <= ({"model.training.parallel"} if path.name == "evaluate.py" else set()), path.name


def test_model_uses_public_kernels_only():
    """And _backend: whether a device can run Triton is a question of memory too."""
    used = {module for name, names in IMPORTS.items() if _within(name, "model") for module in names}
    assert {module for module in used if module.startswith("kernels._")} <= {"kernels._backend"}


def test_report_reads_runs_and_trains_nothing():
    used = {name for module, names in IMPORTS.items() if _within(module, "model.report") for name in names}
    allowed = {"model.training.flops", "model.training.options", "model.training.run_folder"}
    assert {name for name in used if _within(name, "model.training")} <= allowed
    assert not any(_within(name, "kernels", "model.gpt") for name in used)


def test_no_import_cycles():
    graph = {name: {used for used in names if used in MODULES and used != name} for name, names in IMPORTS.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import model.gpt", {"model.gpt"}),
        ("from model import gpt, checkpoint", {"model.gpt", "model.checkpoint"}),
        ("from model.gpt import GPT", {"model.gpt"}),
        ("from . import loader", {"model.data.loader"}),
        ("from .loader import Loader", {"model.data.loader"}),
        ("from .. import gpt", {"model.gpt"}),
        ("from ..gpt import GPT", {"model.gpt"}),
        ("from . import SPLITS", {"model.data"}),
        ("def f():\n    from torch import nn", {"torch"}),
    ],
)
def test_imports_are_resolved(source, expected):
    assert _imports(ast.parse(source), "model.data") == expected


def _functions():
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", node


def test_files_are_short():
    paths = [*SOURCES, *(ROOT / "tests").glob("*.py"), *(ROOT / "model").rglob("*.js")]
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in paths}
    assert {name: n for name, n in lengths.items() if n > MAX_LINES} == {}


def test_functions_are_short():
    lengths = {name: node.end_lineno - node.lineno + 1 for name, node in _functions()}
    assert {name: n for name, n in lengths.items() if n > MAX_FUNCTION_LINES} == {}


def test_functions_have_few_parameters():
    counts = {}
    for name, node in _functions():
        a = node.args
        counts[name] = len([*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, [a.vararg, a.kwarg])])
    assert {name: n for name, n in counts.items() if n > MAX_PARAMETERS} == {}


def test_every_kernel_file_registers_exactly_one_kernel():
    from kernels._registry import KernelSpec, all_specs

    files = [p.stem for p in (ROOT / "kernels").glob("*.py") if not p.stem.startswith("_")]
    specs = []
    for stem in files:
        module = importlib.import_module(f"kernels.{stem}")
        declared = [value for value in vars(module).values() if isinstance(value, KernelSpec)]
        assert len(declared) == 1, f"kernels/{stem}.py declares {len(declared)} kernels"
        specs += declared
    assert {spec.name for spec in specs} == set(all_specs())


@pytest.mark.slow
def test_kernels_is_ours_and_transformers_works():
    """A package on the index is called kernels too; transformers looks for it."""
    code = (
        "import transformers, kernels, pathlib; from transformers import GPT2Config, GPT2LMHeadModel;"
        "GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=16, n_positions=8));"
        "print(pathlib.Path(kernels.__file__).resolve())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.stdout.strip() == str(ROOT / "kernels" / "__init__.py"), done.stderr


def test_openmp_wait_is_set_before_torch_is_imported():
    """GNU OpenMP reads GOMP_SPINCOUNT once, and a user's own value stays."""
    code = "import sys, os, model; print('torch' in sys.modules, os.environ['GOMP_SPINCOUNT'])"
    env = {key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"}
    for own, expected in (({}, "2000"), ({"GOMP_SPINCOUNT": "7"}, "7")):
        done = subprocess.run([sys.executable, "-c", code], env=env | own, cwd=ROOT, capture_output=True, text=True)
        assert done.stdout.split() == ["False", expected], done.stderr
    for path in ("train.py", "bench/__init__.py"):
        imports = [node for node in TREES[ROOT / path].body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = [node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in imports]
        assert next(name for name in names if name in ("model", "torch")) == "model", path
