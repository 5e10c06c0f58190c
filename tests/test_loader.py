"""The batches drawn from tokens, the threads that read them ahead, and the windows of an evaluation."""

from __future__ import annotations

import itertools
import threading
import time

import numpy as np
import pytest
import torch

from model.cli import UserError
from model.data import Loader, get_batch, windows
from model.data.shards import Shard, Tokens, Writer


@pytest.fixture
def row(tmp_path):
    """A function from ids to Tokens, in shards of 700."""

    def make(ids) -> Tokens:
        writer = Writer(tmp_path, "row", np.dtype("<u2"), shard_tokens=700)
        writer.write(np.array(ids))
        writer.close()
        return Tokens([Shard.open(path) for path in writer.paths])

    return make


# Batches


def test_batch_is_made_of_windows_and_their_next_tokens(row):
    idx, targets = get_batch(row(range(1000)), context=16, seed=3, step=5, rows=range(8))
    for tensor in (idx, targets):
        assert (tensor.shape, tensor.dtype, tensor.device.type) == ((8, 16), torch.int64, "cpu")
        assert tensor.is_contiguous()
    assert (targets == idx + 1).all()
    assert (idx[:, 1:] == idx[:, :-1] + 1).all()


def test_batch_at_the_smallest_legal_length(row):
    tokens = row([5, 6, 7, 8])
    for step in range(20):
        idx, targets = get_batch(tokens, context=3, seed=0, step=step, rows=range(2))
        assert idx.tolist() == [[5, 6, 7]] * 2
        assert targets.tolist() == [[6, 7, 8]] * 2


@pytest.mark.parametrize("n", [0, 1, 3])
def test_batch_refuses_too_short_a_text(row, n):
    with pytest.raises(UserError, match="too few for a context of 3: 4 are needed"):
        get_batch(row([0] * n), context=3, seed=0, step=0, rows=range(2))


def test_batch_reaches_every_place_equally(row):
    tokens = row(range(12))  # 12 - 4 = 8 places
    starts = torch.cat([get_batch(tokens, context=4, seed=1, step=s, rows=range(32))[0][:, 0] for s in range(250)])
    counts = torch.bincount(starts, minlength=8)
    assert len(counts) == 8
    assert (counts - 1000).abs().max() < 150  # 5 standard deviations of a binomial draw


def test_batch_is_a_pure_function_of_seed_and_step(row):
    tokens = row(range(50_000))

    def draw(seed, step):
        return get_batch(tokens, context=8, seed=seed, step=step, rows=range(16))[0][:, 0].tolist()

    wanted = [draw(7, step) for step in range(10)]
    np.random.seed(1)
    torch.manual_seed(1)
    assert [draw(7, step) for step in reversed(range(10))] == wanted[::-1]
    assert draw(np.int64(7), np.int64(9)) == wanted[9]
    others = [draw(seed, step) for seed in (0, 7, 8, 2**64) for step in (0, 1, 2**40)]
    flat = [start for starts in others for start in starts]
    assert len(set(map(tuple, others))) == len(others)
    assert len(set(flat)) > 0.98 * len(flat)  # no two draws share a stretch of the generator


def test_batch_stays_the_same_in_every_version(row):
    # a run that is resumed after an upgrade must continue with the same batches
    tokens = row(range(60_000))
    idx, _ = get_batch(tokens, context=1, seed=1234, step=56, rows=range(5))
    assert idx[:, 0].tolist() == [55954, 45487, 888, 9640, 534]


@pytest.mark.parametrize("cuts", [(0, 12), (0, 1, 12), (0, 4, 8, 12), (0, 3, 6, 9, 12), tuple(range(13))])
def test_parts_of_a_batch_are_the_batch(row, cuts):
    tokens = row(range(5000))
    draw = dict(context=8, seed=3, step=4)
    whole = get_batch(tokens, rows=range(12), **draw)
    parts = [get_batch(tokens, rows=range(a, b), **draw) for a, b in itertools.pairwise(cuts)]
    for i in (0, 1):
        assert torch.cat([part[i] for part in parts]).equal(whole[i])
    assert get_batch(tokens, rows=range(1, 12, 3), **draw)[0].equal(whole[0][1::3])


def test_changing_a_batch_leaves_the_tokens_alone(row):
    tokens = row(range(100))
    idx, targets = get_batch(tokens, context=4, seed=0, step=0, rows=range(2))
    idx.fill_(0)
    assert (targets >= 1).all()
    assert tokens[:].tolist() == list(range(100))


# The loader


@pytest.fixture
def loader():
    """Loader, closed in the end."""
    made = []

    def make(tokens, **options) -> Loader:
        options = dict(context=8, seed=3, first_step=5, rows=range(12), micro_batch=2, device="cpu") | options
        made.append(Loader(tokens, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.mark.parametrize("num_workers", [1, 3])
def test_loader_gives_the_batch_of_each_step_in_order(row, loader, num_workers):
    tokens = row(range(5000))
    batches = loader(tokens, num_workers=num_workers)
    for step in range(5, 25):
        wanted = get_batch(tokens, context=8, seed=3, step=step, rows=range(12))
        for found, all_rows in zip(next(batches), wanted, strict=True):
            assert (found.shape, found.dtype) == ((6, 2, 8), torch.int64)
            assert found.is_contiguous()
            assert found.view(12, 8).equal(all_rows)


def test_loaders_of_several_processes_share_a_step(row, loader):
    tokens = row(range(5000))
    whole = loader(tokens)
    parts = [loader(tokens, rows=range(start, start + 4)) for start in (0, 4, 8)]
    for _ in range(4):
        idx, targets = next(whole)
        pairs = [next(part) for part in parts]
        assert torch.cat([pair[0] for pair in pairs]).equal(idx)
        assert torch.cat([pair[1] for pair in pairs]).equal(targets)


def test_loader_resumes_at_any_step(row, loader):
    tokens = row(range(5000))
    first = loader(tokens)
    for _ in range(3):
        next(first)
    assert next(first)[0].equal(next(loader(tokens, first_step=8))[0])


def test_later_batches_leave_an_earlier_one_alone(row, loader):
    batches = loader(row(range(5000)))
    idx, _ = next(batches)
    before = idx.clone()
    for _ in range(20):
        next(batches)
    assert idx.equal(before)


class Slow(Tokens):
    """Tokens that a test can hold back, make fail, and count the readings of."""

    def __init__(self, tokens: Tokens) -> None:
        super().__init__(tokens.shards)
        self.read = 0
        self.may_go = threading.Event()
        self.error: Exception | None = None

    def rows(self, starts, length):
        self.read += 1
        self.may_go.wait()
        if self.error:
            raise self.error
        return super().rows(starts, length)


def until(condition) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen within ten seconds")


def test_loader_reads_ahead_but_not_without_end(row, loader):
    tokens = Slow(row(range(5000)))
    batches = loader(tokens, num_workers=2)
    until(lambda: tokens.read == 2)  # nobody has asked for a batch, and both threads are at it
    tokens.may_go.set()
    until(lambda: tokens.read == 4)
    time.sleep(0.1)
    assert tokens.read == 4
    next(batches)
    until(lambda: tokens.read == 5)


def test_worker_error_is_raised_at_its_step(row, loader):
    tokens = Slow(row(range(5000)))
    tokens.may_go.set()
    batches = loader(tokens, num_workers=1)
    until(lambda: tokens.read == 2)
    tokens.error = OSError(5, "Input/output error", "train_000003.bin")
    for _ in range(2):
        next(batches)
    for _ in range(5):  # and again: no step is passed over
        with pytest.raises(OSError, match="train_000003"):
            next(batches)
    with pytest.raises(UserError, match="too few"):
        next(loader(row([1, 2])))


def test_close_does_not_wait_for_a_reader(row, loader):
    tokens = Slow(row(range(5000)))
    batches = loader(tokens, num_workers=1)
    until(lambda: tokens.read == 1)
    batches.close()  # would wait for ever
    tokens.may_go.set()
    until(lambda: batches._ahead[0].done())
    time.sleep(0.1)
    assert tokens.read == 1  # the steps that it had before it were given up


def test_loader_refuses_half_a_micro_step(row, loader):
    with pytest.raises(ValueError, match="12 rows are not a whole number of micro-steps of 5"):
        loader(row(range(100)), micro_batch=5)


@pytest.mark.gpu
def test_loader_on_a_gpu(row, loader):
    tokens = row(range(60_000))
    options = dict(context=512, rows=range(64), micro_batch=8, device="cuda")
    batches = loader(tokens, **options)
    work = torch.randn(2048, 2048, device="cuda")
    sums = []
    for _ in range(30):
        for _ in range(10):
            work = torch.nn.functional.normalize(work @ work)  # keeps the stream behind the host
        idx, targets = next(batches)
        assert idx.is_cuda
        assert idx.shape == (8, 8, 512)
        sums.append((idx + 0, targets + 0))
    for step, (idx, targets) in enumerate(sums, 5):
        wanted = get_batch(tokens, context=512, seed=3, step=step, rows=range(64))
        assert idx.cpu().view(64, 512).equal(wanted[0])
        assert targets.cpu().view(64, 512).equal(wanted[1])


# Windows


@pytest.mark.parametrize("n", [2, 3, 4, 5, 8, 9, 12, 13, 14, 29])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_windows_cover_everything_once_in_order(n, batch_size):
    tokens = np.arange(100, 100 + n, dtype=np.uint16)
    batches = list(windows(tokens, 4, batch_size))
    idx, targets = (torch.cat(part) for part in zip(*batches, strict=True))
    assert idx.dtype == targets.dtype == torch.int64
    assert idx.shape == targets.shape == (-(-(n - 1) // 4), 4)
    assert [len(part) for part, _ in batches[:-1]] == [batch_size] * (len(batches) - 1)
    real = targets != -100
    assert targets[real].tolist() == tokens[1:].tolist()
    assert idx[real].tolist() == tokens[:-1].tolist()
    assert real.flatten().tolist() == [True] * (n - 1) + [False] * (real.numel() - n + 1)
    assert (idx[~real] == 0).all()


def test_windows_of_shards(row):
    ids = np.arange(2000) % 977
    pairs = zip(windows(row(ids), 16, 3), windows(ids, 16, 3), strict=True)
    assert all(found.equal(wanted) for pair in pairs for found, wanted in zip(*pair, strict=True))


@pytest.mark.parametrize("n", [0, 1])
def test_windows_refuses_at_once(n):
    with pytest.raises(UserError, match="at least 2"):
        windows(np.zeros(n, dtype=np.uint16), 4, 2)
