"""The notebooks: they run, give the outputs they are stored with, and their exercises tell right from wrong."""

import ast
import copy
import re
import runpy
import sys
from collections import Counter
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "notebooks"))
import regenerate  # noqa: E402

WRONG = {}  # by exercise: (code, a part of the message that it gets)
for path in sorted((ROOT / "tests" / "wrong_solutions").glob("*.py")):
    WRONG |= runpy.run_path(str(path))["WRONG"]
NAMES = [path.name for path in regenerate.NOTEBOOKS]
NOTEBOOKS = {path.name: nbformat.read(path, as_version=4) for path in regenerate.NOTEBOOKS}
MAX_KB = 900
OPENING = ("**You will be able to**", "**Time**", "**Prerequisites**")
NUMBER = re.compile(r"(?<![\w.,/-])\d[\d,]*\.?\d*(?![\w/-])")


def _cells(name, *, tag=None, kind=None):
    cells = NOTEBOOKS[name].cells
    return [c for c in cells if (kind or c.cell_type) == c.cell_type and (not tag or tag in c.metadata.get("tags", []))]


def _text(outputs) -> str:
    """What a cell printed, and the alt text of its pictures."""
    parts = [o.text if o.output_type == "stream" else o.get("data", {}).get("text/plain", "") for o in outputs]
    return "".join(f"{part.rstrip()}\n" for part in parts)


def _exercises(name) -> dict[str, tuple]:
    """Its number -> the cells of the exercise, its check, and the code of the solution."""
    starts, checks, solutions = (_cells(name, tag=tag) for tag in ("exercise", "check", "solution"))
    numbers = [re.search(r'grading\("([\d.]+)"\)', cell.source)[1] for cell in checks]
    code = [re.search(r"```python\n(.*?)```", cell.source, re.DOTALL)[1] for cell in solutions]
    return dict(zip(numbers, zip(starts, checks, code, strict=True), strict=True))


EXERCISES = {name: _exercises(name) for name in NAMES}


def _code(cell) -> ast.Module:
    lines = [line for line in cell.source.splitlines() if not line.lstrip().startswith(("%", "!"))]
    return ast.parse("\n".join(lines))


def _defined(tree) -> set[str]:
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def test_there_are_five_and_the_map_names_them():
    assert [name.split(".")[0] for name in NAMES] == ["1", "2", "3", "4", "5"]
    readme = (ROOT / "notebooks" / "README.md").read_text()
    assert all(f"({name.replace(' ', '%20')})" in readme for name in NAMES)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", NAMES)
def test_notebook_runs_and_gives_its_outputs(name, tmp_path, monkeypatch):
    """In another working directory. After the last cell come the solutions, which are right, and the wrong ones."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run = copy.deepcopy(NOTEBOOKS[name])
    stored = [cell for cell in NOTEBOOKS[name].cells if cell.cell_type == "code"]
    expected = []
    for number, (_, check, solution) in EXERCISES[name].items():
        for code, message in [(solution, f"Exercise {number}: solved."), *WRONG.get(number, [])]:
            run.cells += [new_code_cell(code), new_code_cell(check.source)]
            expected.append((number, code, message))
    regenerate.execute(run, tmp_path)
    cells = [cell for cell in run.cells if cell.cell_type == "code"]
    for old, new in zip(stored, cells[: len(stored)], strict=True):
        if "varies" not in old.metadata.get("tags", []):
            assert _text(new.outputs) == _text(old.outputs), old.source
    for (number, code, message), cell in zip(expected, cells[len(stored) + 1 :: 2], strict=True):
        printed = _text(cell.outputs)
        assert printed.startswith(f"Exercise {number}: ") and message in printed, f"{code}\n{printed}"
        assert "solved" not in printed or "solved" in message, code


def test_every_exercise_has_a_wrong_solution():
    numbers = [number for name in NAMES for number in EXERCISES[name]]
    assert len(set(numbers)) == len(numbers) and set(WRONG) == set(numbers)
    assert sum(map(len, WRONG.values())) >= 20


@pytest.mark.parametrize("name", NAMES)
def test_notebook_is_as_the_others(name):
    notebook, cells = NOTEBOOKS[name], _cells(name, kind="code")
    assert notebook.cells[0].cell_type == "markdown"
    assert all(words in notebook.cells[0].source for words in OPENING)
    again = copy.deepcopy(notebook)
    regenerate.prepare(again, name, regenerate.repository())
    assert again == notebook, "run: make notebooks-run"
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run: make notebooks-run"
    assert (ROOT / "notebooks" / name).stat().st_size <= MAX_KB * 1024
    assert not {o.output_type for cell in cells for o in cell.outputs} & {"error"}
    assert not [o.text for cell in cells for o in cell.outputs if o.get("name") == "stderr"]
    assert max(len(cell.source.splitlines()) for cell in cells) <= 40


@pytest.mark.parametrize("name", NAMES)
def test_pictures_have_alternative_text(name):
    for cell in _cells(name, kind="code"):
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                alt = output.metadata["image/png"]["alt"]
                assert len(alt.split()) >= 6 and output.data["text/plain"] == alt
    assert "![](" not in "".join(cell.source for cell in _cells(name, kind="markdown"))


def test_names_defined_in_place_are_taught_there_and_exist_nowhere_else():
    source_names = set()
    for path in [
        ROOT / "train.py",
        *(p for folder in ("kernels", "model", "bench") for p in (ROOT / folder).rglob("*.py")),
    ]:
        source_names |= _defined(ast.parse(path.read_text()))
    places = Counter()
    for name in NAMES:
        names = {n for cell in _cells(name, kind="code") for n in _defined(_code(cell))}
        taught = re.findall(r"`([^`\n]+)`", "".join(cell.source for cell in _cells(name, kind="markdown")))
        assert names <= set(re.findall(r"\w+", " ".join(taught))), f"{name} defines what its text does not name"
        places.update(names)
    assert {n for n, count in places.items() if count > 1} == set(), "defined in two notebooks"
    assert set(places) & source_names == set(), "import it instead"


def _figures(text: str) -> set[str]:
    """Numbers with a decimal point or at least three digits, without their commas."""
    numbers = {match[0].replace(",", "").rstrip(".") for match in NUMBER.finditer(text)}
    return {number for number in numbers if "." in number or len(number) >= 3}


@pytest.mark.parametrize("name", NAMES)
def test_figures_in_the_text_are_those_of_the_code(name):
    """Years and addresses apart; code in the text counts as code."""
    cells = NOTEBOOKS[name].cells
    known = "\n".join(cell.source + "\n" + _text(cell.outputs) for cell in cells if cell.cell_type == "code")
    for cell in _cells(name, kind="markdown"):
        prose = re.sub(
            r"```.*?```|`[^`]*`|\]\([^)]*\)|https?://\S+|arXiv[: ]\S+|\((19|20)\d\d\)",
            " ",
            cell.source,
            flags=re.DOTALL,
        )
        missing = _figures(prose) - _figures(known)
        assert not missing, f"{name}: {sorted(missing)} in: {cell.source[:100]}"


def test_badge_and_setup_follow_the_address_of_the_project():
    notebook = copy.deepcopy(NOTEBOOKS[NAMES[0]])
    plain = copy.deepcopy(notebook)
    for _ in range(2):  # a second time changes nothing
        regenerate.prepare(notebook, NAMES[0], "https://github.com/someone/gpt2")
        first, setup = notebook.cells[0].source, next(c.source for c in notebook.cells if c.cell_type == "code")
        assert first.count(f"/github/someone/gpt2/blob/main/notebooks/{NAMES[0]}") == 1
        assert setup.count("git clone --quiet --depth 1 https://github.com/someone/gpt2 ") == 1
    regenerate.prepare(notebook, NAMES[0], None)
    assert notebook == plain
