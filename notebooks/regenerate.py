"""Run the notebooks and save them with their outputs: python notebooks/regenerate.py [NOTEBOOK ...]

The first code cell and the Colab badge are the same in all of them and are written here. The badge needs to know where
the project is published: `Repository` under [project.urls] in pyproject.toml; without it there is none.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).resolve().parent
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SECONDS = 600  # that one cell may take

COLAB = """\
if "google.colab" in sys.modules and not Path("/content/gpt2").exists():
    !git clone --quiet --depth 1 {repository} /content/gpt2
    !pip install --quiet -e "/content/gpt2[core,notebooks]"
    sys.path.insert(0, "/content/gpt2")
"""
SETUP = """\
# Find the project: on Python's path, or in the folder above this notebook.
import sys
from pathlib import Path

{colab}try:
    import model
except ImportError:
    sys.path.insert(0, str(Path.cwd().parent))
    import model
sys.path.insert(0, str(Path(model.__file__).parents[1] / "notebooks"))"""
BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({url})"


def repository() -> str | None:
    """The address of the project on GitHub, or None."""
    project = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text())["project"]
    return project.get("urls", {}).get("Repository")


def prepare(notebook: NotebookNode, name: str, address: str | None) -> None:
    """Write the badge and the first code cell, and remove what differs between machines: versions, timings."""
    first = notebook.cells[0]
    lines = [line for line in first.source.splitlines() if not line.startswith("[![Open in Colab]")]
    if address:
        path = address.removeprefix("https://github.com/")
        url = f"https://colab.research.google.com/github/{path}/blob/main/notebooks/{name.replace(' ', '%20')}"
        lines.insert(1, BADGE.format(url=url))
    first.source = "\n".join(lines)
    setup = next(cell for cell in notebook.cells if cell.cell_type == "code")
    setup.source = SETUP.format(colab=COLAB.format(repository=address) if address else "")
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = nbformat.from_dict({"kernelspec": kernel, "language_info": {"name": "python"}})
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
        tags = cell.metadata.get("tags")
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})


def execute(notebook: NotebookNode, folder: Path = FOLDER) -> None:
    """Run all cells in a new kernel, in `folder`, without a GPU: outputs are the same everywhere.

    The first error is raised: CellExecutionError.
    """
    client = NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": folder}})
    client.execute(env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = _joined(cell.outputs)


def _joined(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Neighbouring pieces of one stream as one output: where a kernel cuts a stream is a matter of time."""
    joined: list[NotebookNode] = []
    for output in outputs:
        if joined and output.output_type == "stream" == joined[-1].output_type and output.name == joined[-1].name:
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def main() -> None:
    for path in [Path(name) for name in sys.argv[1:]] or NOTEBOOKS:
        start = time.perf_counter()
        notebook = nbformat.read(path, as_version=4)
        prepare(notebook, path.name, repository())
        execute(notebook)
        prepare(notebook, path.name, repository())
        nbformat.write(notebook, path)
        print(f"{path.name}: {time.perf_counter() - start:.0f} s, {path.stat().st_size / 1024:.0f} KB")


if __name__ == "__main__":
    main()
