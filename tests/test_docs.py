"""The README tells the truth: every command in it runs, every file in its tree exists."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import report
from bench.record import Report

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
REPORTS = sorted((ROOT / "bench" / "results").rglob("*.json"))
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.S)
TREE = README.split("## What is where")[1].split("```text\n")[1].split("```")[0]
COMMANDS = [line.split("  #")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()]

# What keeps a command short here; the command itself stays as a reader would type it.
TINY = ["--n-layer", "1", "--n-embd", "16", "--context", "16", "--batch-size", "2", "--eval-every", "2"]
SHORTER = {
    "python train.py --data": [*TINY, "--steps", "2"],
    "python train.py --resume": ["--steps", "6"],
    "python train.py --preset gpt2-124M": [*TINY, "--steps", "2", "--n-head", "1", "--grad-accum", "1"],
    "torchrun": [*TINY, "--steps", "2"],
    "python -m model.generate": ["--tokens", "20"],
    "python -m kernels check": ["--op", "bias_gelu", "--dtype", "float32"],
    "python -m bench static": ["--op", "bias_gelu", "--bench-only"],
    "python -m bench kernels": ["--op", "bias_gelu", "--quick", "--provider", "eager", "--seconds", "0.01"],
    "python -m bench train": ["--batch", "1", "--context", "8", "--provider", "eager", "hf", "--seconds", "0.01"],
    "python -m bench generate": ["--batch", "1", "--seconds", "0.01"],
    "python -m bench memory": ["--preset", "tiny", "--batch", "1"],
    "pytest bench/micro.py": ["-p", "no:cacheprovider", "-k", "layer_norm-forward", "--benchmark-max-time=0.01"],
}
MAKE = {
    "make train": "python train.py",
    "make test": "python -m pytest",
    "make gpu": "python -m bench gpu",
    "make static": "python -m bench static",
    "make fuzz": "python -m pytest -q -m long tests/test_properties.py",
    "make mutants": "python tests/mutants.py",
    "make faults": "python -m pytest -q -m long tests/test_faults.py",
}


def _run(argv, cwd):
    ours = ("TRITON_INTERPRET", "PYTEST_")  # set for this suite, and not for a reader
    env = {k: v for k, v in os.environ.items() if not k.startswith(ours)} | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(argv, cwd=cwd, env=env, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder like a fresh clone, with a corpus of the reader's own and a first run in runs/tiny."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("train.py", "Book", "kernels", "model", "bench", "Makefile", "pyproject.toml", "constraints.txt"):
        (folder / name).symlink_to(ROOT / name)
    text = "CHAPTER I. A dog and a cat\n\n" + "The dog saw the cat, and the cat saw the dog.\n" * 60
    (folder / "corpus.txt").write_text(text)
    for name in ("before.json", "after.json"):
        (folder / name).symlink_to(min(REPORTS))
    done = _run([sys.executable, "train.py", *TINY, "--steps", "2", "--data", "corpus.txt"], folder)
    assert done.returncode == 0, done.stderr
    assert (folder / "runs" / "tiny").is_dir()
    return folder


def test_the_readme_has_commands():
    assert {"make train", "make test"} <= set(COMMANDS) and len(COMMANDS) > 10


@pytest.mark.parametrize("command", dict.fromkeys(COMMANDS))
def test_every_command_of_the_readme_runs(command, folder):
    if command in MAKE:  # what it would run; the rest is installation
        done = _run(["make", "-n", command.removeprefix("make ")], folder)
        assert done.returncode == 0 and f".venv/bin/{MAKE[command]}" in done.stdout, done.stdout + done.stderr
        return
    argv = shlex.split(command)
    module = {"python": [], "pytest": ["-m", "pytest"], "torchrun": ["-m", "torch.distributed.run"]}
    assert argv[0] in module, f"no test knows how to run {command!r}"
    extra = next((more for start, more in SHORTER.items() if command.startswith(start)), [])
    done = _run([sys.executable, *module[argv[0]], *argv[1:], *extra], folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip()


def test_every_file_of_the_tree_exists():
    folder, seen = ROOT, 0
    for line in TREE.splitlines():
        if not line.startswith(" "):
            folder = ROOT
        for name in re.findall(r"(?<!\S)[\w./]+(?:\.py|/)(?=\s|:|;|$)", line):
            assert (folder / name.rstrip(";:")).exists(), name
            seen += 1
            if name.endswith("/"):
                folder = ROOT / name
    assert seen > 20


def test_every_python_file_is_in_the_tree():
    for folder in ("kernels", "model"):
        for path in (ROOT / folder).glob("*.py"):
            assert path.name == "__init__.py" or path.name in TREE, f"{folder}/{path.name}"


def test_the_tables_are_those_of_the_committed_reports():
    reports = {p.relative_to(ROOT).as_posix(): Report.read(p) for p in REPORTS}
    assert reports and report.update_readme(README, report.readme_tables(reports)) == README, (
        "run: python -m bench report bench/results --readme README.md"
    )


def test_gpt2_has_the_parameters_that_the_readme_says():
    from model.config import PRESETS
    from model.gpt import GPT, num_parameters

    with torch.device("meta"):
        assert f"{num_parameters(GPT(PRESETS['gpt2'])):,} parameters" in README
