"""`python -m bench gpu`: the budget, the proof before the measurements, and the summary."""

import pytest
import torch
from reports import CPU, make_report, make_row, refusal

from bench import __main__ as bench_main
from bench import gpu, roofline
from bench.record import Report, Row
from kernels import _check, _proof
from kernels._registry import all_specs

BF16 = torch.bfloat16


class Clock:
    """Seconds that pass when a job says so."""

    now = 0.0

    def __call__(self):
        return self.now


def _jobs(clock, *costs, cap=10):
    def job(i, cost):
        def run():
            for part in range(2):
                clock.now += cost / 2
                yield [make_row(f"{i}.{part}")]

        return gpu.Job(f"job {i}", cap, run)

    return [job(i, cost) for i, cost in enumerate(costs)]


def _carried_out(tmp_path, jobs, clock, seconds):
    report = make_report()
    gpu.run_jobs(jobs, report, tmp_path / "r.json", gpu.Budget(seconds, clock))
    assert Report.read(tmp_path / "r.json").rows == report.rows
    return report


def test_budget_drops_the_last_jobs(tmp_path, capsys):
    clock = Clock()
    report = _carried_out(tmp_path, _jobs(clock, 10, 10, 10, 10), clock, 30)
    assert [row.provider for row in report.rows] == ["0.0", "0.1", "1.0", "1.1", "2.0", "2.1"]
    assert report.dropped == ["job 3"] and clock.now == 30
    assert capsys.readouterr().out.splitlines()[-1] == "dropped, 0 s left: job 3"


def test_slow_job_stops_at_its_cap(tmp_path):
    clock = Clock()
    report = _carried_out(tmp_path, _jobs(clock, 40, 4, 40, 4), clock, 60)
    # 20 s a group: the first job stops after its first, the third too, and the fourth still has the 10 s of its cap
    assert [row.provider for row in report.rows] == ["0.0", "1.0", "1.1", "2.0", "3.0", "3.1"]
    assert report.dropped == ["job 0: from here on", "job 2: from here on"] and clock.now == 48


def test_job_past_the_deadline_stops_after_its_group(tmp_path):
    clock = Clock()
    report = _carried_out(tmp_path, _jobs(clock, 100, 1, cap=45), clock, 45)
    assert [row.provider for row in report.rows] == ["0.0"]
    assert report.dropped == ["job 0: from here on", "job 1"] and clock.now == 50


def test_broken_job_spares_the_others(tmp_path):
    clock = Clock()

    def broken():
        yield [make_row("before")]
        raise RuntimeError("no such kernel\nand more")

    jobs = [gpu.Job("broken", 1, broken), *_jobs(clock, 1)]
    report = _carried_out(tmp_path, jobs, clock, 60)
    assert [row.provider for row in report.rows] == ["before", "0.0", "0.1"]
    assert report.dropped == ["broken: RuntimeError: no such kernel"]


def test_kill_keeps_finished_groups(tmp_path):
    clock = Clock()

    def killed():
        yield [make_row("kept")]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gpu.run_jobs([gpu.Job("k", 1, killed)], make_report(), tmp_path / "r.json", gpu.Budget(60, clock))
    assert [row.provider for row in Report.read(tmp_path / "r.json").rows] == ["kept"]


def _verdict(red=()):
    cases = {name: spec.cases[0] for name, spec in all_specs().items()}
    rows = [_proof.Comparison(name, case, BF16, "y", 0.5, 1.0, case_dtype=BF16) for name, case in cases.items()]
    failures = [f"{name} is off" for name, _ in red]
    return _check.CheckResult(rows, failures, set(red), 0, 1.0, "a GPU")


@pytest.mark.parametrize("red", [(), (("layer_norm", BF16),)])
def test_make_gpu_proves_then_measures(red, tmp_path, monkeypatch, capsys):
    clock, asked = Clock(), {}

    def kernels_run(self, device, report, roofs, *, part, gate):
        (op,), dtype = self.op, getattr(torch, self.dtype[0])
        clock.now += 1
        quick = part == slice(1)
        asked[op, dtype, quick] = gate(all_specs()[op], dtype)
        providers = ["eager", *([] if asked[op, dtype, quick] else ["triton"])]
        yield [Row("kernels", {"op": op, "quick": quick}, name, "events", (0.001, 0.002)) for name in providers]

    def train_groups(self, device, report):
        clock.now += 5
        yield [Row("train", {"batch": self.batch[0]}, name, "events", (0.1,)) for name in self.provider]

    def generate_groups(self, device, report):
        clock.now += 5
        yield [Row("generate", {"batch": self.batch[0]}, "triton", "events", (0.1,))]

    monkeypatch.setattr(gpu, "_device", lambda: CPU)
    monkeypatch.setattr(gpu.Budget.__init__, "__defaults__", (clock,))
    monkeypatch.setattr(gpu, "compile_all", lambda *a: (3, 3))
    monkeypatch.setattr(gpu._check, "check", lambda *a, **k: _verdict(red))
    monkeypatch.setattr(gpu.roofline, "measure", lambda *a: roofline.Roofs({65536: 1e-6}, {"bfloat16": 1e12}))
    monkeypatch.setattr(gpu, "proof_failure", lambda spec, dtype, device: "asked again")
    monkeypatch.setattr(gpu.Kernels, "run", kernels_run)
    monkeypatch.setattr(gpu.Train, "groups", train_groups)
    monkeypatch.setattr(gpu.Generate, "groups", generate_groups)
    argv = ["gpu", "--out", str(tmp_path / "new"), "--minutes", "2"]
    if red:
        with pytest.raises(SystemExit) as stop:
            bench_main.main(argv)
        assert stop.value.code == 1
    else:
        bench_main.main(argv)
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [
        "check.json",
        "report.html",
        "report.json",
        "report.md",
    ]
    assert asked["layer_norm", BF16, True].startswith("not timed" if red else "")
    assert asked["bias_gelu", BF16, True] == "" and asked["bias_gelu", torch.float16, True] == "asked again"
    found = Report.read(tmp_path / "new" / "report.json")
    assert {row.kind for row in found.rows} == {"kernels", "train", "generate"}
    out = capsys.readouterr().out
    summary = out[out.rindex("comparisons with float64") :].splitlines()
    assert len(summary) < 60 and "triton" in out and "best other eager" in out
    assert "[120 s left] training gpt2, batch 64" in out
    assert refusal(argv, capsys).endswith("name another file, or move that one away\n")


def test_summary_stays_short():
    rows = [make_row("triton", op=f"op{i}") for i in range(90)]
    found = make_report(*rows)
    found.dropped = [f"job {i}" for i in range(50)]
    lines = gpu.summary(found, _verdict())
    assert len(lines) < 60 and lines[0].startswith("7 comparisons")


def test_launches_of_a_case_are_compiled(monkeypatch):
    compiled = []

    def compile_launch(launch, arch):
        compiled.append(arch)
        if len(compiled) == 1:
            raise RuntimeError("no such register")

    monkeypatch.setattr(gpu, "compile_launch", compile_launch)
    monkeypatch.setattr(
        gpu, "unique", lambda launches, arch: launches
    )  # which asks the compiler, and this suite is interpreted
    assert gpu._compile_case("layer_norm", torch.float32, 0, 90) == len(compiled) - 1 > 0
    assert set(compiled) == {90}
