"""Hugging Face's GPT-2 with our kernels in it: the same loss, gradients and text, whatever a training script does."""

import contextlib
import copy
import functools
import inspect
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import HAS_CUDA, INTERPRETED
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import _dispatch, patch, unpatch, use_backend
from kernels._proof import compare
from kernels._triton import NAMESPACE

transformers = pytest.importorskip("transformers", minversion="5.8", reason="needs transformers 5.8")

from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, GPT2Model  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
B, T, V = 3, 21, 61
BACKENDS = ["eager", *(["triton"] if HAS_CUDA or INTERPRETED else [])]
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if HAS_CUDA else [])]
EVERY_KERNEL = {"attention", "layer_norm", "add_layer_norm", "bias_gelu", "linear_cross_entropy"}


def gpt2(cls=GPT2LMHeadModel, *, dropout=0.0, **options):
    """A small one in training mode, with weights away from zero and one, so that every term of a gradient counts."""
    torch.manual_seed(0)
    config = {
        "vocab_size": V,
        "n_positions": 40,
        "n_embd": 24,
        "n_layer": 2,
        "n_head": 2,
        "scale_attn_by_inverse_layer_idx": True,
    }
    drops = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), dropout)
    model = cls(GPT2Config(**{**config, **options}, **drops, bos_token_id=0, eos_token_id=0, pad_token_id=0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.loss_type = "ForCausalLM"  # its default too, but then with a warning
    return model.train()


def batch(case="plain", device="cpu"):
    """Arguments of a GPT2LMHeadModel."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, V, (B, T), generator=generator)
    mask, labels = torch.ones_like(ids), ids.clone()
    if case in ("right", "left", "both", "gap"):
        for row, cut in ((0, 5), (1, 11)):
            if case != "right":
                mask[row, : cut // 2] = 0
            if case != "left":
                mask[row, T - cut :] = 0
    if case == "gap":
        mask[2, 4:7] = 0
    labels[mask == 0] = -100
    labels[:, 1:][mask[:, :-1] == 0] = -100  # what a hidden position would predict
    inputs = {"input_ids": ids.masked_fill(mask == 0, 0), "labels": labels}
    if case == "packed":
        starts = torch.tensor([0, 4, 5, 16])
        inputs["position_ids"] = torch.cat([torch.arange(n) for n in torch.diff(starts, append=torch.tensor([T]))])[
            None
        ]
        inputs |= {"use_cache": False}
    elif case != "plain":
        inputs["attention_mask"] = mask
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}


def results(model, inputs, seed=5):
    """The loss, and every gradient by name."""
    torch.manual_seed(seed)
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


def assert_same(got, expected):
    """Equal up to rounding in float32."""
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            got[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


class Ran(TorchDispatchMode):
    """The kernels that run inside."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, fn, types, args=(), kwargs=None):
        if fn.namespace == NAMESPACE and not fn.name().endswith("_bwd"):
            self.names.add(fn.name().removeprefix(f"{NAMESPACE}::").removesuffix("_fwd"))
        return fn(*args, **(kwargs or {}))


@pytest.fixture
def said(monkeypatch):
    """The warnings of the package so far, which appear once in a process."""
    monkeypatch.setattr(_dispatch, "_warned", warned := set())
    return warned


@functools.cache
def truth(case):
    """Loss and gradients in float64 by transformers' own modules; its loss function would round to float32."""
    model, inputs = gpt2().double(), batch(case)
    labels = inputs.pop("labels")
    loss = F.cross_entropy(model(**inputs).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        pytest.param(backend, dtype, marks=[pytest.mark.slow] * (backend == "triton" and dtype != torch.float32))
        for backend in BACKENDS
        for dtype in DTYPES
    ],
    ids=str,
)
def test_loss_and_every_gradient_obey_the_rule(backend, dtype, device, said):
    """Loss is one number, which theirs may hit by luck: over all cases."""
    losses = []
    for case in (
        ("plain", "full", "right", "left", "both", "packed") if backend == "eager" else ("right", "both", "packed")
    ):
        theirs, inputs = gpt2().to(device, dtype), batch(case, device)
        ours = patch(copy.deepcopy(theirs))
        expected = results(theirs, inputs)
        with use_backend(backend), Ran() as ran:
            got = results(ours, inputs)
        assert ran.names == (EVERY_KERNEL if backend == "triton" else ran.names & {"linear_cross_entropy"}) and not said
        for name, true in truth(case).items():
            row = compare("gpt2", {}, name, got[name], expected[name], true.to(device), gradient=True)
            if name == "loss":
                losses.append(row)
            else:
                assert row.passed, f"{case} {name}: error {row.error:.3e} > allowed {row.allowed:.3e}"
    assert max(row.error for row in losses) <= max(row.allowed for row in losses), losses


@pytest.mark.parametrize("backend", [BACKENDS[0], *(pytest.param(b, marks=pytest.mark.slow) for b in BACKENDS[1:])])
def test_dropout_and_checkpointing(backend, device):
    """Under one seed: eager drops what transformers drops; recomputation draws the masks anew, bit for bit."""
    theirs, inputs = gpt2(dropout=0.2).to(device), batch("both", device)
    ours = patch(copy.deepcopy(theirs))
    with use_backend(backend):
        plain = results(ours, inputs)
        if backend == "eager":
            assert_same(plain, results(theirs, inputs))
        ours.gradient_checkpointing_enable({"use_reentrant": False})
        again = results(ours, inputs)
        torch.manual_seed(6)
        other = ours(**inputs).loss
    assert all(torch.equal(again[name], tensor) for name, tensor in plain.items())
    assert plain["loss"].isfinite() and plain["loss"] != other


@pytest.mark.parametrize("items", [7, torch.tensor(7)])
def test_loss_over_a_number_of_items(items):
    """As a Trainer that accumulates gradients asks for; a batch without a target adds nothing."""
    theirs, inputs = gpt2(), batch("right") | {"num_items_in_batch": items}
    ours = patch(copy.deepcopy(theirs))
    assert_same(results(ours, inputs), results(theirs, inputs))
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    assert all(tensor.count_nonzero() == 0 for tensor in results(ours, inputs).values())


def test_autocast():
    """Weights in float32 and products in bfloat16: the loss and the dtypes of the gradients."""
    theirs, inputs = gpt2(), batch("both")
    ours = patch(copy.deepcopy(theirs))
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = results(ours, inputs), results(theirs, inputs)
    row = compare(
        "gpt2", {}, "loss", got["loss"].bfloat16(), expected["loss"].bfloat16(), truth("both")["loss"], gradient=True
    )
    assert row.passed and {name: t.dtype for name, t in got.items()} == {name: t.dtype for name, t in expected.items()}


def test_every_output_outside_training(device):
    """Logits, hidden states, cache; and in training without labels."""
    theirs, inputs = gpt2().to(device), batch("right", device)
    ours = patch(copy.deepcopy(theirs))
    for train, labels in ((False, inputs["labels"]), (True, None)):
        got, expected = (
            model.train(train)(**{**inputs, "labels": labels}, output_hidden_states=True) for model in (ours, theirs)
        )
        seen = inputs["attention_mask"].bool()
        torch.testing.assert_close(got.logits[seen], expected.logits[seen], rtol=1e-4, atol=1e-4)
        assert len(got.hidden_states) == len(expected.hidden_states) == 3 and list(got) == list(expected)
        torch.testing.assert_close(got.hidden_states[1][seen], expected.hidden_states[1][seen], rtol=1e-4, atol=1e-4)
        assert got.past_key_values.get_seq_length() == T
    out = ours.train()(**inputs)
    assert out.logits is None and out.past_key_values.get_seq_length() == T
    for keep in ({"return_dict": False}, {"logits_to_keep": T}):
        assert ours(**inputs, **keep)[1].shape == (B, T, V)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 2}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str
)
def test_generate_gives_the_same_ids(options):
    theirs = gpt2(initializer_range=0.3).eval()
    ours = patch(copy.deepcopy(theirs))
    inputs = batch("left")
    prompts = {"input_ids": inputs["input_ids"][:, 6:], "attention_mask": inputs["attention_mask"][:, 6:]}
    options = {**prompts, **options, "max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    got, expected = ours.generate(**options), theirs.generate(**options)
    assert torch.equal(got, expected) and len(expected[:, -9:].unique()) > 3


@pytest.mark.parametrize("cls", [GPT2Model, GPT2ForSequenceClassification])
def test_other_classes(cls, device):
    theirs, inputs = gpt2(cls, num_labels=3).to(device).eval(), batch("right", device)
    ours, (ids, mask) = patch(copy.deepcopy(theirs)), (inputs["input_ids"], inputs["attention_mask"])
    with use_backend("triton") if "triton" in BACKENDS else contextlib.nullcontext(), Ran() as ran:
        got = ours(ids, attention_mask=mask)[0]
    expected = theirs(ids, attention_mask=mask)[0]
    seen = mask.bool() if cls is GPT2Model else slice(None)
    torch.testing.assert_close(got[seen], expected[seen], rtol=1e-4, atol=1e-4)
    assert ran.names == (EVERY_KERNEL - {"linear_cross_entropy"} if "triton" in BACKENDS else set())


def test_compiles_in_one_graph():
    """Where no value is known: a gap in a mask is an error, not another result."""
    theirs = gpt2(n_layer=1)
    compiled = torch.compile(patch(copy.deepcopy(theirs)), fullgraph=True, backend="aot_eager")
    for case in ("plain", "both"):
        inputs = batch(case) | {"use_cache": False}
        got = {name.removeprefix("_orig_mod."): tensor for name, tensor in results(compiled, inputs).items()}
        assert_same(got, results(theirs, inputs))
    with pytest.raises(RuntimeError, match="has a gap"):
        compiled(**batch("gap"), use_cache=False)


def test_unpatch_restores_exactly():
    theirs = gpt2()
    inputs, classes = batch("both"), [type(module) for module in theirs.modules()]
    before, state = results(theirs, inputs), [vars(module).copy() for module in theirs.modules()]
    keys, signature = list(theirs.state_dict()), inspect.signature(theirs.forward)
    assert patch(patch(theirs)) is theirs and [type(module) for module in theirs.modules()] != classes
    assert list(theirs.state_dict()) == keys and inspect.signature(theirs.forward) == signature
    assert [type(module).__name__ for module in theirs.modules()] == [cls.__name__ for cls in classes]
    stale = theirs.forward  # accelerate keeps it, under autocast
    assert unpatch(theirs) is theirs and [type(module) for module in theirs.modules()] == classes
    assert all(vars(module).keys() == names.keys() for module, names in zip(theirs.modules(), state, strict=True))
    after = results(theirs, inputs)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(stale(**inputs).loss, before["loss"])


def test_saves_and_loads_as_before(tmp_path):
    ours = patch(gpt2())
    ours.save_pretrained(tmp_path)
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path).train()
    assert loaded.config.architectures == ["GPT2LMHeadModel"]
    assert_same(results(ours, batch()), results(loaded, batch()))


FALLBACKS = {
    "eager": ("attn_implementation='eager'", {"attn_implementation": "eager"}, "plain", lambda model: None),
    "gap": ("mask is not padding", {}, "gap", lambda model: None),
    "relu": ("is not GPT-2's GELU", {"activation_function": "relu"}, "plain", lambda model: None),
    "loss": ("logits are kept", {}, "plain", lambda model: setattr(model, "loss_function", lambda x, y, **_: x.mean())),
    "bias": ("logits are kept", {}, "plain", lambda model: setattr(model.lm_head, "bias", nn.Parameter(torch.ones(V)))),
    "block": (None, {}, "plain", lambda model: model.transformer.h.__setitem__(0, MyBlock(model.config, layer_idx=0))),
}


class MyBlock(transformers.models.gpt2.modeling_gpt2.GPT2Block):
    def forward(self, hidden_states, *args, **kwargs):
        return super().forward(hidden_states, *args, **kwargs) * 2


@pytest.mark.parametrize("name", FALLBACKS)
def test_what_cannot_be_fused_runs_as_transformers_wrote_it(name, said, recwarn):
    message, options, case, change = FALLBACKS[name]
    theirs = gpt2(**options)
    change(theirs)
    ours = patch(copy.deepcopy(theirs))
    for _ in range(2):
        assert_same(results(ours, batch(case)), results(theirs, batch(case)))
    assert sum(message in str(warning.message) for warning in recwarn) == 1 if message else not said


def test_hooks_and_foreign_forwards_are_kept(recwarn):
    theirs = gpt2()
    block, calls = theirs.transformer.h[0], []
    for module in (block.ln_2, block.mlp.c_fc, theirs.lm_head, block.attn):
        module.register_forward_hook(lambda module, *_: calls.append(type(module).__name__))
    ln_f = theirs.transformer.ln_f
    ln_f.forward = lambda x: F.layer_norm(x, ln_f.weight.shape, ln_f.weight, ln_f.bias, ln_f.eps)
    expected = results(theirs, batch())
    ours, before = patch(theirs), sorted(calls)
    calls.clear()
    assert_same(results(ours, batch()), expected)
    assert sorted(calls) == before and len(calls) == 4
    assert ["LayerNorm has a forward of its own" in str(warning.message) for warning in recwarn].count(True) == 1


def test_cross_attention(device):
    theirs = gpt2(add_cross_attention=True).to(device)
    inputs = batch("right", device) | {
        "encoder_hidden_states": torch.randn(B, 4, 24, device=device),
        "use_cache": False,
    }
    ours = patch(copy.deepcopy(theirs))
    assert_same(results(ours, inputs), results(theirs, inputs))
    inputs.pop("encoder_hidden_states")
    assert_same(results(ours, inputs), results(theirs, inputs))


def test_what_is_no_gpt2_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="no GPT-2 of transformers in this Linear"):
        patch(nn.Linear(2, 2))
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.57.1")
    with pytest.raises(ValueError, match=r"needs transformers 5.8 or newer, this is 4\.57\.1"):
        patch(gpt2())


@pytest.mark.parametrize("first", [True, False], ids=["patch first", "adapters first"])
def test_adapters_of_peft(first):
    """Adapters in the projections, one of which is inside a fused pair; and the adapters alone get gradients."""
    peft = pytest.importorskip("peft", reason="needs the peft package")
    config = peft.LoraConfig(
        r=3, target_modules=["c_attn", "c_fc", "c_proj"], fan_in_fan_out=True, task_type="CAUSAL_LM"
    )

    def adapted(model):
        model = peft.get_peft_model(model, config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # which begins at zero
                nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
        return model

    theirs = adapted(gpt2())
    torch.manual_seed(0)
    ours = adapted(patch(gpt2())) if first else patch(adapted(gpt2()))
    ours.load_state_dict(theirs.state_dict())
    inputs = batch("both")
    got = results(ours, inputs)
    assert_same(got, results(theirs, inputs))
    assert len(got) == 1 + 2 * 2 * 4
    merged = ours.merge_and_unload()
    torch.testing.assert_close(merged(**inputs).loss, got["loss"])


def test_data_parallel_processes(tmp_path):
    """DDP finds each gradient once."""
    theirs, inputs = gpt2(), batch("right")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        ours = nn.parallel.DistributedDataParallel(patch(copy.deepcopy(theirs)))
        for _ in range(2):
            got = {name.removeprefix("module."): tensor for name, tensor in results(ours, inputs).items()}
    finally:
        torch.distributed.destroy_process_group()
    assert_same(got, results(theirs, inputs))


def _train(model, folder, **options):
    """20 steps of transformers' Trainer: the losses, and those of an evaluation, whose logits it has seen."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(1, V, (40, T), generator=generator)
    rows[:, 1::2] = rows[:, ::2][:, : T // 2]  # something to learn
    data = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row), "unused": 1} for row in rows]
    arguments = transformers.TrainingArguments(
        folder, max_steps=20, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1, report_to=[],
        save_strategy="no", seed=1, use_cpu=True, disable_tqdm=True, **options,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model, arguments, train_dataset=data, eval_dataset=data[:4],
        compute_metrics=lambda prediction: {"shape": list(prediction.predictions.shape)},
    )  # fmt: skip
    trainer.train()
    last = trainer.evaluate()
    assert last["eval_shape"] == [4, T, V]
    return torch.tensor([*(row["loss"] for row in trainer.state.log_history if "loss" in row), last["eval_loss"]])


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}], ids=str)
def test_trainer_has_the_same_curve(options, tmp_path):
    pytest.importorskip("accelerate", reason="needs the accelerate package")
    curves = [_train(model, tmp_path, **options) for model in (gpt2(dropout=0.1), patch(gpt2(dropout=0.1)))]
    assert len(curves[0]) == 21 and curves[0][-1] < 0.9 * curves[0][0]
    torch.testing.assert_close(*curves, rtol=1e-3, atol=1e-3)
