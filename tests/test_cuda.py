"""On a GPU: a CUDA graph and a stop in the middle change no bit of train.py and generation; the tuner measures."""

from __future__ import annotations

import cuda_runs
import pytest
import torch

from kernels import _tables, _tune

pytestmark = pytest.mark.gpu

# Each option with each backend and dtype, not each with all others: see `make cuda-trace`.
SOME = [
    [*kernels, *rest]
    for kernels in cuda_runs.product(a=["--backend auto", "--backend eager"], b=["--dtype bfloat16", "--dtype float32"])
    for rest in cuda_runs.product(
        a=[
            "--optimizer muon --recompute --ema 0.9",
            "--document-mask --spikes skip --batch-size 1 --grad-accum 3 --context 15",
            "--dropout 0",
        ]
    )
]


@pytest.mark.parametrize("options", SOME, ids=" ".join)
def test_graph_changes_no_bit(options, here):
    cuda_runs.train(*options)


@pytest.mark.parametrize("options", SOME, ids=" ".join)
def test_resumed_run_is_the_straight_one(options, here):
    cuda_runs.resume(*options)


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_step_that_is_not_finite_is_named(backend, here):
    cuda_runs.fail("--backend", backend)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_steps_on_nccl_are_those_of_one_process(kind):
    cuda_runs.one_of_a_group(kind, torch.device("cuda", 0))


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"top_p": 0.9, "repetition_penalty": 1.2}], ids=str)
def test_graph_writes_the_same_text(backend, sampling):
    cuda_runs.generate(backend, **sampling)


def test_tuner_measures(tmp_path, monkeypatch):
    """The default and two other candidates of one kernel, one of which may win."""
    monkeypatch.setenv("KERNELS_TABLES", str(tmp_path))
    monkeypatch.setattr(_tables, "_loaded", {})
    monkeypatch.setattr(_tables, "_chosen", {})
    machine = _tune.Machine(torch.device("cuda", 0))
    target = _tune.survey(["layer_norm"], [torch.bfloat16], machine.gpu.arch, machine.gpu.sms, quick=True)[0]
    target.candidates, said = target.candidates[:3], []
    result = _tune.tune(machine, [target], tmp_path / "table.json", quick=True, say=said.append)
    assert result.measured == 1 and not result.problem, said
    (entry,) = _tables.read(tmp_path / "table.json", machine.gpu).entries.values()
    default, *others = entry["candidates"]
    assert default["options"] == entry["default"] and all(second > 0 for second in default["seconds"][0])
    assert all(other["refused"] or len(other["seconds"][0]) == len(default["seconds"][0]) for other in others)
