"""The benchmarks of the whole model: who is timed, who must not be, and what the figures are made of."""

import functools
import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench import generate, peer_models, train_step
from bench.record import CONTROL, Row
from bench.timing import Measured
from kernels._triton import HAS_TRITON
from model.cli import UserError
from model.config import GPTConfig
from model.kv_cache import KVCache
from model.training import memory

CPU = torch.device("cpu")
SMALL = {"vocab_size": 61, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs triton, which is published for Linux")


@pytest.fixture
def no_profiler(monkeypatch):
    """Memory by a number: the profiler takes a second."""

    def peak(call, device):
        call()
        return 2**20

    monkeypatch.setattr(train_step, "peak", peak)


def _train(providers, missing=None, *, batches=(2,), overrides=None, **options):
    missing = {} if missing is None else missing
    overrides = SMALL | (overrides or {})
    groups = train_step.run(
        CPU, "tiny", batches, 16, torch.float32, missing, providers=providers, seconds=0.0, overrides=overrides,
        **options,
    )  # fmt: skip
    return [{row.provider: row for row in rows} for rows in groups]


# --- training --------------------------------------------------------------------------------------------------------


def test_a_training_step_is_timed_and_its_memory_measured():
    missing = {}
    (rows,) = _train(["eager", "hf", "triton", "triton+graph", "trainer", "hf+liger", "nanogpt"], missing)
    assert set(rows) == {"eager", "hf", "trainer", CONTROL} and not any(row.error for row in rows.values())
    assert missing.keys() == {"triton", "triton+graph", "hf+liger", "nanogpt"}
    assert missing["triton"] == "needs a CUDA device" and "nanoGPT" in missing["nanogpt"]
    eager = rows["eager"]
    changed = " ".join(f"{name}={value}" for name, value in SMALL.items())
    assert eager.group == f"tiny {changed} batch=2 context=16 float32 wall"
    assert eager.metrics["tokens_per_s"] == pytest.approx(32 / eager.ms() * 1e3) and eager.metrics["interleaved"] == 1
    assert "mfu" not in eager.metrics and "predicted_mib" not in rows["hf"].metrics
    sizes = {name.removesuffix("_mib"): size for name, size in eager.metrics.items() if name.endswith("_mib")}
    assert sizes["gradients"] == sizes["parameters"] == pytest.approx(sizes["optimizer"] / 2, rel=0.01)
    assert sizes["peak"] == sum(sizes[part] for part in ("parameters", "optimizer", "activations", "workspace"))
    assert sizes["peak"] == pytest.approx(sizes["predicted"], rel=0.1)
    predicted = memory.memory(GPTConfig(**SMALL), 2, 16, torch.float32, "eager", card=0)
    assert sizes["activations"] == pytest.approx(predicted.activations / 2**20, rel=0.02)
    json.dumps(eager.metrics)


@needs_triton
def test_each_rung_runs_its_kernels_and_computes_the_same_losses(no_profiler):
    """Where kernels cannot be timed they can still be run: the gate holds on every rung."""
    config = GPTConfig(**SMALL)
    task = train_step._Task(config, 1, 8, torch.float32, CPU, None)
    norms = {"layer_norm_fwd", "layer_norm_bwd", "add_layer_norm_fwd", "add_layer_norm_bwd"}
    attention = {"attention_fwd", "attention_bwd"}
    loss = {"linear_cross_entropy_fwd", "linear_cross_entropy_bwd"}

    class Seen(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = set()

        def __torch_dispatch__(self, fn, types, args=(), kwargs=None):
            if fn.namespace == "gpt2":
                self.names.add(fn.name().removeprefix("gpt2::"))
            return fn(*args, **(kwargs or {}))

    proof, ops = train_step._Proof(), {}
    for name in (name for name in train_step.LADDER if name not in ("compile", "triton+graph", "trainer")):
        step = train_step._prepare(name, task, proof)
        with Seen() as seen:
            step()
        ops[name] = seen.names
    assert ops["plain"] == ops["eager"] == set()
    kept = {name: metrics["activations_mib"] for name, metrics in proof.metrics.items()}
    assert kept["plain"] > kept["eager"]  # the probabilities of every head
    gelu = ops["+gelu"] - ops["+layer_norm"]
    assert ops["+attention"] == attention and ops["+layer_norm"] == attention | norms
    assert gelu and all("gelu" in name for name in gelu) and ops["triton"] == attention | norms | gelu | loss
    assert list(proof.losses) == list(ops) and all(a > b > c for a, b, c in proof.losses.values())


@pytest.mark.parametrize("wrong", ["value", "gradient"])
def test_another_loss_is_not_timed(wrong, no_profiler, monkeypatch):
    right = peer_models.transformers_loss

    def loss(theirs, idx, targets):
        y = right(theirs, idx, targets)
        return 1.001 * y if wrong == "value" else 2 * y.detach() - y

    monkeypatch.setattr(peer_models, "transformers_loss", loss)
    (rows,) = _train(["eager", "hf"])
    assert rows["hf"].error.startswith("computes another loss: 4.") and "eager has 4." in rows["hf"].error
    assert rows["hf"].seconds == () and rows["eager"].seconds


def test_the_gate_takes_rounding_and_nothing_more():
    proof = train_step._Proof()
    check = functools.partial(train_step._check, "b", proof=proof)
    train_step._check("a", [10.0, 9.5, 9.0], torch.float32, proof)
    check([10.00009, 9.0, 9.0005], torch.float32)
    check([10.009, 9.0, 9.0], torch.bfloat16)
    for losses in ([10.00011, 9.0, 9.0], [10.0, 9.0, 9.0011], [float("nan")] * 3):
        with pytest.raises(train_step._Refused, match="computes another loss"):
            check(losses, torch.float32)


def test_a_failure_is_a_row_and_the_others_go_on(no_profiler, monkeypatch):
    def no_compiler(model):
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(torch, "compile", no_compiler)
    for rows in _train(["compile", "eager"], batches=[1, 2]):
        assert rows["compile"].error == "RuntimeError: no compiler" and not rows["compile"].seconds
        assert rows["eager"].seconds


@pytest.mark.parametrize("short", ["foreseen", "while timing", "while preparing"])
def test_one_after_another_where_memory_is_short(short, no_profiler, monkeypatch):
    together, measure = [], train_step.measure

    def limited(makers, *args, **options):
        if len(makers) > 1:
            together.append(list(makers))
            if short == "while timing":
                raise torch.OutOfMemoryError("CUDA out of memory")
            return Measured("wall", failed={"eager": "OutOfMemoryError: CUDA out of memory"})
        return measure(makers, *args, **options)

    monkeypatch.setattr(train_step, "measure", limited)
    if short == "foreseen":
        monkeypatch.setattr(train_step, "_fit_together", lambda task, providers: False)
    (rows,) = _train(["plain", "eager"])
    assert together == ([] if short == "foreseen" else [["plain", "eager"]])
    assert rows["plain"].metrics["interleaved"] == rows["eager"].metrics["interleaved"] == 0.0
    assert len(rows[CONTROL].seconds) == 2 * len(rows["eager"].seconds) and not any(r.error for r in rows.values())


def test_nanogpt_is_loaded_from_its_folder_with_our_weights(no_profiler, tmp_path, capsys):
    """A model.py that has nanoGPT's names."""
    (tmp_path / "model.py").write_text(
        "from dataclasses import dataclass\n"
        "from model import config, gpt\n"
        "@dataclass\n"
        "class GPTConfig:\n"
        "    block_size: int; vocab_size: int; n_layer: int; n_head: int; n_embd: int; dropout: float; bias: bool\n"
        "class GPT(gpt.GPT):\n"
        "    def __init__(self, c):\n"
        "        print('number of parameters')\n"
        "        super().__init__(config.GPTConfig(c.vocab_size, c.block_size, c.n_embd, c.n_layer, c.n_head,\n"
        "                                          bias=c.bias))\n"
    )
    missing = {}
    (rows,) = _train(["eager", "nanogpt", "hf"], missing, nanogpt=tmp_path, overrides={"bias": False})
    assert rows["nanogpt"].seconds and capsys.readouterr().out == ""
    assert set(rows) == {"eager", "nanogpt", CONTROL} and "has biases" in missing["hf"]


def test_settings_that_make_no_model():
    with pytest.raises(UserError, match="tiny cannot be changed so: n_head must divide"):
        _train(["eager"], overrides={"n_head": 3})
    with pytest.raises(UserError, match="16 tokens and 1 more do not fit the 16 positions"):
        next(generate.run(CPU, "tiny", [1], 16, 1, torch.float32, {}, overrides=SMALL))


# --- generation ------------------------------------------------------------------------------------------------------


@pytest.fixture
def task():
    model = generate._model(GPTConfig(**SMALL), torch.float32, CPU)
    return generate._Task(model, torch.randint(61, (3, 5)), 9)


def test_generation_is_timed_in_two_phases():
    missing = {}
    groups = list(generate.run(CPU, "tiny", [1, 2], 5, 9, torch.float32, missing, seconds=0.0, overrides=SMALL))
    assert [rows[0].group for rows in groups[:2]] == [
        "tiny batch=1 prompt=5 tokens=9 float32 prefill wall", "tiny batch=1 prompt=5 tokens=9 float32 decode wall"
    ]  # fmt: skip
    assert len(groups) == 4 and missing == dict.fromkeys(("triton", "triton+graph", "hf_static"), "needs a CUDA device")
    for rows, tokens in zip(groups, (5, 9, 10, 18), strict=True):
        assert [row.provider for row in rows] == ["eager", "hf", CONTROL] and not any(row.error for row in rows)
        assert rows[0].metrics["tokens_per_s"] == pytest.approx(tokens / rows[0].ms() * 1e3)


def test_the_phases_are_told_apart_round_by_round():
    calls = {name: generate._calls(name) for name in ("a", "b", "c")}
    measured = Measured("events", state={"watts": 1.0})
    measured.seconds = {calls["a"][0]: (1.0, 2.0), calls["a"][1]: (4.0, 7.0), CONTROL: (0.1, 0.2)}
    measured.seconds |= {calls["b"][0]: (1.0, 5.0), calls["b"][1]: (4.0, 4.0), calls["c"][0]: (1.0, 1.0)}
    measured.failed = {calls["c"][1]: "OutOfMemoryError: so much"}
    measured.host = {calls["a"][0]: 0.5, calls["a"][1]: 2.0, calls["b"][0]: 0.5, calls["b"][1]: 2.0}
    phases = generate._phases(measured, ["a", "b", "c", "d"], {"d": "writes another text"})
    prefill, decode = phases["prefill"], phases["decode"]
    assert prefill.seconds == {"a": (1.0, 2.0), "b": (1.0, 5.0), CONTROL: (0.1, 0.2)} and prefill.host["a"] == 0.5
    assert decode.seconds == {"a": (3.0, 5.0), CONTROL: (0.1, 0.2)} and decode.host["a"] == 1.5
    assert prefill.failed == {"c": "OutOfMemoryError: so much", "d": "writes another text"}
    assert decode.failed == prefill.failed | {
        "b": "in one round all tokens took less time than the first: write more of them"
    }
    rows: list[Row] = decode.rows("generate", {}, lambda provider, median: {})
    assert next(row for row in rows if row.provider == CONTROL).metrics == {"watts": 1.0}


@pytest.mark.parametrize("name", ["hf", "hf_static", pytest.param("triton", marks=needs_triton)])
def test_others_write_the_same_text(name, task):
    expected = generate._Ours(task, "eager")(10).clone()
    assert torch.equal(generate._writer(name, task)(10), expected)
    assert all(len(set(text)) > 3 for text in expected.tolist())  # a text that repeats a token proves little


def test_a_text_is_that_of_the_model_and_its_start_that_of_a_shorter_one(task):
    """Against the whole text read anew for each token, without a cache."""
    ours, text = generate._Ours(task, "eager"), task.prompt
    with torch.no_grad():
        for _ in range(10):
            text = torch.cat([text, task.model(text)[0][:, -1:].argmax(-1)], 1)
    assert (
        torch.equal(ours(10), text[:, 5:]) and torch.equal(ours(4), text[:, 5:9]) and torch.equal(ours(10), text[:, 5:])
    )


def test_a_wrong_cache_is_noticed(task, monkeypatch):
    """The weights are such that a text depends on what was read before its last token."""
    expected = generate._Ours(task, "eager")(10)
    write = KVCache.write
    monkeypatch.setattr(KVCache, "write", lambda self, layer, k, v: write(self, layer, k, 0.9 * v))
    with pytest.raises(generate._Refused, match="writes another text: token"):
        generate._check(task.model, task.prompt, expected, generate._Ours(task, "eager")(10))


def test_another_text_is_not_timed(monkeypatch):
    monkeypatch.setattr(
        generate, "_theirs", lambda task, cache: lambda tokens: torch.zeros(2, tokens, dtype=torch.int64)
    )
    run = generate.run(CPU, "tiny", [2], 5, 4, torch.float32, {}, seconds=0.0, overrides=SMALL)
    for rows in run:
        (hf,) = (row for row in rows if row.provider == "hf")
        assert hf.error.startswith("writes another text: token 0 of sequence 0 is 0 and not") and not hf.seconds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_near_tie_may_fall_either_way(dtype, task):
    """A token whose row of the table is all but that of the likeliest one is as likely; one further off is not."""
    model = generate._model(GPTConfig(**SMALL), dtype, CPU)
    prompt = task.prompt[:1]
    likeliest = int(generate._logits(model, prompt[0]).argmax())
    twin = next(i for i in range(61) if i != likeliest and i not in prompt)
    weight = model.transformer.wte.weight.data
    expected, ids = torch.tensor([[likeliest, 1, 2]]), torch.tensor([[twin, 7, 8]])
    weight[twin] = (1 - torch.finfo(dtype).eps) * weight[likeliest]
    generate._check(model, prompt, expected, ids)
    weight[twin] = (1 - 64 * torch.finfo(dtype).eps) * weight[likeliest]
    with pytest.raises(generate._Refused, match=f"token 0 of sequence 0 is {twin} and not {likeliest}"):
        generate._check(model, prompt, expected, ids)


# --- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_every_rung_and_the_graphs_on_a_gpu():
    device, missing = torch.device("cuda"), {}
    options = {"seconds": 0.01, "overrides": SMALL | {"n_embd": 64}}
    providers = [name for name in train_step.LADDER if name != "compile"]
    (rows,) = train_step.run(device, "tiny", [2], 16, torch.bfloat16, missing, providers=providers, **options)
    assert [row.provider for row in rows] == [*providers, CONTROL] and not any(row.error for row in rows)
    names = ["eager", "triton", "triton+graph"]
    for rows in generate.run(device, "tiny", [3], 5, 9, torch.bfloat16, missing, providers=names, **options):
        assert [row.provider for row in rows] == [*names, CONTROL] and not any(row.error for row in rows)
