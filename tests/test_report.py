"""The page of a run, and of several: reading a run folder, drawing it, and refusing what is no run."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from commands import exit_code

from model import files
from model.cli import UserError
from model.report import __main__ as command
from model.report import charts, compare, history
from model.report import page as report
from model.report.charts import Curve, Mark
from model.training import options

MODEL = {"vocab_size": 65, "n_positions": 64, "n_layer": 2, "n_head": 2, "n_embd": 8}
NOW = 1_700_000_000.0


def training(step, loss, **more):
    row = dict.fromkeys(history.COLUMNS) | {"step": step, "tokens": 1000 * step, "loss": loss, "elapsed_s": 2.0 * step}
    return row | {"lr": 1e-3, "grad_norm": 0.5, "step_ms": 2000.0, "tok_per_s": 500.0, "skipped": 0} | more


def validation(step, val_loss):
    row = {"step": step, "tokens": 1000 * step, "val_loss": val_loss, "elapsed_s": 2.0 * step + 1}
    return dict.fromkeys(history.COLUMNS) | row


def make(folder, rows=(), *, steps=100, samples=(), model=MODEL, age=10.0, **train) -> Path:
    """The folder of a run. rows, samples: dicts, or lines as bytes. age: of the last row at NOW, in seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"train": {"preset": "tiny", "steps": steps, "eval_every": 10, **train}, "model": model}
    (folder / "config.json").write_text(json.dumps(content))
    for name, lines in (("metrics.jsonl", rows), ("samples.jsonl", samples)):
        made = [line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines]
        (folder / name).write_bytes(b"".join(made))
    os.utime(folder / "metrics.jsonl", (NOW - age, NOW - age))
    return folder


def usual(done=100, every=10):
    """Rows of a run: training at each step, validation at every 10th, lowest at step 60."""
    for step in range(1, done + 1):
        yield training(step, 4.0 - step / 50)
        if step % every == 0:
            yield validation(step, 3.0 + abs(step - 60) / 100)


class Page(HTMLParser):
    """Tags and text of a page; fails on tags that are closed out of order."""

    VOID = ("meta", "input", "br")

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.words = [], [], ""
        self.feed(text)
        assert self.open == []
        assert not re.search(r"https?://|@import|url\(|<link|src=", text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if not {"style", "script"} & set(self.open):
            self.words += text


def page_of(folder) -> Page:
    return Page(report.html(history.read(folder)))


def charts_of(page: str) -> dict[str, ElementTree.Element]:
    """The charts of a page by title; of a wide one the narrow drawing, which comes after it."""
    drawn = [
        ElementTree.fromstring(found) for found in re.findall(r'<svg role="img" class="chart.*?</svg>', page, re.S)
    ]
    return {chart.find("title").text: chart for chart in drawn}


def of_kind(chart, kind):
    return [element for element in chart.iter() if element.get("class") == kind]


def points(curve):
    return np.array([pair.split(",") for pair in curve.get("points").split()], dtype=float)


def call(*argv) -> int:
    return exit_code(command.main, command.ReportConfig, *argv)


@pytest.fixture
def two(tmp_path):
    """One of 100 steps with a best loss of 3, and one of 50 steps that take half as long."""
    fast = [{**row, "elapsed_s": row["elapsed_s"] / 2} for row in usual(50)]
    return [
        history.read(make(tmp_path / "a", usual(), lr=1e-3), "a"),
        history.read(make(tmp_path / "b", fast, lr=2e-3, ema=0.9), "b"),
    ]


# --- reading ---------------------------------------------------------------------------------------------------------


DAMAGE = {
    "cut by a crash": b'{"step": 3, "tokens": 30',
    "zeros after a power failure": b"\0" * 100 + b"\n",
    "not UTF-8": b'{"step": "\xff"}\n',
    "a list": b"[3]\n",
    "no step": b'{"loss": 3.0}\n',
    "a step below zero": b'{"step": -1}\n',
    "a step that is none": b'{"step": NaN}\n',
    "a step that is text": b'{"step": "3"}\n',
    "a step without end": b'{"step": 1' + b"0" * 400 + b"}\n",
    "too deep": b"[" * 100_000 + b"\n",
}


@pytest.mark.parametrize("line", DAMAGE.values(), ids=DAMAGE)
def test_damaged_line_is_skipped_and_counted(tmp_path, line):
    made = history.read(make(tmp_path, [training(1, 4.0), training(2, 3.0), line]))
    assert made.damaged == 1 and made.columns["loss"].tolist() == [4.0, 3.0] and made.done == 2
    assert "1 line of metrics.jsonl could not be read" in page_of(tmp_path).words


def test_invalid_numbers_are_not_drawn(tmp_path):
    values = [4.0, None, float("nan"), float("inf"), 1e300, "3.0", [3.0], 10**400, 3.0]
    rows = [json.dumps(training(step, value)).encode() + b"\n" for step, value in enumerate(values)]
    made = history.read(make(tmp_path, rows))
    assert made.damaged == 0 and len(made) == len(values)
    assert made.values("loss").tolist() == [4.0, 3.0]
    page = report.html(made)
    assert "7 rows of metrics.jsonl without a finite loss, first at step 1:" in Page(page).words
    assert len(points(of_kind(charts_of(page)["Loss"], "curve raw")[0])) == 2


def test_superseded_rows_are_skipped(tmp_path):
    rows = [training(step, float(i)) for i, step in enumerate([1, 2, 3, 4, 5, 3, 4])]
    made = history.read(make(tmp_path, rows))
    assert made.columns["step"].tolist() == [1, 2, 3, 3, 4] and made.values("loss").tolist() == [0, 1, 2, 5, 6]


def test_best_is_the_first_minimum(tmp_path):
    rows = [validation(step, loss) for step, loss in ((1, 3.0), (2, 2.0), (3, float("nan")), (4, 2.0))]
    assert history.read(make(tmp_path, rows)).best == (2, 2.0)
    assert history.read(make(tmp_path, [training(1, 3.0)])).best is None


@pytest.mark.parametrize("rows", [[], [training(1, 4.0)], [validation(0, 4.0)], [training(0, None, lr=None)]])
def test_run_with_at_most_one_row_has_a_page(tmp_path, rows):
    page = page_of(make(tmp_path, rows))
    assert ("no metrics yet" in page.words) == (not rows)
    Page(compare.html([history.read(tmp_path, "a"), history.read(make(tmp_path / "b"), "b")]))


@pytest.mark.parametrize("seed", range(25))
def test_random_rows_give_a_page(tmp_path, seed):
    rng = random.Random(seed)
    values = [None, 0, 1, -1, 0.5, 1e-320, 1e-30, 9e29, -9e29, float("nan"), float("inf"), True, "x", [1], 3, 1e6]
    some = rng.sample(values, 4)
    rows = [{name: rng.choice(some if rng.random() < 0.5 else values) for name in history.COLUMNS} for _ in range(40)]
    made = history.read(make(tmp_path, rows, eval_every=rng.choice(values)))
    Page(report.html(made))
    Page(compare.html([made, made]))


# --- drawing ---------------------------------------------------------------------------------------------------------


def test_thinning_keeps_ends_and_spikes():
    y = np.random.default_rng(0).normal(size=100_000)
    y[31_234], y[77_777] = 50.0, -50.0
    x = np.arange(100_000.0) * 10 + 10
    keep = charts.thin(x, y, 150)
    assert {0, 31_234, 77_777, 99_999} <= set(keep.tolist())
    assert len(keep) <= 2 * 150 + 2 and (np.diff(keep) > 0).all()
    columns = (x[keep] - 10) * 150 // (x[-1] - 10)
    assert set(columns[:-1]) == set(range(150))  # no column is empty
    assert charts.thin(x[:300], y[:300], 150).tolist() == list(range(300))  # few enough
    assert len(charts.thin(np.ones(1000), y[:1000], 10)) <= 4  # all of one x


def test_smoothing_averages_neighbours_and_follows_the_beginning():
    y = np.array([9.0, 5, 3, 2, 2, 2, 8])
    by_hand = [9, np.mean(y[0:3]), np.mean(y[0:5]), np.mean(y[1:6]), np.mean(y[2:7]), np.mean(y[3:7]), np.mean(y[4:7])]
    assert charts.smooth(y, 2) == pytest.approx(by_hand)
    assert charts.smooth(y, 0) == pytest.approx(y)


@pytest.mark.parametrize("log", [False, True])
def test_points_lie_where_the_axes_say(log):
    x, y = np.array([0.0, 400, 1000]), np.array([1.0, 10, 100])
    chart = ElementTree.fromstring(charts.curves("t", [Curve(x, y, "curve")], x_label="steps", log=log))
    drawn = points(of_kind(chart, "curve")[0])
    labels = {t.text: (float(t.get("x")), float(t.get("y")) - 4) for t in chart.iter("text")}
    assert drawn[1][0] == pytest.approx(labels["400"][0], abs=0.1)
    assert drawn[2][1] == pytest.approx(labels["100"][1], abs=0.1)
    share = (drawn[0][1] - drawn[1][1]) / (drawn[0][1] - drawn[2][1])
    assert share == pytest.approx(1 / 2 if log else 9 / 99, abs=0.01)


def test_since_hides_what_lies_before():
    x = np.arange(100.0)
    bands = [(float(step), f"step {step}") for step in range(100)]
    marks = [Mark(10, 10, "circle", "m", "early"), Mark(90, None, "down", "m", "late")]
    chart = ElementTree.fromstring(
        charts.curves("t", [Curve(x, x, "c")], x_label="x", since=50, bands=bands, marks=marks)
    )
    tips = [e.findtext("title") for e in (*of_kind(chart, "band"), *of_kind(chart, "m"))]
    assert tips == [*(f"step {step}" for step in range(50, 100)), "late"]
    assert points(of_kind(chart, "c")[0])[0][0] == min(float(e.get("x")) for e in of_kind(chart, "band"))
    assert charts.curves("t", [Curve(x, x, "c")], x_label="x", since=100) == ""


@pytest.mark.parametrize("width", [charts.WIDTH, charts.WIDE])
@pytest.mark.parametrize("most", [0.0073, 1.0, 9.08, 37.0, 4000.0, 99_999.0, 20_000_000.0])
@pytest.mark.parametrize("low, high", [(3.2, 11.0), (3.0, 3.0), (0.0, 0.0), (-1e29, 1e29), (1e-6, 6e-4), (1e5, 1.3e6)])
def test_labels_stay_inside_and_apart(low, high, most, width):
    for log in {False, low > 0}:
        curve = Curve(np.array([0.0, most]), np.array([low, high]), "c")
        chart = ElementTree.fromstring(charts.curves("t", [curve], x_label="steps", log=log, width=width))
        height, boxes = float(chart.get("viewBox").split()[-1]), []
        for t in chart.iter("text"):
            wide, x, y = charts.text_width(t.text), float(t.get("x")), float(t.get("y"))
            left = x - {"start": 0, "middle": 0.5, "end": 1}[t.get("text-anchor")] * wide
            assert left > -1 and left + wide < width + 1 and 9 < y < height, t.text
            assert all(left + wide <= a or b <= left or abs(y - base) >= 11 for a, b, base in boxes), t.text
            boxes.append((left, left + wide, y))
        assert len(boxes) >= 3
        assert all(0 < v < height for v in points(of_kind(chart, "c")[0])[:, 1])


def test_bands_show_the_nearest_row(tmp_path):
    chart = charts_of(report.html(history.read(make(tmp_path, usual()))))["Loss"]
    bands = of_kind(chart, "band")
    assert len(bands) == report.MOST_BANDS
    assert bands[-1].findtext("title") == "step 100, 100,000 tokens, 3:20, loss 2.0000"
    ends = [(float(b.get("x")), float(b.get("x")) + float(b.get("width"))) for b in bands]
    assert all(a[1] == pytest.approx(b[0], abs=0.2) for a, b in itertools.pairwise(ends))  # no gap
    steps = [int(b.findtext("title").split(",")[0].removeprefix("step ")) for b in bands]
    left, right = ends[0][0], ends[-1][1]
    nearest = [left + (right - left) * (a + b) / 2 / 100 for a, b in itertools.pairwise(steps)]
    assert [end for _, end in ends[:-1]] == pytest.approx(nearest, abs=0.2)
    assert ends[-1][1] == pytest.approx(charts.WIDTH - charts.MARGIN, abs=0.1)


def test_validations_and_the_best_are_marked(tmp_path):
    chart = charts_of(report.html(history.read(make(tmp_path, usual()))))["Loss"]
    (best,) = of_kind(chart, "mark best")
    dots = of_kind(chart, "mark validation")
    assert len(dots) == 10 and best.findtext("title").startswith(
        "lowest: step 60, 60,000 tokens, 2:01, validation loss 3"
    )
    assert (best.get("cx"), best.get("cy")) == (dots[5].get("cx"), dots[5].get("cy"))
    assert float(best.get("cy")) == max(float(dot.get("cy")) for dot in dots)  # lowest on the page too


def test_best_is_marked_despite_thinning(tmp_path):
    rows = [validation(step, 1.0 if step == 1234 else 2.0) for step in range(3000)]
    chart = charts_of(report.html(history.read(make(tmp_path, rows, steps=3000))))["Loss"]
    assert "step 1,234," in of_kind(chart, "mark best")[0].findtext("title")
    assert len(of_kind(chart, "mark validation")) == report.MOST_VALIDATIONS


def test_skipped_steps_are_marked(tmp_path):
    rows = [training(step, 3.0, skipped=(step >= 20) + 2 * (step >= 70)) for step in range(1, 101)]
    made = charts_of(report.html(history.read(make(tmp_path, rows))))
    for title in ("Loss", "Gradient norm"):
        tips = [mark.findtext("title") for mark in of_kind(made[title], "mark skipped")]
        assert [tip[:33] for tip in tips] == ["1 step skipped up to step 20, 20,", "2 steps skipped up to step 70, 70"]
    assert not of_kind(made["Learning rate"], "mark skipped")
    first = charts_of(report.html(history.read(make(tmp_path / "b", [training(1, 3.0, skipped=1)]))))["Loss"]
    assert len(of_kind(first, "mark skipped")) == 1
    assert "3steps skipped" in page_of(tmp_path).words


def test_unmeasured_columns_have_no_chart(tmp_path):
    made = charts_of(report.html(history.read(make(tmp_path, usual()))))
    assert list(made) == ["Loss", "Loss, second half", "Learning rate", "Gradient norm", "Tokens per second"]
    rows = [training(1, 3.0, peak_mib=900.0, grad_norm=0.0), training(2, 3.0, peak_mib=1000.0, grad_norm=0.0)]
    made = charts_of(report.html(history.read(make(tmp_path, rows))))
    assert list(made) == ["Loss", "Learning rate", "Tokens per second", "Peak memory, MiB"]  # no logarithm of 0
    zero = {title for title, chart in made.items() if "0" in [t.text for t in chart.iter("text")][:1]}
    assert zero == {"Learning rate", "Tokens per second", "Peak memory, MiB"}


def test_page_size_is_bounded(tmp_path):
    def rows(n):
        rng = np.random.default_rng(0)
        template = json.dumps(training(7777, 8888, grad_norm=9999)).encode() + b"\n"
        for step, loss in enumerate(rng.normal(4, 0.1, n), 1):
            row = template.replace(b"7777000", b"%d" % (1000 * step)).replace(b"7777", b"%d" % step)
            yield row.replace(b"8888", b"%.4f" % loss).replace(b"9999", b"%.4f" % loss)

    short, long = (report.html(history.read(make(tmp_path, rows(n), steps=n))) for n in (500, 10_000))
    assert len(long) < 1.5 * len(short) < 500_000
    assert of_kind(charts_of(long)["Loss"], "band")[-1].findtext("title").startswith("step 10,000, 10.0 million tokens")


# --- words -----------------------------------------------------------------------------------------------------------


def test_highlights_of_a_run(tmp_path):
    rows = [*usual(50), training(51, 2.5, mfu=0.4213, peak_mib=1234.0, tok_per_s=123456.0)]
    words = " ".join(page_of(make(tmp_path, rows)).words.split())
    for figure in (
        "51 of 100 steps done, 51 %", "2.5000 loss now; smoothed 2.5", "3.1000 best validation loss, at step 50; "
        "perplexity 22.2", "123,000 tokens/s", "42.1 % MFU", "1,234 MiB peak memory", "1:42 of training",
        "1:38 to go, for 49 steps",
    ):  # fmt: skip
        assert figure.replace(" ", "") in words.replace(" ", ""), figure


def test_eta_uses_the_last_tenth(tmp_path):
    rows = [training(step, 3.0, elapsed_s=100.0 * step if step <= 90 else 9000 + step - 90) for step in range(1, 101)]
    made = history.read(make(tmp_path, rows, steps=110))
    assert report._eta_s(made) == pytest.approx(10.0)  # 1 s a step by now, 100 s before
    assert report._eta_s(history.read(make(tmp_path, rows, steps=100))) is None
    one = history.read(make(tmp_path, [training(1, 3.0)], steps=11))
    assert report._eta_s(one) == pytest.approx(20.0)


def test_page_says_how_far_the_run_is(tmp_path):
    half, finished = (report.html(history.read(make(tmp_path / str(done), usual(done)))) for done in (50, 100))
    assert re.search(r"As of 2023-11-1\d \d\d:\d\d: step 50 of 100\.", Page(half).words)
    assert re.search(r"As of 2023-11-1\d \d\d:\d\d: finished, step 100 of 100\.", Page(finished).words)
    assert "reload" not in half


def test_run_that_reached_its_loss_is_finished(tmp_path):
    """Once more after it went on to a lower one."""
    rows = [*usual(50), validation(50, 2.5) | {"reached": 2.6}]
    reached = make(tmp_path / "a", rows, until_loss=2.6)
    words = page_of(reached).words
    assert "finished, step 50 of 100." in words and "to go" not in words
    assert "1:41to a validation loss of 2.6, at step 50, on 50,000 tokens" in words
    assert f"train longerpython train.py --resume {reached} --until-loss 0\n" in words
    resumed = page_of(make(tmp_path / "b", [*rows, training(51, 2.0)], until_loss=2.4)).words
    assert ": step 51 of 100." in resumed and "of 2.6, at step 50" in resumed and "to go" in resumed
    last = page_of(make(tmp_path / "c", [*usual(), validation(100, 2.5)], until_loss=2.6)).words
    assert f"--resume {tmp_path}/c --until-loss 0 --steps 200\n" in last


def test_steps_are_estimated_until_minutes_have_set_them(tmp_path):
    made = history.read(make(tmp_path / "a", usual(9), steps=0, minutes=3.0))
    assert made.steps == 90 and not made.is_finished  # 9 steps in 18 s
    assert "step 9 of 90." in page_of(made.folder).words and report._eta_s(made) == pytest.approx(162)
    late = history.read(make(tmp_path / "b", usual(9), steps=0, minutes=0.1))
    assert late.steps == 10 and not late.is_finished
    assert history.read(make(tmp_path / "c", [], steps=0, minutes=0.1)).steps == 1
    with pytest.raises(UserError, match="damaged"):
        history.read(make(tmp_path / "d", usual(9), steps=0))


def test_changed_options_come_first(tmp_path):
    stored = options.preset("tiny").run_options() | {"lr": 0.123}
    changed, rest = report._options(history.read(make(tmp_path, usual(), **stored)))
    assert changed == [("lr", f"0.123 (preset: {options.preset('tiny').lr})")]
    assert ("batch_size", str(stored["batch_size"])) in rest and ("model: n_embd", "8") in rest
    changed, rest = report._options(history.read(make(tmp_path, usual(), **{**stored, "preset": "gone.toml"})))
    assert changed == [] and ("lr", "0.123") in rest


def test_samples_are_newest_first_and_verbatim(tmp_path):
    bad = "</pre><script>alert('x')</script>\ud800\0&amp;"
    samples = [{"step": 10, "text": "old"}, {"step": 20}, b"{\n", {"step": 30, "text": bad}]
    folder = make(tmp_path, usual(), samples=samples)
    (folder / "sample.txt").write_bytes(b"final \xff")
    page = Page(report.write(folder).read_bytes().decode())
    assert page.tags.count("script") == 1
    at = [page.words.index(text) for text in ("final", "2 earlier", "step 30\n", "alert('x')", "&amp;", "step 10\nold")]
    assert at == sorted(at)


def test_many_samples_are_thinned(tmp_path):
    samples = [{"step": step, "text": f"text {step}"} for step in range(1, 1001)]
    page = page_of(make(tmp_path, usual(), samples=samples))
    shown = [int(step) for step in re.findall(r"text (\d+)", page.words)]
    assert len(shown) == report.MOST_SAMPLES and shown[0] == 1000 and shown[-1] == 1
    assert shown == sorted(shown, reverse=True) and "960 more in samples.jsonl" in page.words


def test_next_commands(tmp_path):
    stopped = page_of(make(tmp_path / "my run", usual(50))).words
    assert f"python train.py --resume '{tmp_path}/my run'\n" in stopped
    assert f"--resume '{tmp_path}/my run' --steps 200\n" in page_of(make(tmp_path / "my run", usual())).words


def test_hostile_names_stay_text(tmp_path):
    bad = "<script>alert('x')<!--&"
    folder = make(tmp_path / bad.replace("/", ""), usual(), samples=[{"step": 1, "text": bad}], tokenizer=bad)
    assert page_of(folder).tags.count("script") == 1
    both = [history.read(folder, bad), history.read(make(tmp_path / "b", usual()), "b")]
    page = Page(compare.html(both))
    assert page.tags.count("script") == 1 and bad in page.words


# --- writing ---------------------------------------------------------------------------------------------------------


def test_page_is_written_atomically(tmp_path, monkeypatch):
    folder = make(tmp_path, usual(50))
    path = report.write(folder)
    old = path.read_bytes()
    assert path == folder / "report.html" and old.endswith(b"</html>")
    (folder / "metrics.jsonl").write_bytes(b"")

    def full(path, data, **options):
        path.open("wb").close()
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(files, "write_file", full)
    with pytest.raises(OSError, match="No space"):
        report.write(folder)
    assert path.read_bytes() == old
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "metrics.jsonl", "report.html", "samples.jsonl"]


def test_command_writes_a_page_and_prints_its_path(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    a, b = make(tmp_path / "runs/a", usual()), make(tmp_path / "runs/b", usual(50))
    assert call(a) == 0 and capsys.readouterr().out == f"{a}/report.html\n"
    assert call(a, "--out", "new/page.html") == 0 and "<h1>a</h1>" in (tmp_path / "new/page.html").read_text()
    assert call(a, b, "runs/a") == 0 and capsys.readouterr().out.endswith("runs/compare.html\n")
    assert "<h1>2 runs</h1>" in (tmp_path / "runs/compare.html").read_text()  # one that is named twice is one
    assert call(a, b, "--out", "c.html") == 0 and (tmp_path / "c.html").exists()


def test_svg_is_a_picture_of_its_own(two, tmp_path):
    for argv, title, curves in (
        ([two[0].folder], "Loss of a, nats per token", {"curve raw", "curve smooth", "curve between"}),
        ([each.folder for each in two], "Validation loss, nats per token", {"curve run0 dash0", "curve run1 dash1"}),
    ):
        assert call(*argv, "--svg", tmp_path / "new/loss.svg") == 0
        content = (tmp_path / "new/loss.svg").read_bytes()
        chart = ElementTree.fromstring(content.replace(b' xmlns="http://www.w3.org/2000/svg"', b""))
        assert len(content) < 40_000 and content.count(b"http") == 1
        style, words = chart.find("style").text, [t.text for t in chart.iter("text")]
        assert "prefers-color-scheme: dark" in style and {title, "steps", "40"} <= set(words)
        assert curves <= {line.get("class") for line in chart.iter("polyline")}
        assert {"training", "validation"} <= set(words) or {"a", "b"} <= set(words)  # the legend
        width, height = (float(v) for v in chart.get("viewBox").split()[2:])
        for t in chart.iter("text"):
            left = float(t.get("x")) - {"start": 0, "middle": 0.5, "end": 1}[t.get("text-anchor")] * len(t.text) * 6.9
            assert left > -1 and left + len(t.text) * 6.9 < width + 1 and 9 < float(t.get("y")) < height, t.text
    empty = make(tmp_path / "empty", [])
    assert call(empty, "--svg", tmp_path / "no.svg") == 2 and not (tmp_path / "no.svg").exists()


def broken(name, content):
    def spoil(folder):
        make(folder, usual())
        (folder / name).unlink() if content is None else (folder / name).write_bytes(content)

    return spoil


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda folder: None, "holds no run: there is no config.json in it"),
        (broken("config.json", b'{"train"'), "config.json is damaged"),
        (broken("config.json", b"[]"), "config.json is damaged"),
        (broken("config.json", b'{"train": {}, "model": {}}'), "config.json is damaged"),
        (broken("config.json", b'{"train": {"steps": "9"}, "model": {}}'), "config.json is damaged"),
        (broken("config.json", b'{"train": {"steps": 9}, "model": {"n_head": 7}}'), "config.json is damaged"),
        (broken("config.json", b'{"train": {"steps": 9}, "model": {"heads": 7}}'), "config.json is damaged"),
        (broken("metrics.jsonl", None), "has no metrics.jsonl: did the run begin?"),
    ],
)  # fmt: skip
def test_invalid_run_is_refused_in_one_line(tmp_path, capsys, spoil, words):
    spoil(tmp_path / "bad")
    good = make(tmp_path / "good", usual())
    for argv in ([tmp_path / "bad"], [good, tmp_path / "bad"]):
        assert call(*argv, "--out", tmp_path / "page.html") == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and words in error and "bad" in error
    assert not (tmp_path / "page.html").exists()
    with pytest.raises(UserError):
        report.write(tmp_path / "bad")


def test_command_without_a_run_is_refused(capsys):
    assert call() == 2 and "which run?" in capsys.readouterr().err


# --- runs over each other --------------------------------------------------------------------------------------------


def test_names_are_the_shortest_unique_ends(tmp_path):
    folders = [tmp_path / name for name in ("a/tiny", "b/tiny", "b/gpt2")]
    assert compare.names(folders[1:]) == ["tiny", "gpt2"]
    assert compare.names(folders) == ["a/tiny", "b/tiny", "b/gpt2"]


def test_runs_are_drawn_over_each_axis(two):
    page = compare.html(two)
    parts = dict(re.findall(r'<div class="over over-(\w+)">(.*?)</div>', page.split("Training loss")[0], re.S))
    assert list(parts) == list(history.AXES)
    shares = {}
    for axis, part in parts.items():
        chart = charts_of(part)["Validation loss, nats per token"]
        ends = [points(of_kind(chart, f"curve run{i} dash{i}")[0])[-1][0] for i in (0, 1)]
        left = float(next(iter(of_kind(chart, "grid"))).get("x1"))
        shares[axis] = (ends[1] - left) / (ends[0] - left)
    assert shares["step"] == pytest.approx(0.5, abs=0.01) == shares["tokens"]
    assert shares["elapsed_s"] == pytest.approx(50.5 / 201, abs=0.01)
    tips = [e.findtext("title") for e in of_kind(chart, "mark run1")]
    assert tips[-1] == "b: step 50, 50,000 tokens, 0:50, validation loss 3.1000"
    assert 'id="x-step" checked' in page and page.count('type="radio"') == 3


def test_results_mark_the_lowest_loss(two):
    table = compare._results(two)
    assert [[cell.mark for cell in row] for row in table.rows] == [["", "win", *[""] * 9], [""] * 11]
    cells = {head: tuple(cell.text for cell in both) for head, *both in zip(table.head, *table.rows, strict=True)}
    assert cells["best validation loss"] == ("3.0000", "3.1000") and cells["of step"] == ("60", "50")
    assert cells["last validation loss"] == ("3.4000", "3.1000")
    assert cells["steps"] == ("100", "50 of 100") and cells["tokens"] == ("100,000", "50,000")
    assert cells["time"] == ("3:21", "0:50") and cells["time to 3.10"] == ("1:41", "0:50")
    assert cells["tokens/s, median"] == ("500", "500")
    assert "peak MiB" not in table.head  # not measured
    assert re.findall(r'class="is-win"[^>]*>([^<]*)', compare.html(two)) == ["3.0000"]


def test_times_to_a_common_loss_need_comparable_runs(two, tmp_path):
    other = history.read(make(tmp_path / "c", usual(), model={**MODEL, "vocab_size": 66}), "c")
    without = history.read(make(tmp_path / "d", [training(1, 3.0)]), "d")
    for runs in ([two[0], other], [two[0], without]):
        assert not any(head.startswith("time to") for head in compare._results(runs).head)


def test_different_options_are_listed(two, tmp_path):
    rows = [[cell.text for cell in row] for row in compare._differences(two).rows]
    assert rows == [["lr", "0.001", "0.002"], ["ema", charts.NONE, "0.9"]]
    other = history.read(make(tmp_path / "c", usual(), model={**MODEL, "vocab_size": 66, "n_positions": 32}), "c")
    names = [row[0].text for row in compare._differences([two[0], other]).rows]
    assert names == ["vocab_size", "lr"]  # the context is told as an option of the run, not twice
    assert "All options are the same." in Page(compare.html([two[0], two[0]])).words


def test_many_runs_differ_in_colour_and_dashes(tmp_path):
    folder = make(tmp_path / "run", usual(20))
    page = compare.html([history.read(folder, f"run {i}") for i in range(20)])
    kinds = set(re.findall(r'class="curve (run\d dash\d)"', page))
    assert len(kinds) == 20
