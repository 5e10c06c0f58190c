"""--track: the metrics and samples of a run in TensorBoard, Trackio or Weights & Biases too.

RUN/track.txt is the run's name there: a resumed run continues it. What has failed once is off for the rest of the
invocation, with a warning: no library for logging ends a run.
"""

from __future__ import annotations

import importlib.util
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from model.cli import UserError
from model.files import write_atomic

Library = Literal["none", "tensorboard", "trackio", "wandb"]
PROJECT, NAME = "gpt2", "track.txt"


class Run(Protocol):
    """A run in Trackio or Weights & Biases."""

    def log(self, values: dict[str, Any], **more: int) -> None: ...
    def finish(self) -> None: ...


def require(library: Library) -> None:
    """Raise UserError if the library is not installed. It is not imported: that takes seconds."""
    if library != "none" and importlib.util.find_spec(library) is None:
        raise UserError(f"--track {library} needs the {library} package: pip install {library}, or omit it")


class Tracker:
    """The metrics of one invocation of the trainer in a library. Its methods never raise."""

    def __init__(
        self, library: Library, folder: Path, options: dict[str, Any], *, done: int, warn: Callable[[str], None]
    ) -> None:
        """options: of the run. done: steps before this invocation. UserError if the library cannot start."""
        require(library)
        if not (folder / NAME).exists():
            write_atomic(folder / NAME, f"{folder.resolve().name}-{uuid.uuid4().hex[:8]}\n")
        start = {"tensorboard": TensorBoard, "trackio": _trackio, "wandb": _wandb}[library]
        self.library, self.warn = library, warn
        try:
            self.run: Run | None = start(folder, (folder / NAME).read_text().strip(), options, done)
        except Exception as error:
            raise UserError(f"--track {library} cannot start: {_first_line(error)}\nfix that, or omit it") from None

    def log(self, step: int, values: Mapping[str, float | str]) -> None:
        """Log finite numbers, or a text, of a step."""
        # Weights & Biases drops what is logged with a lower step than before, as after a resume: its step is a value.
        key = {"step": step} if self.library == "wandb" else {}
        more = {} if key else {"step": step}
        self._try(lambda run: run.log({**values, **key}, **more))

    def close(self) -> None:
        self._try(lambda run: run.finish())

    def _try(self, work: Callable[[Run], None]) -> None:
        if self.run is None:
            return
        try:
            work(self.run)
        except Exception as error:
            self.run = None
            self.warn(
                f"warning: --track {self.library} failed and is off until the run is resumed: {_first_line(error)}"
            )


class TensorBoard:
    """RUN/tensorboard, with the methods of a Run."""

    def __init__(self, folder: Path, name: str, options: dict[str, Any], done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # purge_step: what a killed run wrote after its last checkpoint is hidden, as those steps come again
        self.writer = SummaryWriter(folder / "tensorboard", purge_step=done + 1 if done else None)  # type: ignore[no-untyped-call]

    def log(self, values: dict[str, Any], *, step: int) -> None:
        for key, value in values.items():
            add = self.writer.add_text if isinstance(value, str) else self.writer.add_scalar
            add(key, value, step)

    def finish(self) -> None:
        self.writer.close()  # type: ignore[no-untyped-call]


def _trackio(folder: Path, name: str, options: dict[str, Any], done: int) -> Any:
    """Local, in TRACKIO_DIR, unless TRACKIO_SPACE_ID or TRACKIO_SERVER_URL says otherwise."""
    import trackio

    return trackio.init(project=PROJECT, name=name, resume="allow", config=options, embed=False)


def _wandb(folder: Path, name: str, options: dict[str, Any], done: int) -> Any:
    """RUN/wandb, and the server unless WANDB_MODE=offline."""
    import wandb

    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT), id=name, name=name, resume="allow", config=options,
        dir=str(folder), settings=wandb.Settings(console="off", silent=True),
    )  # fmt: skip
    run.define_metric("*", step_metric="step")
    return run


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
