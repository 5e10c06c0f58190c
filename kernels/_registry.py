"""The registry of kernels: tests, the check command and the benchmarks find every kernel here.

A kernel that is not of this package needs no registration: `load_spec` takes it from a file (YOUR_KERNEL.md).
"""

import importlib
import importlib.util
import pkgutil
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Case = Mapping[str, Any]


def case_text(case: Case) -> str:
    """A case as reports show it: ``B=64 H=12 T=1024 D=64``."""
    return " ".join(f"{k}={v}" for k, v in case.items() if k != "why")


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as reports name it: float32."""
    return str(dtype).removeprefix("torch.")


class Draw:
    """Random numbers for a case, drawn on the CPU from a seed: the same ones for every dtype and device."""

    def __init__(self, seed: int, dtype: torch.dtype, device: torch.device) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, self.device = dtype, device

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers in the dtype of the case."""
        return torch.randn(shape, generator=self.generator).to(device=self.device, dtype=self.dtype)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """int64 numbers in [low, high)."""
        return torch.randint(low, high, shape, generator=self.generator).to(self.device)


@dataclass(frozen=True)
class KernelSpec:
    """One operator, as its file declares it. ValueError for a field that cannot be one.

    name: the public function's name.
    fn: the public function.
    eager: the same operator by PyTorch, the baseline and, in float64, the oracle; fn under ``use_backend("eager")``
        where it is None.
    reference: takes that place in the proof, for an operator whose eager path shares code with its kernel.
    make_inputs: (case, draw) -> keyword arguments of fn.
    outputs: what fn returns, by name: one tensor, or a tuple of them.
    grads: the arguments whose gradients exist; none for an operator of inference only.
    cases: small shapes, each with a word ``why`` on the path of the kernel that it reaches; the most telling one first:
        a quick check runs only that.
    space: the values that each entry of a case may take; random tests draw any combination of them.
    large: factor of the inputs where large ones are tried; less for an operator whose own rounding grows with them.
    bench_cases: the shapes that matter for speed.
    bytes_moved: (case, dtype) -> (forward, backward) bytes that must cross device memory, each tensor once; None: the
        inputs and outputs, as large as they are.
    flops: (case) -> (forward, backward) floating-point operations of the matrix products, zero where there are none.
    """

    name: str
    fn: Callable[..., Any]
    make_inputs: Callable[[Case, Draw], dict[str, Any]]
    grads: tuple[str, ...]
    cases: tuple[Case, ...]
    bench_cases: tuple[Case, ...] = ()
    bytes_moved: Callable[[Case, torch.dtype], tuple[int, int]] | None = None
    flops: Callable[[Case], tuple[int, int]] = lambda case: (0, 0)
    outputs: tuple[str, ...] = ("y",)
    space: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    large: float = 30.0
    eager: Callable[..., Any] | None = None
    reference: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        for name, what, fits in (
            ("name", "a string", isinstance(self.name, str) and self.name != ""),
            ("fn", "a function", callable(self.fn)),
            ("make_inputs", "a function", callable(self.make_inputs)),
            ("eager", "a function or None", self.eager is None or callable(self.eager)),
            ("reference", "a function or None", self.reference is None or callable(self.reference)),
            ("grads", "a tuple of names", _all(str, self.grads)),
            ("outputs", "a tuple of names", _all(str, self.outputs) and self.outputs != ()),
            ("cases", "a tuple of dictionaries", _all(Mapping, self.cases)),
            ("bench_cases", "a tuple of dictionaries", _all(Mapping, self.bench_cases)),
        ):
            if not fits:
                raise ValueError(f"KernelSpec: {name} must be {what}, got {getattr(self, name)!r}")

    def inputs(self, case: Case, dtype: torch.dtype, device: torch.device, seed: int = 0) -> dict[str, Any]:
        """Arguments of fn."""
        return self.make_inputs(case, Draw(seed, dtype, device))


def _all(kind: type, values: Any) -> bool:
    return isinstance(values, tuple) and all(isinstance(value, kind) for value in values)


_specs: dict[str, KernelSpec] = {}


def register(spec: KernelSpec) -> KernelSpec:
    """Add a kernel. ValueError if the name is taken."""
    if spec.name in _specs:
        raise ValueError(f"a kernel named {spec.name!r} is registered already")
    _specs[spec.name] = spec
    return spec


def all_specs() -> dict[str, KernelSpec]:
    """Every registered kernel by name, sorted: imports all modules of this package whose name has no underscore."""
    package = importlib.import_module(__package__)
    for module in pkgutil.iter_modules(package.__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"{__package__}.{module.name}")
    return dict(sorted(_specs.items()))


def load_spec(path: Path) -> KernelSpec:
    """The one KernelSpec that a Python file declares; the file is run. ValueError, in one line, if that cannot be."""
    if not path.is_file():
        raise ValueError("there is no such file")
    loader = importlib.util.spec_from_file_location(f"_kernel_file_{path.stem}", path)
    if loader is None or loader.loader is None:
        raise ValueError("its name must end in .py")
    module = importlib.util.module_from_spec(loader)
    sys.modules[loader.name] = module  # dataclasses and pickle look a module up by its name
    sys.path.insert(0, str(path.resolve().parent))  # as `python FILE` would: it may import its neighbours
    try:
        loader.loader.exec_module(module)
    except SyntaxError as error:
        raise ValueError(f"line {error.lineno} of {error.filename}: {error.msg}") from error
    except (Exception, SystemExit) as error:  # anything may happen in a file
        line = next((str(line) for line in reversed(_lines(error, path))), "?")
        raise ValueError(f"line {line}: {type(error).__name__}: {str(error).strip() or 'no message'}") from error
    finally:
        sys.path.remove(str(path.resolve().parent))
    found = list({id(value): value for value in vars(module).values() if isinstance(value, KernelSpec)}.values())
    if len(found) != 1:
        names = ", ".join(spec.name for spec in found)
        raise ValueError(f"it declares {f'{len(found)} kernels, {names}' if found else 'no KernelSpec'}: one is wanted")
    return found[0]


def _lines(error: BaseException, path: Path) -> list[int]:
    """The lines of a file through which an error came, the innermost last."""
    return [frame.lineno or 0 for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
