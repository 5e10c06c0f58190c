"""One HTML page that carries a model, its tokenizer and a small engine, and needs no network.

python -m model.explore runs/first-run page.html                              # a model
python -m model.explore runs/first-run runs/lora page.html                    # two, side by side on the same text
python -m model.explore runs/first-run page.html --checkpoint step-00000100 best
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from model.checkpoint import read_state
from model.cli import UserError, run
from model.config import GPTConfig
from model.explore.page import BYTES, Subject, Weights, least_megabytes, megabytes, write
from model.lora import load_model
from model.report import page as report
from model.report.compare import names

MOST = 2  # models on a page


@dataclass(frozen=True)
class ExploreConfig:
    """Write one HTML page that carries a model and runs it in a browser: to write, and to look inside.

    With two runs, two checkpoints or an adapter it compares two models on the same text.
    """

    paths: tyro.conf.Positional[Annotated[tuple[Path, ...], tyro.conf.arg(metavar="RUN [RUN] PAGE.html")]]
    """folder of a training run, or of two, and the page to write"""
    checkpoint: tuple[str, ...] = ("best",)  # last, best, or a name such as step-00000100; two compare the two
    adapter: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """compare the model with this adapter, of a run or PEFT's, to the model without"""
    weights: Literal["auto", "float16", "int8"] = "auto"  # auto takes int8 where float16 makes the page too large
    max_mb: float = 200.0  # the largest page, in MB of 10^6 bytes


@dataclass(frozen=True)
class _Source:
    """Where a model is."""

    run: Path
    checkpoint: str
    adapter: Path | None = None


def main(cfg: ExploreConfig) -> None:
    *runs, path = cfg.paths or [Path()]
    if not runs or path.suffix not in (".html", ".htm"):
        raise UserError("give the folder of a run and the page to write: python -m model.explore RUN page.html")
    runs = [*{folder.resolve(): folder for folder in runs}.values()]
    sources = [_Source(folder, name) for folder, name in itertools.product(runs, cfg.checkpoint)]
    sources += [_Source(source.run, source.checkpoint, cfg.adapter) for source in sources if cfg.adapter]
    if len(sources) > MOST:
        raise UserError(
            f"a page holds {MOST} models at most, and these are {len(sources)}: name fewer runs or checkpoints"
        )
    states = [read_state(source.run, source.checkpoint) for source in sources]
    configs = [GPTConfig.from_dict(state["model"]) for state in states]
    _choose(cfg, lambda form: max(least_megabytes(config, form) for config in configs))  # before the weights are read
    loaded = [load_model(source.run, name=source.checkpoint, adapter=source.adapter) for source in sources]
    tokenizer = loaded[0][1]
    if not all(tokenizer.equals(other) for _, other in loaded):
        raise UserError(
            "these models have different tokenizers, and would read different tokens: write a page for each"
        )
    titles = dict(zip(runs, names(runs), strict=True))
    subjects = []
    for source, state, (model, _) in zip(sources, states, loaded, strict=True):
        step = f", step {state['step']:,}" if state["step"] else ""  # 0: of a model that was imported
        subjects.append(Subject(f"{titles[source.run]}{step}{', adapted' if source.adapter else ''}", model))
    weights = _choose(cfg, functools.partial(megabytes, subjects))
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, " and ".join(dict.fromkeys(titles.values())), subjects, tokenizer, weights)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, {weights}; open it in a browser")
    for folder in runs:  # whose report links to it
        if path.resolve() == (folder / report.EXPLORE).resolve() and (folder / report.PAGE).exists():
            report.write(folder)


def _choose(cfg: ExploreConfig, size_in: Callable[[Weights], float]) -> Weights:
    """The first form of the weights in which the page is small enough. UserError where it is in none."""
    forms: list[Weights] = [*BYTES] if cfg.weights == "auto" else [cfg.weights]
    sizes: dict[Weights, float] = {}
    for form in forms:
        sizes[form] = size_in(form)
        if sizes[form] <= cfg.max_mb:
            return form
    form, size = min(sizes.items(), key=lambda item: item[1])
    smaller = "" if "int8" in sizes else " or --weights int8"
    raise UserError(
        f"the page would have {size:,.0f} MB in {form}: more than --max-mb {cfg.max_mb:g}; raise it{smaller}"
    )


if __name__ == "__main__":
    run(main, ExploreConfig, prog="python -m model.explore")
