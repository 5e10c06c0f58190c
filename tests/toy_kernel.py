"""An operator with a launch space, for the tests of tuning: three times x, in ways that are right and wrong."""

import torch

from kernels._dispatch import use_triton
from kernels._launch import launch
from kernels._registry import KernelSpec
from kernels._tables import choose

RIGHT, ULP, WRONG, RAISES = range(4)
DEFAULT = {"BLOCK": 32, "MODE": RIGHT}
SPACE = {"BLOCK": (16, 32, 64), "MODE": (RIGHT, ULP, WRONG, RAISES)}


class Kernel:
    """Stands in for @triton.jit, for speed: its function runs once, on whole tensors."""

    def __init__(self, fn):
        self.fn, self.__name__ = fn, fn.__name__

    def __call__(self, *args):
        return self.fn(*args)

    def __getitem__(self, grid):
        return self.fn


@Kernel
def _triple(x, MODE):
    return x * 3.0 * (1.0, 1.0000001, 1.01)[MODE]


@Kernel
def _triple_fwd_kernel(x, y, n, BLOCK, MODE):
    y.copy_(_triple(x, MODE))


@Kernel
def _triple_bwd_kernel(x, y, n, BLOCK, MODE):
    y.copy_(_triple(x, MODE))


def _run(name, kernel, x):
    x = x.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    options = choose(name, DEFAULT, SPACE, x.device, dtype=x.dtype, N=x.shape[-1])
    if options["MODE"] == RAISES:
        raise RuntimeError("no room for it")
    launch(kernel, (-(-x.numel() // options["BLOCK"]),), x, y, x.numel(), **options)
    return y


class _Triple(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return _run("triple_fwd", _triple_fwd_kernel, x)

    @staticmethod
    def backward(ctx, dy):
        return _run("triple_bwd", _triple_bwd_kernel, dy)


def triple(x):
    return _Triple.apply(x) if use_triton("triple", x, N=x.shape[-1]) else x * 3.0


SPEC = KernelSpec(
    "triple", triple, lambda case, draw: {"x": draw.normal(case["M"], case["N"])}, ("x",), ({"M": 5, "N": 8},),
    ({"M": 64, "N": 8}, {"M": 128, "N": 8}), lambda case, dtype: (0, 0),
)  # fmt: skip
