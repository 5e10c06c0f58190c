"""The READMEs are true: every command in them runs, every file they name exists, their figures are the reports'."""

import io
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import warnings
from dataclasses import fields
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from mutants import MUTANTS

from bench import report, tables
from bench.record import Report
from kernels import _proof
from kernels._registry import all_specs
from kernels._triton import INTERPRET
from model.training.options import TrainConfig, preset_names

ROOT = Path(__file__).parent.parent
FOLDERS = ("Book", "kernels", "model", "bench", "notebooks")
READMES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in [ROOT / "README.md", *(p for name in FOLDERS for p in sorted((ROOT / name).rglob("README.md")))]
}
README = READMES["README.md"]
RESULTS = ROOT / "bench" / "results"
REPORTS = {path: Report.read(path) for path in sorted(RESULTS.rglob("*.json"))}


def _blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


# --- commands --------------------------------------------------------------------------------------------------------

LINES = [line for text in READMES.values() for block in _blocks(text, "bash") for line in block.splitlines()]
LINES += re.findall(r"`((?:python|make|pytest) [^`]+)`", README)  # those within its sentences too
COMMANDS = list(dict.fromkeys(" ".join(line.split("  #")[0].split()) for line in LINES if line.split("#")[0].strip()))

# What keeps a command short here; the command itself stays as a reader would type it.
TINY = ["--n-layer", "1", "--n-embd", "16", "--context", "16", "--batch-size", "2", "--eval-every", "2"]
SHORTER = {
    "python train.py --data corpus.txt --out runs/a --or-resume": [*TINY, "--steps", "4"],
    "python train.py --data": [*TINY, "--minutes", "0.01"],
    "python train.py --init": ["--steps", "2", "--context", "16", "--batch-size", "2"],
    "python train.py --resume": ["--steps", "6"],
    "python train.py --preset": [*TINY, "--steps", "2", "--n-head", "1", "--grad-accum", "1"],
    "torchrun": [*TINY, "--steps", "2"],
    "python -m model.tokenizer": ["--vocab-size", "270"],
    "python -m model.generate": ["--tokens", "20"],
    "python -m kernels check": ["--op", "bias_gelu", "--quick", "--dtype", "float32"],
    "python -m kernels tune": ["--op", "bias_gelu", "--quick", "--dry-run", "90"],
    "python -m bench static": ["--op", "bias_gelu", "--bench-only"],
    "python -m bench kernels": ["--op", "bias_gelu", "--quick", "--provider", "eager", "--seconds", "0.01"],
    "python -m bench train": [
        *("--preset", "tiny", "--batch", "1", "--context", "8", "--provider", "eager", "hf", "--seconds", "0.01"),
    ],
    "python -m bench quality": [
        *(
            "--until-loss",
            "0",
            "--minutes",
            "0.01",
            "--seeds",
            "1",
            "--preset",
            "tiny",
            "--data",
            "corpus.txt",
            "--",
            *TINY,
        )
    ],
    "python -m bench generate": [
        *("--preset", "tiny", "--batch", "1", "--prompt", "16", "--tokens", "32", "--seconds", "0.01"),
    ],
    "python -m bench memory": ["--preset", "tiny", "--batch", "1"],
    "pytest bench/micro.py": ["-p", "no:cacheprovider", "-k", "layer_norm-forward", "--benchmark-max-time=0.01"],
}


def _argv(command):
    """A command's words, with those that keep it short."""
    more = next((more for start, more in SHORTER.items() if command.startswith(start)), [])
    return [*shlex.split(command), *more]


# Of commands that are the same once they are short, one is run.
RUN = list({frozenset(_argv(c)): c for c in reversed(COMMANDS) if not c.startswith("make ")}.values())[::-1]
MAKE = {  # what a target runs; the rest is installation
    "train": "python train.py",
    "test": "python -m pytest",
    "slow": "python -m pytest",
    "gpu": "python -m bench gpu",
    "static": "python -m bench static",
    "fuzz": "python -m pytest -q -m long tests/test_properties.py",
    "mutants": "python tests/mutants.py",
    "faults": "python -m pytest -q -m long tests/test_faults.py",
    "cuda-trace": "python -m pytest -q -n auto -m long tests/test_fake_cuda.py",
    "as-with-gpu": "python -m pytest -n auto --dist loadfile -m 'not long'",
    "llama": "python -m pytest -q -m long tests/test_llama.py",
    "browser": "python -m pytest -q tests/test_explore_browser.py",
    "notebooks": "jupyter lab notebooks",
    "notebooks-run": "python notebooks/regenerate.py",
    "exchange": "python -m pytest -q -m slow tests/test_exchange.py",
    "track": "python -m pytest -q -m 'slow or not slow' tests/test_track.py",
    "lint": "ruff check",
    "format": "ruff format",
}
PROCESS = {  # what needs a process of its own: several of them, a pytest in pytest, kernels that are not interpreted
    "torchrun": ["-m", "torch.distributed.run"],
    "pytest": ["-m", "pytest"],
    "python -m kernels tune": ["-m", "kernels", "tune"],
    "python -m bench static": ["-m", "bench", "static"],
}
if not INTERPRET:  # then it starts itself anew, interpreted, in the place of this process
    PROCESS["python -m kernels check"] = ["-m", "kernels", "check"]
SLOW = (*PROCESS, *(f"python -m bench {what}" for what in ("kernels", "train", "quality", "generate", "memory")))


def _run(argv, cwd):
    ours = ("TRITON_INTERPRET", "PYTEST_")  # set for this suite, and not for a reader
    env = {k: v for k, v in os.environ.items() if not k.startswith(ours)} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(argv, cwd=cwd, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _call(argv, monkeypatch):
    """`python ARGV` in this process: the same module as __main__, with the same arguments."""
    is_module = argv[0] == "-m"
    monkeypatch.setattr(sys, "argv", argv[1:] if is_module else argv)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(?s).*found in sys.modules", RuntimeWarning)  # others have imported it
            if is_module:
                runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as exit_:
        assert not exit_.code, exit_.code


def _clone(folder):
    """A working folder like a fresh clone, with a corpus of the reader's own. bench/results are copies."""
    for name in ("train.py", "Book", "kernels", "model", "Makefile", "pyproject.toml", "constraints.txt", "README.md"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "bench").mkdir()
    for path in (ROOT / "bench").iterdir():
        if path.name != "results":
            (folder / "bench" / path.name).symlink_to(path)
    shutil.copytree(RESULTS, folder / "bench" / "results")
    text = "CHAPTER I. A dog and a cat\n\n" + "The dog saw the cat, and the cat saw the dog.\n" * 60
    (folder / "corpus.txt").write_text(text)
    for name in ("before.json", "after.json"):
        (folder / name).symlink_to(min(REPORTS))
    return folder


@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    """A clone with a short first run in runs/first-run."""
    folder = _clone(tmp_path_factory.mktemp("clone"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        _call(["train.py", *TINY, "--steps", "2", "--data", "corpus.txt"], monkeypatch)
    assert (folder / "runs" / "first-run").is_dir()
    return folder


@pytest.fixture
def folder(first_run, tmp_path):
    """A clone of its own for a command: runs/first-run, runs/a and runs/b are there."""
    folder = _clone(tmp_path)
    for name in ("first-run", "a", "b"):
        shutil.copytree(first_run / "runs" / "first-run", folder / "runs" / name)
    return folder


def test_readmes_have_commands():
    assert {"make train", "make test"} <= set(COMMANDS) and len(COMMANDS) > 10


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make ")])
def test_make_commands_run_what_they_say(command, folder):
    target, *variables = shlex.split(command)[1:]
    assert f".venv/bin/{MAKE[target]}" in _run(["make", "-n", target, *variables], folder)


@pytest.mark.parametrize(
    "command", [pytest.param(c, marks=pytest.mark.slow if c.startswith(SLOW) else ()) for c in RUN]
)
def test_commands_run(command, folder, monkeypatch, capfd):
    argv = _argv(command)
    if "--out" in argv and not {"--or-resume", "model.report"} & set(argv):  # it makes this run
        shutil.rmtree(folder / argv[argv.index("--out") + 1], ignore_errors=True)
    process = next((start for start in PROCESS if command.startswith(start)), None)
    if process is not None:
        out = _run([sys.executable, *PROCESS[process], *argv[len(process.split()) :]], folder)
    else:
        assert argv[0] == "python", f"no test knows how to run {command!r}"
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "stdin", io.StringIO("The dog\n"))
        _call(argv[1:], monkeypatch)
        out = capfd.readouterr().out
    assert out.strip()


# --- trees, links ----------------------------------------------------------------------------------------------------

NAME = re.compile(
    r"(?<!\S)[\w.-]+(?:/[\w.-]+)*(?:/|\.(?:py|toml|json|jsonl|safetensors|html|txt|md|jinja))(?=[\s:;,]|$)"
)


def _tree(block):
    """The paths of a tree: a line's indentation says in which folder above it lies. Empty for another block."""
    paths, above = [], []  # above: (indentation, folder)
    for line in block.splitlines():
        indent = len(line) - len(line.lstrip())
        above = [(n, folder) for n, folder in above if n < indent]
        base = above[-1][1] if above else Path()
        names = NAME.findall(line)
        if not names or not line.lstrip().startswith(names[0]):
            if not indent:
                return []
            continue
        if names[0].endswith("/"):
            paths.append(base / names[0])
            base /= names.pop(0)
            above.append((indent, base))
        paths += [base / name for name in names]
    return paths


TREES = {(name, i): _tree(block) for name, text in READMES.items() for i, block in enumerate(_blocks(text, "text"))}


def test_everything_in_a_tree_exists(first_run):
    assert sum(map(len, TREES.values())) > 20
    for (readme, _), paths in TREES.items():
        for path in paths:
            places = (ROOT, ROOT / Path(readme).parent, first_run)
            assert any((place / path).exists() for place in places), f"{readme}: {path}"


def test_every_folder_of_source_is_in_the_tree():
    shown = {path.as_posix() for (name, _), paths in TREES.items() if name == "README.md" for path in paths}
    for package in ("kernels", "model", "bench"):
        folders = {path.parent.relative_to(ROOT).as_posix() for path in (ROOT / package).rglob("*.py")}
        assert folders <= shown


def test_every_kernel_is_in_the_kernel_table():
    assert set(re.findall(r"^\| `(\w+)` \|", README, re.M)) == set(all_specs())


def _anchor(heading):
    return re.sub(r"[^\w -]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("readme", READMES)
def test_links_resolve(readme):
    for target in re.findall(r"\]\(([^)\s]+)\)", READMES[readme]):
        if target.startswith("http"):
            continue
        name, _, anchor = unquote(target).partition("#")
        path = ((ROOT / readme).parent / name).resolve() if name else ROOT / readme
        assert path.exists(), target
        if anchor:
            assert anchor in map(_anchor, re.findall(r"^#+ (.*)", path.read_text(), re.M)), target


# --- figures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("readme", [name for name, text in READMES.items() if "<!-- bench " in text])
def test_tables_are_those_of_the_reports(readme):
    folder = (ROOT / readme).parent
    named = {Path(os.path.relpath(path, folder)).as_posix(): found for path, found in REPORTS.items()}
    assert report.update_readme(READMES[readme], report.readme_tables(named)) == READMES[readme], (
        f"run: python -m bench report bench/results --readme {readme}"
    )


def _comparison():
    """The README's table of comparisons, from the reports: p50 in ms, and a competitor's time over ours."""
    train, no_bias, generate = (REPORTS[RESULTS / "xeon-2-cores" / f"{name}.json"] for name in COMPARED)
    lines = ["| what | compared with | theirs, ms | ours, ms | theirs / ours |", "| --- | --- | ---: | ---: | ---: |"]
    rows = [("training step", group, peer) for group in tables.groups(train, "train") for peer in PEERS]
    rows += [("the same, no biases", group, "nanogpt") for group in tables.groups(no_bias, "train")]
    for group in tables.groups(generate, "generate", phase="decode"):
        rows.append((f"GPT-2 124M writes 64 tokens, batch {group.get('batch')}", group, "hf"))
    for what, group, peer in rows:
        theirs, ours = group.rows[peer], group.rows["eager"]
        ratio = tables.ratio(theirs, ours)
        cells = [what, PEERS[peer], tables.num(theirs.ms()), tables.num(ours.ms())]
        lines.append(f"| {' | '.join(cells)} | {tables.SYMBOLS[ratio.mark]} {tables.times(ratio.mid)} |")
    return "\n".join(lines)


COMPARED = ("train", "train-no-bias", "generate")
PEERS = {
    "plain": "the same model, attention written out",
    "compile": "our model under `torch.compile`",
    "hf": "Hugging Face transformers",
    "nanogpt": "nanoGPT",
}


def test_comparison_is_that_of_the_reports():
    table = README.split("<!-- comparison -->\n")[1].split("\n<!-- /comparison -->")[0]
    assert table == _comparison(), f"the table is:\n{_comparison()}"


def test_committed_gpu_report_is_mentioned():
    assert (report.NO_GPU in README) == all(found.on_cpu for found in REPORTS.values())


def test_parameters_are_counted_right():
    from model.config import PRESETS
    from model.gpt import GPT, num_parameters

    with torch.device("meta"):
        assert f"{num_parameters(GPT(PRESETS['gpt2'])):,} parameters" in README


def test_book_is_described_right():
    sizes = {path.name: len(path.read_text()) for path in (ROOT / "Book").glob("*.txt")}
    rows = re.findall(r"^\| `(\S+)` \|.*\| ([\d,]+) \|$", READMES["Book/README.md"], re.M)
    assert {name: int(n.replace(",", "")) for name, n in rows} == sizes
    assert f"{len(sizes)} stories" in README.replace(
        "thirteen", "13"
    ) and f"{sum(sizes.values()) // 1000} KB" in README.replace(",", "")


def test_tolerance_rule_is_the_one_in_use():
    rule = f"k = {_proof.OUTPUT_FACTOR:.0f} for outputs, {_proof.GRADIENT_FACTOR:.0f} for gradients"
    assert rule in README and f"+ {_proof.ULPS:.0f} ulp" in README


def test_options_and_presets_of_training_exist():
    text, flags = READMES["model/training/README.md"], {f"--{f.name.replace('_', '-')}" for f in fields(TrainConfig)}
    others = {
        "--max-restarts",
        "--shutdown-timeout",
        "--standalone",
        "--nproc-per-node",
        "--vocab-size",
    }  # torchrun's, model.tokenizer's
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) <= flags | others
    assert set(preset_names()) == set(re.findall(r"`([\w-]+)`", "".join(re.findall(r"^\| (`.*?) \|", text, re.M))))


def test_mutants_are_counted_right():
    assert f"{len(MUTANTS)} places" in README
    assert f"{len(MUTANTS)} wrong lines" in READMES["kernels/README.md"]


@pytest.mark.parametrize("readme", [name for name, text in READMES.items() if "<!-- check output -->" in text])
def test_check_output_is_within_the_rule(readme):
    """The rows of a README are of kernels that exist, pass, and are the same in each README that shows them."""
    rows = re.findall(r"^(\w+) +(float\d+) +((?:\d\.\d\d +){5})(.*)$", READMES[readme], re.M)
    assert len(rows) >= 3
    for row in rows:
        name, _, scores, _ = row
        assert name in all_specs() and all(float(score) <= 1 for score in scores.split())
    assert all(row[0] in READMES["kernels/README.md"] and row[3] in READMES["kernels/README.md"] for row in rows)
