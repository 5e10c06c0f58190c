"""Every registered kernel on its bench cases, beside PyTorch's operator, eager and compiled, in the same process."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.timing import Timing, measure
from kernels import _proof, use_backend
from kernels._registry import Case, KernelSpec, all_specs

SDPA = {"sdpa_flash": SDPBackend.FLASH_ATTENTION, "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
        "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION}  # fmt: skip


@dataclass(frozen=True)
class KernelRow:
    """One kernel, case, dtype, mode ("forward" or "forward+backward") and provider.

    gb_per_s: bytes that must move over the median time, 1e9 bytes; tflop_per_s likewise, 0 where there is no product.
    """

    kernel: str
    case: str
    dtype: str
    mode: str
    provider: str
    timing: Timing
    gb_per_s: float
    tflop_per_s: float
    error: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The row as JSON takes it."""
        return asdict(self)


def _providers(spec: KernelSpec) -> dict[str, Callable[..., Any]]:
    def under(backend: str, fn: Callable[..., Any]) -> Callable[..., Any]:
        def call(**inputs: Any) -> Any:
            with use_backend(backend):  # type: ignore[arg-type]
                return fn(**inputs)

        return call

    providers = {"triton": under("triton", spec.fn), "eager": under("eager", spec.fn)}
    providers["compile"] = under("eager", torch.compile(spec.fn, dynamic=False))
    if spec.name == "causal_attention":
        for name, backend in SDPA.items():
            providers[name] = _sdpa(backend)
    return providers


def _sdpa(backend: SDPBackend) -> Callable[..., Tensor]:
    """PyTorch's attention by one of its backends, from the packed projection to (B, T, C), as a model would call it."""

    def call(qkv: Tensor, n_head: int, **_: Any) -> Tensor:
        q, k, v = qkv.unflatten(-1, (3, n_head, -1)).permute(2, 0, 3, 1, 4)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

    return call


def _calls(spec: KernelSpec, fn: Callable[..., Any], inputs: dict[str, Any]) -> dict[str, Callable[[], object]]:
    """What is timed of one provider, by mode."""
    leaves = {k: v.detach().requires_grad_() for k, v in inputs.items() if k in spec.grads and v is not None}
    given = {**inputs, **leaves}
    incoming = list(_proof.incoming_gradients(spec, inputs, seed=0).values())

    def forward() -> object:
        with torch.no_grad():
            return fn(**given)

    def both() -> object:
        return torch.autograd.grad(fn(**given), list(leaves.values()), incoming)

    if not leaves:
        return {"forward": forward}
    return {"forward": forward, "forward+backward": both}


def case_text(case: Case) -> str:
    """A case as reports show it: ``B=64 H=12 T=1024 D=64``."""
    return " ".join(f"{k}={v}" for k, v in case.items() if k != "why")


def run(
    device: torch.device, dtypes: list[torch.dtype], ops: list[str] | None, *, seconds: float = 0.5, quick: bool = False
) -> Iterator[KernelRow]:
    """Yields rows as they are measured. A kernel that is not within the rule gets one row that says so, and no time.

    A provider that cannot run a case gets a row whose `error` says why. quick: the first bench case of each kernel.
    """
    for spec in all_specs().values():
        if ops and spec.name not in ops:
            continue
        for dtype in dtypes:
            name = str(dtype).removeprefix("torch.")
            wrong = [row for case in spec.cases for row in _proof.prove(spec, case, dtype, device) if not row.passed]
            if wrong:
                yield KernelRow(
                    spec.name, "", name, "", "triton", Timing(0, 0, 0, 0), 0, 0,
                    error=f"not timed: {len(wrong)} comparisons with float64 fail (python -m kernels check)",
                )  # fmt: skip
                continue
            for case in spec.bench_cases[:1] if quick else spec.bench_cases:
                yield from _run_case(spec, case, dtype, device, seconds)


def _run_case(
    spec: KernelSpec, case: Case, dtype: torch.dtype, device: torch.device, seconds: float
) -> Iterator[KernelRow]:
    inputs = spec.inputs(case, dtype, device)
    modes: dict[str, dict[str, Callable[[], object]]] = {"forward": {}, "forward+backward": {}}
    failed: dict[str, str] = {}
    for provider, fn in _providers(spec).items():
        try:
            calls = _calls(spec, fn, inputs)
            for mode, call in calls.items():
                call()
                modes[mode][provider] = call
        except Exception as error:  # what a peer cannot do is a result
            failed[provider] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"[:160]
    dtype_name = str(dtype).removeprefix("torch.")
    for mode, calls in modes.items():
        for provider, timing in (measure(calls, device, seconds=seconds) if calls else {}).items():
            move, work = spec.bytes_moved(case, dtype), spec.flops(case)
            both = mode != "forward"
            yield KernelRow(
                spec.name, case_text(case), dtype_name, mode, provider, timing,
                gb_per_s=(sum(move) if both else move[0]) / timing.p50_ms / 1e6,
                tflop_per_s=(sum(work) if both else work[0]) / timing.p50_ms / 1e9,
            )  # fmt: skip
    for provider, why in failed.items():
        yield KernelRow(spec.name, case_text(case), dtype_name, "", provider, Timing(0, 0, 0, 0), 0, 0, error=why)
