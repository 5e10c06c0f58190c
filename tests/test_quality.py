"""Training to a loss over several seeds: ours in this process, nanoGPT's output as it would print it."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from trainer import SMALL, TEXT, call

from bench import __main__ as bench_main
from bench import command, peer_training, quality
from bench.record import Report
from model import data
from model.training import summary
from model.training.options import preset

FLAGS = SMALL[SMALL.index("--n-layer") :]  # without the device and the text
RECORDED = """
tokens per iteration will be: 64
found vocab_size = 26 (inside meta.pkl)
number of parameters: 0.00M
step 0: train loss 3.2600, val loss 3.2500
iter 0: loss 3.2600, time 900.00ms, mfu -100.00%
iter 1: loss 3.1000, time 20.00ms, mfu -100.00%
iter 2: loss 3.0000, time 10.00ms, mfu -100.00%
iter 3: loss 2.9000, time 10.00ms, mfu -100.00%
step 4: train loss 2.5000, val loss 2.4000
saving checkpoint to out
iter 4: loss 2.4000, time 110.00ms, mfu -100.00%
iter 5: loss 2.3000, time 10.00ms, mfu 0.01%
iter 6: loss 2.2000, time 10.00ms, mfu 0.01%
iter 7: loss 2.1000, time 10.00ms, mfu 0.01%
step 8: train loss 1.5000, val loss 1.4000
iter 8: loss 1.4000, time 60.00ms, mfu 0.01%
"""


@pytest.fixture
def ran(tmp_path, monkeypatch) -> list[list[str]]:
    """The processes that are started: train.py here and now, and nanoGPT as a recording."""
    (tmp_path / "book.txt").write_text(TEXT)
    (tmp_path / "nanoGPT").mkdir()
    for name in ("train.py", "model.py", "configurator.py"):
        (tmp_path / "nanoGPT" / name).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(summary, "SAMPLE_TOKENS", 4)
    started = []

    def lines(argv, **where):
        started.append(argv)
        if argv[1] == "-c":
            yield from RECORDED.splitlines()
            return
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            code = call(*argv[2:])
        yield from out.getvalue().splitlines()
        if code:
            raise quality.Failed(code, err.getvalue().strip().removeprefix("error: "))

    monkeypatch.setattr(quality, "lines", lines)
    return started


def bench(*argv) -> int:
    options = shlex.split("--device cpu") + FLAGS
    try:
        bench_main.main(["quality", "--preset", "tiny", "--data", "book.txt", *map(str, argv), "--", *options])
    except SystemExit as exit_:
        return exit_.code
    return 0


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_two_seeds_reach_a_loss(ran, capsys, tmp_path):
    assert bench("--until-loss", 2.6, "--seeds", 2, "--runs", "runs", "--out", "quality.json") == 0
    report = Report.read(tmp_path / "quality.json")
    assert [row.metrics["seed"] for row in report.rows] == [1, 2] and len({row.key for row in report.rows}) == 1
    for seed, row in enumerate(report.rows, 1):
        found = metrics(Path("runs") / f"seed-{seed}")
        last = found[-1]
        assert json.loads((Path("runs") / f"seed-{seed}/config.json").read_text())["train"]["seed"] == seed
        assert last["reached"] == 2.6 >= last["val_loss"] and row.metrics["loss"] == last["val_loss"]
        assert row.seconds == (pytest.approx(last["elapsed_s"], rel=1e-4),)
        assert (row.metrics["step"], row.metrics["tokens"]) == (last["step"], last["tokens"])
        logged = [r for r in found if r["step_ms"]]
        gaps = np.diff([0, *(r["step"] for r in logged)])
        assert row.metrics["steps_s"] == pytest.approx(sum(gaps * [r["step_ms"] for r in logged]) / 1e3)
        assert row.metrics["steps_s"] < row.seconds[0]
        text = data.load(Path("runs") / f"seed-{seed}/data")  # one byte a character, and one end of text
        bits = last["val_loss"] / np.log(2) * len(text.val) / text.meta["val"]["bytes"]
        assert row.metrics["bits_per_byte"] == pytest.approx(bits)
    assert report.rows[0].metrics["loss"] != report.rows[1].metrics["loss"]
    assert report.rows[0].params == {"preset": "tiny", "data": "book.txt", "until_loss": 2.6,
                                     "options": shlex.join(["--device", "cpu", *FLAGS])}  # fmt: skip
    out = capsys.readouterr().out
    assert "ours, seed 2: step 00010/03000 | validation loss" in out and "ours: 2 of 2 runs, " in out and " ± " in out
    started = len(ran)
    assert bench("--until-loss", 2.6, "--seeds", 2, "--runs", "runs", "--out", "again.json") == 0  # nothing to train
    assert len(ran) == started + 2
    assert [row.seconds for row in Report.read(tmp_path / "again.json").rows] == [row.seconds for row in report.rows]


def test_loss_that_is_not_reached_is_an_error(ran, capsys, tmp_path):
    assert bench("--until-loss", 0.5, "--minutes", 0.005, "--seeds", 2, "--out", "quality.json") == 1
    rows = Report.read(tmp_path / "quality.json").rows
    assert len(rows) == 2
    for seed, row in enumerate(rows, 1):
        assert not row.seconds and row.error.startswith(f"seed {seed}: after ")
        assert "above 0.5: allow more steps, or a higher loss" in row.error
    assert "ours: 0 of 2 runs\n" in capsys.readouterr().out


def test_nanogpt_trains_by_turns_on_the_same_ids(ran, capsys, tmp_path):
    argv = ["--until-loss", 2.5, "--seeds", 2, "--nanogpt", "nanoGPT", "--runs", "runs", "--out", "quality.json"]
    assert bench(*argv) == 0
    rows = Report.read(tmp_path / "quality.json").rows
    assert [(row.provider, row.metrics["seed"]) for row in rows] == [
        ("ours", 1), ("nanogpt", 1), ("ours", 2), ("nanogpt", 2)
    ]  # fmt: skip
    theirs = rows[1]
    assert theirs.seconds == (pytest.approx(0.15),) and theirs.metrics["step"] == 4  # the first below 2.5
    assert theirs.metrics["tokens"] == 4 * 4 * 16
    given = dict(arg[2:].split("=") for arg in ran[1] if arg.startswith("--"))
    assert ran[1][3] == "1" and ran[3][3] == "2"  # the seeds
    for name, value in {
        "n_layer": "1", "n_embd": "16", "block_size": "16", "batch_size": "4", "dropout": "0.1", "bias": "True",
        "learning_rate": "0.01", "min_lr": "0.001", "warmup_iters": "2", "eval_interval": "10", "eval_iters": "3",
        "max_iters": "3000", "lr_decay_iters": "3000", "gradient_accumulation_steps": "1", "device": "cpu",
        "dtype": "float32", "compile": "False", "beta2": "0.99",
    }.items():  # fmt: skip
        assert given[name] == value, name
    folder, ours = Path(given["dataset"]), data.load(Path("runs/seed-1/data"))
    for name, ids in (("train", ours.train), ("val", ours.val)):
        assert np.array_equal(np.fromfile(folder / f"{name}.bin", np.uint16), ids[:])
    assert pickle.loads((folder / "meta.pkl").read_bytes()) == {"vocab_size": ours.tokenizer.n_vocab}
    assert not list(Path("nanoGPT").glob("*/"))
    assert "nanogpt: 2 of 2 runs, 0.150 ± " in capsys.readouterr().out


def test_nanogpt_gets_the_same_time(ran, tmp_path):
    """A trial of 20 steps comes first: 4 steps of it in 0.05 s, and 0.1 s of evaluation."""
    assert bench("--minutes", 0.01, "--seeds", 1, "--nanogpt", "nanoGPT", "--out", "quality.json") == 0
    trial, run = (dict(arg[2:].split("=") for arg in argv if arg.startswith("--")) for argv in ran[1:])
    assert (trial["max_iters"], trial["eval_interval"]) == ("20", "20")
    assert int(run["max_iters"]) % int(run["eval_interval"]) == 0 and run["max_iters"] == run["lr_decay_iters"]
    theirs = Report.read(tmp_path / "quality.json").rows[1]
    assert theirs.metrics["step"] == 8 and theirs.metrics["loss"] == 1.4  # the last evaluation


def test_loss_is_converted_between_tokenizers(ran, monkeypatch, tmp_path):
    monkeypatch.setattr(sys.modules[__name__], "FLAGS", [*FLAGS, "--tokenizer", "gpt2"])
    argv = ["--until-loss", 8.0, "--seeds", 1, "--nanogpt", "nanoGPT", "--runs", "runs", "--out", "quality.json"]
    assert bench(*argv) == 0
    ours, theirs = Report.read(tmp_path / "quality.json").rows
    text, chars = data.load(Path("runs/seed-1/data")), data.load(Path("runs/nanogpt-1/chars"))
    goal = 8.0 * len(text.val) / text.meta["val"]["bytes"] / (len(chars.val) / chars.meta["val"]["bytes"])
    assert 1.4 < goal < 2.4 and theirs.metrics["loss"] == 1.4
    assert theirs.metrics["bits_per_byte"] == pytest.approx(
        theirs.metrics["loss"] / np.log(2) * len(chars.val) / chars.meta["val"]["bytes"]
    )
    assert theirs.metrics["bits_per_byte"] < ours.metrics["bits_per_byte"] < 8.0


def test_recorded_output_is_read():
    """A step takes 10 ms, the evaluations 100 and 50 ms; the first evaluation and its step are not counted as read."""
    first, second = peer_training.evaluations(RECORDED.splitlines())
    assert (first.step, first.loss, second.step, second.loss) == (4, 2.4, 8, 1.4)
    assert first.steps_s == pytest.approx(0.01 + 0.02 + 2 * 0.01) and first.seconds == pytest.approx(0.05 + 0.1)
    assert second.steps_s == pytest.approx(0.09) and second.seconds == pytest.approx(0.09 + 0.1 + 0.05)
    nan = ["step 2: train loss nan, val loss nan", "iter 2: loss nan, time 5.00ms, mfu 0.01%"]
    (lost,) = peer_training.evaluations(nan)
    assert np.isnan(lost.loss)
    assert list(peer_training.evaluations(["step 2: train loss 1.0, val loss 1.0"])) == []


def test_plan_ends_with_an_evaluation():
    trial = peer_training.Evaluation(20, 3.0, seconds=25.0, steps_s=20.0)
    assert peer_training.plan(2.0, trial, 50) == (104, 52)  # 104 steps and 2 evaluations of 5 s in 120 s
    assert peer_training.plan(0.5, trial, 50) == (25, 25)
    assert peer_training.plan(0.01, trial, 50) == (1, 1)


def test_failures_of_a_run_are_told(ran, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(sys.modules[__name__], "FLAGS", [*FLAGS, "--lr", "-1"])
    assert bench("--until-loss", 2.0, "--seeds", 2) == 2  # wrong for all seeds
    assert capsys.readouterr().err == "error: --lr must be a number above 0, got -1.0\n" and len(ran) == 1
    monkeypatch.setattr(sys.modules[__name__], "FLAGS", [*FLAGS[:-2], "--lr", "1e30", "--grad-clip", "0"])
    assert bench("--until-loss", 2.0, "--seeds", 1, "--out", "quality.json") == 1
    (row,) = Report.read(tmp_path / "quality.json").rows
    assert row.error.startswith("seed 1: ") and "not finite" in row.error


def test_lines_of_a_process():
    code = "import sys; print('one'); print('error: bad\\nmend it', file=sys.stderr); sys.exit(2)"
    read = []
    with pytest.raises(quality.Failed, match=r"^bad\nmend it$") as failed:
        read.extend(quality.lines([sys.executable, "-c", code]))
    assert failed.value.code == 2
    endless = quality.lines(
        [sys.executable, "-c", "import itertools\nfor i in itertools.count(): print(i, flush=True)"]
    )
    assert next(endless) == "0"
    endless.close()  # returns: the process has ended


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "give --until-loss, --minutes, or both"),
        (["--until-loss", "-1"], "--until-loss must be above 0, got -1"),
        (["--minutes", "nan"], "--minutes must be above 0, got nan"),
        (["--minutes", "1", "--seeds", "0"], "--seeds must be above 0, got 0"),
        (["--minutes", "1", "--nanogpt", "."], "it has no train.py"),
        (["--minutes", "1", "--", "--seed", "3"], "--seed cannot be passed on to train.py: give --seeds N before"),
        (["--minutes", "1", "--", "--out=a"], "--out cannot be passed on to train.py"),
    ],
)
def test_bad_arguments_are_refused(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        bench_main.main(["quality", *argv])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and words in err and err.count("\n") <= 2, err


def test_command_has_no_paths_of_this_machine():
    typed = shlex.split("quality --data /home/a/input.txt --runs /home/a/runs --minutes 2 -- --lr 1e-3")
    assert command.typed(typed) == "python -m bench quality --data input.txt --minutes 2 -- --lr 1e-3"


def test_equal_rate_for_a_constant_schedule(tmp_path):
    """nanoGPT's constant rate has no warm-up: its decay to the same rate has."""
    (tmp_path / "book.txt").write_text(TEXT)
    text = data.prepare(tmp_path / "book.txt", tmp_path / "data", "char")
    cfg = preset("tiny")
    for schedule, rate in (("constant", cfg.lr), ("cosine", cfg.min_lr)):
        made = peer_training.arguments(
            replace(cfg, schedule=schedule, dtype="tf32", device="cpu"), text, tmp_path, seed=1, steps=9, eval_every=3
        )
        assert f"--min_lr={rate}" in made and "--dtype=float32" in made
