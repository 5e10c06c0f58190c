"""The device of device.cpp, and what stands in for the parts of torch.cuda that talk to a driver.

    fake.build(library); fake.load(library)     # before torch is imported: it asks once which devices there are

Triton's launches are checked and not run, so that the outputs of kernels are zeros. On the eager path every number is
computed.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

compiled: set[tuple[str, str]] = set()  # what Triton would have compiled by now: hash of the source, options
SOURCE = Path(__file__).with_name("device.cpp")
H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, total_memory=85_017_755_648,
    shared_memory_per_block_optin=232_448,
    L2_cache_size=50 * 2**20,
)  # fmt: skip


def build(library: Path, compiler: str = "g++") -> None:
    """Compile device.cpp, without importing torch."""
    torch = Path(importlib.util.find_spec("torch").origin).parent
    include = [f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}"]
    link = [f"-L{torch / 'lib'}", f"-Wl,-rpath,{torch / 'lib'}", "-lc10", "-ltorch_cpu"]
    options = ["-shared", "-fPIC", "-std=c++20", "-O0", "-w"]
    subprocess.run([compiler, *options, *include, str(SOURCE), *link, "-o", str(library)], check=True)


def load(library: Path) -> None:
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    _patch_torch()
    _patch_kernels()


def _patch_torch() -> None:
    import torch

    ops, accelerator = torch.ops.fake_cuda, torch.accelerator

    @contextlib.contextmanager
    def stream(new):
        before = accelerator.current_stream()
        accelerator.set_stream(new)
        try:
            yield
        finally:
            accelerator.set_stream(before)

    class CUDAGraph:
        def replay(self):
            ops.replay(self.number)

    class graph:
        """As PyTorch's: after an error in the block the current stream stays that of the capture."""

        def __init__(self, cuda_graph, pool=None, stream=None, capture_error_mode="global"):
            self.graph, self.stream = cuda_graph, stream

        def __enter__(self):
            self.before, self.generator = accelerator.current_stream(), torch.get_rng_state()
            accelerator.set_stream(self.stream)
            ops.begin_capture()

        def __exit__(self, kind, *error):
            self.graph.number = ops.end_capture()
            torch.set_rng_state(self.generator)  # recording draws nothing
            if kind is None:
                accelerator.set_stream(self.before)

    class Event:
        """On a device without time every interval takes a millisecond."""

        def __init__(self, enable_timing=False): ...

        def record(self, stream=None): ...

        def synchronize(self):
            accelerator.current_stream().synchronize()

        def elapsed_time(self, end):
            return 1.0

    nothing = dict.fromkeys(
        ("empty_cache", "_lazy_init", "manual_seed_all", "reset_peak_memory_stats", "graph_pool_handle"), None
    )
    numbers = dict.fromkeys(("memory_allocated", "max_memory_allocated", "current_device"), 0)
    answers = {
        **nothing, **numbers, "is_available": True, "device_count": 1, "is_bf16_supported": True,
        "is_current_stream_capturing": False,
        "get_device_capability": (H100.major, H100.minor), "get_device_properties": H100, "get_device_name": H100.name,
        "mem_get_info": (80 * 2**30, 80 * 2**30),
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *args, answer=answer, **options: answer)
    for name, value in {
        "Stream": torch.Stream, "Event": Event, "stream": stream, "graph": graph, "CUDAGraph": CUDAGraph,
        "current_stream": lambda device=None: accelerator.current_stream(),
        "synchronize": lambda device=None: accelerator.current_stream().synchronize(),
        "device": contextlib.nullcontext, "manual_seed": torch.default_generator.manual_seed,
    }.items():  # fmt: skip
        setattr(torch.cuda, name, value)


def _patch_kernels() -> None:
    """A launch compiles what it has not seen before, which a capture must not."""
    import torch
    from triton import knobs

    from kernels import _compile, _dispatch, _launch
    from kernels._registry import all_specs

    def launch(kernel, grid, *args, **meta):
        if 0 in grid:
            return
        places = {t.device for t in _launch.tensors(args)}
        assert places == {torch.device("cuda", 0)}, f"{kernel.__name__} is launched on {places}"
        code, options = _compile.source(_launch.Launch(kernel, grid, args, meta), 90)
        key = code.hash(), str(options)
        if key not in compiled:
            compiled.add(key)
            if knobs.runtime.jit_cache_hook is not None:
                knobs.runtime.jit_cache_hook(repr=kernel.__name__)
            torch.ops.fake_cuda.load_code(kernel.__name__)

    all_specs()
    for name, module in [*sys.modules.items()]:
        if name.startswith("kernels.") and hasattr(module, "launch"):
            module.launch = launch
    _dispatch.kernel_problem = lambda *args, **widths: None
