"""Checkpoints: nothing is lost, nothing half-written is seen, damage is named."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from model import checkpoint
from model.cli import UserError
from model.config import GPTConfig
from model.gpt import GPT
from model.optim import adamw
from model.tokenizer import CharTokenizer

CONFIG = GPTConfig(vocab_size=5, n_positions=8, n_embd=8, n_layer=2, n_head=2, resid_pdrop=0.1)
FILES = ("model.safetensors", "optimizer.safetensors", "state.json")


def fresh() -> tuple[GPT, torch.optim.AdamW]:
    model = GPT(CONFIG)
    return model, adamw(model, lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)


def learn(model, optimizer) -> None:
    idx = torch.randint(0, CONFIG.vocab_size, (2, 8))
    model(idx, idx)[1].backward()
    optimizer.step()
    optimizer.zero_grad()


def tensors(model, optimizer) -> list[torch.Tensor]:
    return [
        x for p in model.parameters() for x in (p.detach(), *(optimizer.state[p][slot] for slot in checkpoint.SLOTS))
    ]


@pytest.fixture
def run(tmp_path) -> Path:
    CharTokenizer("abcd").save(tmp_path / "tokenizer")
    return tmp_path


@pytest.fixture
def trained():
    model, optimizer = fresh()
    learn(model, optimizer)
    return model, optimizer


def save(run, step, model, optimizer, val_loss=None) -> Path:
    return checkpoint.save(
        run, step, model, optimizer, config={"lr": 0.01}, val_loss=val_loss, best_val_loss=val_loss, elapsed_s=1.5
    )


def kept(run) -> list[int]:
    return [int(name.removeprefix("step-")) for name in checkpoint.names(run)]


def test_everything_comes_back_bit_for_bit(run, trained):
    model, optimizer = trained
    folder = save(run, 1, model, optimizer, 2.5)
    learn(model, optimizer)  # dropout and data draw from the generator that was saved
    after = [x.clone() for x in tensors(model, optimizer)]

    torch.manual_seed(99)
    other, other_optimizer = fresh()
    saved = checkpoint.load(run)
    checkpoint.restore(saved, other, other_optimizer)
    learn(other, other_optimizer)
    assert all(map(torch.equal, after, tensors(other, other_optimizer)))
    assert saved.folder == folder
    assert {key: saved.state[key] for key in ("step", "val_loss", "config", "elapsed_s")} == {
        "step": 1,
        "val_loss": 2.5,
        "config": {"lr": 0.01},
        "elapsed_s": 1.5,
    }


def test_a_folder_holds_safetensors_and_json_with_their_hashes(run, trained):
    folder = save(run, 12, *trained)
    assert folder == run / "checkpoints" / "step-00000012"
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    state = json.loads((folder / "state.json").read_text())
    assert state["format"] == 1 and GPTConfig.from_dict(state["model"]) == CONFIG
    for name, entry in state["files"].items():
        data = (folder / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_each_parameter_is_stored_once_by_its_name(run, trained):
    model, optimizer = trained
    folder = save(run, 1, model, optimizer)
    names = {name for name, _ in model.named_parameters()}
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert set(file.keys()) == names
    with safe_open(folder / "optimizer.safetensors", "pt") as file:
        assert set(file.keys()) == {f"{slot}/{name}" for slot in ("exp_avg", "exp_avg_sq", "step") for name in names}


def test_the_last_two_and_the_best_are_kept(run, trained):
    for step, val_loss in [(10, 3.0), (20, 1.0), (30, 2.0), (40, None), (50, 1.0)]:
        save(run, step, *trained, val_loss)
    assert kept(run) == [20, 40, 50]  # the earliest of equals is the best
    save(run, 60, *trained, 0.5)
    assert kept(run) == [50, 60]


def test_going_back_drops_what_came_later_once_there_is_something_new(run, trained):
    for step in (10, 20, 30):
        save(run, step, *trained, step)
    assert checkpoint.load(run, "step-00000010").state["step"] == 10
    assert kept(run) == [10, 20, 30]
    save(run, 15, *trained)
    assert kept(run) == [10, 15]
    save(run, 15, *trained, 7.0)  # the same step once more
    assert checkpoint.load(run).state["val_loss"] == 7.0


def test_which(run, trained):
    for step, val_loss in [(10, 1.0), (20, 2.0), (30, None)]:
        save(run, step, *trained, val_loss)
    steps = {which: checkpoint.load(run, which).state["step"] for which in ("last", "best", "step-00000020")}
    assert steps == {"last": 30, "best": 10, "step-00000020": 20}
    with pytest.raises(UserError, match="no checkpoint 'step-11': use last, best, step-00000010, "):
        checkpoint.load(run, "step-11")


def test_best_is_the_last_where_nothing_was_measured(run, trained):
    save(run, 10, *trained)
    save(run, 20, *trained)
    assert checkpoint.load(run, "best").state["step"] == 20


@pytest.mark.parametrize("missing", ["", "checkpoints"])
def test_a_folder_without_checkpoints_is_refused(tmp_path, missing):
    (tmp_path / missing).mkdir(exist_ok=True)
    with pytest.raises(UserError, match="holds no checkpoint"):
        checkpoint.load(tmp_path)


def test_files_and_folders_are_flushed_before_and_after_the_rename(run, trained, monkeypatch):
    save(run, 10, *trained)
    events = []
    fsync, rename = os.fsync, Path.rename

    def note_fsync(descriptor):
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def note_rename(self, target):
        events.append(f"{self.name} -> {target.name}")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "rename", note_rename)
    save(run, 20, *trained)
    temporary = ".tmp-step-00000020"
    assert events == [*FILES, temporary, f"{temporary} -> step-00000020", "checkpoints"]


class Crash(BaseException):
    """The process dies: no handler of ours runs."""


@pytest.mark.parametrize("call", range(1, 6))
@pytest.mark.parametrize("cleans_up", [False, True], ids=["killed", "interrupted"])
def test_a_save_that_dies_at_any_point_leaves_the_last_checkpoint(run, trained, monkeypatch, call, cleans_up):
    save(run, 10, *trained, 1.0)
    save(run, 20, *trained, 2.0)
    calls = []
    fsync = os.fsync

    def dying(descriptor):  # once for each of three files, the folder, and the folder of folders
        calls.append(descriptor)
        if len(calls) == call:
            raise Crash
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", dying)
        if not cleans_up:
            patch.setattr(checkpoint.shutil, "rmtree", lambda *args, **kwargs: None)
        with pytest.raises(Crash):
            save(run, 30, *trained, 0.5)
    assert checkpoint.load(run).state["step"] == (20 if call < 5 else 30)  # call 5 comes after the rename
    assert checkpoint.load(run, "best").state["step"] == (10 if call < 5 else 30)
    save(run, 30, *trained, 0.1)  # the run goes on and comes by here again
    assert kept(run) == [20, 30]
    assert {path.name for path in (run / "checkpoints").iterdir()} == set(checkpoint.names(run))  # no rubbish


def test_a_full_disk_is_named_and_nothing_is_lost(run, trained, monkeypatch):
    save(run, 10, *trained)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as caught:
        save(run, 20, *trained)
    assert caught.value.filename == str(run / "checkpoints/.tmp-step-00000020/model.safetensors")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, flip, empty, Path.unlink])
@pytest.mark.parametrize("name", FILES)
def test_damage_is_named_with_the_checkpoint_to_use_instead(run, trained, name, damage):
    save(run, 10, *trained)
    folder = save(run, 20, *trained)
    damage(folder / name)
    with pytest.raises(UserError) as caught:
        checkpoint.load(run)
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"{folder / name} is damaged: ")
    assert second == "the one before it is whole: use --which step-00000010"
    assert checkpoint.load(run, "step-00000010").state["step"] == 10


def test_advice_passes_over_a_second_damaged_checkpoint(run, trained):
    for step, val_loss in [(10, 1.0), (20, 2.0), (30, 3.0)]:
        save(run, step, *trained, val_loss)
    for step in (20, 30):
        flip(run / f"checkpoints/step-000000{step}/optimizer.safetensors")
    with pytest.raises(UserError, match="use --which step-00000010"):
        checkpoint.load(run)
    flip(run / "checkpoints/step-00000010/model.safetensors")
    with pytest.raises(UserError, match="no earlier checkpoint is whole"):
        checkpoint.load(run)


def test_a_changed_number_in_the_state_is_damage(run, trained):
    path = save(run, 10, *trained) / "state.json"
    path.write_text(path.read_text().replace('"step": 10', '"step": 11'))
    with pytest.raises(UserError, match=r"state\.json is damaged"):
        checkpoint.load(run)


def test_damage_elsewhere_does_not_stop_best_or_the_next_save(run, trained):
    save(run, 10, *trained, 2.0)
    flip(save(run, 20, *trained, 1.0) / "state.json")
    assert checkpoint.load(run, "best").state["step"] == 10
    save(run, 30, *trained, 3.0)
    assert kept(run) == [10, 20, 30]


def test_a_newer_format_is_refused_in_words(run, trained):
    path = save(run, 10, *trained) / "state.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(UserError, match=r"newer version of this project \(format 2, this one reads 1\): update"):
        checkpoint.load(run)


def test_load_model_gives_the_model_and_its_tokenizer(run, trained):
    model, optimizer = trained
    save(run, 10, model, optimizer, 1.0)
    idx = torch.tensor([[0, 1, 2, 3]])
    expected = model.eval()(idx)[0]
    model.train()
    learn(model, optimizer)
    save(run, 20, model, optimizer, 2.0)

    loaded, tokenizer = checkpoint.load_model(run)
    assert torch.equal(loaded(idx)[0], expected)  # of the best; evaluation mode, so without dropout
    assert not loaded.training and loaded.config == CONFIG
    assert tokenizer.encode("dab") == [3, 0, 1]
    assert not torch.equal(checkpoint.load_model(run, "cpu", which="last")[0](idx)[0], expected)
    assert checkpoint.load_model(run, dtype=torch.bfloat16)[0](idx)[0].dtype == torch.bfloat16


def test_load_model_needs_no_optimizer_file(run, trained):
    (save(run, 10, *trained) / "optimizer.safetensors").unlink()
    checkpoint.load_model(run)
