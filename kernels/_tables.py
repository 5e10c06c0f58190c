"""Launch tables: the options that a kernel is launched with, by GPU, dtype and widths."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

Options = dict[str, int]  # BLOCK_M, num_warps, num_stages, ...: tl.constexpr arguments, options of a launch, grid sizes
Space = Mapping[str, Sequence[int]]  # the values that each option may take; an option without an entry is fixed


def choose(kernel: str, default: Options, space: Space, device: torch.device, **key: Any) -> Options:
    """The options of a kernel under a key: what was measured on this GPU, or else the default.

    kernel: the name of the @triton.jit function without its dressing (attention_fwd). default, space: declared next to
    each other in the kernel's file; a launch may turn some options into its grid. key: dtype and widths, never the
    batch or the length of a sequence, so that a table chosen once holds for all of them.
    """
    return default
