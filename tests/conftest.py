"""Shared set-up. Without a CUDA device the kernels run in Triton's interpreter: to be asked for before its import.

AS_WITH_GPU=1, `make as-with-gpu`: the suite as on a machine with a GPU, on one without. Nothing is interpreted, and
what would run on the GPU is skipped: a test that asks for a kernel on a tensor of the CPU fails, as it would there.
"""

import gc
import os
from pathlib import Path

import pytest
import torch

HAS_CUDA = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
AS_WITH_GPU = not HAS_CUDA and os.environ.get("AS_WITH_GPU") == "1"
INTERPRETED = not (HAS_CUDA or AS_WITH_GPU)
if INTERPRETED:
    os.environ["TRITON_INTERPRET"] = "1"
NO_GPU = "needs a CUDA GPU of compute capability 8.0 or newer"

# The workers of pytest-xdist share the cores: more threads in each would only take turns.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    interpreter = "needs Triton's interpreter, which is not used where there is a GPU"
    for item in items:
        if item.get_closest_marker("gpu") and not HAS_CUDA:
            item.add_marker(pytest.mark.skip(reason=NO_GPU))
        if item.get_closest_marker("interpreted") and not INTERPRETED:
            item.add_marker(pytest.mark.skip(reason=interpreter))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(1234)


@pytest.fixture(scope="module", autouse=True)
def _freeze_imports():
    """Else every gc.collect() walks all that was imported: 0.3 s, and each measurement of memory collects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run in this session: the GPU, or the CPU under the interpreter."""
    if AS_WITH_GPU:
        pytest.skip(NO_GPU)
    return torch.device("cuda" if HAS_CUDA else "cpu")


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working directory with a book in it, for runs of train.py."""
    from trainer import settle  # here, as these imports take seconds

    settle(tmp_path, monkeypatch)
    return tmp_path
