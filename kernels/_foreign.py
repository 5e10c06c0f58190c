"""Somebody else's code: its launches that do not go through `launch`, and whether it replaced what judges it."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ._triton import HAS_TRITON, INTERPRET

_intercepting = threading.RLock()  # Triton's methods are replaced for all threads: by one block at a time
Seen = Callable[[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]], object]


@contextlib.contextmanager
def intercepted(seen: Seen) -> Iterator[None]:
    """Inside the block a launch of this thread calls seen(kernel, grid, args, options) and does not run; an empty grid
    calls nothing.

    args: in the order of the signature, as far as they were given by position. options: those given by name. A kernel
    under @triton.autotune is seen once for each of its configurations.
    """
    if not HAS_TRITON:
        yield
        return
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool = False, **options: Any) -> Any:
        if threading.get_ident() != owner:
            return previous[0](kernel, *args, grid=grid, warmup=warmup, **options)
        if callable(grid):
            grid = grid(dict(zip(kernel.arg_names, args, strict=False)) | options)
        grid = tuple(grid) if isinstance(grid, tuple | list) else (grid,)
        if 0 not in grid:
            seen(kernel, grid, args, options)
        return None

    def run_each(tuner: Any, *args: Any, **options: Any) -> Any:
        if threading.get_ident() != owner:
            return previous[1](tuner, *args, **options)
        for config in tuner.configs:
            tuner.fn.run(*args, **{**options, **config.all_kwargs()})
        return None

    kind: Any = InterpretedFunction if INTERPRET else JITFunction
    with _intercepting:
        owner, previous = threading.get_ident(), (kind.run, Autotuner.run)
        kind.run, Autotuner.run = run, run_each
        try:
            yield
        finally:
            kind.run, Autotuner.run = previous


def judges(*packages: str) -> dict[tuple[Any, str], Any]:
    """The functions that a measurement relies on, by owner and name: clocks, tensors, and the modules of packages.

    Not a module's names that begin with "__": torch.compile puts its functions there and removes them again.
    """
    modules = [m for name, m in sys.modules.items() if name.split(".")[0] in packages]
    owners: list[Any] = [time, torch.Tensor, torch.cuda.Event, *modules]
    names = [(o, name) for o in owners for name in vars(o) if o not in modules or not name.startswith("__")]
    return {(o, name): vars(o)[name] for o, name in names if callable(vars(o)[name])}


def replaced(before: dict[tuple[Any, str], Any]) -> str | None:
    """The name of the first function of `judges` that is not what it was, or None."""
    changed = (f"{o.__name__}.{name}" for (o, name), value in before.items() if vars(o).get(name) is not value)
    return next(changed, None)
