"""The micro set, under pytest-benchmark: pytest bench/micro.py [--benchmark-json FILE]

Small enough for every commit: each registered operator, a training step and a generated token, through the backend that
"auto" picks on this machine. `python -m bench compare` reads its files; the whole tables come from `python -m bench`.
"""

import pytest
import torch

from bench.kernels import case_text, cases, make_call
from bench.memory import training_step
from kernels._registry import all_specs
from model.config import PRESETS
from model.generate import generate
from model.gpt import GPT
from model.quantize import prepare
from model.training import optim

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WHAT = [
    (name, mode) for name, spec in all_specs().items() for mode in ("forward", "both") if spec.grads or mode != "both"
]
SETTINGS = {"warmup": True, "warmup_iterations": 3, "max_time": 0.5, "min_rounds": 5}


@pytest.fixture(autouse=True)
def settings(benchmark):
    """Kept with the times."""
    benchmark.extra_info["torch"] = torch.__version__


def _time(benchmark, call) -> None:
    def finished() -> None:
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark(finished)


@pytest.mark.benchmark(**SETTINGS)
@pytest.mark.parametrize("name, mode", WHAT)
def test_operator(benchmark, name, mode):
    spec = all_specs()[name]
    case = cases(spec, torch.device("cpu"))[0]  # small on a GPU too
    benchmark.group = f"{name} {case_text(case)} {mode}"
    _time(benchmark, make_call(spec, spec.inputs(case, torch.float32, DEVICE), spec.fn, mode))


@pytest.mark.benchmark(**SETTINGS)
def test_training_step(benchmark):
    torch.manual_seed(0)
    config = PRESETS["tiny"]
    model = GPT(config).to(DEVICE)
    optimizer = optim.adamw(model, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    idx = torch.randint(config.vocab_size, (4, config.n_positions), device=DEVICE)

    _time(benchmark, training_step(model, optimizer, lambda: model(idx, idx)[1]))


@pytest.mark.benchmark(**SETTINGS)
def test_generation(benchmark):
    torch.manual_seed(0)
    model = prepare(GPT(PRESETS["tiny"]).to(DEVICE))
    _time(benchmark, lambda: list(generate(model, [0] * 16, tokens=32, temperature=0.0)))
