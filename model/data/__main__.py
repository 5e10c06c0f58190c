"""python -m model.data: prepare a token folder, show what one holds, or list the works in a folder of text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from model.cli import run
from model.data import books
from model.data.corpus import SHARD_TOKENS, SPLITS, prepare, verify


@dataclass(frozen=True)
class Prepare:
    """Encode a text file, or a folder of .txt files, into a token folder, for one run or many."""

    source: tyro.conf.Positional[Path]
    """Text file, or folder of text files."""
    folder: tyro.conf.Positional[Path]
    """Token folder to create; an older one of that name is replaced."""
    tokenizer: str = "gpt2"
    """char (one token per character), gpt2 (50,257 byte-pair tokens), bpe:N (N of them, learned from the training
    part), or the folder of a saved tokenizer."""
    val_fraction: float = 0.1
    """Share of each text for validation, 0 to 1."""
    shard_tokens: int = SHARD_TOKENS
    """Maximum tokens in a shard."""


@dataclass(frozen=True)
class Show:
    """List the content of a token folder, after comparing the SHA-256 of every shard."""

    folder: tyro.conf.Positional[Path]
    """Token folder, such as the data/ of a run."""


@dataclass(frozen=True)
class List:
    """List the works in a folder of text files with their chapters, characters and words."""

    folder: tyro.conf.Positional[Path] = Path("Book")
    """Folder of .txt files, or one of them."""


Command = (
    Annotated[Prepare, tyro.conf.subcommand("prepare")]
    | Annotated[Show, tyro.conf.subcommand("show")]
    | Annotated[List, tyro.conf.subcommand("list")]
)


def list_works(folder: Path) -> None:
    paths = books.documents(folder)
    works = [books.survey(path) for path in paths]
    root = folder if folder.is_dir() else folder.parent
    names = [str(path.relative_to(root)) for path in paths] + [f"{len(works)} in all"]
    width = max(map(len, names))
    print(f"{'work':{width}}  chapters   characters        words")
    for name, (chapters, characters, words) in zip(names, [*works, map(sum, zip(*works, strict=True))], strict=True):
        print(f"{name:{width}}  {chapters:8,}  {characters:11,}  {words:11,}")


def main(command: Prepare | Show | List) -> None:
    if isinstance(command, List):
        return list_works(command.folder)
    data = prepare(**vars(command)) if isinstance(command, Prepare) else verify(command.folder)
    print(f"{command.folder}: tokenizer {data.tokenizer.name}, {data.tokenizer.n_vocab:,} ids")
    for split in SPLITS:
        meta = data.meta[split]
        count = f"{len(meta['shards']):,} {'shard' if len(meta['shards']) == 1 else 'shards'}"
        print(f"{split:5}  {meta['tokens']:15,} tokens  {meta['bytes']:15,} bytes of text  {count}")
        for path in sorted({str(Path(entry["path"]).parent) for entry in meta["shards"]} - {"."}):
            print(f"       in {path}")
    if isinstance(command, Show):
        print("every shard has the SHA-256 it had when it was first read")


if __name__ == "__main__":
    run(main, Command, prog="python -m model.data")  # type: ignore[arg-type]
