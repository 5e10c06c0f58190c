"""The trainer from the outside: options in, folder and words out."""

from __future__ import annotations

import gzip
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import exit_code
from trainer import SMALL, TEXT, call, losses, refused, rows, state

import model.training.log
import model.training.step
import train
from model import checkpoint, config, data, evaluate
from model.cli import UserError, run
from model.generate import generate
from model.gpt import GPT
from model.training import memory, options, parallel, summary
from model.training.memory import MemoryModel
from model.training.optim import adamw
from model.training.options import ALIASES, TrainConfig, preset

# A run


def test_run_learns_and_fills_its_folder(here, capsys):
    assert call(*SMALL, "--steps", 40) == 0
    folder = here / "runs/tiny"
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "tokenizer", "data", "metrics.jsonl", "checkpoints", "sample.txt", "samples.jsonl",
        "report.html", "lock",
    }  # fmt: skip

    training = [row for row in rows(folder) if row["loss"] is not None]
    validation = [row for row in rows(folder) if row["val_loss"] is not None]
    assert [row["step"] for row in training] == [1, 5, 10, 15, 20, 25, 30, 35, 40]
    assert [row["step"] for row in validation] == [10, 20, 30, 40]
    assert training[0]["loss"] == pytest.approx(math.log(26), abs=0.3)  # the alphabet's size, nothing learnt yet
    assert training[-1]["loss"] < 2.5 and validation[-1]["val_loss"] < 2.5
    keys = {"step", "tokens", *model.training.log.COLUMNS, "elapsed_s"}
    for row in rows(folder):
        assert set(row) == keys and row["tokens"] == row["step"] * 4 * 16
    for row in training:
        assert row["step_ms"] > 0 and row["tok_per_s"] == pytest.approx(64e3 / row["step_ms"])
        assert row["peak_mib"] > 10 and row["mfu"] is None and row["skipped"] == 0
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in samples] == [10, 20, 30, 40]
    assert all(row["text"].startswith("CHAPTER I. ") and len(row["text"]) == 14 for row in samples)

    best = checkpoint.load(folder, "best").state
    assert best["val_loss"] == min(row["val_loss"] for row in validation) == best["best_val_loss"]
    sample = (folder / "sample.txt").read_text()
    assert sample.startswith("CHAPTER I. ") and len(sample) == len("CHAPTER I. ") + 40 + 1

    out = capsys.readouterr().out
    assert "step 00005/00040 | loss " in out and " tok/s | eta " in out and "mfu" not in out
    assert "step 00040/00040 | validation loss" in out
    assert sample.strip() in out
    loss = best["val_loss"]
    assert f"validation loss {loss:.4f} | perplexity {math.exp(loss):.2f} | {loss / math.log(2):.3f} bits" in out
    in_browser = "in a browser: python -m model.explore runs/tiny runs/tiny/explore.html\n"
    assert out.endswith(f'more text: python -m model.generate runs/tiny --prompt "CHAPTER I. "\n{in_browser}')


def test_progress_lines_with_and_without_a_terminal(here, monkeypatch):
    """A known GPU would add its MFU; times are not compared."""
    lines = []
    monkeypatch.setattr(model.training.log.LiveLine, "update", lambda self, text: lines.append(text))
    monkeypatch.setattr(model.training.log, "peak_flops", lambda device, dtype: 1e9)
    assert call(*SMALL, "--steps", 15, "--out", "a") == 0
    number = r"[\d.,]+"
    pattern = (
        rf"step 00015/00015 \| loss {number} \| lr 1.1e-03 \| {number} ms \| {number} tok/s \| mfu {number} \| eta 0:00"
    )
    assert re.fullmatch(pattern, lines[-1])
    monkeypatch.setattr(model.training.log.LiveLine, "__enter__", lambda self: setattr(self, "is_live", True) or self)
    assert call(*SMALL, "--steps", 15, "--out", "b") == 0
    start = (
        rf"step 00015/00015 \| loss {number} \| val {number} \| elapsed [\d:]+ \| eta 0:00 \| lr 1.1e-03 \| {number} ms"
    )
    assert re.match(start, lines[-1])
    assert " val " not in lines[4]  # nothing is measured before step 10


def test_clock():
    assert [model.training.log.clock(s) for s in (0, 9.6, 61, 3599, 3600, 90061)] == [
        "0:00", "0:10", "1:01", "59:59", "1:00:00", "25:01:01"
    ]  # fmt: skip


def test_config_json_holds_options_and_model(here):
    assert call(*SMALL, "--steps", 2, "--seed", 7) == 0
    stored = json.loads((here / "runs/tiny/config.json").read_text())
    assert stored["model"]["vocab_size"] == len(set(TEXT)) + 1
    assert stored["train"]["seed"] == 7 and stored["train"]["dtype"] == "float32"
    assert options.stored_config(here / "runs/tiny") == replace(
        preset("tiny"), data=Path("book.txt"), n_layer=1, n_head=2, n_embd=16, context=16, batch_size=4, dropout=0.1,
        lr=1e-2, min_lr=1e-3, warmup_steps=2, eval_every=10, eval_windows=12, save_every=10, log_every=5, steps=2,
        seed=7, device="cpu", dtype="float32", sample_tokens=3,
    )  # fmt: skip


def test_seed_determines_the_run(here):
    for out, seed in [("a", 1), ("b", 1), ("c", 2)]:
        assert call(*SMALL, "--steps", 12, "--out", out, "--seed", seed) == 0
    assert losses(here / "a") == losses(here / "b") != losses(here / "c")
    assert state(here / "a", 12) == state(here / "b", 12)


def test_logging_interval_does_not_change_training(here):
    assert call(*SMALL, "--steps", 12, "--out", "a") == 0
    assert call(*SMALL, "--steps", 12, "--out", "b", "--eval-every", 1, "--log-every", 1, "--save-every", 1) == 0
    assert state(here / "a", 12) == state(here / "b", 12)


def test_accumulation_equals_the_large_batch(here):
    """One step of 3 x 4 sequences against clipping and AdamW on all 12 at once."""
    flags = ["--dropout", 0, "--warmup-steps", 0, "--steps", 1, "--seed", 5]
    assert call(*SMALL, *flags, "--batch-size", 4, "--grad-accum", 3) == 0
    tokens = data.load(here / "runs/tiny/data")
    idx, targets = data.get_batch(tokens.train, context=16, seed=5, step=0, rows=range(12))
    assert len(idx.unique(dim=0)) == 12

    saved = checkpoint.load(here / "runs/tiny")
    torch.manual_seed(5)
    model = GPT(config.GPTConfig.from_dict(saved.state["model"]))
    optimizer = adamw(model, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    loss = model(idx, targets)[1]
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    assert rows(here / "runs/tiny")[0]["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert rows(here / "runs/tiny")[0]["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        # Moments, not weights: the first update of AdamW is lr * sign(gradient), whatever the gradient's size.
        expected = optimizer.state[parameter]["exp_avg"]
        torch.testing.assert_close(saved.parts["optimizer"][f"exp_avg/{name}"], expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(("clip", "expected"), [("0.01", 0.01), ("0", None)])
def test_gradient_is_clipped_and_unclipped_norm_logged(here, clip, expected):
    assert call(*SMALL, "--steps", 1, "--grad-clip", clip) == 0
    norm = rows(here / "runs/tiny")[0]["grad_norm"]
    moments = checkpoint.load(here / "runs/tiny").parts["optimizer"]
    clipped = math.sqrt(sum(t.double().square().sum().item() for k, t in moments.items() if k.startswith("exp_avg/")))
    assert norm > 0.1
    assert clipped / 0.1 == pytest.approx(expected or norm, rel=1e-3)  # exp_avg = (1 - beta1) * gradient


def test_best_weights_write_the_sample_and_report(here, capsys, monkeypatch):
    # ten good steps, then ten that spoil the weights
    monkeypatch.setattr(TrainConfig, "lr_at", lambda self, step: 1e-2 if step <= 10 else 3.0)
    assert call(*SMALL, "--steps", 20, "--save-every", 1000) == 0
    validation = {row["step"]: row["val_loss"] for row in rows(here / "runs/tiny") if row["val_loss"]}
    assert validation[10] < validation[20]
    assert checkpoint.list_checkpoints(here / "runs/tiny") == ["step-00000010", "step-00000020"]
    out = capsys.readouterr().out
    assert f"the text above is by the best weights, of step 10\nvalidation loss {validation[10]:.4f}" in out
    model, tokenizer = checkpoint.load_model(here / "runs/tiny", name="step-00000010")
    ids = generate(
        model, tokenizer.encode("CHAPTER I. "), tokens=40, temperature=summary.SAMPLE_TEMPERATURE, top_k=40, seed=1337
    )
    assert (here / "runs/tiny/sample.txt").read_text() == "CHAPTER I. " + tokenizer.decode(list(ids)) + "\n"


def test_text_without_prompt_letters_gets_a_sample(here, capsys):
    (here / "book.txt").write_text("0123456789 " * 100)
    assert call(*SMALL, "--steps", 2) == 0
    assert len((here / "runs/tiny/sample.txt").read_text().strip()) > 10
    assert 'model.generate runs/tiny --prompt ""' in capsys.readouterr().out


# Options


def test_nanogpt_cpu_example_is_expressible(monkeypatch):
    flags = (
        "--preset tiny --n-layer 4 --n-head 4 --n-embd 128 --context 64 --batch-size 12 --steps 2000 --dropout 0 "
        "--lr 1e-3 --min-lr 1e-4 --warmup-steps 100 --beta2 0.99"
    )
    seen = []
    run(seen.append, TrainConfig, prog="train.py", default=train.default_config, aliases=ALIASES, argv=flags.split())
    wanted = dict(
        tokenizer="char", n_layer=4, n_head=4, n_embd=128, context=64, batch_size=12, grad_accum=1, steps=2000,
        dropout=0.0, lr=1e-3, min_lr=1e-4, warmup_steps=100, beta1=0.9, beta2=0.99, weight_decay=0.1, grad_clip=1.0,
    )  # fmt: skip
    assert {name: getattr(seen[0], name) for name in wanted} == wanted


def test_char_preset_is_nanogpts_gpu_example():
    cfg = preset("shakespeare-char")
    assert (cfg.n_layer, cfg.n_head, cfg.n_embd, cfg.context, cfg.dropout, cfg.bias) == (6, 6, 384, 256, 0.2, False)
    assert (cfg.batch_size, cfg.grad_accum, cfg.steps, cfg.warmup_steps, cfg.eval_every) == (64, 1, 5000, 100, 250)
    assert (cfg.lr, cfg.min_lr, cfg.beta1, cfg.beta2, cfg.weight_decay, cfg.grad_clip) == (
        1e-3,
        1e-4,
        0.9,
        0.99,
        0.1,
        1,
    )


def test_presets_are_named_and_valid():
    names = options.preset_names()
    assert {"tiny", "shakespeare-char", "gpt2-124M", "gpt2-medium", "gpt2-large", "gpt2-xl"} <= set(names)
    assert {f"gpt2-124M-{size}GB" for size in (6, 8, 12, 24)} <= set(names)
    for name in names:
        cfg = preset(name)
        cfg.check()
        tokenizer = "gpt2" if name.startswith("gpt2") else "bpe:4096" if name == "first-run" else "char"
        assert cfg.preset == name and cfg.tokenizer == tokenizer
        if cfg.tokenizer == "gpt2" and name != "gpt2-first-run":
            assert cfg.sequences * cfg.context == 2**19
    for name in ("gpt2-medium", "gpt2-large", "gpt2-xl"):
        assert preset(name).gpt_config(50257) == config.PRESETS[name]


@pytest.mark.parametrize(
    ("argv", "has_gpu", "expected"),
    [
        ([], False, "first-run"),
        ([], True, "gpt2-first-run"),
        (["--device", "cpu"], True, "first-run"),
        (["--preset", "shakespeare-char"], True, "shakespeare-char"),
        (["--preset=gpt2-xl"], False, "gpt2-xl"),
    ],
)
def test_defaults_come_from_the_preset_or_the_machine(argv, has_gpu, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(options, "gpu_problem", lambda: None)
    assert options.default_config(argv) == preset(expected)


def test_command_line_overrides_the_preset(monkeypatch):
    seen = []
    argv = ["--lr", "5e-4", "--preset", "shakespeare-char"]
    run(seen.append, TrainConfig, prog="train.py", default=options.default_config, argv=argv)
    assert seen == [replace(preset("shakespeare-char"), lr=5e-4)]


def test_user_preset_extends_another(here):
    (here / "mine.toml").write_text('preset = "tiny"\nn_layer = 1\nlr = 2e-3\ndata = "book.txt"\n')
    cfg = preset("mine.toml")
    assert (cfg.n_layer, cfg.lr, cfg.data) == (1, 2e-3, Path("book.txt"))
    assert replace(cfg, n_layer=4, lr=3e-3, data=Path("Book"), preset="tiny") == preset("tiny")
    assert call(*SMALL, "--preset", "mine.toml", "--steps", 1) == 0
    assert (here / "runs/mine/sample.txt").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("n_layer = ", "mine.toml is not TOML"),
        ('preset = "tiny"\nlearning_rate = 1.0', "mine.toml: unknown option 'learning_rate'"),
        ('preset = "tiny"\nn_layer = "4"', "mine.toml: n_layer must be int, got '4'"),
        ('preset = "tiny"\nbatch_size = "auto"', "mine.toml: batch_size must be int"),
        ('preset = "tinny"', "unknown preset 'tinny'"),
        ('shape = "gpt3"', "mine.toml: unknown shape 'gpt3'"),
        ("n_layer = 4", "mine.toml lacks options"),
    ],
)
def test_unreadable_preset_is_refused(here, capsys, content, words):
    (here / "mine.toml").write_text(content)
    refused(here, capsys, ["--preset", "mine.toml"], words)
    (here / "mine.toml").unlink()
    refused(here, capsys, ["--preset", "mine.toml"], "no such file or folder: mine.toml")


# Where a run goes


def test_second_run_takes_the_next_free_folder(here):
    for _ in range(3):
        assert call(*SMALL, "--steps", 1) == 0
    assert sorted(path.name for path in (here / "runs").iterdir()) == ["tiny", "tiny-2", "tiny-3"]


def test_empty_out_folder_is_accepted(here):
    (here / "empty").mkdir()
    assert call(*SMALL, "--steps", 1, "--out", "empty") == 0
    assert (here / "empty/sample.txt").exists()


# Spikes


def with_spike(monkeypatch, at: int) -> None:
    """A step with a loss that is a hundred times too high, once the window is full."""
    forward, calls = GPT.forward, []

    def spoil(self, idx, targets=None, **options):
        logits, loss = forward(self, idx, targets, **options)
        if self.training:
            calls.append(1)
            loss = loss * 100 if len(calls) == at else loss
        return logits, loss

    monkeypatch.setattr(GPT, "forward", spoil)


def test_documents_are_apart_in_validation_too(here, capsys):
    (here / "books").mkdir()
    for i in range(60):
        (here / f"books/{i:02}.txt").write_text(f"The dog {i} sat by the log, and the cat sat on the mat.\n")
    assert call(*SMALL, "--data", "books", "--document-mask", "--steps", 10) == 0
    folder = here / "runs/tiny"
    (loss,) = [row["val_loss"] for row in rows(folder) if row["val_loss"] is not None]
    trained, tokenizer = checkpoint.load_model(folder, name="last")
    val = data.load(folder / "data").val
    measured = [
        evaluate.evaluate(trained, val, context=16, batch_size=4, max_windows=12, document_id=document_id)
        for document_id in (tokenizer.eot_id, None)
    ]
    assert measured[0] == pytest.approx(loss, rel=1e-5) != pytest.approx(measured[1], rel=1e-5)
    capsys.readouterr()
    assert exit_code(evaluate.main, evaluate.EvaluateConfig, "runs/tiny", "--max-windows", 12, "--json") == 0
    assert json.loads(capsys.readouterr().out)["results"]["float32"]["loss"] == pytest.approx(loss, rel=1e-5)


def test_many_micro_steps_are_no_graph():
    world = parallel.World(0, 1, 0, torch.device("cuda", 0))
    tiny = preset("tiny")  # 4 layers
    few, many = (replace(tiny, grad_accum=n) for n in (256, 257))
    wanted = [cfg.uses_graph(world) for cfg in (few, many, replace(many, graph="on"), replace(few, graph="off"))]
    assert wanted == [True, False, True, False]


def test_spike_is_skipped(here, monkeypatch):
    with_spike(monkeypatch, 140)
    assert call(*SMALL, "--steps", 150, "--spikes", "skip", "--spike-z", 20) == 0
    skipped = {row["step"]: row["skipped"] for row in rows(here / "runs/tiny") if row["skipped"] is not None}
    assert (skipped[135], skipped[140], skipped[150]) == (0, 1, 1)


def test_spike_ends_the_run(here, capsys, monkeypatch):
    with_spike(monkeypatch, 137)
    assert call(*SMALL, "--steps", 150, "--spikes", "stop", "--spike-z", 20) == 1
    err = capsys.readouterr().err
    assert "stands out from the steps before at step 137" in err and "--spikes skip skips such a step" in err
    assert "step-00000130 in runs/tiny is good" in err
    details = checkpoint.load(here / "runs/tiny", "failed").state["details"]
    (found,) = details["processes"]
    assert details["step"] == 137 and found["losses"][0] < 5 and found["gradients_not_finite"] == []


def test_weights_that_are_not_finite_end_the_run(here, capsys, monkeypatch):
    """The last update spoils them, after a loss and a gradient that were finite: the checkpoint before it stays."""
    lr_at = TrainConfig.lr_at
    monkeypatch.setattr(TrainConfig, "lr_at", lambda self, step: math.nan if step == 20 else lr_at(self, step))
    assert call(*SMALL, "--steps", 20, "--keep-last", 1) == 1
    err = capsys.readouterr().err
    assert "the weights are not finite after step 20" in err and "step-00000010 in runs/tiny is good" in err
    assert call(*SMALL, "--steps", 30, "--eval-every", 20, "--save-every", 30, "--out", "other") == 1
    assert "the validation loss is nan at step 20" in capsys.readouterr().err


def test_float16_overflow_is_skipped_and_metrics_stay_json(here, monkeypatch):
    monkeypatch.setattr(model.training.step, "FIRST_SCALE", 2.0**40)
    assert call(*SMALL, "--dtype", "float16", "--steps", 30, "--log-every", 1) == 0
    found = [row for row in rows(here / "runs/tiny") if row["loss"] is not None]
    assert "Infinity" not in (here / "runs/tiny/metrics.jsonl").read_text()
    assert found[0]["grad_norm"] is None and found[0]["skipped"] == 1
    assert 5 < found[-1]["skipped"] < 30 and found[-1]["grad_norm"] > 0
    assert found[-1]["loss"] < found[0]["loss"]


# Extras


def test_profile_traces_three_steps(here, capsys):
    assert call(*SMALL, "--steps", 10, "--profile") == 0
    assert "trace of 3 steps: runs/tiny/trace.json.gz" in capsys.readouterr().out
    with gzip.open(here / "runs/tiny/trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    assert sum(event.get("name", "").startswith("ProfilerStep#") for event in events) == 3
    assert any("gelu" in event.get("name", "") for event in events)


def test_batch_size_auto_keeps_sequences_per_step(here, capsys, monkeypatch):
    """tiny's 16 sequences, on a machine that has room for few."""
    flags = [x for x in SMALL if x not in ("--batch-size", "4")]
    assert call(*flags, "--batch-size", "auto", "--steps", 2, "--out", "a") == 0
    cfg = options.stored_config(here / "a")
    assert (cfg.batch_size, cfg.grad_accum) == (16, 1)
    monkeypatch.setattr(MemoryModel, "largest_batch", lambda self, limit: 7)
    assert call(*flags, "--batch-size", "auto", "--steps", 2, "--out", "b") == 0
    cfg = options.stored_config(here / "b")
    assert (cfg.batch_size, cfg.grad_accum) == (4, 4)
    assert call("--resume", "b", "--batch-size", "auto", "--steps", 3) == 0
    monkeypatch.setattr(MemoryModel, "largest_batch", lambda self, limit: 0)
    refused(
        here, capsys, [*flags, "--batch-size", "auto"], "do not fit into memory\nno smaller --batch-size should fit"
    )


def test_memory_is_predicted_before_the_first_step(here, capsys):
    assert call(*SMALL, "--steps", 1) == 0
    assert re.search(r"^memory: \d+ MiB predicted of [\d.]+ GiB: \d+ parameters", capsys.readouterr().out, re.M)


def test_step_beyond_memory_is_refused_before_it_starts(here, capsys, monkeypatch):
    """The message names a batch that fits; --force starts anyway."""
    monkeypatch.setattr(memory, "device_bytes", lambda device: 2**30 + 2**20)
    flags = [*SMALL, "--batch-size", 8192, "--context", 64]
    refused(
        here,
        capsys,
        flags,
        "of memory, and the machine has 1.0 GiB",
        "use --batch-size ",
        "it should fit",
        "(--force starts",
    )
    monkeypatch.setattr(memory, "device_bytes", lambda device: 2**20)
    assert call(*SMALL, "--steps", 1, "--force") == 0


def test_gpu_options_are_refused_on_a_cpu(here, capsys):
    refused(here, capsys, [*SMALL, "--graph", "on"], "--graph on needs a CUDA device")
    refused(here, capsys, [*SMALL, "--memory-snapshot"], "--memory-snapshot records a GPU's memory")
    refused(here, capsys, [*SMALL, "--dtype", "tf32"], "use --dtype float32")
    refused(here, capsys, [*SMALL, "--parallel", "fsdp"], "--parallel fsdp needs several processes")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"parallel": "fsdp", "optimizer": "muon"}, "--optimizer muon works on whole matrices"),
        ({"parallel": "fsdp", "compile": True}, "--compile does not work with --parallel fsdp"),
        ({"graph": "on", "device": "cuda"}, "--graph on is for one process"),
        ({}, "torchrun --max-restarts needs --out or --resume"),
    ],
)
def test_options_refused_with_several_processes(changes, words, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    device = torch.device(changes.get("device", "cpu"))
    with pytest.raises(UserError, match=words):
        replace(preset("tiny"), **changes).check_machine(parallel.World(0, 2, 0, device))
    replace(preset("tiny"), out=Path("a")).check_machine(parallel.World(0, 2, 0, torch.device("cpu")))


@pytest.mark.parametrize(
    ("capability", "expected"),
    [(None, "float32"), ((6, 1), "float32"), ((7, 5), "float16"), ((8, 0), "bfloat16"), ((12, 0), "bfloat16")],
)
def test_capability_decides_the_dtype(capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device = torch.device("cpu" if capability is None else "cuda")
    assert options.pick_dtype("auto", device) == expected
    assert options.pick_dtype("float32", device) == "float32"


def test_bpe_prompt_has_no_trailing_space(here, capsys):
    """A space alone is a token that stands before runs of spaces: the sample would be one."""
    assert call(*SMALL, "--tokenizer", "gpt2", "--steps", 1) == 0
    assert '--prompt "CHAPTER I."\n' in capsys.readouterr().out
    assert (here / "runs/tiny/sample.txt").read_text().startswith("CHAPTER I.")
