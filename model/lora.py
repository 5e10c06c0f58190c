"""LoRA: fine-tuning by small matrices beside frozen ones (Hu et al. 2021, arXiv 2106.09685), in PEFT's format.

    y = W x + b + (alpha / r) B A dropout(x)        W: (out, in), b: (out,), frozen
                                                    A: (r, in), normal at first; B: (out, r), zero at first

    python train.py --init RUN --lora-rank 8 --data mine.txt      # train adapters for the model of a run
    python -m model.generate RUN --adapter DIR                    # write with one, of a run of ours or made by PEFT
    python -m model.lora merge RUN NEW                            # a run with the adapters in its weights
    python -m model.lora export RUN DIR                           # the adapters alone, for PEFT

An adapter folder holds adapter_model.safetensors and adapter_config.json, as `peft` writes and loads them: A and B of
base_model.model.transformer.h.0.attn.c_attn and so on, lora_A.weight (r, in) and lora_B.weight (out, r). Each
checkpoint of a run with adapters is one. Such a run keeps no copy of the model it adapts: it notes where that is and
the SHA-256 of its weights. For inference the adapter is added into the weights, which then cost what they did without;
in Python `with merged(model, read(DIR)):` does so for a block, to switch between several.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from kernels import bias_gelu
from model import checkpoint, files, foreign
from model.checkpoint import ADAPTER, ADAPTER_CONFIG, PEFT_PREFIX
from model.cli import UserError, run
from model.config import GPTConfig
from model.gpt import GPT, Linear, Sum
from model.tokenizer import Tokenizer

TARGETS = ("c_attn", "c_proj", "c_fc", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")  # ends of names
WEIGHTS = f"{ADAPTER}.safetensors"
# Settings of PEFT that change what an adapter computes, with the values under which this file computes it.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),  # others change the frozen weights too
    **dict.fromkeys(("use_dora", "use_qalora", "lora_bias"), (False, None)),
    **dict.fromkeys(("modules_to_save", "trainable_token_indices", "target_parameters"), (None, [], {})),
    **dict.fromkeys(("alpha_pattern", "layer_replication", "alora_invocation_tokens", "arrow_config"), (None, [], {})),
}


@dataclass(frozen=True)
class LoraConfig:
    """rank: r. targets: the ends of the names of the matrices that get an adapter, out of TARGETS."""

    rank: int
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("c_attn", "c_proj", "c_fc")

    def is_target(self, name: str) -> bool:
        """name: of a module, such as transformer.h.0.attn.c_attn."""
        return any(name.endswith(f".{target}") for target in self.targets)

    def to_peft(self, base: str) -> dict[str, Any]:
        """The content of adapter_config.json. base: name or path of the model that it is for."""
        return {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
            "r": self.rank, "lora_alpha": int(self.alpha) if self.alpha == int(self.alpha) else self.alpha,
            "lora_dropout": self.dropout, "target_modules": list(self.targets),
            "fan_in_fan_out": True,  # transformers' GPT-2 keeps its matrices as (in, out)
            "bias": "none", "inference_mode": True,
        }  # fmt: skip


# Training


class LoraLinear(Linear):
    """A Linear with its parameters, and an adapter beside it."""

    def __init__(self, linear: Linear, config: LoraConfig) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_A = nn.Linear(self.in_features, config.rank, bias=False)
        self.lora_B = nn.Linear(config.rank, self.out_features, bias=False)
        nn.init.normal_(self.lora_A.weight, std=self.in_features**-0.5)  # A x is about as large as x
        nn.init.zeros_(self.lora_B.weight)
        self.scale, self.dropout = config.alpha / config.rank, config.dropout

    def forward(self, x: Tensor, into: Sum | None = None) -> Any:
        """(..., in) -> (..., out); with a sum, the two tensors that come of that."""
        y: Tensor = super().forward(x)
        A, B = self.lora_A.weight.to(x.dtype), self.lora_B.weight.to(x.dtype)
        low = F.linear(F.dropout(x, self.dropout, self.training), A)  # (..., r)
        y = torch.addmm(y.flatten(0, -2), low.flatten(0, -2), B.t(), alpha=self.scale).view(y.shape)
        return y if into is None else into.of(y)

    def gelu(self, x: Tensor, approximate: str) -> Tensor:  # (..., in) -> (..., out)
        return bias_gelu(self(x), None, approximate)  # the bias is frozen, and in self(x)


def add(model: GPT, config: LoraConfig) -> GPT:
    """Freeze all parameters of `model` and put adapters beside its matrices, in place -> model.

    A is drawn from torch's global generator. The outputs do not change, as B is zero.
    """
    model.requires_grad_(False)
    for path, module in [*model.named_modules()]:
        if isinstance(module, Linear) and config.is_target(path):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, LoraLinear(module, config).train(module.training))
    return model


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are not frozen, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# Adapters


@dataclass(frozen=True)
class Adapter:
    """name: where it is from. pairs: A (r, in) and B (out, r) of each module by its name, B times the scale."""

    name: str
    pairs: dict[str, tuple[Tensor, Tensor]]

    @classmethod
    def from_peft(cls, name: str, config: dict[str, Any], tensors: dict[str, Tensor]) -> Adapter:
        """config: the content of adapter_config.json. tensors: by PEFT's names, without their prefix.

        UserError for what is no LoRA, or one of a kind that this project does not compute.
        """
        if (kind := config.get("peft_type")) != "LORA":
            raise UserError(f"{name} is an adapter of type {str(kind)[:40]!r}: only LORA can be used here")
        for key, plain in _PLAIN.items():
            if config.get(key, plain[0]) not in plain:
                raise UserError(f"{name} has {key} {str(config[key])[:40]!r}, which is not supported: train it without")
        alpha = config.get("lora_alpha", 8)
        if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not abs(alpha) < 1e9:
            raise UserError(
                f"{name} has lora_alpha {str(alpha)[:40]!r}, not a number below 1e9: restore it, or make it again"
            )
        pairs = {}
        for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
            module = key.removesuffix(".lora_A.weight")
            A, B = tensors.pop(key), tensors.pop(f"{module}.lora_B.weight", torch.empty(0))
            if A.ndim != 2 or B.ndim != 2 or not 0 < len(A) == B.shape[1]:
                raise UserError(
                    f"{name}: A and B of {module} are {tuple(A.shape)} and {tuple(B.shape)}: no pair (r, in), (out, r)"
                )
            r = math.sqrt(len(A)) if config.get("use_rslora") else len(A)
            pairs[module] = A.float(), B.float() * (alpha / r)
        if tensors or not pairs:
            unknown = f"the tensor {min(tensors)[:100]!r}" if tensors else "no tensors"
            raise UserError(f"{name} holds {unknown} where a LoRA has NAME.lora_A.weight and NAME.lora_B.weight")
        return cls(name, pairs)


def read(source: Path) -> Adapter:
    """The adapter in a folder that PEFT or `export` wrote, or the best of a run. UserError where there is none."""
    if not (source / ADAPTER_CONFIG).exists():
        return _of_run(source, checkpoint.load(source, "best", weights_only=True) if _is_run(source) else None)
    config = foreign.read_json(source, ADAPTER_CONFIG)
    if not foreign.has(source, WEIGHTS):
        raise UserError(f"{source} has no {WEIGHTS}: save the adapter with safetensors")
    tensors = {}
    for name, stored in foreign.tensors(foreign.inside(source, WEIGHTS)):
        stored.check_dtype(name)
        tensors[name.removeprefix(PEFT_PREFIX)] = stored.read()
    return Adapter.from_peft(str(source), config, tensors)


def write(out: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Make the folder of an adapter. config: of LoraConfig.to_peft. tensors: the trained parameters by name."""
    with files.new_folder(out) as folder:
        checkpoint.write_tensors(folder, ADAPTER, tensors)
        files.write_file(folder / ADAPTER_CONFIG, json.dumps(config, indent=2) + "\n")


def _is_run(source: Path) -> bool:
    return bool(checkpoint.list_checkpoints(source))


def _of_run(source: Path, saved: checkpoint.Checkpoint | None) -> Adapter:
    if saved is None or not (notes := saved.state.get("lora")):
        raise UserError(f"{source} holds no adapter: there is no {ADAPTER_CONFIG} in it, and no run with --lora-rank")
    (tensors,) = saved.parts.values()
    return Adapter.from_peft(str(source), notes["peft"], dict(tensors))


def merge(model: GPT, adapter: Adapter) -> GPT:
    """Add an adapter into the weights of a model, in place, in float32 -> model. UserError if it does not fit it."""
    for name, weight in _adapted(model, adapter).items():
        A, B = adapter.pairs[name]
        weight.data += (B @ A).to(weight.device)
    return model


@contextlib.contextmanager
def merged(model: GPT, adapter: Adapter) -> Iterator[GPT]:
    """The model with the adapter in the body, and then with the very weights that it had: to switch between several."""
    before = {weight: weight.detach().clone() for weight in _adapted(model, adapter).values()}
    try:
        yield merge(model, adapter)
    finally:
        for weight, value in before.items():
            weight.data.copy_(value)


def _adapted(model: GPT, adapter: Adapter) -> dict[str, Tensor]:
    """The matrices that an adapter changes, by the names of their modules."""
    matrices = {name: module.weight for name, module in model.named_modules() if isinstance(module, Linear)}
    for name, (A, B) in adapter.pairs.items():
        there, here = (len(B), A.shape[1]), tuple(matrices[name].shape) if name in matrices else "missing"
        if there != here:
            raise UserError(f"{adapter.name} is for another model: {name[:100]} is {there} there and {here} here")
    return {name: matrices[name] for name in adapter.pairs}


# The model that is adapted


@dataclass(frozen=True)
class Base:
    """A model that a run begins with. about: {"path", "checkpoint", "sha256"}; no checkpoint if not a run's."""

    model: GPT
    tokenizer: Tokenizer
    about: dict[str, Any]


def load_base(source: Path, name: str | None = None, sha256: str | None = None) -> Base:
    """The model of a run, the best by default, or of a Hugging Face folder. UserError if its weights have changed.

    name: of its checkpoint. sha256: of its weights, as noted before.
    """
    if _is_pretrained(source):
        from model import hf

        model, tokenizer = hf.load_pretrained(source)
    else:
        saved = checkpoint.load(source, name or "best", weights_only=True)
        name = saved.folder.name
        model, tokenizer = checkpoint.open_model(source, saved)
    found = digest(model)
    if sha256 not in (None, found):
        raise UserError(
            f"{source} has changed: its weights are not those that the adapters were trained for\n"
            "put them back, or train new adapters"
        )
    return Base(model, tokenizer, {"path": str(source.absolute()), "checkpoint": name, "sha256": found})


def digest(model: nn.Module) -> str:
    """The SHA-256 of all parameters, with names and shapes: that of equal weights in any file."""
    content = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        content.update(f"{name} {p.dtype} {tuple(p.shape)}\n".encode())
        content.update(p.detach().cpu().contiguous().view(torch.uint8).numpy())  # type: ignore[arg-type]
    return content.hexdigest()


def shape_of(source: Path) -> GPTConfig:
    """The shape of the model that `load_base` loads, without its weights."""
    if not _is_pretrained(source):
        return GPTConfig.from_dict(checkpoint.read_state(source)["model"])
    from model import hf

    return hf.shape_of(source)


def _is_pretrained(source: Path) -> bool:
    from model import hf  # here, as most commands need none of it

    return hf.is_pretrained(source)


def take(model: GPT, base: Base) -> None:
    """Copy the weights of `base` into `model`, which may have fewer positions. UserError for another shape."""
    fit(model.config, base.model.config, base.about["path"])
    weights = base.model.state_dict()
    wpe = "transformer.wpe.weight"
    model.load_state_dict({**weights, wpe: weights[wpe][: model.config.n_positions]})


def fit(config: GPTConfig, base: GPTConfig, name: str | Path) -> None:
    """Raise UserError where a model of this shape cannot begin with the weights of that one."""
    if config.n_positions > base.n_positions:
        most = f"{name} has {base.n_positions} positions, a vector each: --context can be that at most"
        raise UserError(f"{most}, got {config.n_positions}")
    shape = ("vocab_size", "n_layer", "n_head", "n_embd", "activation_function", "layer_norm_epsilon", "bias")
    for key in shape:
        if (here := getattr(config, key)) != (there := getattr(base, key)):
            raise UserError(f"{key} is {there} in {name} and {here} here: omit the option, and it is taken from there")


def load_model(
    source: Path,
    device: str | torch.device = "cpu",
    *,
    name: str = "best",
    dtype: torch.dtype = torch.float32,
    adapter: Path | None = None,
) -> tuple[GPT, Tokenizer]:
    """A model in evaluation mode and its tokenizer, from a run, one with adapters included, which are merged.

    adapter: of a run or a folder of PEFT's, to merge in addition. UserError as for `checkpoint.load_model`; for a base
    that has changed; for an adapter that does not fit.
    """
    saved = checkpoint.load(source, name, weights_only=True)
    if (notes := saved.state.get("lora")) is None:
        model, tokenizer = checkpoint.open_model(source, saved, device, dtype=dtype)
    else:
        config = GPTConfig.from_dict(saved.state["model"])
        about = notes["base"]
        base = load_base(Path(about["path"]), about["checkpoint"], about["sha256"])
        with torch.device("meta"):
            model = GPT(config, dtype=dtype)
        take(model.to_empty(device=device).eval(), base)
        merge(model, _of_run(source, saved))
        tokenizer = checkpoint.own_tokenizer(source, config)
    if adapter is not None:
        merge(model, read(adapter))
    return model, tokenizer


# The command


@dataclass(frozen=True)
class LoraCommand:
    """Merge the adapters of a run into its weights, as a new run; or export them alone, in PEFT's format."""

    command: tyro.conf.Positional[Literal["merge", "export"]]
    run: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]]
    """folder of a run with --lora-rank; for merge with --adapter of any run"""
    out: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="DIR")]]
    """new folder"""
    adapter: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """with merge: an adapter to merge in addition, of a run or made by PEFT"""
    checkpoint: str = "best"
    """last, best (lowest validation loss), or a name such as step-00000100"""


def main(cfg: LoraCommand) -> None:
    files.refuse_existing(cfg.out)
    if cfg.adapter is not None and cfg.command == "export":
        raise UserError("--adapter is for merge: export writes the run's own adapters alone, so omit it")
    saved = checkpoint.load(cfg.run, cfg.checkpoint, weights_only=True)
    if cfg.adapter is None:
        _of_run(cfg.run, saved)  # refuses a run without adapters
    if cfg.command == "export":
        (tensors,) = saved.parts.values()
        write(cfg.out, saved.state["lora"]["peft"], tensors)
        print(f"{cfg.out}: {len(tensors)} tensors of {saved.folder.name}, for PEFT or --adapter")
        return
    model, tokenizer = load_model(cfg.run, name=cfg.checkpoint, adapter=cfg.adapter)
    checkpoint.save_model(cfg.out, model, tokenizer, step=saved.state["step"], config={"merged": str(cfg.run)})
    print(f"{cfg.out}: the model of {cfg.run}, {saved.folder.name}, with its adapters in the weights")


if __name__ == "__main__":
    run(main, LoraCommand, prog="python -m model.lora")
