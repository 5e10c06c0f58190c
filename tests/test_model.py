"""The GPT against GPT-2's published facts and Hugging Face's implementation, and what must hold of any causal model."""

from __future__ import annotations

import copy
import math
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
import torch.nn.functional as F

from model.config import PRESETS, GPTConfig
from model.gpt import GPT, num_parameters

SMALL = GPTConfig(vocab_size=61, n_positions=16, n_embd=48, n_layer=2, n_head=3)


def build(config: GPTConfig = SMALL, seed: int = 0, **kwargs) -> GPT:
    torch.manual_seed(seed)
    return GPT(config, **kwargs)


def tokens(*shape: int, vocab: int = SMALL.vocab_size, seed: int = 1) -> torch.Tensor:
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def randomize(model: GPT, seed: int = 2) -> GPT:
    """Weights far from the initial ones: biases and LayerNorm weights that were never 0 or 1 can show a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


# --- configuration


def test_config_round_trip_and_presets():
    for config in PRESETS.values():
        assert GPTConfig.from_dict(config.to_dict()) == config
    assert GPTConfig.from_dict({"n_layer": 3}) == replace(GPTConfig(), n_layer=3)
    assert (PRESETS["char"].n_layer, PRESETS["char"].n_embd, PRESETS["char"].attn_pdrop) == (6, 384, 0.2)
    with pytest.raises(FrozenInstanceError):
        SMALL.n_layer = 3


def test_config_refuses_unknown_keys_by_name():
    with pytest.raises(ValueError, match="n_heads"):
        GPTConfig.from_dict({"n_heads": 3})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_head": 5}, "n_head must divide n_embd, but 48"),
        ({"vocab_size": 0}, "vocab_size must be a whole number of at least 1, got 0"),
        ({"n_layer": 2.0}, "n_layer must be a whole number"),
        ({"n_positions": True}, "n_positions must be a whole number"),
        ({"resid_pdrop": 1.0}, "resid_pdrop is a dropout probability"),
        ({"attn_pdrop": float("nan")}, "attn_pdrop is a dropout probability"),
        ({"embd_pdrop": "0.1"}, "embd_pdrop is a dropout probability"),
        ({"layer_norm_epsilon": 0.0}, "layer_norm_epsilon must be a number above 0"),
        ({"initializer_range": -0.02}, "initializer_range must be a number above 0"),
        ({"layer_norm_epsilon": 1e30}, "layer_norm_epsilon must be a number above 0 and below 1e30"),
        ({"initializer_range": 10**400}, "initializer_range must be a number above 0 and below 1e30"),
        ({"activation_function": "relu"}, "activation_function must be 'gelu_new' or 'gelu', got 'relu'"),
        ({"bias": 1}, "bias must be true or false"),
    ],
)
def test_config_refuses_values_that_make_no_model(change, words):
    with pytest.raises(ValueError, match=words):
        replace(SMALL, **change)


# --- what was published


def test_gpt2_has_124439808_parameters_with_published_names():
    with torch.device("meta"):
        model = GPT(PRESETS["gpt2"])
    assert num_parameters(model) == 124_439_808
    names = set(model.state_dict())
    assert names == {name for name, _ in model.named_parameters()}
    per_layer = ["ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"]
    assert names == {"transformer.wte.weight", "transformer.wpe.weight"} | {
        f"transformer.{module}.{kind}"
        for module in [*(f"h.{i}.{part}" for i in range(12) for part in per_layer), "ln_f"]
        for kind in ("weight", "bias")
    }


def test_initial_weights_have_gpt2_statistics():
    model = build(replace(SMALL, n_embd=192, n_layer=8, vocab_size=500, n_positions=100))
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            assert (parameter == 0).all(), name
        elif ".ln_" in name:
            assert (parameter == 1).all(), name
        else:
            std = 0.02 / math.sqrt(2 * 8) if name.endswith("c_proj.weight") else 0.02
            n = parameter.numel()
            assert abs(parameter.mean()) < 5 * std / math.sqrt(n), name
            assert abs(parameter.std() / std - 1) < 5 / math.sqrt(2 * n), name


def test_initial_loss_is_that_of_a_uniform_guess():
    model = build(replace(SMALL, vocab_size=1000))
    _, loss = model(tokens(8, 16, vocab=1000), tokens(8, 16, vocab=1000, seed=2))
    assert loss.item() == pytest.approx(math.log(1000), abs=0.05)


@pytest.mark.parametrize("activation", ["gelu_new", "gelu"])
def test_logits_loss_and_gradients_equal_hugging_face(activation):
    transformers = pytest.importorskip("transformers", reason="needs the transformers package")
    config = replace(SMALL, activation_function=activation)
    ours = randomize(build(config))
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**{**config.to_dict(), "bos_token_id": 0, "eos_token_id": 0})
    )
    transposed = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # HF's Conv1D keeps weights as (in, out)

    def in_hf_layout(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.T if name.endswith(transposed) else tensor

    assert dict(theirs.named_parameters()).keys() == dict(ours.named_parameters()).keys()
    state = {name: in_hf_layout(name, tensor) for name, tensor in ours.state_dict().items()}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected  # tied to wte, which was loaded
    theirs.eval()

    idx, targets = tokens(3, 16), tokens(3, 16, seed=3)
    targets[0, :5] = -100
    logits, none = ours(idx)
    nothing, loss = ours(idx, targets)
    assert none is None and nothing is None
    their_logits = theirs(idx).logits
    their_loss = F.cross_entropy(their_logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    assert logits.dtype == loss.dtype == torch.float32
    assert logits.std() > 0.5  # there is something to compare
    torch.testing.assert_close(logits, their_logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(loss, their_loss, atol=1e-5, rtol=0)

    loss.backward()
    their_loss.backward()
    expected = {name: in_hf_layout(name, p.grad) for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


# --- what must hold of any causal language model


def test_no_token_sees_a_later_one():
    model = randomize(build()).eval()
    idx = tokens(2, 16)
    before, _ = model(idx)
    for t in (1, 7, 15):
        changed = idx.clone()
        changed[:, t] = (changed[:, t] + 1) % SMALL.vocab_size
        after, _ = model(changed)
        assert torch.equal(after[:, :t], before[:, :t]), t
        assert (after[:, t:] - before[:, t:]).abs().amax(dim=(0, 2)).min() > 1e-4, t  # and every later one does see it


def test_positions_matter():
    logits, _ = randomize(build())(torch.full((1, 4), 7))
    assert not torch.allclose(logits[0, 0], logits[0, 1], atol=1e-3)


def test_last_logits_are_the_last_of_all():
    model = randomize(build())
    idx = tokens(2, 9)
    every, _ = model(idx)
    last, loss = model(idx, logits="last")
    assert last.shape == (2, 1, SMALL.vocab_size) and loss is None
    torch.testing.assert_close(last, every[:, -1:])


def test_loss_is_the_mean_over_the_targets_that_count():
    model = randomize(build())
    idx, targets = tokens(2, 8), tokens(2, 8, seed=3)
    targets[1, 3:] = -100
    (logits, _), (_, loss) = model(idx), model(idx, targets)
    counted = targets != -100
    expected = -logits.log_softmax(-1)[counted].gather(-1, targets[counted][:, None]).mean()
    torch.testing.assert_close(loss, expected)


def test_overfits_one_batch():
    model = build(replace(SMALL, attn_pdrop=0.0))
    idx, targets = tokens(2, 16), tokens(2, 16, seed=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(150):
        optimizer.zero_grad()
        _, loss = model(idx, targets)
        loss.backward()
        optimizer.step()
        if loss < 0.1:
            break
    assert loss < 0.1


def test_one_layer_and_models_without_biases():
    config = replace(SMALL, n_layer=1, n_head=1, bias=False)
    model = build(config)
    assert not [name for name in model.state_dict() if name.endswith("bias")]
    _, loss = model(tokens(1, 1), tokens(1, 1))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# --- the tied head, state dicts


def test_head_and_embedding_are_one_tensor():
    model = build()
    _, loss = model(torch.zeros(1, 4, dtype=torch.int64), torch.ones(1, 4, dtype=torch.int64))
    loss.backward()
    # Token 5 is nowhere in the input: only the head can have sent it a gradient. Token 0 got more from the look-up.
    gradient = model.transformer.wte.weight.grad
    assert gradient[5].abs().sum() > 0
    logits, _ = model(tokens(1, 4))
    with torch.no_grad():
        model.transformer.wte.weight[60] *= -1
    flipped, _ = model(tokens(1, 4))
    torch.testing.assert_close(flipped[..., 60], -logits[..., 60])


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("repeated", [False, True])
def test_the_tie_survives_loading(repeated, assign):
    source, model = randomize(build()), build(seed=5)
    state = copy.deepcopy(source.state_dict())
    if repeated:  # as GPT2LMHeadModel.state_dict() does
        state["lm_head.weight"] = state["transformer.wte.weight"].clone()
    keys = list(state)
    model.load_state_dict(state, assign=assign)
    assert list(state) == keys  # the caller's dict is left alone
    idx = tokens(2, 8)
    assert torch.equal(model(idx)[0], source(idx)[0])
    with torch.no_grad():
        model.transformer.wte.weight.zero_()
    assert (model(idx)[0] == 0).all()  # the head went with it
    assert (
        num_parameters(model) == num_parameters(source) == len(torch.nn.utils.parameters_to_vector(model.parameters()))
    )


def test_loading_refuses_an_untied_head():
    state = build().state_dict()
    state["lm_head.weight"] = state["transformer.wte.weight"] + 1
    with pytest.raises(ValueError, match="ties"):
        build().load_state_dict(state)


def test_loading_a_head_without_the_embedding_is_still_tied():
    source = build()
    state = source.state_dict()
    state["lm_head.weight"] = state.pop("transformer.wte.weight")
    model = build(seed=5)
    model.load_state_dict(state)
    assert torch.equal(model.transformer.wte.weight, source.transformer.wte.weight)


# --- precision


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters():
    exact, model = randomize(build()), randomize(build(dtype=torch.bfloat16))
    idx, targets = tokens(2, 16), tokens(2, 16, seed=3)
    seen = []
    for block in model.transformer.h:
        block.register_forward_hook(lambda _module, _inputs, output: seen.extend(t.dtype for t in output))
    (logits, _), (_, loss) = model(idx), model(idx, targets)
    assert seen == [torch.bfloat16] * 4 * SMALL.n_layer
    assert model.dtype == logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    loss.backward()
    assert {(p.dtype, p.grad.dtype) for p in model.parameters()} == {(torch.float32, torch.float32)}
    (expected, _), (_, expected_loss) = exact(idx), exact(idx, targets)
    assert (logits.float() - expected).norm() < 0.03 * expected.norm()
    assert loss.item() == pytest.approx(expected_loss.item(), rel=0.02)


def test_float32_casts_copy_nothing():
    model, idx = build(), tokens(2, 16)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        _, loss = model(idx, idx)
        loss.backward()
    shapes = [event.input_shapes[0] for event in profile.events() if event.name == "aten::_to_copy"]
    assert all(math.prod(shape) <= idx.numel() for shape in shapes)  # the mask of the targets, which is counted


# --- dropout


@pytest.mark.parametrize("which", ["embd_pdrop", "resid_pdrop", "attn_pdrop"])
def test_dropout_acts_in_training_only(which):
    model = randomize(build(replace(SMALL, **{which: 0.5})))
    idx = tokens(2, 16)
    reference, _ = randomize(build())(idx)
    model.eval()
    assert torch.equal(model(idx)[0], reference)
    model.train()
    first, second = model(idx)[0], model(idx)[0]
    assert not torch.equal(first, second)
    torch.manual_seed(7)
    first, _ = model(idx)
    torch.manual_seed(7)
    assert torch.equal(model(idx)[0], first)


def test_residual_dropout_has_the_probability_of_the_config():
    model = build(replace(SMALL, resid_pdrop=0.25))
    dropped = []
    for block in model.transformer.h:
        block.attn.c_proj.bias.data.fill_(1000.0)  # what is dropped is then plain to see in the residual stream
        block.register_forward_hook(lambda _module, _inputs, output: dropped.append(output[1]))
    model(tokens(8, 16))
    zeros = (dropped[0].abs() < 100).float().mean().item()
    assert zeros == pytest.approx(0.25, abs=0.03)  # 6,144 values: one deviation is 0.0055
    assert dropped[0].max().item() == pytest.approx(1000 / 0.75, rel=0.01)


# --- refusals


def test_too_long_a_sequence_names_both_lengths():
    model = build()
    model(tokens(1, 16))
    with pytest.raises(ValueError, match="17 tokens is longer than the model's 16 positions"):
        model(tokens(1, 17))


@pytest.mark.parametrize("bad", [-1, SMALL.vocab_size])
def test_ids_outside_the_vocabulary_are_refused(bad):
    idx = tokens(1, 4)
    idx[0, 2] = bad
    with pytest.raises(ValueError, match=rf"\[0, 61\), got ids from .*{'-1 to' if bad < 0 else 'to 61'}"):
        build()(idx)


# --- torch.compile


@pytest.mark.slow
def test_compiles_into_one_graph():
    model = randomize(build())
    idx, targets = tokens(2, 16), tokens(2, 16, seed=3)
    _, expected = model(idx, targets)
    expected.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    _, loss = compiled(idx, targets)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    torch.testing.assert_close(compiled(idx, logits="last")[0], model(idx, logits="last")[0])


# --- CUDA


@pytest.mark.gpu
def test_padded_columns_never_reach_the_caller():
    model = randomize(build())
    idx, targets = tokens(2, 16), tokens(2, 16, seed=3)
    (expected, _), (_, expected_loss) = model(idx), model(idx, targets)
    expected_loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.cuda()
    (logits, _), (_, loss) = model(idx.cuda()), model(idx.cuda(), targets.cuda())
    loss.backward()
    assert logits.shape == expected.shape and model.transformer.wte.weight.shape[0] == SMALL.vocab_size
    torch.testing.assert_close(logits.cpu(), expected, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(loss.cpu(), expected_loss, atol=1e-4, rtol=1e-4)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad.cpu(), gradients[name], atol=1e-3, rtol=1e-3)
