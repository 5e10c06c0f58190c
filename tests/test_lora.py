"""Adapters: what they compute and train, PEFT's format both ways, runs that train them, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from small_model import small_model, small_tokenizer
from test_parallel import launch
from test_resume import KILLED
from torch.utils._python_dispatch import TorchDispatchMode
from trainer import ROOT, SMALL, TEXT, call, losses, made_once, refused, state

from kernels import use_backend
from model import checkpoint, hf, lora
from model.cli import run
from model.config import GPTConfig
from model.evaluate import EvaluateConfig
from model.evaluate import main as evaluate
from model.generate import ALIASES, GenerateConfig
from model.generate import main as generate
from model.gpt import GPT
from model.lora import LoraCommand, LoraConfig, LoraLinear
from model.tokenizer import CharTokenizer
from model.training.weights import describe

ALL = LoraConfig(4)


def adapted(config: LoraConfig = ALL, dtype: torch.dtype = torch.float32) -> GPT:
    """The small model with adapters that change what it computes."""
    model = small_model(small_tokenizer())
    model.dtype = dtype
    lora.add(model, config)
    for name, p in lora.trained(model).items():
        if "lora_B" in name:
            p.data.normal_(0, 0.2)
    return model


def ids(model: GPT, *shape: int) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, shape)


# --- the model -------------------------------------------------------------------------------------------------------


def test_adapters_change_nothing_at_first_and_then_the_formula():
    model = small_model(small_tokenizer())
    idx = ids(model, 2, 12)
    before = model(idx)[0]
    assert torch.equal(lora.add(model, LoraConfig(4, alpha=6.0))(idx)[0], before)
    linear = model.transformer.h[0].mlp.c_fc
    linear.lora_B.weight.data.normal_()
    linear.bias.data.normal_()
    x, W, b = torch.randn(3, 5, 16), linear.weight, linear.bias
    expected = x @ W.T + b + 6 / 4 * (x @ linear.lora_A.weight.T @ linear.lora_B.weight.T)
    torch.testing.assert_close(linear(x), expected)
    torch.testing.assert_close(linear.gelu(x, "tanh"), torch.nn.functional.gelu(expected, approximate="tanh"))


def test_initialisation_is_the_papers():
    torch.manual_seed(0)
    linear = lora.add(small_model(small_tokenizer()), LoraConfig(16)).transformer.h[0].mlp.c_proj
    assert linear.lora_A.weight.std().item() == pytest.approx(64**-0.5, rel=0.1)
    assert not linear.lora_B.weight.any()


@pytest.mark.parametrize("targets", [("c_attn",), ("attn.c_proj", "c_fc"), ("c_attn", "c_proj", "c_fc")], ids="+".join)
def test_only_adapters_of_the_targets_are_trained(targets):
    model = lora.add(small_model(small_tokenizer()), LoraConfig(2, targets=targets))
    ends = {name.split(".", 3)[3] for name, module in model.named_modules() if isinstance(module, LoraLinear)}
    every = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert ends == {name for name in every if name.endswith(targets)}
    assert all(re.search(r"\.lora_[AB]\.weight$", name) for name in lora.trained(model))
    assert len(lora.trained(model)) == 2 * 2 * len(ends)
    assert describe(model) == f"{sum(p.numel() for p in lora.trained(model).values()):,} of " + (
        f"{sum(p.numel() for p in model.parameters()):,} parameters trained"
    )


class _Sizes(TorchDispatchMode):
    """Collects the shapes of what operators make, views of some tensors aside."""

    def __init__(self, known):
        super().__init__()
        self.shapes, self.known = {()}, {t.untyped_storage().data_ptr() for t in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.shapes.add(tuple(t.shape))
        return result


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_backward_computes_no_gradient_of_a_frozen_parameter(backend, recompute, device):
    model = adapted().to(device)
    model.recompute = recompute
    model.train()
    idx = ids(model, 3, 7).to(device)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    shapes = {tuple(p.shape) for p in frozen} | {tuple(p.shape[::-1]) for p in frozen}
    with use_backend(backend):
        loss = model(idx, idx)[1]
        with _Sizes(frozen) as made:
            loss.backward()
    assert (4, 16) in made.shapes and made.shapes & shapes == set()  # the gradients of A are there
    assert all(p.grad is None for p in frozen) and all(p.grad is not None for p in lora.trained(model).values())


def test_gradients_are_those_of_the_formula():
    """Of A and B from the gradient of the merged weight: dB = s dW A', dA = s B' dW."""
    model = adapted(LoraConfig(4, alpha=6.0))
    plain = small_model(small_tokenizer())
    lora.merge(
        plain,
        lora.Adapter("", {n: (m.lora_A.weight.detach(), 1.5 * m.lora_B.weight.detach()) for n, m in _pairs(model)}),
    )
    idx = ids(model, 2, 12)
    torch.testing.assert_close(model(idx)[0], plain(idx)[0], atol=1e-4, rtol=1e-4)
    model(idx, idx)[1].backward()
    plain(idx, idx)[1].backward()
    for name, module in _pairs(model):
        dW, A, B = plain.get_parameter(f"{name}.weight").grad, module.lora_A.weight, module.lora_B.weight
        torch.testing.assert_close(A.grad, 1.5 * B.T @ dW, atol=1e-5, rtol=1e-3)
        torch.testing.assert_close(B.grad, 1.5 * dW @ A.T, atol=1e-5, rtol=1e-3)


def _pairs(model):
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLinear)]


def test_dropout_is_of_the_adapters_input_in_training_alone():
    model = adapted(LoraConfig(4, dropout=0.5))
    linear, x = model.transformer.h[0].mlp.c_fc, torch.ones(1, 16)
    with torch.no_grad():
        plain = linear(x)
        linear.train()
        W, b = linear.weight, linear.bias
        values = {tuple((linear(x) - x @ W.T - b).flatten().tolist()) for _ in range(8)}
        mean = torch.stack([linear(x) for _ in range(4000)]).mean(0)
    assert len(values) > 4
    torch.testing.assert_close(mean, plain, atol=0.1, rtol=0.1)
    torch.testing.assert_close(linear.eval()(x), plain)


def test_frozen_matrices_are_kept_in_the_activations_dtype_alone():
    model, idx = adapted(dtype=torch.bfloat16), torch.zeros(1, 12, dtype=torch.int64)
    before = model(idx, idx)[1]
    model.keep_working_weights()
    linear = model.transformer.h[0].mlp.c_fc
    assert linear.weight.dtype == torch.bfloat16 and linear.working is None
    assert linear.lora_A.weight.dtype == model.transformer.wte.weight.dtype == torch.float32
    assert torch.equal(model(idx, idx)[1], before)


@pytest.mark.slow
def test_compiled_model_has_the_same_gradients():
    model = adapted()
    idx = ids(model, 2, 12)
    model(idx, idx)[1].backward()
    eager = {name: p.grad.clone() for name, p in lora.trained(model).items()}
    model.zero_grad()
    torch.compile(model, backend="aot_eager", fullgraph=True)(idx, idx)[1].backward()
    for name, p in lora.trained(model).items():
        torch.testing.assert_close(p.grad, eager[name])


# --- PEFT ------------------------------------------------------------------------------------------------------------


# transformers about itself
QUIET = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture
def theirs():
    """Our small model in transformers."""
    transformers = pytest.importorskip("transformers", reason="needs the transformers package")
    pytest.importorskip("peft", reason="needs the peft package")
    ours = small_model(small_tokenizer())
    fields = {key: value for key, value in ours.config.to_dict().items() if key != "bias"}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**fields)).eval()
    weights = {
        name: p.T if re.search(r"(c_attn|c_proj|c_fc)\.weight$", name) else p for name, p in ours.state_dict().items()
    }
    model.load_state_dict({**weights, "lm_head.weight": weights["transformer.wte.weight"]}, strict=False)
    return model


def _export(model: GPT, config: LoraConfig, folder) -> None:
    lora.write(folder, config.to_peft("base"), {name: p.detach() for name, p in lora.trained(model).items()})


@QUIET
@pytest.mark.parametrize("config", [ALL, LoraConfig(2, alpha=3.5, targets=("mlp.c_proj", "c_attn"))], ids=str)
def test_peft_loads_ours(config, theirs, tmp_path):
    from peft import PeftModel

    model = adapted(config)
    _export(model, config, tmp_path / "adapter")
    idx = ids(model, 3, 12)
    before = theirs(idx).logits
    peft = PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    with torch.no_grad():
        got = peft(idx).logits
    torch.testing.assert_close(got, model(idx)[0], atol=1e-4, rtol=0)
    assert (got - before).abs().max() > 0.1
    names = {name.replace(".default", "") for name, _ in peft.named_parameters() if "lora_" in name}
    assert names == set(safetensors.torch.load_file(tmp_path / "adapter" / lora.WEIGHTS))


@QUIET
@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn", "c_proj", "c_fc"]},
        {"r": 3, "lora_alpha": 5, "target_modules": ["c_attn"], "use_rslora": True},
        {"r": 4, "target_modules": ["c_attn", "c_fc"], "rank_pattern": {"c_fc": 2}, "layers_to_transform": [1]},
    ],
    ids=["all", "rslora", "patterns"],
)
def test_ours_loads_pefts(options, theirs, tmp_path):
    import peft

    model = peft.get_peft_model(theirs, peft.LoraConfig(**options, fan_in_fan_out=True, task_type="CAUSAL_LM"))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.2)
    model.eval().save_pretrained(tmp_path)
    ours = small_model(small_tokenizer())
    idx = ids(ours, 3, 12)
    with torch.no_grad():
        expected = model(idx).logits
        plain = ours(idx)[0]
        with lora.merged(ours, lora.read(tmp_path)):
            torch.testing.assert_close(ours(idx)[0], expected, atol=1e-4, rtol=0)
        assert torch.equal(ours(idx)[0], plain) and (plain - expected).abs().max() > 0.1


# --- runs ------------------------------------------------------------------------------------------------------------

OTHER = TEXT.replace("cat", "log").replace("mat", "dog")
TUNE = shlex.split("""
    --preset tiny --device cpu --data other.txt --init base --batch-size 4 --schedule constant --lr 1e-2 --min-lr 1e-3
    --warmup-steps 2 --eval-every 10 --eval-windows 12 --save-every 10 --log-every 5 --sample-tokens 3
""")
LORA = [*TUNE, *shlex.split("--lora-rank 4 --lora-dropout 0.1 --ema 0.9")]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return made_once(tmp_path_factory, "--steps", 20)


@pytest.fixture
def base(made, here):
    (here / "other.txt").write_text(OTHER)
    return shutil.copytree(made, here / "base")


@pytest.mark.parametrize("options", [[], ["--optimizer", "muon", "--grad-accum", 2]], ids=["adamw", "muon"])
def test_resumed_run_is_bitwise_the_straight_one(base, here, capsys, options):
    assert call(*LORA, *options, "--steps", 20, "--out", "straight") == 0
    assert " parameters trained | cpu" in capsys.readouterr().out
    assert call(*LORA, *options, "--steps", 10, "--out", "run") == 0
    assert call("--resume", "run", "--steps", 20) == 0
    assert state(here / "run", 20) == state(here / "straight", 20)
    val_losses = [row[3] for row in losses(here / "straight") if row[3] is not None]
    assert val_losses[-1] < val_losses[0]


@pytest.mark.slow
def test_resume_after_kill_9_is_bitwise_equal(base, here):
    def process(*argv):
        command = [sys.executable, "-c", KILLED, *map(str, argv)]
        env = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=here, env=env, capture_output=True, text=True)

    died = process(*LORA, "--steps", 20, "--out", "killed")
    assert died.returncode == -9, died.stderr
    assert checkpoint.list_checkpoints(here / "killed") == ["step-00000010"]
    resumed = process("--resume", "killed")
    assert (resumed.returncode, resumed.stderr) == (0, "")
    assert call(*LORA, "--steps", 20, "--out", "straight") == 0
    assert state(here / "killed", 20) == state(here / "straight", 20)
    assert losses(here / "killed") == losses(here / "straight")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_train_the_same_adapters(base, here, kind):
    options = [*LORA, "--lora-dropout", 0, "--steps", 10, "--data", here / "other.txt", "--init", base]
    assert call(*options, "--out", "one") == 0
    done = launch(ROOT / "train.py", *options, "--out", here / "two", "--parallel", kind)
    assert done.returncode == 0, done.stderr
    one, two = (checkpoint.load(here / name).parts for name in ("one", "two"))
    assert one.keys() == two.keys()
    for part in ("adapter_model", "ema", "optimizer"):
        torch.testing.assert_close(two[part], one[part], atol=2e-4, rtol=1e-3)


def test_checkpoint_holds_adapters_alone_in_pefts_format(base, here):
    assert call(*LORA, "--steps", 10, "--out", "run") == 0
    folder = here / "run/checkpoints/step-00000010"
    assert not (folder / "model.safetensors").exists()
    saved = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    assert len(saved) == 8 and all(name.startswith("base_model.model.transformer.h.0.") for name in saved)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 16)
    notes = checkpoint.load(here / "run").state["lora"]
    assert notes["base"] == lora.load_base(here / "base").about and notes["peft"] == config
    assert lora.read(folder).pairs.keys() == lora.read(here / "run").pairs.keys()


def text_of(capsys, *argv) -> str:
    capsys.readouterr()
    run(generate, GenerateConfig, prog="", argv=[*map(str, argv), "--tokens", "30", "--greedy"], aliases=ALIASES)
    return capsys.readouterr().out


def command(*argv) -> None:
    run(lora.main, LoraCommand, prog="", argv=[str(arg) for arg in argv])


def test_everything_takes_the_run_merged_exported_or_as_an_adapter(base, here, capsys):
    assert call(*LORA, "--steps", 20, "--out", "run") == 0
    command("merge", "run", "merged")
    command("export", "run", "exported")
    own, plain = text_of(capsys, "run"), text_of(capsys, "base")
    assert own != plain
    assert own == text_of(capsys, "merged") == text_of(capsys, "base", "--adapter", "run")
    assert own == text_of(capsys, "base", "--adapter", "exported")
    both = text_of(capsys, "base", "--adapter", "run", "--adapter", "exported")
    assert both == f"--- adapter run\n{own}--- adapter exported\n{own}"
    evaluate(EvaluateConfig(here / "run", max_windows=12))
    val_loss = checkpoint.load(here / "run", "best").state["val_loss"]
    assert f"validation loss {val_loss:.4f}" in capsys.readouterr().out
    found = []
    for cfg in (EvaluateConfig(here / "merged"), EvaluateConfig(here / "base", adapter=here / "exported")):
        evaluate(EvaluateConfig(cfg.run, data=here / "other.txt", adapter=cfg.adapter, json=True))
        found.append(json.loads(capsys.readouterr().out)["results"])
    assert found[0] == found[1]
    # and another one can begin with it
    assert call(*[arg if arg != "base" else "merged" for arg in LORA], "--steps", 2, "--out", "again") == 0


def test_full_fine_tuning_begins_with_the_weights(base, here, capsys):
    assert call(*TUNE, "--dropout", 0, "--lr", 1e-9, "--min-lr", 0, "--steps", 1, "--out", "run") == 0
    saved, begun = (checkpoint.load(here / name, "best").parts["model"] for name in ("run", "base"))
    assert all((saved[name] - begun[name]).abs().max() < 1e-6 for name in begun)
    shutil.rmtree(here / "base")
    assert call("--resume", "run", "--steps", 2) == 0  # the checkpoint has all weights


def test_run_begins_with_a_hugging_face_folder(base, here):
    """Its shape comes from config.json; another GELU and epsilon stay."""
    tokenizer = lora.load_base(base).tokenizer
    config = GPTConfig(tokenizer.n_vocab, 16, 16, 2, 2, activation_function="gelu", layer_norm_epsilon=1e-6)
    model = GPT(config)

    def export(run):
        shutil.rmtree(here / "theirs", ignore_errors=True)
        checkpoint.save_model(here / run, model, tokenizer, config={})
        hf.export(here / run, here / "theirs")

    export("ours")
    options = [arg if arg != "base" else "theirs" for arg in LORA]
    assert call(*options, "--steps", 10, "--out", "run") == 0
    assert call("--resume", "run", "--steps", 20) == 0
    assert lora.shape_of(here / "run") == dataclasses.replace(config, initializer_range=0.02)
    assert lora.load_model(here / "run")[0].config.activation_function == "gelu"
    model.transformer.wpe.weight.data[0] += 1
    export("changed")
    with pytest.raises(lora.UserError, match="theirs has changed"):
        lora.load_model(here / "run")


def test_shape_of_a_hugging_face_folder_is_that_of_its_model(base, here):
    """The GELU by another name, biases of zero that it does not have."""
    model, tokenizer = GPT(GPTConfig(28, 16, 16, 2, 2, bias=False)), CharTokenizer("abcdefghijklmnopqrstuvwxyz.")
    checkpoint.save_model(here / "ours", model, tokenizer, config={})
    hf.export(here / "ours", here / "theirs")
    path = here / "theirs/config.json"
    path.write_text(path.read_text().replace('"gelu_new"', '"gelu_pytorch_tanh"'))
    shape = lora.shape_of(here / "theirs")
    assert shape == hf.load_pretrained(here / "theirs")[0].config
    assert (shape.activation_function, shape.bias) == ("gelu_new", False)


def test_context_may_be_shorter_than_that_of_the_base(base, here, capsys):
    assert call(*LORA, "--context", 8, "--steps", 2, "--out", "run") == 0
    model, _ = lora.load_model(here / "run")
    full, _ = lora.load_model(base)
    assert torch.equal(model.transformer.wpe.weight, full.transformer.wpe.weight[:8])
    refused(here, capsys, [*LORA, "--context", 32, "--out", "long"], "base has 16 positions", "got 32")


def test_base_may_move_but_not_change(base, here, capsys):
    assert call(*LORA, "--steps", 10, "--out", "run") == 0
    base.rename(here / "moved")
    refused(here, capsys, ["--resume", "run", "--steps", 12], "has no checkpoint")
    assert call("--resume", "run", "--init", "moved", "--steps", 12) == 0
    assert lora.load_model(here / "run")[0]
    assert call("--resume", "moved", "--steps", 30, "--keep-last", 1) == 0  # its best is another one now
    refused(here, capsys, ["--resume", "run", "--steps", 14], "moved has no checkpoint 'step-00000020'")
    saved = checkpoint.load(here / "moved")
    checkpoint.save(
        here / "moved", 20, saved.parts, config={}, model=lora.shape_of(here / "moved"), best_val_loss=None, elapsed_s=0
    )
    refused(here, capsys, ["--resume", "run", "--steps", 14], "moved has changed: its weights are not those")
    with pytest.raises(lora.UserError, match="has changed"):
        lora.load_model(here / "run")


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--lora-rank", -1], "--lora-rank must be 0 (none) or more"),
        (["--lora-rank", 17], "--lora-rank must be at most the model's width, 16"),
        (["--lora-alpha", 0], "--lora-alpha must be a number above 0"),
        (["--lora-dropout", 1], "--lora-dropout must be in [0, 1)"),
        (["--recompute"], "--lora-dropout must be 0 with --recompute"),
        (["--lora-targets", "wte"], "--lora-targets must be some of c_attn,c_proj,c_fc"),
        (["--lora-targets", ""], "--lora-targets must be some of"),
        (["--tokenizer", "char"], "--tokenizer must be omitted with --init"),
        (["--n-layer", 2], "n_layer is 1 in base and 2 here: omit the option"),
        (["--no-bias"], "bias is True in base and False here"),
        (["--init", "nowhere"], "nowhere has no checkpoint"),
        (["--init", "other.txt"], "other.txt has no checkpoint"),
        (["--data", "greek.txt"], "not in this tokenizer's alphabet"),
    ],
)
def test_bad_options_are_refused(base, here, capsys, argv, words):
    (here / "greek.txt").write_text("αβγ " * 500)
    refused(here, capsys, [*LORA, *argv, "--out", "run"], words)


def test_rank_needs_a_model_to_adapt(here, capsys):
    refused(here, capsys, [*SMALL, "--lora-rank", 4], "--lora-rank must be omitted without --init")


def test_adapters_on_adapters_are_refused(base, here, capsys):
    assert call(*LORA, "--steps", 2, "--out", "run") == 0
    again = [arg if arg != "base" else "run" for arg in LORA]
    refused(here, capsys, [*again, "--out", "more"], "run holds adapters: merge them first")
    for out in ("base", "run"):
        with pytest.raises(SystemExit):
            command("merge", "run", out)
        assert "exists and is not an empty folder" in capsys.readouterr().err
    for what in ("merge", "export"):
        with pytest.raises(SystemExit):
            command(what, "base", "new")
        assert "base holds no adapter" in capsys.readouterr().err
    assert not (here / "new").exists()
    with pytest.raises(SystemExit):
        command("export", "run", "new", "--adapter", "run")
    assert "--adapter is for merge" in capsys.readouterr().err and not (here / "new").exists()


def test_exported_adapter_is_a_file_like_others(tmp_path, monkeypatch):
    (tmp_path / ".tmp-adapter").mkdir()  # of a process that was killed
    flushed, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (flushed.append(file), fsync(file)))
    _export(adapted(), ALL, tmp_path / "adapter")
    weights, settings = (tmp_path / "adapter" / name for name in (lora.WEIGHTS, "adapter_config.json"))
    assert weights.stat().st_mode == settings.stat().st_mode and flushed

    def full(*args):
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space left on device"):
        _export(adapted(), ALL, tmp_path / "other")
    assert {path.name for path in tmp_path.iterdir()} == {".tmp-adapter", "adapter"}


def _edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _tensors(folder, change):
    path = folder / lora.WEIGHTS
    safetensors.torch.save_file(change(safetensors.torch.load_file(path)), path)


A, B = (f"base_model.model.transformer.h.0.attn.c_attn.lora_{x}.weight" for x in "AB")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "adapter_config.json").unlink(), "holds no adapter: there is no adapter_config.json in it"),
        (lambda f: _edit(f, init_lora_weights="pissa"), "has init_lora_weights 'pissa'"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "is not a JSON object"),
        (lambda f: (f / "adapter_config.json").write_text("[" * 10**5), "is not a JSON object"),
        (lambda f: (f / "adapter_config.json").write_text("[1]"), "is not a JSON object"),
        (lambda f: (f / "adapter_config.json").write_text(" " * (1 << 20) + "{}"), "has 1,048,578 bytes"),
        (lambda f: _edit(f, peft_type="IA3"), "is an adapter of type 'IA3'"),
        (lambda f: _edit(f, use_dora=True), "has use_dora 'True', which is not supported"),
        (lambda f: _edit(f, bias="all"), "has bias 'all'"),
        (lambda f: _edit(f, modules_to_save=["wte"]), "has modules_to_save"),
        (lambda f: _edit(f, alpha_pattern={"c_fc": 3}), "has alpha_pattern"),
        (lambda f: _edit(f, lora_alpha="x" * 1000), "has lora_alpha 'xxx"),
        (lambda f: _edit(f, lora_alpha=float("nan")), "has lora_alpha 'nan'"),
        (lambda f: _edit(f, lora_alpha=10**400), "has lora_alpha '1000"),
        (lambda f: ((f / lora.WEIGHTS).unlink(), (f / lora.WEIGHTS).mkdir()), "is not a file"),
        (lambda f: _tensors(f, lambda t: {n: x.double() for n, x in t.items()}), "is 'F64': convert it to float32"),
        (lambda f: (f / lora.WEIGHTS).unlink(), "has no adapter_model.safetensors"),
        (lambda f: (f / lora.WEIGHTS).write_bytes(b""), "is not a complete safetensors file"),
        (lambda f: (f / lora.WEIGHTS).write_bytes(b"\xff" * 64), "is not a complete safetensors file"),
        (lambda f: _tensors(f, lambda t: {}), "holds no tensors"),
        (
            lambda f: _tensors(f, lambda t: {n: x for n, x in t.items() if n != B}),
            "A and B of transformer.h.0.attn.c_attn",
        ),
        (lambda f: _tensors(f, lambda t: {**t, A: t[A][:2].clone()}), "A and B of transformer.h.0.attn.c_attn"),
        (lambda f: _tensors(f, lambda t: {**t, A: t[A][:, :8].clone()}), "is for another model"),
        (lambda f: _tensors(f, lambda t: {**t, "x" * 5000: t[A].clone()}), "holds the tensor 'xxx"),
        (lambda f: _tensors(f, lambda t: {n.replace("h.1", "h.9"): x for n, x in t.items()}), "and missing here"),
    ],
)
def test_bad_adapters_are_refused(damage, words, tmp_path):
    folder = tmp_path / "adapter"
    _export(adapted(), ALL, folder)
    model = small_model(small_tokenizer())
    before = {name: p.clone() for name, p in model.named_parameters()}
    damage(folder)
    with pytest.raises(lora.UserError) as error:
        lora.merge(model, lora.read(folder))
    message = str(error.value)
    assert words in message and len(message) < 500 and message.count("\n") <= 1
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
