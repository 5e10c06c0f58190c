"""Small benchmark reports."""

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
