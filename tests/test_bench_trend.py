"""Comparisons for a pull request, github-action-benchmark's JSON, and reports over time."""

import datetime
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from reports import CPU, Page, charts_of, make_report, make_row, refusal

from bench import __main__ as bench_main
from bench import report, trend
from bench.record import CONTROL, Report, Row
from model.cli import UserError

STEADY = [1.00, 1.01, 0.99, 1.02, 0.98, 1.00, 1.01, 0.99, 1.00, 1.00, 1.01, 0.99]
ROOT = Path(__file__).parent.parent


def a_run(factor=1.0, *rows, day=1, commit=None, **machine) -> Report:
    """A report of `day`, of a commit of the same day, with eager's times being `factor` in seconds, and the control."""
    made = make_report(make_row(seconds=[factor * s for s in STEADY]), make_row(CONTROL, STEADY), *rows, **machine)
    made.datetime = f"2026-01-{day:02d}T12:00:00+00:00"
    time = f"2026-01-{day:02d}T09:00:00+02:00"
    made.commit = {"id": commit or f"{day:012d}", "dirty": False, "time": time}
    return made


def write(folder: Path, *reports: Report) -> Path:
    for i, made in enumerate(reports):
        made.write(folder / f"{i}.json")
    return folder


def run(*argv) -> int:
    """The exit code of `python -m bench ARGV`."""
    try:
        bench_main.main([str(arg) for arg in argv])
    except SystemExit as stop:
        return stop.code
    return 0


# --- a pull request --------------------------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path) -> tuple[Path, Path]:
    """Before and after: eager is slower, compile faster, fla needs more memory, liger fails."""
    more = [make_row("compile", STEADY), make_row("fla", STEADY, peak_mib=100.0), make_row("liger", STEADY)]
    now = [make_row("compile", [0.5 * s for s in STEADY]), make_row("fla", STEADY, peak_mib=120.0)]
    failed = Row("kernels", {**make_row().params, "mode": ""}, "liger", error="no | pipe\n<b>")
    write(tmp_path / "a", a_run(1.0, *more))
    write(tmp_path / "b", a_run(1.4, *now, failed, day=2))
    return tmp_path / "a", tmp_path / "b"


def test_comparison_as_markdown(two, capsys):
    assert run("compare", *two, "--format", "markdown") == 1
    out = capsys.readouterr().out
    head, _, title, _, *rest = out.splitlines()
    assert head == "### Benchmarks: 1 slower, 1 fatter, 1 lost, 1 faster" and title.startswith("**Beyond 5% and the")
    table = [line.split(" | ") for line in rest if line.startswith("|")]
    assert [row[0].strip("| ") for row in table[2:]] == ["slower", "fatter", "lost", "faster"]
    assert {len(row) for row in table} == {7}
    assert table[2][1:4] == ["kernels bias_gelu M=8 N=16 float32 forward wall", "eager", "1.400"]
    assert table[2][-2:] == ["1000 ms", "1400 ms |"] and table[3][-2:] == ["100.0 MiB", "120.0 MiB |"]
    assert r"no \| pipe &lt;b&gt; |" in out
    assert "- no change: 1 rows" in out and "000000000002" in out


def test_comparison_as_json(two, capsys):
    assert run("compare", *two, "--format", "json") == 1
    found = json.loads(capsys.readouterr().out)
    changes = {change["provider"]: change for change in found["changes"]}
    assert {name: change["verdict"] for name, change in changes.items()} == {
        "eager": "slower", "compile": "faster", "fla": "same",
    }  # fmt: skip
    assert changes["eager"]["before_ms"] == 1000 and changes["eager"]["ratio"] == pytest.approx(1.4)
    assert changes["fla"]["fatter"] and changes["fla"]["memory_mib"] == [100.0, 120.0]
    assert found["regressed"] and [row["provider"] for row in found["lost"]] == ["liger"]


def test_comparison_without_a_change(two, capsys):
    for form in ("markdown", "json", "text"):
        assert run("compare", two[0], two[0], "--format", form) == 0
    out = capsys.readouterr().out
    assert out.startswith("### Benchmarks: nothing changed beyond the noise\n") and "|" not in out.split("{")[0]


def test_entries_for_github_action_benchmark(tmp_path, capsys):
    write(tmp_path, a_run(1.0, make_row("fla", STEADY, peak_mib=100.04)), a_run(1.2), a_run(1.4))
    assert run("report", tmp_path, "--format", "github-action-benchmark") == 0
    entries = json.loads(capsys.readouterr().out)
    name = "kernels bias_gelu M=8 N=16 float32 forward wall [{}]".format
    assert {e["name"]: (e["value"], e["unit"]) for e in entries} == {
        name("eager"): (1200, "ms"), name("control"): (1000, "ms"), name("fla"): (1000, "ms"),
        f"{name('fla')}, peak memory": (100.0, "MiB"),
    }  # fmt: skip
    assert entries[0]["range"] == "1,190 to 1,210" and "torch" in entries[0]["extra"]
    assert all(set(e) <= {"name", "unit", "value", "range", "extra"} for e in entries)
    with pytest.raises(UserError, match=r"different devices: A, .*; B, "):
        report.action_entries([a_run(device="A"), a_run(device="B")])


# --- over time -------------------------------------------------------------------------------------------------------


def machines(*reports: Report, folder: Path) -> dict:
    return trend.read(write(folder, *reports))


def test_revisions_are_in_the_order_of_their_commits(tmp_path):
    """Not of the measurements: an old commit was measured last. A report without a commit has its own date."""
    old, new = a_run(day=2), a_run(day=5)
    old.datetime = "2026-01-20T00:00:00+00:00"
    bare = a_run(day=4)
    bare.commit, bare.datetime = {"id": None, "dirty": False}, "2026-01-04T00:00:00"  # a naive date is UTC
    changed = a_run(day=2)
    changed.commit = {**old.commit, "dirty": True, "time": "2026-01-02T23:00:00Z"}
    other = a_run(device="B")
    found = machines(new, bare, old, changed, replace(old), other, folder=tmp_path)
    assert list(found) == sorted([new.device, other.device])
    names = [(r.number, r.name, len(r.reports)) for r in found[new.device]]
    expected = [(1, "000000000002", 2), (2, "000000000002+", 1), (3, "2026-01-04T00:00:00", 1), (4, "000000000005", 1)]
    assert names == expected and [r.number for r in found[other.device]] == [1]


def test_regressions_beyond_the_noise_are_named(tmp_path, capsys):
    """Slower by 40 % on the third day; by 4 % a day, which no day shows; noise; a machine apart."""
    creep = [make_row(op="layer_norm", seconds=[1.04**day * s for s in STEADY]) for day in range(5)]
    control = make_row(CONTROL, STEADY, op="layer_norm")
    runs = [a_run(1.4 if day > 2 else 1.0, creep[day - 1], control, day=day) for day in range(1, 6)]
    write(tmp_path / "reports", *runs, a_run(1.0, day=1, device="B"), a_run(1.02, day=2, device="B"))
    assert run("trend", tmp_path / "reports") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("B, ") and lines[0].endswith(": 2 revisions, nothing got worse beyond the noise")
    assert lines[1].endswith(": 5 revisions, 2 rows got worse")
    worse = [re.match(r"  0+(\d) to 0+(\d): kernels (\w+) .* \[eager\] (\S+) x", line).groups() for line in lines[2:-1]]
    assert worse == [("1", "5", "bias_gelu", "1.400"), ("1", "5", "layer_norm", "1.170"),
                     ("2", "3", "bias_gelu", "1.400")]  # fmt: skip
    assert lines[-1] == str(tmp_path / "reports/trend.html")
    assert run("trend", tmp_path / "reports", "--threshold", 50, "--out", tmp_path / "pages/t.html") == 0
    assert "got worse\n" not in capsys.readouterr().out and (tmp_path / "pages/t.html").exists()


def test_group_is_compared_with_the_revision_that_has_it(tmp_path):
    """layer_norm is measured on days 1 and 3, and its time is lost on day 4."""
    rows = [make_row(op="layer_norm", seconds=[f * s for s in STEADY]) for f in (1.0, 2.0)]
    lost = Row("kernels", {"op": "layer_norm", "case": "", "dtype": "float32", "mode": ""}, "eager", error="wrong")
    (found,) = machines(
        a_run(1.0, rows[0]), a_run(1.0, day=2), a_run(1.0, rows[1], day=3), a_run(1.0, lost, day=4), folder=tmp_path
    ).values()
    named = [(c.label, words.split()[0]) for c in trend.compared(found, 0.05) for _, words in c.worse()]
    assert sorted(named) == [("1 to 3", "2.000"), ("1 to 4", "wrong"), ("3 to 4", "wrong")]


def test_page_has_a_chart_for_each_group(tmp_path):
    ln = [make_row(name, STEADY, op="layer_norm") for name in ("eager", "compile")]
    once = make_row(op="cross_entropy", seconds=STEADY)
    found = machines(a_run(1.0, *ln), a_run(2.0, *ln, once, day=2), a_run(1.0, day=3), folder=tmp_path)
    page = trend.html(found)
    Page(page)
    charts = charts_of(page)
    assert [chart.find("title").text for chart in charts] == [
        f"{op} M=8 N=16 float32 forward wall" for op in ("bias_gelu", "layer_norm")
    ]
    assert [len(chart.findall("polyline")) - len(chart.findall("polyline[@class='grid']")) for chart in charts] == [
        2, 4,  # a curve and its key in the legend for each provider
    ]  # fmt: skip
    worse, better = (charts[0].findall(f"polygon[@class='{kind}']/title") for kind in ("loss", "win"))
    assert [t.text for t in worse] == ["eager, revision 2, 000000000002: 2,000 ms, slower, 1 to 2"]
    assert [t.text for t in better] == ["eager, revision 3, 000000000003: 1,000 ms, faster, 2 to 3"]
    labels = [t.text for t in charts[0].findall("text")]
    assert {"1", "2", "3"} <= set(labels) and "1.5" not in labels
    assert "1 group measured in one revision only" in page and "control" not in page.split("<article")[1]
    assert "1 row got worse" in page and not re.search(r"(src|href)=.?https?:", page)
    assert trend.html(found) == page


def test_page_of_one_revision_and_of_hostile_names(tmp_path):
    bad = "<script>alert(1)</script>|"
    found = machines(
        *(a_run(f, make_row(bad, STEADY), day=d, device=bad, commit=str(d) + bad) for d, f in ((1, 1.0), (2, 2.0))),
        a_run(),
        folder=tmp_path,
    )
    page = trend.html(found)
    assert len(Page(page).all("script")) == 1 and len(charts_of(page)) == 1


@pytest.mark.parametrize(
    "argv, words",
    [
        (["trend", "none"], "no such file or folder: none"),
        (["trend", "empty"], "there is no report in empty"),
        (["trend", "dateless"], "has no date that can be read, but 'yesterday'"),
        (["trend", "damaged"], "0.json is not a whole report"),
        (["trend", "good", "--threshold", "0"], "--threshold must be above 0"),
        (["compare", "good", "good", "--format", "xml"], "xml"),
        (["report", "good", "--format", "xml"], "xml"),
    ],
)
def test_bad_input_is_refused_in_one_line(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    dateless = a_run()
    dateless.datetime, dateless.commit = "yesterday", {}
    write(Path("dateless"), dateless)
    write(Path("good"), a_run())
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/0.json").write_text('{"schema": 2,')
    assert words in refusal(argv, capsys)


def test_commit_has_a_date():
    found = Report.start(CPU).commit
    assert found["id"] is None or datetime.datetime.fromisoformat(found["time"]).tzinfo


# --- the example of a workflow ---------------------------------------------------------------------------------------


def test_workflow_runs_commands_that_exist(monkeypatch, tmp_path, capsys):
    yaml = pytest.importorskip("yaml", reason="needs the pyyaml package")
    jobs = yaml.safe_load((ROOT / "bench/github-workflow.yml").read_text())["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert "make test" in commands and all(
        step.keys() & {"run", "uses"} for job in jobs.values() for step in job["steps"]
    )
    monkeypatch.chdir(tmp_path)
    for folder, day in (("base/runs", 1), ("runs/after", 2), ("reports", 3)):
        write(Path(folder), a_run(day=day))
    for command in commands:
        words = shlex.split(command.split(" > ")[0].split(" >> ")[0], comments=True)
        if words[0] == "make":
            assert [w for w in words[1:] if w in targets]
        elif words[0] == ".venv/bin/python":
            assert words[1:3] == ["-m", "bench"]
            assert run(*("reports" if "$REPORTS" in word else word for word in words[3:])) == 0
    assert '>> "$GITHUB_STEP_SUMMARY"' in "\n".join(commands) and "### Benchmarks: " in capsys.readouterr().out
