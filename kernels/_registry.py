"""The registry of kernels: tests, the check command and the benchmarks find every kernel here."""

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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
    """One operator, as its file declares it.

    name: the public function's name.
    fn: the public function; under ``use_backend("eager")`` it is the baseline and, in float64, the oracle.
    make_inputs: (case, draw) -> keyword arguments of fn.
    outputs: what fn returns, by name: one tensor, or a tuple of them.
    grads: the arguments whose gradients exist; none for an operator of inference only.
    cases: small shapes, each with a word ``why`` on the path of the kernel that it reaches; the most telling one first:
        a quick check runs only that.
    space: the values that each entry of a case may take; random tests draw any combination of them.
    large: factor of the inputs where large ones are tried; less for an operator whose own rounding grows with them.
    bench_cases: the shapes that matter for speed.
    bytes_moved: (case, dtype) -> (forward, backward) bytes that must cross device memory, each tensor once.
    flops: (case) -> (forward, backward) floating-point operations of the matrix products, zero where there are none.
    """

    name: str
    fn: Callable[..., Any]
    make_inputs: Callable[[Case, Draw], dict[str, Any]]
    grads: tuple[str, ...]
    cases: tuple[Case, ...]
    bench_cases: tuple[Case, ...]
    bytes_moved: Callable[[Case, torch.dtype], tuple[int, int]]
    flops: Callable[[Case], tuple[int, int]] = lambda case: (0, 0)
    outputs: tuple[str, ...] = ("y",)
    space: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    large: float = 30.0

    def inputs(self, case: Case, dtype: torch.dtype, device: torch.device, seed: int = 0) -> dict[str, Any]:
        """Arguments of fn."""
        return self.make_inputs(case, Draw(seed, dtype, device))


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
