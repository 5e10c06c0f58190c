"""Memory, measured and predicted, on calls whose need is known."""

from dataclasses import replace

import pytest
import torch

from bench import memory
from bench.record import Report
from model.config import GPTConfig
from model.training.memory import MemoryModel

MIB = 2**20
NANO = GPTConfig(vocab_size=300, n_positions=16, n_embd=32, n_layer=2, n_head=4)


def _empty(mib: int, device: torch.device) -> torch.Tensor:
    return torch.empty(mib * MIB, dtype=torch.int8, device=device)


def test_peak_is_the_highest_sum_not_the_total(device):
    def call():
        a = _empty(3, device)
        del a
        b = _empty(2, device)
        c = _empty(4, device)
        del b
        return c

    assert memory.peak(call, device) == 6 * MIB


def test_peak_sees_temporaries_inside_operators(device):
    x = torch.zeros(1024, 1024, device=device)
    assert memory.peak(lambda: (x + 1).mul_(2).sum(), device) == pytest.approx(4 * MIB, abs=4096)
    assert memory.peak(lambda: x.add_(1), device) < 64  # the 1 itself, on a CPU


def test_peak_ignores_memory_freed_from_before(device):
    held = [_empty(8, device), _empty(8, device)]

    def call():
        new = _empty(5, device)
        held.clear()
        return new

    assert memory.peak(call, device) == 5 * MIB


def test_peak_of_a_second_call_is_independent(device):
    def blocks():
        return [torch.empty(2**15, dtype=torch.int8, device=device) for _ in range(64)]

    held = []
    assert memory.peak(lambda: held.extend(blocks()), device) == 2 * MIB
    held.clear()
    held.extend(blocks())  # at addresses of the first, which the CPU's profiler has not seen released

    def call():
        first = _empty(5, device)
        held.clear()
        return first, _empty(5, device)

    assert memory.peak(call, device) == (10 if device.type == "cpu" else 8) * MIB


def test_peak_counts_the_backward_pass(device):
    w = torch.ones(MIB, device=device, requires_grad=True)
    assert memory.peak(lambda: w.sigmoid().sum().backward(), device) >= 8 * MIB


def test_levels_end_with_the_result(device):
    def call():
        scratch = _empty(3, device)
        del scratch
        return [_empty(1, device), _empty(1, device)]

    assert memory.levels(call, device) == (3 * MIB, 2 * MIB)
    w = torch.ones(MIB, device=device, requires_grad=True)
    assert memory.levels(lambda: (w * w.detach()).sigmoid().sum(), device)[1] == pytest.approx(4 * MIB, abs=4096)


@pytest.mark.parametrize(
    ("options", "part"),
    [({"recompute": True}, "activations"), ({"optimizer": "muon"}, "optimizer"), ({"ema": True}, "ema")],
    ids=str,
)
def test_step_peak_follows_the_options(options, part):
    config = replace(NANO, n_layer=6)
    task = config, 8, 16, torch.float32, "eager"
    saved = memory.step_peak(*task, torch.device("cpu")) - memory.step_peak(*task, torch.device("cpu"), **options)
    plain, other = (MemoryModel(config, 16, *task[3:], card=0, **more).predict(8) for more in ({}, options))
    assert getattr(plain, part) != getattr(other, part)
    assert saved == pytest.approx(plain.peak - other.peak, rel=0.03)


@pytest.fixture
def nano(monkeypatch):
    monkeypatch.setitem(memory.PRESETS, "nano", replace(NANO, resid_pdrop=0.2))
    return "nano"


def _run(batch, missing=None):
    command = memory.Memory(preset="nano", batch=batch, context=16, dtype="float32")
    return [*command.groups(torch.device("cpu"), Report({}, {}, "", missing={} if missing is None else missing))]


def test_rows_hold_prediction_and_peak(nano):
    missing = {}
    groups = _run((2, 4), missing)
    assert [[row.provider for row in rows] for rows in groups] == 2 * [["eager", "triton"]]
    for batch, (eager, triton) in zip((2, 4), groups, strict=True):
        assert eager.kind == "memory" and not eager.seconds and not eager.error
        assert eager.params == {"preset": nano, "batch": batch, "context": 16, "dtype": "float32"}
        assert eager.group == triton.group == f"nano batch={batch} context=16 float32"
        needs = MemoryModel(NANO, 16, torch.float32, "eager", card=0).predict(batch)  # and no dropout
        assert eager.metrics["predicted_mib"] * MIB == needs.peak
        assert eager.metrics["workspace_mib"] * MIB == needs.workspace
        assert not {"working_mib", "ema_mib"} & eager.metrics.keys()  # float32, no average
        # AdamW also counts its steps, 4 bytes a tensor; the loss has targets, losses and masks of a chunk, 20 a token.
        counts = (200 + 20 * batch * 16) / MIB
        assert eager.metrics["peak_mib"] == pytest.approx(eager.metrics["predicted_mib"], abs=counts)
        assert triton.metrics["predicted_mib"] * MIB == MemoryModel(NANO, 16, torch.float32).predict(batch).peak
        assert "peak_mib" not in triton.metrics
    assert missing["triton"].startswith("predicted, not run: ")


def test_too_large_step_is_predicted_only(nano, monkeypatch):
    monkeypatch.setattr(memory, "ON_CPU", 0)
    monkeypatch.setattr(memory, "step_peak", lambda *_: pytest.fail("ran"))
    ((eager, _),) = _run((2,))
    assert "predicted_mib" in eager.metrics and "peak_mib" not in eager.metrics and not eager.error


def test_failed_step_keeps_its_prediction(nano, monkeypatch):
    def out_of_memory(*_):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(memory, "step_peak", out_of_memory)
    ((eager, _),) = _run((2,))
    assert eager.error == "OutOfMemoryError: no room" and "predicted_mib" in eager.metrics


def test_fits_is_the_largest_batch_per_card(nano):
    found = memory.Memory(preset=nano, context=16, dtype="bfloat16").fits(cards_gib=(1, 2, 4))
    assert [gib for gib, _ in found] == [1, 2, 4]
    for gib, batches in found:
        for backend, batch in batches.items():
            assert batch == MemoryModel(NANO, 16, torch.bfloat16, backend).largest_batch(gib * 2**30)
    assert found[0][1] == {"eager": 0, "triton": 0}  # all of it is reserve
    assert 0 < found[1][1]["eager"] < found[1][1]["triton"] < found[2][1]["triton"]
