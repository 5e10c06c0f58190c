"""Reports as Markdown, as a page with charts, as tables of the README, and as lines on a terminal."""

import itertools
import random
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch
from reports import Page, charts_of

from bench import __main__ as command
from bench import charts, report, tables
from bench.record import CONTROL, Report, Row
from model.cli import UserError

PEERS = {
    "causal_attention": ["eager", "compile", "sdpa_flash", "sdpa_cudnn", "sdpa_efficient", "sdpa_math", "flex", "fla"],
    "decode_attention": ["eager", "compile", "sdpa", "sdpa_full"],
    "layer_norm": ["eager", "compile", "liger", "fla"],
    "add_layer_norm": ["eager", "compile", "fla"],
    "bias_gelu": ["eager", "compile"],
    "cross_entropy": ["eager", "compile", "liger", "fla"],
    "linear_cross_entropy": ["eager", "compile", "liger", "cce", "cce_exact", "fla"],
}
PRODUCTS = {"causal_attention": 200.0, "decode_attention": 1.0, "linear_cross_entropy": 700.0}  # FLOP a byte
LADDER = ("plain", "eager", "compile", "+attention", "+layer_norm", "+gelu", "triton", "triton+graph")
PARTS = {"parameters": 475, "gradients": 475, "optimizer": 950, "activations": 1400, "workspace": 300}


def row(kind, params, provider, milliseconds, clock="wall", **metrics):
    return Row(kind, params, provider, clock, tuple(ms / 1e3 for ms in milliseconds), metrics)


def noisy(rng, ms, rounds=11):
    return [ms * rng.uniform(0.97, 1.05) for _ in range(rounds)]


def a_report(device, rows, **more):
    machine = {"device": device, "threads": 2, "torch": "2.13.0", "python_version": "3.11.7", "system": "Linux x86_64"}
    return Report(machine, {"id": "0123456789ab", "dirty": False}, "2025-01-01T00:00:00+00:00", rows=rows, **more)


def kernel_rows(rng, op, clocks, cases, scale):
    us, *peers = ["triton", *PEERS[op]] if "graph" in clocks else ["eager", "compile"]
    modes = ("forward",) if op == "decode_attention" else ("forward", "backward", "both")
    for n, case in enumerate(cases):
        for mode in modes:
            params = {"op": op, "case": case, "dtype": "bfloat16" if "graph" in clocks else "float32", "mode": mode}
            for clock in clocks:
                ours = scale * (1 + 0.2 * n) * (1 + modes.index(mode))
                host = {"host_ms": 0.04} if clock == "events" else {}
                for name, factor in [(us, 1.0), *((peer, rng.uniform(0.8, 4.0)) for peer in peers)]:
                    ms = ours * factor + 0.02 * (clock == "events")
                    size, share = 0.7 * ours * 3e9, 0.7 * ours / ms
                    flops = PRODUCTS.get(op, 0) * size
                    yield row(
                        "kernels", params, name, noisy(rng, ms), clock, gb_per_s=size / ms / 1e6, floor=share,
                        tflop_per_s=0.3 * flops / ms / 1e9, bytes=size, flops=0.3 * flops, floor_ms=0.7 * ours,
                        peak_mib=100 * factor, **host,
                    )  # fmt: skip
                state = {"sm_mhz": 1755, "watts": 412, "celsius": 61} if "graph" in clocks else {"load": 1.2}
                yield row("kernels", params, CONTROL, noisy(rng, 0.2), clock, **state)


def train_rows(rng, batch, clock, ladder):
    params = {"preset": "gpt2", "batch": batch, "context": 1024, "dtype": "bfloat16"}
    for i, name in enumerate([*ladder, "hf", "hf+liger", "nanogpt"]):
        ms = 30.0 * batch / (1 + 0.25 * (i if name in ladder else 1.4))
        rate = batch * 1024e3 / ms
        parts = {f"{part}_mib": mib * (batch if part[0] in "aw" else 1) / (1 + i / 9) for part, mib in PARTS.items()}
        peak = sum(parts.values())
        mfu = {"mfu": rate * 855e6 / 989e12} if clock == "events" else {}
        times = noisy(rng, ms)
        yield row(
            "train", params, name, times, clock, tokens_per_s=rate, peak_mib=peak, predicted_mib=peak, **parts, **mfu
        )
    yield row("train", params, CONTROL, noisy(rng, 0.2), clock)


def generate_rows(rng, batch, clock, providers):
    for phase, tokens, ms in (("prefill", 1, 3.0), ("decode", 64, 60.0)):
        params = {"preset": "gpt2", "batch": batch, "prompt": 32, "tokens": 64, "dtype": "float32", "phase": phase}
        for i, name in enumerate(providers):
            t = ms * (1 + 0.3 * i)
            yield row("generate", params, name, noisy(rng, t), clock, tokens_per_s=batch * tokens / t * 1e3)


def memory_rows(batch, measured):
    params = {"preset": "gpt2", "batch": batch, "context": 1024, "dtype": "bfloat16"}
    for name, factor in (("eager", 2.0), ("triton", 0.8)):
        parts = {f"{part}_mib": mib * (factor * batch if part[0] in "aw" else 1.0) for part, mib in PARTS.items()}
        predicted = sum(parts.values())
        peak = {"peak_mib": predicted * 1.03} if measured else {}
        yield Row("memory", params, name, metrics={**parts, "predicted_mib": predicted, **peak})


def quality_rows(seeds, times):
    """Training runs: the last of ours has not reached the loss."""
    params = {"preset": "tiny", "data": "Book", "until_loss": 1.8}
    for seed in range(1, seeds + 1):
        for name, seconds in times.items():
            metrics = {"seed": seed, "step": 900 + 100 * seed, "tokens": 1e5 * seed, "loss": 1.79, "bits_per_byte": 2.5}
            yield Row("quality", params, name, seconds=(seconds + seed,), metrics=metrics | {"steps_s": seconds})
    yield Row("quality", params, "ours", error="seed 9: after 3000 steps the validation loss is 1.9, above 1.8")


def gpu_report():
    """Everything that a report can hold: two clocks, a red kernel, errors, missing providers, dropped cases."""
    rng = random.Random(0)
    rows = []
    for op in PEERS:
        cases = [f"M={65536 * 768 // n} N={n}" for n in (768, 1024, 1280, 1600)]
        rows += kernel_rows(rng, op, ("events", "graph"), cases, 0.08)
    rows = [r for r in rows if (r.params["op"], r.provider) not in {("bias_gelu", "triton"), ("layer_norm", "liger")}]
    red = "not timed: 3 comparisons with float64 fail (python -m kernels check)"
    rows.append(Row("kernels", {"op": "bias_gelu", "case": "", "dtype": "bfloat16", "mode": ""}, "triton", error=red))
    oom = "OutOfMemoryError: CUDA out of memory"
    layer_norm = {"op": "layer_norm", "case": "M=65536 N=768", "dtype": "bfloat16", "mode": "forward"}
    rows += [Row("kernels", {**layer_norm, "mode": mode}, "liger", "events", error=oom) for mode in ("forward", "both")]
    for batch in (4, 16, 64):
        rows += train_rows(rng, batch, "events", LADDER)
        rows += memory_rows(batch, measured=batch < 64)
    for batch in (1, 8, 64):
        rows += generate_rows(rng, batch, "events", ("triton+graph", "triton", "eager", "hf", "hf_static"))
    rows += quality_rows(2, {"ours": 60.0, "nanogpt": 70.0})
    roofs = {"copy": {"65536": 2e-6, str(2**30): 2**30 / 3e12}, "flops": {"bfloat16": 7.1e14, "float32": 5e13}}
    method = {"events": "by events", "graph": "by graph", "wall": "unused", "interval": "p50", "roofs": roofs}
    missing = {"cce": "cut_cross_entropy is not installed (pip install cut-cross-entropy)"}
    made = a_report(
        "NVIDIA H100 80GB HBM3", rows, method=method, missing=missing, dropped=["train batch=64", "generate"]
    )
    made.machine |= {"compute_capability": "9.0", "memory_mib": 81559, "triton": "3.7.1", "driver": "570.1"}
    return made


def cpu_report():
    rng = random.Random(1)
    rows = []
    for op in ("layer_norm", "causal_attention"):
        rows += kernel_rows(rng, op, ("wall",), ["M=1024 N=768", "M=768 N=1024"], 1.5)
    rows += train_rows(rng, 1, "wall", ("plain", "eager", "compile"))
    rows += [*generate_rows(rng, 1, "wall", ("eager", "hf")), *memory_rows(1, measured=True)]
    rows += quality_rows(3, {"ours": 150.0, "nanogpt": 170.0})
    roofs = {"copy": {"65536": 1e-5}, "flops": {"float32": 1e11}}
    return a_report("A CPU", rows, method={"wall": "by torch.utils.benchmark", "roofs": roofs})


@pytest.fixture(scope="module")
def reports():
    return [gpu_report(), cpu_report()]


@pytest.fixture(scope="module")
def page(reports):
    return report.html(reports)


@pytest.fixture(scope="module")
def text(reports):
    return report.markdown(reports)


def layer_norm(mode="forward", case="M=4 N=8"):
    return {"op": "layer_norm", "case": case, "dtype": "float32", "mode": mode}


def small(*rows):
    """A report of a GPU with a few rows."""
    made = a_report("A GPU", list(rows))
    made.machine["compute_capability"] = "9.0"
    return made


def table_rows(text, title):
    """The cells of a Markdown table, a list a row, head first; dashes and signs in ASCII."""
    lines = iter(text.replace(tables.NONE, "-").replace(tables.TIMES, "x").splitlines())
    next(line for line in lines if line.startswith(f"**{title}."))
    next(lines)
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return [rows[0], *rows[2:]]


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value, shown",
    [
        (0.02134, "0.0213"), (1.4149, "1.41"), (21.35, "21.4"), (0.9996, "1.00"), (99.96, "100"), (412345, "412,000"),
        (1234.5, "1,230"), (0, "0"), (-2.5, "-2.50"), (None, tables.NONE), (float("nan"), tables.NONE),
        (float("inf"), tables.NONE),
    ],
)  # fmt: skip
def test_numbers_have_three_digits(value, shown):
    assert tables.num(value) == shown


def test_ratio_and_floor_match_hand_computed():
    ours = row("kernels", layer_norm(), "triton", (2.0, 2.0, 2.0), "graph", floor=0.812, gb_per_s=1234.0, tflop_per_s=0)
    faster = row("kernels", layer_norm(), "liger", (1.0, 1.5, 1.0), "graph")
    slower = row("kernels", layer_norm(), "eager", (5.0, 5.0, 5.0), "graph")
    head, cells = table_rows(report.markdown([small(slower, ours, faster)]), "layer_norm, float32, graph")
    assert head == ["case", "mode", "triton (ours), ms", "of floor", "GB/s", "eager, ms", "liger, ms"]
    # p20 to p80 beside the time; ratios 5 / 2 and 1 / 2
    assert cells == [
        "M=4 N=8", "forward", "2.00 (2.00-2.00)", "81.2 %", "1,230", "5.00 (5.00-5.00) ▲ 2.50x",
        "1.00 (1.00-1.30) ▼ 0.500x",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "theirs, mark",
    [((2, 2, 2, 2, 0.5), "win"), ((2, 2, 0.5, 0.5, 2), "tie"), ((0.5, 0.5, 0.5, 0.5, 2), "loss"), ((1,) * 5, "tie")],
)
def test_mark_needs_four_fifths_of_the_rounds(theirs, mark):
    """Rounds are compared with each other: a machine that slows down in the middle slows both."""
    slow = (1, 1, 1, 50, 50)
    ours = row("kernels", layer_norm(), "triton", slow)
    other = row("kernels", layer_norm(), "eager", [a * b for a, b in zip(theirs, slow, strict=True)])
    assert tables.ratio(other, ours).mark == mark


def test_summary_counts_wins_and_losses():
    rows = []
    for case, theirs in (("M=1", 4.0), ("M=2", 1.0), ("M=3", 0.25), ("M=4", 0.25)):
        params = layer_norm(case=case)
        rows += [row("kernels", params, "triton", (1.0,) * 5), row("kernels", params, "eager", (theirs,) * 5)]
    made = small(*rows)
    assert table_rows(report.markdown([made]), "Ours against each, wall")[1:] == [
        ["layer_norm", "float32", "0.707x ▼ 1/1/2"]  # the fourth root of 4 * 1 / 4 / 4
    ]
    assert tables.highlights(made) == [("1 of 4", "comparisons of kernels won by triton, 2 lost (wall)")]


def test_ladder_gain_is_over_the_nearest_timed_step():
    params = {"preset": "tiny", "batch": 2, "context": 8, "dtype": "float32"}
    rows = [
        row("train", params, name, (ms,) * 5) for name, ms in (("eager", 8), ("compile", 6), ("+gelu", 4), ("hf", 1))
    ]
    (group,) = tables.groups(small(*rows), "train")
    assert tables.ladder_step(group, "+gelu") == ("eager", 2.0)
    assert tables.ladder_step(group, "compile") == ("eager", pytest.approx(8 / 6))
    assert tables.ladder_step(group, "hf") is None and tables.ladder_step(group, "eager") is None
    assert list(group.rows) == ["eager", "compile", "+gelu", "hf"]


def test_training_and_generation_are_told_against_eager_and_hf(text):
    rows = {cells[0]: cells for cells in table_rows(text, "gpt2 batch=64 context=1024 bfloat16, events")}
    assert list(rows) == ["provider", *LADDER[:6], "triton (ours)", "triton+graph", "hf", "hf+liger", "nanogpt"]
    against = rows["provider"].index("speed against eager")
    assert rows["plain"][against].startswith("▼ 0.8") and rows["triton+graph"][against].startswith("▲ 2.")
    _, *rows = table_rows(text, "gpt2 float32, prompt of 32, 64 new tokens, wall")
    assert [cells[:2] for cells in rows] == [["1", "eager (ours)"], ["1", "hf"]]
    assert rows[0][4].startswith("▲ 1.2") and rows[1][4] == "-"


def test_memory_is_compared_with_the_prediction(text):
    head, *rows = table_rows(text, "gpt2 bfloat16, context 1024")
    assert head[-3:] == ["predicted MiB", "measured MiB", "measured / predicted"]
    assert rows[0][:2] == ["4", "eager"] and rows[0][-1] == "1.03" and rows[-1][-2:] == ["-", "-"]


# --- honesty ---------------------------------------------------------------------------------------------------------


def test_failed_kernel_has_a_reason_and_no_ratio(text):
    cells = table_rows(text, "bias_gelu, bfloat16, graph")[1]
    assert cells[2].startswith("failed") and not any("x" in cell for cell in cells)
    errors = table_rows(text, "Not timed")
    assert [
        "kernels",
        "bias_gelu bfloat16",
        "triton",
        "not timed: 3 comparisons with float64 fail (python -m kernels check)",
    ] in errors
    assert ["layer_norm M=65536 N=768 bfloat16 forward events and 1 more", "liger"] in [e[1:3] for e in errors]


def test_missing_and_skipped_are_named(text):
    assert table_rows(text, "Missing providers")[1][0] == "cce"
    assert table_rows(text, "Skipped")[1:] == [["train batch=64"], ["generate"]]


def test_facts_say_where_when_and_how(text):
    for words in (
        "device: NVIDIA H100", "torch: 2.13.0", "commit: 0123456789ab", "date: 2025-01-01", "graph: by graph",
        "measured roof, copy: 3,000 GB/s", "measured roof, bfloat16: 710 TFLOP/s", "61.0 to 61.0 °C",
        "control, graph: 0.",
    ):  # fmt: skip
        assert f"- {words}" in text or words in text, words
    assert "unused" not in text  # how a clock works that no row of the report has


def test_cpu_report_says_ours_are_pytorch_operators(reports):
    gpu, cpu = (report.markdown([r]) for r in reports)
    assert report._EAGER in cpu and report._EAGER not in gpu
    assert "won by" in gpu and "won by" not in cpu


def test_the_control_is_no_competitor(reports, text):
    assert all(CONTROL not in group.rows for group in tables.groups(reports[0], "kernels"))
    assert not re.search(r"^\|.*control", text, re.MULTILINE)


# --- the page --------------------------------------------------------------------------------------------------------


def test_page_is_self_contained(page):
    parsed = Page(page)
    assert not re.search(r"https?://|@import|url\(|<link|src=", page)
    ids = [attrs["id"] for _, attrs in parsed.tags if "id" in attrs]
    links = [attrs["href"] for attrs in parsed.all("a")]
    assert len(ids) == len(set(ids)) and {f"#{name}" for name in ids} == set(links)
    assert len(parsed.all("article")) == 2
    assert 'name="viewport"' in page and "prefers-color-scheme: dark" in page and "@media print" in page


def test_every_table_is_sortable_and_scrolls_in_its_box(page):
    parsed = Page(page)
    assert len(parsed.all("th")) > 100 and all(attrs["aria-sort"] == "none" for attrs in parsed.all("th"))
    assert parsed.heads == ["th"] * len(parsed.all("th"))
    boxes = [attrs for attrs in parsed.all("div") if attrs.get("class") == "scroll"]
    assert len(boxes) == len(parsed.all("table")) and all(box["tabindex"] == "0" for box in boxes)
    assert all(re.fullmatch(r"-?[\d.e-]+", attrs["data-value"]) for attrs in parsed.all("td") if "data-value" in attrs)


def test_charts_have_titles_and_descriptions(page):
    drawn = charts_of(page)
    assert len(drawn) == 12 + 2 + 6 + 3 + 2 + 2 + 2 + 1  # a GPU: ratios, floor and roofline, ladders, memory; a CPU
    assert all(svg.find("title").text and svg.find("desc").text for svg in drawn)


def test_labels_of_charts_stay_inside_and_apart(page):
    """At 6.9 units a letter and 11 a line: a wide font."""
    params, long = layer_norm(), "a_provider_with_a_name_that_is_long"
    rows = [row("kernels", params, name, (ms,) * 5) for name, ms in (("triton", 1), (long, 900), ("eager", 0.01))]
    wide = charts.ratios(tables.groups(small(*rows), "kernels"), "triton", "long")
    slow = [row("kernels", params, name, (ms,) * 5) for name, ms in (("triton", 1), ("hf", 900))]
    narrow = charts.ratios(tables.groups(small(*slow), "kernels"), "triton", "narrow")
    for svg in charts_of(page + wide + narrow):
        title, height = svg.find("title").text, float(svg.get("viewBox").split()[-1])
        boxes = []
        for t in svg.iter("text"):
            width, x, y = 6.9 * len(t.text), float(t.get("x")), float(t.get("y"))
            left = x - {"start": 0, "middle": 0.5, "end": 1}[t.get("text-anchor")] * width
            assert left > -1 and left + width < charts.WIDTH + 3 and 9 < y < height, (title, t.text)
            apart = [left + width <= start or end <= left or abs(y - base) >= 11 for start, end, base in boxes]
            assert all(apart), (title, t.text)
            boxes.append((left, left + width, y))
        assert boxes


def test_wins_and_losses_differ_in_shape():
    rows = [row("kernels", layer_norm(), name, (ms,) * 5) for name, ms in (("triton", 1), ("eager", 2), ("liger", 0.5))]
    svg = ElementTree.fromstring(charts.ratios(tables.groups(small(*rows), "kernels"), "triton", "t"))
    (win,), (loss,) = ([e for e in svg.iter() if e.get("class") == kind] for kind in ("win", "loss"))
    assert (win.tag, loss.tag) == ("circle", "polygon")
    line = float(next(e for e in svg.iter("line") if e.get("class") == "reference").get("x1"))
    lost = sum(float(corner.split(",")[0]) for corner in loss.get("points").split()) / 3
    assert lost < line and float(win.get("cx")) - line == pytest.approx(
        line - lost, abs=0.2
    )  # 2 and 1 / 2, on a log axis


def test_ladder_shows_gains_and_intervals():
    params = {"preset": "tiny", "batch": 2, "context": 8, "dtype": "float32"}
    rows = [
        row("train", params, name, samples, tokens_per_s=rate)
        for name, samples, rate in (
            ("eager", (2, 2, 2), 100.0),
            ("triton", (0.9, 1, 1.2), 200.0),
            ("hf", (4, 4, 4), 50.0),
        )
    ]
    (group,) = tables.groups(small(*rows), "train")
    svg = ElementTree.fromstring(charts.ladder(group, "tokens_per_s", "t"))
    assert {"100", "200  +100%", "50.0"} <= {t.text for t in svg.iter("text")}
    eager, triton, hf = (e for e in svg.iter("rect"))
    assert float(triton.get("width")) == pytest.approx(4 * float(hf.get("width")), abs=0.5)
    assert [e.get("class") for e in (eager, triton, hf)] == ["bar", "bar", "bar other"]
    interval = [e for e in svg.iter("line") if e.get("class") == "error"][1]
    low, high = (float(interval.get(end)) - float(triton.get("x")) for end in ("x1", "x2"))
    per_ms = float(triton.get("width"))  # p50 is 1 ms; p20 and p80 are 0.94 and 1.12 ms
    assert (low, high) == (pytest.approx(per_ms / 1.12, abs=0.5), pytest.approx(per_ms / 0.94, abs=0.5))
    assert charts.ladder(group, "peak_mib", "t") == ""


def test_roofline_contains_its_points(reports):
    found = [g for g in tables.groups(reports[0], "kernels") if g.clock == "graph"]
    svg = ElementTree.fromstring(charts.roofline(found, reports[0], "t"))
    tips = [e.find("title").text for e in svg.iter() if e.find("title") is not None and e.tag != "svg"]
    assert any(tip.startswith("triton, causal_attention") and "60.0 FLOP a byte" in tip for tip in tips)
    shapes = {kind: [e for e in svg.iter() if e.get("class") == kind] for kind in ("mark run0", "mark run1")}
    left = float(shapes["mark run1"][0].get("points").split(",")[0])  # decoding needs more bytes for a product
    assert left < float(shapes["mark run0"][0].get("cx"))
    case = next(g for g in found if g.get("op") == "causal_attention")
    fastest = min((name for name in case.rows if name != "triton"), key=lambda name: case.rows[name].ms())
    assert any(tip.startswith(f"{fastest}, {case.label()}:") for tip in tips)
    without = [g for g in found if g.get("op") == "layer_norm"]
    assert charts.roofline(without, reports[0], "t") == ""  # no product, no roofline


def test_memory_bars_are_proportional():
    made = list(memory_rows(4, measured=True))
    svg = ElementTree.fromstring(charts.memory(made, "t"))
    wide = {e.find("title").text: float(e.get("width")) for e in svg.iter("rect") if e.find("title") is not None}
    assert wide["eager, activations: 11,200 MiB"] == pytest.approx(
        8 * wide["triton, workspace: 960 MiB"] * 35 / 24, rel=0.01
    )
    of_eager = [e for e in svg.iter("rect") if (e.findtext("title") or "").startswith("eager")]
    *parts, peak = [(float(e.get("x")), float(e.get("width"))) for e in of_eager]
    assert all(a + width == pytest.approx(b, abs=0.2) for (a, width), (b, _) in itertools.pairwise(parts))
    long = sum(width for _, width in parts)
    assert peak[0] + peak[1] / 2 - parts[0][0] == pytest.approx(1.03 * long, abs=0.5)
    cards = [t.text for t in svg.iter("text") if t.text.endswith(" GB")]
    assert cards == ["16 GB", "12 GB", "8 GB", "6 GB"]


def test_empty_charts_and_sections_are_omitted():
    empty = report.html([a_report("A CPU", [])])
    assert Page(empty).all("svg") == [] and Page(empty).all("h3") == []
    alone = row("kernels", layer_norm(), "triton", (1.0,))
    assert "<svg" not in report.html([small(alone)]) and "<figure" not in report.html([small(alone)])
    for kind, heading in (("train", "Training"), ("micro", "micro")):
        failed = Row(kind, layer_norm(), "triton", error="RuntimeError: no")
        assert f"### {heading}" not in report.markdown([small(failed)])
    assert "RuntimeError: no" in report.markdown([small(failed)])


def test_hostile_names_stay_text():
    bad = "<script>alert('x')</script>|`*_[a](b)\n<!-- bench kernels -->"
    params = {**layer_norm(), "op": bad, "case": bad}
    rows = [row("kernels", params, name, (ms,) * 3, floor=0.5) for name, ms in (("triton", 1), (bad, 2))]
    rows += [Row("kernels", params, "cce", error=bad), row("micro", {"test": bad}, bad, (1.0,))]
    rows += [row("train", {"preset": bad, "batch": bad}, bad, (1.0,), tokens_per_s=3.0)]
    rows.append(Row("memory", {"preset": bad, "batch": 1}, bad, metrics={"predicted_mib": 5.0, "parameters_mib": 5.0}))
    made = small(*rows)
    made.machine["device"], made.missing, made.dropped = bad, {bad: bad}, [bad]
    page, text = report.html([made]), report.markdown([made])
    assert len(Page(page).all("script")) == 1 and len(charts_of(page)) == 4
    assert "<script" not in text and "<!--" not in text
    assert [len(cells) for cells in table_rows(text, "Missing providers")] == [2, 2]
    assert r"\|\`\*\_\[a\](b) &lt;!--" in text


def test_output_is_deterministic(reports, page, text):
    assert report.html([gpu_report(), cpu_report()]) == page and report.markdown(reports) == text


# --- README and terminal ---------------------------------------------------------------------------------------------


def test_readme_tables_show_the_reports(reports):
    gpu, cpu = reports
    parts = report.readme_tables({"bench/results/gpu.json": gpu, "bench/results/cpu.json": cpu})
    assert list(parts) == [
        "bench kernels", "bench train", "bench generate", "bench memory", "bench quality"
    ]  # fmt: skip
    for kind, part in parts.items():
        assert report.NO_GPU not in part and f"`python -m {kind}`" in part and "(bench/results/cpu.json)" in part
    assert "batch=64" in parts["bench train"] and "batch=16" not in parts["bench train"]
    first = next(line for line in parts["bench kernels"].splitlines() if line.startswith("| causal_attention"))
    assert "| both |" in first and "70.0 %" in first
    only_cpu = report.readme_tables({"bench/results/cpu.json": cpu})
    assert all(part.startswith(report.NO_GPU) and "A CPU, 2 threads" in part for part in only_cpu.values())
    assert set(report.readme_tables({}).values()) == {report.NO_REPORT}


def test_quality_table_has_means_over_seeds(reports):
    text = report.markdown([reports[1]])
    title = next(line for line in text.splitlines() if line.startswith("**tiny Book until_loss=1.8")).strip("*.")
    head, ours, nanogpt = table_rows(text, title)
    assert head == ["provider", "runs", "time, s", "s of steps", "steps", "tokens", "validation loss", "bits per byte"]
    assert ours[:5] == ["ours", "3 of 4", "152 ± 1.00", "150 ± 0", "1,100 ± 100"]
    assert nanogpt[:3] == ["nanogpt", "3 of 3", "172 ± 1.00"] and nanogpt[-1] == "2.5000 ± 0.0000"
    assert "after 3000 steps the validation loss is 1.9, above 1.8" in text and "Training to a loss" in text


def test_readme_changes_only_between_markers():
    before = "a\n<!-- bench train -->\nold\n<!-- /bench train -->\nb\n"
    after = report.update_readme(before, {"bench train": r"| \1 |"})
    assert after == "a\n<!-- bench train -->\n| \\1 |\n<!-- /bench train -->\nb\n"
    assert report.update_readme(after, {"bench train": r"| \1 |"}) == after


@pytest.mark.parametrize("text", ["", "<!-- bench train -->", "<!-- /bench train --> <!-- bench train -->"])
def test_readme_without_marker_is_refused(text):
    with pytest.raises(UserError, match=r"no place for bench train: .*<!-- /bench train -->"):
        report.update_readme(text, {"bench train": "x"})


def test_readme_links_are_relative_to_its_folder(reports, tmp_path, capsys):
    (tmp_path / "results/cpu").mkdir(parents=True)
    reports[1].write(tmp_path / "results/cpu/x.json")
    for readme, link in (("results/README.md", "cpu/x.json"), ("docs/README.md", "../results/cpu/x.json")):
        path = tmp_path / readme
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(f"<!-- bench {kind} -->\n<!-- /bench {kind} -->\n" for kind in report._COMMANDS))
        command.main(["report", str(tmp_path / "results"), "--readme", str(path)])
        assert path.read_text().count(f"[{link}]({link})") == 5


def test_row_is_one_line_on_a_terminal(reports):
    ours = row("kernels", layer_norm(), "triton", (2.0, 2.0, 2.0), "events", gb_per_s=1234, floor=0.8, host_ms=0.04)
    line = report.line(ours)
    assert re.sub(" +", " ", line) == (
        "kernels layer_norm M=4 N=8 float32 forward events triton 2.00 ms (2.00 to 2.00) "
        "1,230 GB/s 80.0 % of floor host 0.0400 ms"
    )
    failed = report.line(Row("kernels", layer_norm(), "cce", "events", error="RuntimeError: no"))
    assert failed.endswith(" cce            RuntimeError: no") and failed.index("cce") == line.index("triton")
    assert all("\n" not in report.line(r) for each in reports for r in each.rows)


def test_working_copies_of_weights_have_a_column():
    """A part that a report in float32 does not have: no column there, and one here."""
    metrics = {"parameters_mib": 475.0, "working_mib": 162.0, "predicted_mib": 637.0}
    row = Row("memory", {"preset": "gpt2", "batch": 1, "context": 1024, "dtype": "bfloat16"}, "triton", metrics=metrics)
    found = Report.start(torch.device("cpu"))
    found.rows = [row]
    (table,) = tables.memory_tables(found)
    assert "working MiB" in table.head and "gradients MiB" not in table.head
    assert 'class="part5"' in charts.memory([row], "memory")
    found.rows = [replace(row, metrics={"parameters_mib": 475.0, "predicted_mib": 475.0})]
    assert "working MiB" not in tables.memory_tables(found)[0].head
