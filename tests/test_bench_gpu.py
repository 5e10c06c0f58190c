"""`python -m bench gpu`: the budget, the proof before the measurements, and the summary."""

import os
import signal
import time

import pytest
import torch
from reports import CPU, make_report, make_row, refusal

from bench import __main__ as bench_main
from bench import gpu, roofline, supervise
from bench.record import Report, Row, read_reports
from kernels import _check, _proof, _tables, _tune
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

        return supervise.Job(f"job {i}", cap, run)

    return [job(i, cost) for i, cost in enumerate(costs)]


def _in_process(make_jobs, budget, accept):
    """supervise() without a process: for jobs that neither hang nor die."""
    dropped, takers = [], {"result": accept, "dropped": lambda line: dropped.append(line)}
    supervise.work(lambda message: takers.get(message[0], bool)(message[1]), make_jobs(), 0, budget)
    return dropped


def _carried_out(jobs, clock, seconds):
    """The providers of the rows, and what was dropped."""
    results = []
    dropped = _in_process(lambda: jobs, supervise.Budget(seconds, clock), results.append)
    return [row.provider for rows in results for row in rows], dropped


def test_budget_drops_the_last_jobs(capsys):
    clock = Clock()
    rows, dropped = _carried_out(_jobs(clock, 10, 10, 10, 10), clock, 30)
    assert rows == ["0.0", "0.1", "1.0", "1.1", "2.0", "2.1"]
    assert dropped == ["job 3"] and clock.now == 30
    assert capsys.readouterr().out.splitlines()[-1] == "dropped, 0 s left: job 3"


def test_slow_job_stops_at_its_cap():
    clock = Clock()
    rows, dropped = _carried_out(_jobs(clock, 40, 4, 40, 4), clock, 60)
    # 20 s a group: the first job stops after its first, the third too, and the fourth still has the 10 s of its cap
    assert rows == ["0.0", "1.0", "1.1", "2.0", "3.0", "3.1"]
    assert dropped == ["job 0: from here on", "job 2: from here on"] and clock.now == 48


def test_job_past_the_deadline_stops_after_its_group():
    clock = Clock()
    rows, dropped = _carried_out(_jobs(clock, 100, 1, cap=45), clock, 45)
    assert rows == ["0.0"]
    assert dropped == ["job 0: from here on", "job 1"] and clock.now == 50


def test_broken_job_spares_the_others():
    clock = Clock()

    def broken():
        yield [make_row("before")]
        raise RuntimeError("no such kernel\nand more")

    rows, dropped = _carried_out([supervise.Job("broken", 1, broken), *_jobs(clock, 1)], clock, 60)
    assert rows == ["before", "0.0", "0.1"]
    assert dropped == ["broken: RuntimeError: no such kernel"]


def _bad_day():
    """The jobs of a bad day, for a child process: `lost` is what an illegal memory access does to a process."""

    def fine():
        yield os.getpid()

    def raises():
        yield os.getpid()
        raise RuntimeError("no such kernel")

    def out_of_memory():
        raise torch.cuda.OutOfMemoryError("tried to allocate 90 GiB")
        yield

    def hangs():
        yield os.getpid()
        time.sleep(1000)

    def dies():
        os.kill(os.getpid(), signal.SIGSEGV)
        yield

    def lost():
        def synchronize():
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, synchronize
        yield os.getpid()
        synchronize()

    caps = {hangs: 5}  # and no more patience: time enough to send a result on a busy machine
    jobs = (raises, fine, out_of_memory, hangs, fine, dies, lost, fine)
    return [supervise.Job(job.__name__, caps.get(job, 60), job) for job in jobs]


@pytest.mark.slow  # four processes import torch, one after the other
def test_bad_day_costs_the_bad_jobs_alone(monkeypatch):
    monkeypatch.setattr(supervise, "PATIENCE", 0.0)
    results = []
    dropped = supervise.supervise(_bad_day, supervise.Budget(3600), results.append)
    assert dropped == [
        "raises: RuntimeError: no such kernel",
        "out_of_memory: OutOfMemoryError: tried to allocate 90 GiB",
        "hangs: stopped, as it did not answer",
        "dies: its process ended: SIGSEGV",
        "lost: RuntimeError: CUDA error: an illegal memory access was encountered",
    ]
    one, two, three, four, five, six = results  # raises, fine, hangs | fine | lost | fine
    assert one == two == three != four != five != six and os.getpid() not in results


def _nothing_starts():
    os._exit(3)


@pytest.mark.slow
def test_child_that_cannot_start_ends_the_work():
    dropped = supervise.supervise(_nothing_starts, supervise.Budget(3600), print)
    assert dropped == ["the first job: its process ended: exit code 3"]


@pytest.mark.slow
def test_interrupt_stops_the_child():
    pids = []

    def accept(pid):
        pids.append(pid)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        supervise.supervise(_bad_day, supervise.Budget(3600), accept)
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


def _verdict(red=()):
    cases = {name: spec.cases[0] for name, spec in all_specs().items()}
    rows = [_proof.Comparison(name, case, BF16, "y", 0.5, 1.0, case_dtype=BF16) for name, case in cases.items()]
    failures = [f"{name} is off" for name, _ in red]
    return _check.CheckResult(rows, failures, set(red), 0, 1.0, "a GPU")


def _tuned(folder):
    """What a tuning job of three seconds leaves."""
    gpu = _tables.Gpu("a GPU", 90, 132, "3.7.1")
    table = _tables.Table(str(folder / "cache" / "a-gpu.json"), gpu)
    _tables.write(table)
    return _tune.Tuned(table, measured=3, hash="0123456789ab")


@pytest.mark.slow  # it runs every benchmark
@pytest.mark.parametrize("red", [(), (("layer_norm", BF16),)])
def test_make_gpu_proves_then_measures(red, tmp_path, monkeypatch, capsys):
    clock, asked, order = Clock(), {}, []

    def tune_kernels(device, seconds):
        assert seconds == pytest.approx(0.9 * 0.2 * 120)
        clock.now += 3
        order.append("tune")
        yield _tuned(tmp_path)

    def kernels_run(self, device, report, roofs, *, part, gate):
        (op,), dtype = self.op, getattr(torch, self.dtype[0])
        clock.now += 1
        quick = part == slice(1)
        asked[op, dtype, quick] = gate(all_specs()[op], dtype)
        providers = ["eager", *([] if asked[op, dtype, quick] else ["triton", "untuned"])]
        yield [Row("kernels", {"op": op, "quick": quick}, name, "events", (0.001, 0.002)) for name in providers]

    def train_groups(self, device, report):
        clock.now += 5
        yield [Row("train", {"batch": self.batch[0]}, name, "events", (0.1,)) for name in self.provider]

    def generate_groups(self, device, report):
        clock.now += 5
        yield [Row("generate", {"batch": self.batch[0]}, "triton", "events", (0.1,))]

    monkeypatch.setattr(gpu, "_device", lambda: CPU)
    monkeypatch.setattr(gpu, "arch_of", lambda device: 90)
    monkeypatch.setattr(gpu, "sm_count", lambda device: 132)
    monkeypatch.setattr(gpu, "supervise", _in_process)
    monkeypatch.setattr(gpu.Budget.__init__, "__defaults__", (clock,))
    monkeypatch.setattr(gpu, "compile_all", lambda *a: order.append("compile") or (3, 3))
    monkeypatch.setattr(gpu, "tune_kernels", tune_kernels)
    monkeypatch.setattr(gpu._check, "check", lambda *a, **k: order.append("check") or _verdict(red))
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
        "tuned.json",
    ]
    assert order == ["tune", "compile", "check"], "what is proven and measured is what was chosen"
    refused = asked["layer_norm", BF16, True]
    assert refused.startswith("not timed") if red else refused == ""
    assert asked["bias_gelu", BF16, True] == "" and asked["bias_gelu", torch.float16, True] == "asked again"
    (found,) = read_reports([tmp_path / "new"]).values()
    assert {row.kind for row in found.rows} == {"kernels", "train", "generate"}
    trained = [(row.group, row.provider) for row in found.rows if row.kind == "train"]
    assert len(trained) == len({*trained}), "two jobs of the same name"
    assert found.machine["launch_tables"] == "0123456789ab" and found.method["tuned"].startswith("3 measured and kept")
    out = capsys.readouterr().out
    summary = out[out.rindex("comparisons with float64") :].splitlines()
    assert len(summary) < 60 and "triton" in out and "best other eager" in out
    assert any("triton" in line and "untuned 1.500 ms" in line for line in summary)
    assert "[117 s left] training gpt2, batch 64" in out
    assert refusal(argv, capsys).endswith("name another file, or move that one away\n")


@pytest.mark.slow  # it proves every kernel
def test_without_a_check_each_kernel_is_proven_before_it_is_timed(tmp_path, monkeypatch):
    """And the command still fails: the proof is what it is for."""
    asked = []
    monkeypatch.setattr(gpu, "_device", lambda: CPU)
    monkeypatch.setattr(gpu, "proof_failure", lambda spec, dtype, device: asked.append(spec.name) or "it hangs")

    def kernels_run(self, device, report, roofs, *, part, gate):
        report.missing["liger"] = "not installed"
        gate(all_specs()[self.op[0]], getattr(torch, self.dtype[0]))
        yield [make_row("eager")]

    def supervised(make_jobs, budget, accept):
        if make_jobs.func is gpu.preparations:
            return [f"{gpu.CHECK}: stopped, as it did not answer"]
        return _in_process(lambda: [job for job in make_jobs() if "first case" in job.name], budget, accept)

    monkeypatch.setattr(gpu.Kernels, "run", kernels_run)
    monkeypatch.setattr(gpu, "supervise", supervised)
    result = gpu.run_all(make_report(), tmp_path, supervise.Budget(3600))
    assert result.failures == [f"{gpu.CHECK}: stopped, as it did not answer"] and set(asked) == set(all_specs())
    report = Report.read(tmp_path / "report.json")
    assert report.dropped == result.failures and report.missing == {"liger": "not installed"} and report.rows


def test_tuning_ends_within_its_time(monkeypatch, tmp_path):
    asked = {}
    machine = type("Machine", (), {"gpu": _tables.Gpu("a GPU", 90, 132, "3.7.1")})()
    monkeypatch.setenv("KERNELS_TABLES", str(tmp_path))
    monkeypatch.setattr(gpu, "arch_of", lambda device: 90)
    monkeypatch.setattr(gpu, "sm_count", lambda device: 132)
    monkeypatch.setattr(gpu._tune, "Machine", lambda device: machine)
    monkeypatch.setattr(
        gpu._tune, "survey", lambda ops, dtypes, arch, sms, quick: asked.update(ops=ops) or ["a target"]
    )
    monkeypatch.setattr(gpu._tune, "tune", lambda *a, **options: (a, options))
    ((args, options),) = gpu.tune_kernels(CPU, 77.0)
    assert args == (machine, ["a target"], tmp_path / "a-gpu.json") and options == {"quick": True, "seconds": 77.0}
    assert asked["ops"] == [*all_specs()]


def test_summary_stays_short():
    rows = [make_row("triton", op=f"op{i}") for i in range(90)]
    found = make_report(*rows)
    found.dropped = [f"job {i}" for i in range(50)]
    lines = gpu.summary(found, _verdict())
    assert len(lines) < 60 and lines[0].startswith(f"{len(all_specs())} comparisons")


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
    check, bench = (gpu._compile_case("layer_norm", torch.float32, 0, is_bench, 90, 132) for is_bench in (False, True))
    assert check > bench > 0 and check + bench == len(compiled) - 1  # the check has more layouts
    assert set(compiled) == {90}
