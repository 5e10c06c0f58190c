"""Python code on the fake device, in a process of its own, where a warning is an error.

    python tests/fake_cuda/trace.py LIBRARY 'train("--backend", "eager"); generate()'

The code has the names of cuda_runs.py and those below.
"""

from __future__ import annotations

import inspect
import sys
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from fake_cuda import fake  # noqa: E402

fake.load(Path(sys.argv[1]))

import cuda_runs  # noqa: E402
import torch  # noqa: E402
from cuda_runs import *  # noqa: E402, F403
from cuda_runs import run  # noqa: E402
from trainer import TEXT  # noqa: E402

from model.training import parallel, summary  # noqa: E402


def _anew(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with nothing compiled before it."""

    def call(*arguments: Any, **options: Any) -> Any:
        fake.compiled.clear()
        return function(*arguments, **options)

    return call


def wrapped(*options: str) -> None:
    """A run whose module holds, as DDP's does, the nodes that accumulate the gradients: on the stream of the moment."""
    held = []

    def wrap(model: torch.nn.Module, *arguments: Any) -> torch.nn.Module:
        held.extend(p.view_as(p).grad_fn.next_functions[0][0] for p in model.parameters())
        return model

    with mock.patch.object(parallel, "wrap", wrap):
        run(*options)
    assert held


def turns_red(words: str, call: Any, module: str, name: str, old: str, new: str) -> None:
    """Check that a call with one line of a function changed raises an error with these words."""
    owner: Any = sys.modules[module]
    *classes, function = name.split(".")
    for part in classes:
        owner = getattr(owner, part)
    source = textwrap.dedent(inspect.getsource(getattr(owner, function)))
    assert source.count(old) == 1, f"{old} is not one line of {name}"
    scope = {**vars(sys.modules[module])}
    exec("from __future__ import annotations\n" + source.replace(old, new), scope)
    with mock.patch.object(owner, function, scope[function]):
        try:
            call()
        except Exception as error:
            assert words in str(error), f"{new} in {name} ends in {error!r}"
        else:
            raise AssertionError(f"{new} in {name} is not seen")


if __name__ == "__main__":
    Path("book.txt").write_text(TEXT)
    summary.SAMPLE_TOKENS = 10
    cuda_runs.call, cuda_runs.batch = _anew(cuda_runs.call), _anew(cuda_runs.batch)
    warnings.simplefilter("error")
    exec(sys.argv[2])
