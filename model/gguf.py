"""A run as one GGUF file, for llama.cpp and the programs that are built on it, such as Ollama.

    python -m model.gguf runs/first-run model.gguf                # the weights as they are, float32
    python -m model.gguf runs/first-run model.gguf --type q8_0    # a little over a quarter of the size

llama.cpp's GPT-2 always has biases, which are zeros for a model without, and the tanh form of GELU. Its tokenizer is
byte-level BPE. In that of a vocabulary of characters the bytes of each character merge with one another and with
nothing else, so text gets the same ids; a character that is not in the vocabulary, which is an error here, is dropped
there.

f16 and q8_0 are the form of the matrices, the tied output head included. Positions, biases and LayerNorm stay float32.
q8_0 stores 32 neighbours in a row as 8-bit integers and one float16, their largest magnitude / 127.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import tyro
from torch import Tensor

from model.bpe import to_printable
from model.checkpoint import load_model
from model.cli import UserError, run
from model.config import GPTConfig
from model.files import new_file
from model.gpt import GPT
from model.tokenizer import BytePairTokenizer, Tokenizer

if TYPE_CHECKING:
    from gguf import GGUFWriter

Type = Literal["f32", "f16", "q8_0"]
BLOCK = 32  # numbers of a row that q8_0 stores together
LARGEST = np.finfo(np.float16).max
CONTEXT_STEP = 256  # llama.cpp rounds a context up to a multiple of it; a token beyond the model's ends the process


def write(model: GPT, tokenizer: Tokenizer, path: Path, kind: Type = "f32", name: str = "gpt2") -> None:
    """Write the GGUF file `path`, whole or not at all. name: what llama.cpp shows.

    f16 and q8_0 take as much memory again as the file is large. UserError without the gguf package, for a model that
    llama.cpp has no form of, and for numbers that `kind` cannot hold.
    """
    try:
        import gguf  # here: an optional package
    except ImportError:
        raise UserError("a GGUF file needs the gguf package: pip install gguf") from None
    _check(model.config, kind)
    matrices = {"f32": "F32", "f16": "F16", "q8_0": "Q8_0"}[kind]
    module_names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, model.config.n_layer)  # from Hugging Face's
    with new_file(path) as temporary:
        writer = gguf.GGUFWriter(temporary, "gpt2")
        try:
            writer.add_name(name.encode(errors="replace").decode())  # the name of a folder need not be UTF-8
            writer.add_file_type(gguf.LlamaFileType[("ALL_" if kind == "f32" else "MOSTLY_") + matrices])
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            _add_shape(writer, model.config)
            _add_tokenizer(writer, tokenizer)
            for ours, tensor in _tensors(model):
                module, _, parameter = ours.rpartition(".")
                array = tensor.detach().cpu().float().numpy()
                is_matrix = array.ndim == 2 and module != "transformer.wpe"  # positions are only added
                form = gguf.GGMLQuantizationType[matrices if is_matrix else "F32"]
                if form != gguf.GGMLQuantizationType.F32 and not np.abs(array).max() <= LARGEST:  # NaN fails too
                    raise UserError(f"{ours} has a number beyond float16, or NaN: use f32, which keeps every number")
                writer.add_tensor(f"{module_names[module]}.{parameter}", gguf.quantize(array, form), raw_dtype=form)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        except OSError as error:
            if error.errno is None:  # NumPy's own, which says only how many numbers were written
                raise UserError(f"{path} could not be written to its end: is the disk full?") from None
            raise
        finally:
            writer.close()


def vocabulary(tokenizer: Tokenizer) -> tuple[list[bytes], list[tuple[bytes, bytes]]]:
    """The bytes of each id but the end-of-text id, and the pairs to merge, in order.

    A byte, or the beginning of a character, needs no id: llama.cpp looks ids up when all pairs are merged. An id of its
    own would have a logit of its own, and could be drawn.
    """
    tokens = [tokenizer.decode_bytes([i]) for i in range(tokenizer.eot_id)]
    if isinstance(tokenizer, BytePairTokenizer):
        return tokens, list(tokenizer.merges())
    # UTF-8 tells the first byte of a character from the others, so no pair lies across two characters. U+FFFD, in the
    # vocabulary or not: llama.cpp refuses a file without pairs, such as one of ASCII.
    pairs = [(char[:i], char[i : i + 1]) for char in [*tokens, "\ufffd".encode()] for i in range(1, len(char))]
    return tokens, list(dict.fromkeys(pairs))


def _check(config: GPTConfig, kind: Type) -> None:
    if config.activation_function != "gelu_new":
        only = "llama.cpp's GPT-2 has the tanh form of GELU alone, gelu_new"
        raise UserError(f"this model has the activation function {config.activation_function!r}: {only}")
    if kind == "q8_0" and config.n_embd % BLOCK:
        raise UserError(f"q8_0 needs a width that is a multiple of {BLOCK}, and n_embd is {config.n_embd}: use f16")


def _add_shape(writer: GGUFWriter, config: GPTConfig) -> None:
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)


def _add_tokenizer(writer: GGUFWriter, tokenizer: Tokenizer) -> None:
    from gguf import TokenType

    tokens, merges = vocabulary(tokenizer)
    writer.add_tokenizer_model("gpt2")  # byte-level BPE
    writer.add_tokenizer_pre("gpt-2")  # GPT-2's pattern
    writer.add_token_list([*map(to_printable, tokens), "<|endoftext|>"])
    writer.add_token_types([TokenType.NORMAL] * len(tokens) + [TokenType.CONTROL])  # never found in a text
    writer.add_token_merges([f"{to_printable(a)} {to_printable(b)}" for a, b in merges])
    writer.add_bos_token_id(tokenizer.eot_id)
    writer.add_eos_token_id(tokenizer.eot_id)
    writer.add_add_bos_token(False)


def _tensors(model: GPT) -> Iterator[tuple[str, Tensor]]:
    """Parameters by name, with zeros for the biases that the model does not have."""
    for name, parameter in model.named_parameters():
        yield name, parameter
        if not model.config.bias and name not in ("transformer.wte.weight", "transformer.wpe.weight"):
            yield name.removesuffix("weight") + "bias", parameter.new_zeros(parameter.shape[0])


# The command


@dataclass(frozen=True)
class GGUFConfig:
    """Write the model of a run and its tokenizer into one GGUF file, for llama.cpp and Ollama."""

    run: tyro.conf.Positional[Path]  # folder of a training run
    file: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="FILE.gguf")]]  # new file
    type: Type = "f32"  # of the matrices: f32 is exact, f16 is half as large, q8_0 a little over a quarter
    checkpoint: str = "best"  # last, best (lowest validation loss), or a name such as step-00000100


def main(cfg: GGUFConfig) -> None:
    if cfg.file.exists():
        raise UserError(f"{cfg.file} exists: choose another name, or remove it")
    if not cfg.file.parent.is_dir():
        raise UserError(f"{cfg.file.parent} is not a folder: create it first, or choose another path")
    model, tokenizer = load_model(cfg.run, name=cfg.checkpoint)
    write(model, tokenizer, cfg.file, cfg.type, cfg.run.resolve().name)
    N = model.config.n_positions
    print(f"{cfg.file}: {cfg.file.stat().st_size:,} bytes, {cfg.type}, {tokenizer.n_vocab:,} ids, context {N:,}")
    if N % CONTEXT_STEP:
        print(f"prompt and text must fit in {N:,} tokens: llama.cpp rounds contexts up to a multiple of {CONTEXT_STEP}")


if __name__ == "__main__":
    run(main, GGUFConfig, prog="python -m model.gguf")
