"""Triton where it is installed, inert stand-ins where it is not, so that every kernel file imports anywhere.

NAMESPACE: of the operators in torch.ops. This folder has two import names, `kernels` in the repository and
`gpt2_kernels` from a wheel; operators, and what torch.compile stores of them, follow it, so one process can have both.
"""

from types import SimpleNamespace

NAMESPACE = __package__.replace(".", "_")

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    HAS_TRITON = True
    # Triton decides at import whether @triton.jit compiles or interprets; a later change of the variable has no effect.
    INTERPRET = bool(triton.knobs.runtime.interpret)
except ImportError:  # macOS, Windows, or a Linux without the wheel
    HAS_TRITON = INTERPRET = False

    def _jit(fn=None, **_options):
        return fn if fn is not None else _jit

    triton = SimpleNamespace(jit=_jit, cdiv=lambda n, d: -(-n // d), __version__=None)  # type: ignore[assignment]
    tl = SimpleNamespace(constexpr=lambda value=None: value)  # type: ignore[assignment]
    TensorDescriptor = SimpleNamespace  # type: ignore[assignment,misc]

__all__ = ["HAS_TRITON", "INTERPRET", "NAMESPACE", "TensorDescriptor", "tl", "triton"]
