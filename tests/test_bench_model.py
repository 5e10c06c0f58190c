"""The benchmarks of the whole model: who is timed, who must not be, and what the figures are made of."""

import functools
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bench import generate, peer_models, train_step
from bench.record import CONTROL, Report
from bench.timing import Measured, Refused, error_line
from kernels import causal_attention
from kernels._triton import HAS_TRITON, NAMESPACE
from model.config import PRESETS, GPTConfig
from model.kv_cache import KVCache
from model.training.memory import MemoryModel

CPU = torch.device("cpu")
SMALL = {"vocab_size": 61, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs triton, which is published for Linux")
interpreted = [needs_triton, pytest.mark.interpreted]


@pytest.fixture
def no_profiler(monkeypatch):
    """Memory by a number: the profiler takes a second."""

    def peak(call, device):
        call()
        return 2**20

    monkeypatch.setattr(train_step, "peak", peak)


@pytest.fixture(autouse=True)
def nano(monkeypatch):
    """A preset that takes milliseconds."""
    monkeypatch.setitem(PRESETS, "nano", GPTConfig(**SMALL))


def _train(providers, missing=None, *, batch=(2,), device=CPU, **options):
    report = Report({}, {}, "", missing={} if missing is None else missing)
    command = train_step.Train(
        preset="nano", batch=batch, provider=tuple(providers), **{"dtype": "float32", "seconds": 0.0, **options}
    )
    return [{row.provider: row for row in rows} for rows in command.groups(device, report)]


# --- training --------------------------------------------------------------------------------------------------------


def test_training_step_has_time_and_memory(monkeypatch):
    monkeypatch.setitem(PRESETS, "nano", GPTConfig(**SMALL | {"n_embd": 32}))  # a step changes the gradient's norm
    missing = {}
    (rows,) = _train(["eager", "hf", "hf+patch", "triton", "triton+graph", "trainer", "hf+liger", "nanogpt"], missing)
    assert set(rows) == {"eager", "hf", "hf+patch", "trainer", CONTROL} and not any(row.error for row in rows.values())
    assert missing.keys() == {"triton", "triton+graph", "hf+liger", "nanogpt"}
    assert missing["triton"] == "needs a CUDA device" and "nanoGPT" in missing["nanogpt"]
    eager = rows["eager"]
    assert eager.group == "nano batch=2 context=16 float32 wall"
    assert eager.metrics["tokens_per_s"] == pytest.approx(32 / eager.ms() * 1e3) and eager.metrics["interleaved"] == 1
    assert "mfu" not in eager.metrics and "predicted_mib" not in rows["hf"].metrics
    sizes = {name.removesuffix("_mib"): size for name, size in eager.metrics.items() if name.endswith("_mib")}
    assert sizes["gradients"] == sizes["parameters"] == pytest.approx(sizes["optimizer"] / 2, rel=0.01)
    assert sizes["peak"] == sum(sizes[part] for part in ("parameters", "optimizer", "activations", "workspace"))
    assert sizes["peak"] == pytest.approx(sizes["predicted"], rel=0.1)
    predicted = MemoryModel(PRESETS["nano"], 16, torch.float32, "eager", card=0).predict(2)
    assert sizes["activations"] == pytest.approx(predicted.activations / 2**20, rel=0.02)
    json.dumps(eager.metrics)


@needs_triton
@pytest.mark.interpreted
def test_each_rung_of_the_ladder_runs_its_kernels(no_profiler):
    """Where kernels cannot be timed they can still be run: the gate holds on every rung."""
    config = GPTConfig(**SMALL)
    task = train_step._Task(config, 1, 8, torch.float32, CPU, None)
    norms = {"layer_norm_fwd", "layer_norm_bwd", "add_layer_norm_fwd", "add_layer_norm_bwd"}
    attention = {"attention_fwd", "attention_bwd"}
    loss = {"linear_cross_entropy_fwd", "linear_cross_entropy_bwd"}
    embedding = {"embedding_fwd", "embedding_bwd"}

    class Seen(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = set()

        def __torch_dispatch__(self, fn, types, args=(), kwargs=None):
            if fn.namespace == NAMESPACE:
                self.names.add(fn.name().removeprefix(f"{NAMESPACE}::"))
            return fn(*args, **(kwargs or {}))

    proof, ops = train_step._Proof(), {}
    for name in (name for name in train_step.LADDER if name not in ("compile", "triton+graph", "trainer")):
        with Seen() as seen:
            train_step._prepare(name, task, proof)
        ops[name] = seen.names
    assert ops["plain"] == ops["eager"] == loss  # on a CPU, its eager form
    kept = {name: metrics["activations_mib"] for name, metrics in proof.metrics.items()}
    assert kept["plain"] > kept["eager"]  # the probabilities of every head
    gelu = ops["+gelu"] - ops["+layer_norm"]
    assert ops["+attention"] == attention | loss and ops["+layer_norm"] == attention | norms | loss
    assert (
        gelu and all("gelu" in name for name in gelu) and ops["triton"] == attention | norms | gelu | loss | embedding
    )
    assert list(proof.losses) == list(ops) and all(a > b > c for a, b, c in proof.losses.values())


def _loss(x, weight, targets):
    """Rounded to 16 bits, as PyTorch's own does where its arguments are."""
    return F.cross_entropy(F.linear(x, weight.to(x.dtype)), targets).bfloat16()


@pytest.mark.parametrize("provider", train_step.peers.STEP_PEERS)
def test_compiled_step_takes_the_operator_of_a_peer(provider, no_profiler, monkeypatch):
    calls, compiled, factor = [], [], [1.0]
    peer = train_step.peers.STEP_PEERS[provider]
    right = {"causal_attention": causal_attention, "linear_cross_entropy": _loss}[peer.op]

    def fn(**inputs):
        calls.append({name: x.shape for name, x in inputs.items() if isinstance(x, torch.Tensor)})
        y = right(**inputs)
        return factor[0] * y + (1 - factor[0]) * y.detach()  # the value, and a multiple of the gradient

    def compile_(model, **options):
        compiled.append(options)
        return model

    monkeypatch.setitem(train_step.peers.STEP_PEERS, provider, replace(peer, cuda=False, make=lambda: fn))
    monkeypatch.setattr(torch, "compile", compile_)
    task, proof = train_step._Task(GPTConfig(**SMALL), 1, 8, torch.float32, CPU, None), train_step._Proof()
    for name in ("eager", "compile", provider):
        train_step._prepare(name, task, proof)()
    assert calls and set(calls[0]) == ({"qkv"} if peer.op == "causal_attention" else {"x", "weight", "targets"})
    chunked = provider == "compile+auto_chunker"
    assert [bool(options["options"]) for options in compiled] == [False, chunked]
    assert all(options["isolate_recompiles"] for options in compiled)
    of_scale = "loss" if peer.op == "causal_attention" else "gradient"  # AdamW loses a scale common to all gradients
    for factor[0], what in ((-1.0, "loss"), (2.0, of_scale)):
        with pytest.raises(Refused, match=f"computes another {what}"):
            train_step._prepare(provider, task, proof)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # which the chunked loss asks for under torch.compile
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_steps_beside_each_other(dtype, no_profiler):
    providers = ["eager", "compile", "compile+linear_ce", "compile+linear_ce_chunked"]
    (rows,) = _train(providers, dtype=dtype)
    assert rows.keys() == {*providers, CONTROL} and not any(row.error for row in rows.values())


@pytest.mark.parametrize("wrong", ["value", "sign", "scale"])
def test_wrong_loss_is_not_timed(wrong, no_profiler, monkeypatch):
    right = peer_models.transformers_loss

    def loss(theirs, idx, targets):
        y = right(theirs, idx, targets)
        factor = {"value": 1.0, "sign": -1.0, "scale": 1.01}[wrong]
        return 1.001 * y if wrong == "value" else factor * y + (1 - factor) * y.detach()

    monkeypatch.setattr(peer_models, "transformers_loss", loss)
    (rows,) = _train(["eager", "hf"])
    what = "gradient, of norm" if wrong == "scale" else "loss: 4."
    assert rows["hf"].error.startswith(f"computes another {what}") and "eager has" in rows["hf"].error
    assert rows["hf"].seconds == () and rows["eager"].seconds


def test_loss_check_accepts_rounding_only():
    proof = train_step._Proof()
    check = functools.partial(train_step._check, "b", proof=proof)
    right = [10.0, 9.5, 9.0]
    train_step._check("a", right, 2.0, torch.float32, proof)
    check([10.00009, 9.0, 9.0005], 2.0019, torch.float32)
    check([10.009, 9.0, 9.0], 2.03, torch.bfloat16)
    for losses in ([10.00011, 9.0, 9.0], [10.0, 9.0, 9.0011], [float("nan")] * 3):
        with pytest.raises(Refused, match="computes another loss"):
            check(losses, 2.0, torch.float32)
    for norm in (2.0021, 1.9979, float("nan")):
        with pytest.raises(Refused, match="computes another gradient, of norm"):
            check(right, norm, torch.float32)


def test_failure_is_a_row(no_profiler, monkeypatch):
    def no_compiler(model, **options):
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(torch, "compile", no_compiler)
    for rows in _train(["compile", "eager"], batch=(1, 2)):
        assert rows["compile"].error == "RuntimeError: no compiler" and not rows["compile"].seconds
        assert rows["eager"].seconds


@pytest.mark.parametrize("short", ["foreseen", "while timing", "while preparing"])
def test_short_memory_times_one_by_one(short, no_profiler, monkeypatch):
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


def test_nanogpt_gets_our_weights(no_profiler, tmp_path, capsys):
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
    (rows,) = _train(["eager", "nanogpt", "hf"], missing, nanogpt=tmp_path, bias=False)
    assert rows["nanogpt"].seconds and capsys.readouterr().out == ""
    assert set(rows) == {"eager", "nanogpt", CONTROL} and "has biases" in missing["hf"]


# --- generation ------------------------------------------------------------------------------------------------------


@pytest.fixture
def task():
    model = generate._model(GPTConfig(**SMALL), torch.float32, CPU)
    return generate._Task(model, torch.randint(61, (3, 5)), 9)


def _generate(monkeypatch, missing=None, **options):
    """The rows of generation by a clock on which each call of prefill takes 1 s and each of decode 2 s."""

    def measure(makers, device, clock, *, seconds):
        measured = Measured(clock, state={"watts": 1.0})
        for name, maker in makers.items():
            try:
                maker()()
                measured.seconds[name] = (1.0, 1.0) if name.endswith("prefill") else (2.0, 2.0)
                measured.host[name] = 0.5
            except Exception as error:
                measured.failed[name] = error_line(error)
        measured.seconds[CONTROL] = (0.1, 0.2)
        return measured

    monkeypatch.setattr(generate, "measure", measure)
    report = Report({}, {}, "", missing={} if missing is None else missing)
    command = generate.Generate(preset="nano", **{"prompt": 5, "tokens": 9, "dtype": "float32", **options})
    return list(command.groups(CPU, report))


def test_generation_is_timed_in_two_phases(monkeypatch):
    missing = {}
    groups = _generate(monkeypatch, missing, batch=(1, 2))
    assert [rows[0].group for rows in groups[:2]] == [
        "nano batch=1 prompt=5 tokens=9 float32 prefill wall", "nano batch=1 prompt=5 tokens=9 float32 decode wall"
    ]  # fmt: skip
    assert len(groups) == 4 and missing == dict.fromkeys(("triton", "triton+graph", "hf_static"), "needs a CUDA device")
    for rows, tokens, seconds in zip(groups, (5, 9, 10, 18), (1.0, 2.0, 1.0, 2.0), strict=True):
        assert [row.provider for row in rows] == ["eager", "hf", CONTROL] and not any(row.error for row in rows)
        assert rows[0].seconds == (seconds, seconds) and rows[0].metrics["host_ms"] == 500.0
        assert rows[0].metrics["tokens_per_s"] == pytest.approx(tokens / seconds)
        assert rows[-1].seconds == (0.1, 0.2) and rows[-1].metrics == {"watts": 1.0}


def test_ragged_prompts_and_weights_in_fewer_bits(monkeypatch):
    groups = _generate(monkeypatch, batch=(3,), ragged=True, weights=("bfloat16", "int8"), provider=("eager", "hf"))
    for rows, tokens in zip(groups, (5 + 3 + 1, 3 * 9), strict=True):
        assert [row.provider for row in rows] == ["eager", "hf", "bfloat16", "int8", CONTROL]
        assert not any(row.error for row in rows) and "ragged" in rows[0].group
        assert rows[0].metrics["tokens_per_s"] == pytest.approx(tokens / rows[0].seconds[0])
        mib = {row.provider: row.metrics.get("weights_mib") for row in rows}
        assert mib["int8"] < mib["bfloat16"] < mib["eager"] and mib["hf"] is None


def test_failed_phase_leaves_the_other(monkeypatch):
    write = generate._Ours.__call__

    def short_of_memory(self, tokens, after_first=generate._nothing):
        if after_first is not generate._nothing:
            raise torch.OutOfMemoryError("so much")
        return write(self, tokens, after_first)

    monkeypatch.setattr(generate._Ours, "__call__", short_of_memory)
    (prefill, decode) = _generate(monkeypatch, batch=(1,), provider=("eager",))
    assert prefill[0].seconds and not prefill[0].error
    assert decode[-1].error == "OutOfMemoryError: so much" and not decode[-1].seconds


@pytest.mark.parametrize("name", ["eager", "hf"])
def test_decode_time_starts_after_the_first_token(name, task):
    passes, at_start = [], []
    write = generate._writer(name, task)

    def count(module, *_):
        if type(module).__name__ in ("GPT", "GPT2LMHeadModel"):
            passes.append(1)

    with torch.nn.modules.module.register_module_forward_hook(count):
        write(10, lambda: at_start.append(len(passes)))
    assert (at_start, len(passes)) == ([1], 10)


@pytest.mark.parametrize("name", ["hf", "hf_static", pytest.param("triton", marks=interpreted)])
def test_other_providers_write_the_same_text(name, task):
    expected = generate._Ours(task, "eager")(10).clone()
    assert torch.equal(generate._writer(name, task)(10, generate._nothing), expected)
    assert all(len(set(text)) > 3 for text in expected.tolist())  # a text that repeats a token proves little


def test_text_equals_generation_without_a_cache(task):
    """Against the whole text read anew for each token, without a cache."""
    ours, text = generate._Ours(task, "eager"), task.prompt
    with torch.no_grad():
        for _ in range(10):
            text = torch.cat([text, task.model(text)[0][:, -1:].argmax(-1)], 1)
    assert (
        torch.equal(ours(10), text[:, 5:]) and torch.equal(ours(4), text[:, 5:9]) and torch.equal(ours(10), text[:, 5:])
    )


def test_wrong_cache_is_refused(task, monkeypatch):
    """The weights are such that a text depends on what was read before its last token."""
    expected = generate._Ours(task, "eager")(10)
    write = KVCache.write
    scale = torch.tensor([1.0, 0.9])[:, None, None]  # the values are wrong
    monkeypatch.setattr(KVCache, "write", lambda self, layer, kv: write(self, layer, kv * scale))
    with pytest.raises(Refused, match="writes another text: token"):
        generate._check(task.model, task.prompt, expected, generate._Ours(task, "eager")(10))


@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_wrong_cache_in_few_bits_is_refused(weights, task, monkeypatch):
    model = generate._model(GPTConfig(**SMALL), torch.float32, CPU, weights)
    task = replace(
        task, model=generate._model(GPTConfig(**SMALL), torch.float32, CPU), lengths=[5, 3, 1], low={weights: model}
    )
    ids = generate._writer(weights, task)(10, generate._nothing).clone()
    generate._check_likeliest(model, task.model, task.texts(), ids)
    write = KVCache.write
    scale = torch.tensor([1.0, 0.5])[:, None, None]  # the values are wrong
    monkeypatch.setattr(KVCache, "write", lambda self, layer, kv: write(self, layer, kv * scale))
    ids = generate._writer(weights, task)(10, generate._nothing)
    with pytest.raises(Refused, match="writes another text: token"):
        generate._check_likeliest(model, task.model, task.texts(), ids)


def test_wrong_text_is_not_timed(monkeypatch):
    zeros = lambda tokens, after_first: torch.zeros(2, tokens, dtype=torch.int64)  # noqa: E731
    monkeypatch.setattr(generate, "_theirs", lambda task, cache: zeros)
    for rows in _generate(monkeypatch, batch=(2,), tokens=4):
        (hf,) = (row for row in rows if row.provider == "hf")
        assert hf.error.startswith("writes another text: token 0 of sequence 0 is 0 and not") and not hf.seconds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_near_tie_is_accepted(dtype, task):
    """A token whose row of the table is all but that of the likeliest one is as likely; one further off is not."""
    model = generate._model(GPTConfig(**SMALL), dtype, CPU)
    prompt = task.prompt[:1]
    likeliest = int(generate._logits(model, prompt[0])[-1].argmax())
    twin = next(i for i in range(61) if i != likeliest and i not in prompt)
    weight = model.transformer.wte.weight.data
    expected, ids = torch.tensor([[likeliest, 1, 2]]), torch.tensor([[twin, 7, 8]])
    weight[twin] = (1 - torch.finfo(dtype).eps) * weight[likeliest]
    generate._check(model, prompt, expected, ids)
    weight[twin] = (1 - 64 * torch.finfo(dtype).eps) * weight[likeliest]
    with pytest.raises(Refused, match=f"token 0 of sequence 0 is {twin} and not {likeliest}"):
        generate._check(model, prompt, expected, ids)


# --- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_every_provider_on_a_gpu(monkeypatch):
    monkeypatch.setitem(PRESETS, "nano", GPTConfig(**SMALL | {"n_embd": 64}))
    device = torch.device("cuda")
    providers = [name for name in train_step.LADDER if name != "compile"]
    (rows,) = _train(providers, device=device, dtype="bfloat16", seconds=0.01)
    assert list(rows) == [*providers, CONTROL] and not any(row.error for row in rows.values())
    names = ("eager", "triton", "triton+graph")
    command = generate.Generate(
        preset="nano", batch=(3,), prompt=5, tokens=9, dtype="bfloat16", provider=names, seconds=0.01
    )
    for group in command.groups(device, Report({}, {}, "")):
        assert [row.provider for row in group] == [*names, CONTROL] and not any(row.error for row in group)
