"""Checkpoints: nothing is lost, nothing half-written is seen, damage is named."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from checkpoints import CONFIG, FILES, PARTS, empty, flip, kept, mark, partial, parts, save, save_failure, truncate
from safetensors import SafetensorError, safe_open

from model import checkpoint, files
from model.cli import UserError
from model.config import GPTConfig
from model.tokenizer import CharTokenizer


@pytest.fixture(autouse=True)
def _fast_disk(monkeypatch):
    """Hundreds of checkpoints here need not survive a power cut; tests/test_faults.py flushes for true."""
    monkeypatch.setattr(os, "fsync", os.fstat)  # of the descriptor too, and quick


@pytest.fixture
def run(tmp_path) -> Path:
    CharTokenizer("abcd").save(tmp_path / "tokenizer")
    return tmp_path


# What is in it


def test_everything_comes_back_bit_for_bit(run):
    content = parts()
    folder = save(run, 1, content=content, best=2.5)
    saved = checkpoint.load(run)
    assert saved.folder == folder == run / "checkpoints" / "step-00000001"
    assert {part: set(tensors) for part, tensors in saved.parts.items()} == {part: set(content[part]) for part in PARTS}
    for part, tensors in content.items():
        for name, tensor in tensors.items():
            other = saved.parts[part][name]
            assert other.dtype == tensor.dtype and torch.equal(other, tensor)
    keys = ("step", "val_loss", "best_val_loss", "elapsed_s", "config", "model")
    assert tuple(saved.state[key] for key in keys) == (1, None, 2.5, 1.5, {"lr": 0.01}, CONFIG.to_dict())


def test_a_folder_holds_safetensors_and_json_with_their_hashes(run):
    folder = save(run, 12, 2.0)
    assert {path.name for path in folder.iterdir()} == set(FILES)
    state = json.loads((folder / "state.json").read_text())
    assert state["format"] == 2 and GPTConfig.from_dict(state["model"]) == CONFIG
    assert list(state["files"]) == [f"{part}.safetensors" for part in PARTS]
    for name, entry in state["files"].items():
        data = (folder / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    with safe_open(folder / "optimizer.safetensors", "pt") as file:
        assert set(file.keys()) == {"exp_avg/a", "step/a", "scale/a"}


def test_only_the_parts_that_are_given_are_written(run):
    content = {"model": parts()["model"], "trainer": {}}
    folder = save(run, 1, content=content)
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "trainer.safetensors", "state.json"}
    assert set(checkpoint.load(run).parts) == {"model", "trainer"} and checkpoint.load(run).parts["trainer"] == {}


def test_who_may_read_the_run_may_read_its_files(run):
    before = os.umask(0o027)
    try:
        folder = save(run, 1, 2.0)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o640}


def test_changing_a_loaded_tensor_leaves_its_file(run):
    save(run, 1, mark=3.0)
    checkpoint.load(run).parts["trainer"]["mark"].fill_(4.0)
    assert mark(run) == 3.0


def test_loading_maps_files_and_saving_makes_no_copy(run, monkeypatch):
    content = {"model": {"w": torch.zeros(5)}}
    pointers = []
    save_file = safetensors.torch.save_file

    def note(tensors, path, metadata):
        pointers.extend(t.data_ptr() for t in tensors.values())
        save_file(tensors, path, metadata)

    monkeypatch.setattr(safetensors.torch, "save_file", note)
    folder = save(run, 1, content=content)
    assert pointers == [content["model"]["w"].data_ptr()]
    saved = checkpoint.load(run)
    assert str(folder / "model.safetensors") in Path("/proc/self/maps").read_text()
    assert saved.parts["model"]["w"].sum() == 0


# The validation loss


def test_validation_loss_is_added_to_a_saved_checkpoint(run):
    folder = save(run, 10, best=1.5)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    checkpoint.record_validation(run, 10, 2.5)
    state = checkpoint.load(run).state
    assert (state["val_loss"], state["best_val_loss"]) == (2.5, 1.5)
    assert {path: path.read_bytes() for path in folder.iterdir() if path.name != "validation.json"} == before
    checkpoint.record_validation(run, 10, 0.5)
    state = checkpoint.load(run).state
    assert (state["val_loss"], state["best_val_loss"]) == (0.5, 0.5)
    assert partial(run) == []


def test_first_validation_loss_is_the_lowest(run):
    save(run, 10, 2.5)
    assert checkpoint.load(run).state["best_val_loss"] == 2.5


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_not_recorded(run, loss):
    save(run, 10)
    with pytest.raises(ValueError, match="must be finite"):
        checkpoint.record_validation(run, 10, loss)


def test_the_loss_of_another_checkpoint_is_damage(run):
    first, second = save(run, 10, 1.0), save(run, 20)
    shutil.copy(first / "validation.json", second)
    with pytest.raises(UserError, match=r"step-00000020/validation\.json is damaged: it is of step 10"):
        checkpoint.load(run)


def test_which(run):
    for step, val_loss in [(10, 1.0), (20, 2.0), (30, None)]:
        save(run, step, val_loss)
    steps = {which: checkpoint.load(run, which).state["step"] for which in ("last", "best", "step-00000020")}
    assert steps == {"last": 30, "best": 10, "step-00000020": 20}
    for which in ("step-11", "", "failedstep-00000010", "../tokenizer"):
        with pytest.raises(UserError, match=f"no checkpoint '{which}': use last, best, step-00000010, "):
            checkpoint.load(run, which)


def test_best_is_the_last_where_nothing_was_measured(run):
    save(run, 10)
    save(run, 20)
    assert checkpoint.load(run, "best").state["step"] == 20


@pytest.mark.parametrize("missing", ["", "checkpoints"])
def test_a_folder_without_checkpoints_is_refused(tmp_path, missing):
    (tmp_path / missing).mkdir(exist_ok=True)
    with pytest.raises(UserError, match="has no checkpoint: is it"):
        checkpoint.load(tmp_path)


# What is kept


def test_the_last_two_and_the_best_are_kept(run):
    for step, val_loss in [(10, 3.0), (20, 1.0), (30, 2.0), (40, None), (50, 1.0)]:
        save(run, step, val_loss)
    assert kept(run) == [20, 40, 50]  # the earliest of equals is the best
    save(run, 60)
    assert kept(run) == [20, 50, 60]
    checkpoint.record_validation(run, 60, 0.5)  # the best is no longer 20
    assert kept(run) == [50, 60]


@pytest.mark.parametrize(("keep_last", "expected"), [(1, [10, 50]), (3, [10, 30, 40, 50])])
def test_how_many_are_kept_can_be_chosen(run, keep_last, expected):
    for step, val_loss in [(10, 1.0), (20, 2.0), (30, 3.0), (40, 4.0), (50, 5.0)]:
        save(run, step, val_loss, keep_last=keep_last)
    assert kept(run) == expected


def test_resume_from_earlier_drops_later_at_next_save(run):
    for step in (10, 20, 30):
        save(run, step, step)
    assert checkpoint.load(run, "step-00000010").state["step"] == 10
    assert kept(run) == [10, 20, 30]
    save(run, 15)
    assert kept(run) == [10, 15]
    save(run, 15, 7.0, mark=1.0)  # the same step once more
    assert mark(run) == 1.0 and checkpoint.load(run).state["val_loss"] == 7.0
    save(run, 15, mark=2.0)
    assert mark(run) == 2.0 and checkpoint.load(run).state["val_loss"] is None  # that loss was of other parameters
    assert kept(run) == [10, 15] and partial(run) == []


# Damage


@pytest.mark.parametrize(
    ("name", "damage"),
    [(name, damage) for name in FILES for damage in (truncate, flip, empty)]
    + [(name, Path.unlink) for name in FILES[:5]],
)
def test_damage_is_named_with_the_checkpoint_to_use_instead(run, name, damage):
    save(run, 10)
    folder = save(run, 20, 1.0)
    damage(folder / name)
    with pytest.raises(UserError) as caught:
        checkpoint.load(run)
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"{folder / name} is damaged: ")
    assert second == "the one before it is intact: use --checkpoint step-00000010"
    assert checkpoint.load(run, "step-00000010").state["step"] == 10


@pytest.mark.parametrize("name", ["state.json", "validation.json"])
def test_not_one_byte_of_the_json_may_change(run, name):
    path = save(run, 10, 1e-5) / name
    data = path.read_bytes()
    for offset in range(len(data)):
        changed = data[offset] ^ 0x20  # 1e-05 and 1E-05 are the same number, and differ in this bit
        path.write_bytes(data[:offset] + bytes([changed]) + data[offset + 1 :])
        with pytest.raises(UserError, match=f"{name} is damaged"):
            checkpoint.load(run)


def test_advice_passes_over_a_second_damaged_checkpoint(run):
    for step, val_loss in [(10, 1.0), (20, 2.0), (30, 3.0)]:
        save(run, step, val_loss)
    for step in (20, 30):
        flip(run / f"checkpoints/step-000000{step}/optimizer.safetensors")
    with pytest.raises(UserError, match="use --checkpoint step-00000010"):
        checkpoint.load(run)
    flip(run / "checkpoints/step-00000010/model.safetensors")
    with pytest.raises(UserError, match="no earlier one is intact"):
        checkpoint.load(run)
    save(run, 40)
    with pytest.raises(UserError, match="no earlier one is intact"):  # a later one is not before it
        checkpoint.load(run, "step-00000030")


def test_damage_elsewhere_stops_neither_best_nor_save(run):
    save(run, 10, 2.0)
    flip(save(run, 20, 1.0) / "state.json")
    assert checkpoint.load(run, "best").state["step"] == 10
    save(run, 30, 3.0)
    assert kept(run) == [10, 20, 30]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("state.json", truncate),
        ("state.json", Path.unlink),
        ("model.safetensors", truncate),
        ("model.safetensors", Path.unlink),
        ("validation.json", truncate),
    ],
)
def test_a_damaged_checkpoint_takes_no_whole_ones_place(run, name, damage):
    """Whatever the loss of the damaged ones was, and also when the damage comes after the save."""
    save(run, 10)
    save(run, 20, 0.5)
    damage(save(run, 30, 0.1) / name)
    damage(save(run, 40, 0.2) / name)
    assert kept(run) == [20, 30, 40]
    save(run, 50)
    assert kept(run) == [20, 40, 50]
    damage(run / "checkpoints/step-00000050" / ("state.json" if name == "validation.json" else name))
    checkpoint.record_validation(run, 40, 0.3)
    assert 20 in kept(run)
    assert checkpoint.load(run, "step-00000020").state["val_loss"] == 0.5


@pytest.mark.parametrize(
    ("version", "words"),
    [
        (3, r"a newer version of this project \(format 3, this one reads 2\): update this one"),
        (1, r"an older version of this project \(format 1, this one reads 2\): continue with that one"),
    ],
)
def test_another_format_is_refused(run, version, words):
    path = save(run, 10) / "state.json"
    content = json.loads(path.read_text())
    del content["sha256"]
    content["format"] = version
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()  # as all formats have it
    path.write_text(json.dumps({**content, "sha256": digest}, indent=1))
    with pytest.raises(UserError, match=words):
        checkpoint.load(run)
    save(run, 20)
    assert kept(run) == [10, 20]


# Order on the disk, and death between any two operations


def test_fsync_comes_before_and_after_the_rename(run, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor):
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def note_replace(source, target):
        events.append(f"{Path(source).name} -> {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    save(run, 10)
    assert events[0] == run.name  # where checkpoints/ is new
    events.clear()
    save(run, 20)
    temporary = ".tmp-step-00000020"
    assert events == [*FILES[:5], temporary, f"{temporary} -> step-00000020", "checkpoints"]
    events.clear()
    checkpoint.record_validation(run, 20, 1.0)
    temporary = f".tmp-{os.getpid()}-validation.json"
    assert events == [temporary, f"{temporary} -> validation.json", "step-00000020"]
    events.clear()
    save(run, 30)
    assert events[-1] == "step-00000010 -> .tmp-old-step-00000010"


class Crash(BaseException):
    """The process dies, or is interrupted."""


class Faults:
    """Counts the operations on the disk; the one of the given number is left half done, and Crash is raised.

    killed: nothing that comes later is done either, whatever handler asks for it.
    """

    def __init__(self, patch: pytest.MonkeyPatch, at: int | None = None, killed: bool = False) -> None:
        self.at, self.killed, self.count = at, killed, 0
        self.wrap(patch, os, "fsync")
        self.wrap(patch, os, "replace")
        self.wrap(patch, Path, "mkdir")
        self.wrap(patch, Path, "unlink")
        self.wrap(patch, shutil, "rmtree", lambda path, **_: next(path.iterdir()).unlink())
        self.wrap(patch, files, "write_file", lambda path, data, **_: path.write_bytes(data[: len(data) // 2]))
        self.wrap(patch, safetensors.torch, "save_file", lambda _, path, *__: path.write_bytes(b"\x08\x00\x00\x00\x00"))

    def wrap(self, patch, owner, name, half: Callable[..., object] = lambda *_, **__: None) -> None:
        do = getattr(owner, name)

        def operation(*args, **kwargs):
            self.count += 1
            if self.killed and self.at is not None and self.count > self.at:
                raise Crash
            if self.count == self.at:
                half(*args, **kwargs)
                raise Crash
            return do(*args, **kwargs)

        patch.setattr(owner, name, operation)


def two_checkpoints(run):
    save(run, 10, 1.0, mark=10)
    save(run, 20, 2.0, mark=20)


def three_checkpoints(run):
    two_checkpoints(run)
    save(run, 30, 3.0, mark=30)


SCENES = {
    # what was there, what is done, the mark of `last` before and after it, what is kept in the end
    "first": (lambda run: None, lambda run: save(run, 10, mark=11), None, 11, [10]),
    "next": (two_checkpoints, lambda run: save(run, 30, mark=31), 20, 31, [10, 20, 30]),
    "pruning": (three_checkpoints, lambda run: save(run, 40, mark=41), 30, 41, [10, 30, 40]),
    "same step": (two_checkpoints, lambda run: save(run, 20, mark=21), 20, 21, [10, 20]),
    "gone back": (three_checkpoints, lambda run: save(run, 20, mark=21), 30, 21, [10, 20]),
    "loss": (three_checkpoints, lambda run: checkpoint.record_validation(run, 30, 0.1), 30, 30, [20, 30]),
    "failure": (two_checkpoints, lambda run: save_failure(run, 21), 20, 20, [10, 20]),
}


@pytest.mark.parametrize("killed", [True, False], ids=["killed", "interrupted"])
@pytest.mark.parametrize("scene", SCENES)
def test_crash_at_any_operation_leaves_old_or_new(tmp_path, monkeypatch, scene, killed):
    prepare, act, old, new, expected = SCENES[scene]
    (tmp_path / "before").mkdir()
    prepare(tmp_path / "before")

    def attempt(name: str, at: int | None = None) -> int:
        """-> how many operations there were."""
        shutil.copytree(tmp_path / "before", tmp_path / name)
        with monkeypatch.context() as patch:
            faults = Faults(patch, at, killed)
            with contextlib.nullcontext() if at is None else pytest.raises(Crash):
                act(tmp_path / name)
        return faults.count

    seen = []
    for at in range(1, attempt("counted") + 1):
        run = tmp_path / f"run-{at}"
        attempt(run.name, at)
        names = checkpoint.list_checkpoints(run)
        seen.append(mark(run) if names else None)
        for name in names:  # whatever has a name is whole
            checkpoint.load(run, name)
        if old and new != old:
            assert mark(run, "best") == 10
        if at % 2:  # a save has to do without, too
            checkpoint.remove_partial(run)
            assert partial(run) == [] and (not names or mark(run) == seen[-1])
        act(run)  # the run continues and comes by here again
        assert mark(run) == new and kept(run) == expected and partial(run) == []
    assert len(seen) >= 3 and set(seen) <= {old, new}
    assert seen == sorted(seen, key=lambda mark: mark == new)  # once the new one is there, it stays


def test_interrupted_replacement_gets_the_validation_loss(run, monkeypatch):
    """Killed between the two names: the loss measured after the resume goes to the new one."""
    save(run, 10, mark=1)

    def die(folder):
        raise Crash

    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(checkpoint, "_discard", die)
        save(run, 10, mark=2)
    assert checkpoint.list_checkpoints(run) == ["step-00000010", "step-00000010-new"] and mark(run) == 2
    checkpoint.record_validation(run, 10, 0.5)
    assert kept(run) == [10] and mark(run) == 2 and checkpoint.load(run).state["val_loss"] == 0.5


# A full disk


def full(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("message", ["I/O error: No space left on device (os error 28)", "IoError(Os { code: 28, kind"])
def test_full_disk_for_tensors_loses_nothing(run, monkeypatch, message):
    """The library has an error of its own, in words that changed between its versions."""

    def save_file(tensors, path, metadata):
        raise SafetensorError(message)

    save(run, 10, mark=10)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    monkeypatch.setattr(safetensors.torch, "save_file", save_file)
    with pytest.raises(OSError) as caught:
        save(run, 20)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(run / "checkpoints/.tmp-step-00000020/model.safetensors")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert partial(run) == []


def test_other_safetensors_errors_pass_through(run, monkeypatch):
    def save_file(tensors, path, metadata):
        raise SafetensorError("invalid header")

    monkeypatch.setattr(safetensors.torch, "save_file", save_file)
    with pytest.raises(SafetensorError, match="invalid header"):
        save(run, 20)


@pytest.mark.parametrize("at", range(7))
def test_full_disk_at_a_flush_is_named(run, monkeypatch, at):
    save(run, 10)
    fsync, calls = os.fsync, []

    def fsync_or_full(descriptor):
        calls.append(descriptor)
        return full() if len(calls) == at + 1 else fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync_or_full)
    with pytest.raises(OSError) as caught:
        save(run, 20)
    root = run / "checkpoints"
    temporary = root / ".tmp-step-00000020"
    assert caught.value.filename == str([*(temporary / name for name in FILES[:5]), temporary, root][at])
    assert partial(run) == [] and kept(run) == ([10] if at < 6 else [10, 20])


def test_full_disk_for_the_loss_keeps_the_checkpoint(run, monkeypatch):
    save(run, 10)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as caught:
        checkpoint.record_validation(run, 10, 1.0)
    assert caught.value.filename == str(run / f"checkpoints/step-00000010/.tmp-{os.getpid()}-validation.json")
    assert partial(run) == [] and checkpoint.load(run).state["val_loss"] is None


# The state before a step that went wrong


def test_a_failure_is_kept_apart_with_its_details(run):
    save(run, 10, 1.0)
    folder = save_failure(run, 12, mark=12)
    assert folder == run / "failed/step-00000012"
    assert {path.name for path in folder.iterdir()} == set(FILES[:5])
    save_failure(run, 14, mark=14)
    for step in range(20, 60, 10):
        save(run, step, 2.0)
    assert kept(run) == [10, 40, 50] and mark(run) == mark(run, "best") == 0
    assert (mark(run, "failed"), mark(run, "failed/step-00000012")) == (14, 12)
    state = checkpoint.load(run, "failed").state
    assert state["details"] == {"loss": "nan", "rank": 1} and state["step"] == 14
    save_failure(run, 14, mark=15)  # a step that went wrong goes wrong again
    assert mark(run, "failed") == 15 and partial(run) == []
    assert {path.name for path in (run / "failed").iterdir()} == {"step-00000012", "step-00000014"}


def test_a_failure_that_is_not_there_or_is_damaged(run):
    save(run, 10)
    with pytest.raises(UserError, match="has no state of a failed step: use last, best"):
        checkpoint.load(run, "failed")
    save_failure(run, 12)
    flip(save_failure(run, 14) / "trainer.safetensors")
    with pytest.raises(UserError, match=r"no checkpoint 'failed/best': use failed, failed/step-00000012, failed/"):
        checkpoint.load(run, "failed/best")
    with pytest.raises(UserError, match=r"failed/step-00000014/trainer\.safetensors is damaged") as caught:
        checkpoint.load(run, "failed")
    assert "use --checkpoint failed/step-00000012" in str(caught.value)
