"""Small benchmark reports, and what their pages are made of."""

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import torch

from bench import __main__ as bench_main
from bench.record import Report, Row

CPU = torch.device("cpu")
PARAMS = {"op": "bias_gelu", "case": "M=8 N=16", "dtype": "float32", "mode": "forward"}


def make_report(*rows: Row, **machine) -> Report:
    found = Report.start(CPU)
    found.machine.update(machine)
    found.rows += rows
    return found


def make_row(provider="eager", seconds=(1.0, 1.0, 1.0), op="bias_gelu", **metrics) -> Row:
    return Row("kernels", {**PARAMS, "op": op}, provider, "wall", tuple(seconds), metrics)


def refusal(argv, capsys):
    """The error message of `python -m bench ARGV`, after checking its form."""
    with pytest.raises(SystemExit) as stop:
        bench_main.main(argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") <= 2, err
    return err


class Page(HTMLParser):
    """Tags with their attributes; fails on tags that are closed out of order."""

    VOID = ("meta", "br", "link", "img", "input", "hr")

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.heads = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "button":
            self.heads.append(self.open[-2])

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def charts_of(page):
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]
