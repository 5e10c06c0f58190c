"""What a kernel declares about itself: tests, the check command and the benchmarks find every kernel here."""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Case = Mapping[str, Any]


@dataclass(frozen=True)
class KernelSpec:
    """One operator, as its file declares it.

    name: the public function's name.
    fn: the public function; under ``use_backend("eager")`` it is the baseline and, in float64, the oracle.
    make_inputs: (case, randn) -> keyword arguments of fn; randn(*shape) draws a tensor.
    grads: the arguments whose gradients exist.
    cases: small shapes, each with a word ``why`` on the path of the kernel that it reaches.
    bench_cases: the shapes that matter for speed.
    bytes_moved: (case, dtype) -> (forward, backward) bytes that must cross device memory, each tensor once.
    flops: (case) -> (forward, backward) floating-point operations of the matrix products, zero where there are none.
    """

    name: str
    fn: Callable[..., Tensor]
    make_inputs: Callable[[Case, Callable[..., Tensor]], dict[str, Any]]
    grads: tuple[str, ...]
    cases: tuple[Case, ...]
    bench_cases: tuple[Case, ...]
    bytes_moved: Callable[[Case, torch.dtype], tuple[int, int]]
    flops: Callable[[Case], tuple[int, int]] = lambda case: (0, 0)

    def inputs(self, case: Case, dtype: torch.dtype, device: torch.device, seed: int = 0) -> dict[str, Any]:
        """Arguments of fn. The numbers are drawn in float32 on the CPU: the same ones for every dtype and device."""
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device=device, dtype=dtype)

        return self.make_inputs(case, randn)


_specs: dict[str, KernelSpec] = {}


def register(spec: KernelSpec) -> KernelSpec:
    """Adds a kernel. ValueError if the name is taken."""
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
