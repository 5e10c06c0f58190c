"""Launches that do not go through `launch`: kernel[grid](...) in somebody else's code, seen where Triton starts."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from ._triton import HAS_TRITON, INTERPRET

Seen = Callable[[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]], object]


@contextlib.contextmanager
def intercepted(seen: Seen) -> Iterator[None]:
    """Inside the block a launch calls seen(kernel, grid, args, options) and does not run; an empty grid calls nothing.

    args: in the order of the signature, as far as they were given by position. options: those given by name. A kernel
    under @triton.autotune is seen once for each of its configurations.
    """
    if not HAS_TRITON:
        yield
        return
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool = False, **options: Any) -> None:
        if callable(grid):
            grid = grid(dict(zip(kernel.arg_names, args, strict=False)) | options)
        grid = tuple(grid) if isinstance(grid, tuple | list) else (grid,)
        if 0 not in grid:
            seen(kernel, grid, args, options)

    def run_each(tuner: Any, *args: Any, **options: Any) -> None:
        for config in tuner.configs:
            tuner.fn.run(*args, **{**options, **config.all_kwargs()})

    kind: Any = InterpretedFunction if INTERPRET else JITFunction
    previous = kind.run, Autotuner.run
    kind.run, Autotuner.run = run, run_each
    try:
        yield
    finally:
        kind.run, Autotuner.run = previous
