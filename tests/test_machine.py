"""What a machine lacks for the kernels is named, with its remedy."""

import pytest
import torch

from kernels import _backend, _check, _machine
from kernels.__main__ import main

BUS = {
    "nvidia": {"00:1f.0": ("0x8086", "0x060100"), "01:00.0": ("0x10de", "0x030000"), "01:00.1": ("0x10de", "0x040300")},
    "sound of nvidia": {"01:00.1": ("0x10de", "0x040300")},
    "amd": {"03:00.0": ("0x1002", "0x030000")},
}
VERSION = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build\nGCC version:  gcc 12.3.0\n"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine without a GPU that torch can use: machine(bus, driver, cuda) sets what is in it."""

    def build(bus="nvidia", driver=None, cuda="13.0"):
        for name, (vendor, kind) in BUS[bus].items():
            (tmp_path / "pci" / name).mkdir(parents=True)
            (tmp_path / "pci" / name / "vendor").write_text(vendor + "\n")
            (tmp_path / "pci" / name / "class").write_text(kind + "\n")
        if driver:
            (tmp_path / "version").write_text(VERSION.format(driver))
        monkeypatch.setattr(_machine, "PCI", tmp_path / "pci")
        monkeypatch.setattr(_machine, "DRIVER", tmp_path / "version")
        monkeypatch.setattr(_machine.shutil, "which", lambda name: None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return build


@pytest.mark.parametrize(
    ("bus", "driver", "cuda", "expected"),
    [
        ("nvidia", "550.54.15", "13.0", "driver 550.54.15 is too old for CUDA 13.0 of this torch, which needs 580"),
        ("nvidia", "580.95.05", "13.0", "does not start on driver 580.95.05: see what nvidia-smi says"),
        ("nvidia", "550.54.15", "12.6", "does not start on driver 550.54.15"),
        ("nvidia", None, "13.0", "no NVIDIA driver is loaded"),
        ("nvidia", "580.95.05", None, "is built without CUDA: pip install"),
        ("sound of nvidia", "550.54.15", "13.0", "is too old"),  # a GPU that the bus does not show
        ("sound of nvidia", None, "13.0", None),
        ("amd", None, "13.0", None),
        ("amd", None, None, None),
    ],
)
def test_gpu_that_torch_cannot_use(machine, bus, driver, cuda, expected):
    machine(bus, driver, cuda)
    problem = _machine.gpu_problem()
    assert problem is None if expected is None else expected in problem
    lines = "\n".join(_check.describe())
    assert (f"an NVIDIA GPU is here, but {problem}" in lines) == (expected is not None)


def test_gpu_that_the_user_hides_is_not_missed(machine, monkeypatch):
    machine("nvidia")
    for value, missed in (("", False), ("-1", False), ("0", True)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        assert (_machine.gpu_problem() is not None) == missed


def test_driver_of_windows_is_asked_under_wsl(machine, monkeypatch, tmp_path):
    machine("amd")
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\necho 551.23\n")
    command.chmod(0o755)
    monkeypatch.setattr(_machine.shutil, "which", lambda name: str(command))
    assert _machine.driver_version() == "551.23"
    assert "551.23 is too old" in _machine.gpu_problem()


@pytest.mark.parametrize(("capability", "fits"), [((6, 1), False), ((7, 5), True), ((8, 9), True), ((12, 1), True)])
def test_gpu_that_torch_has_no_code_for(machine, monkeypatch, capability, fits):
    machine("nvidia", "580.95.05")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_90", "sm_90a", "sm_120", "compute_120"])
    problem = _machine.gpu_problem()
    assert problem is None if fits else "capability 6.1 and this torch has code for 7.5 and newer" in problem


@pytest.fixture
def tools(monkeypatch, tmp_path):
    """tools(compilers, header): what is on the path, and whether Python.h is there."""

    def build(*compilers, header=True):
        if header:
            (tmp_path / "Python.h").touch()
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setattr(_machine.shutil, "which", lambda name: name if name in compilers else None)
        monkeypatch.setattr(_machine.sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
        _machine.build_problem.cache_clear()

    yield build
    _machine.build_problem.cache_clear()


def test_compiler_and_headers(tools, monkeypatch):
    for compiler in ("gcc", "clang"):
        tools(compiler)
        assert _machine.build_problem() is None
    tools("gcc-12")
    assert "needs a C compiler: apt install gcc" in _machine.build_problem()
    monkeypatch.setenv("CC", "gcc-12")
    _machine.build_problem.cache_clear()
    assert _machine.build_problem() is None
    tools("gcc")
    monkeypatch.setenv("CC", "icc")
    _machine.build_problem.cache_clear()
    assert "CC=icc is none" in _machine.build_problem()


def test_missing_headers(tools):
    tools("gcc", header=False)
    assert "-dev" in _machine.build_problem() and "Python's C headers" in _machine.build_problem()


def test_without_a_compiler_a_gpu_runs_eagerly(tools, monkeypatch):
    """At once, so that memory is predicted for what will run, and not kernel by kernel."""
    monkeypatch.setattr(_backend, "INTERPRET", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    tools("gcc")
    assert _backend.device_problem("cuda", 0) is None
    tools()
    assert "C compiler" in _backend.device_problem("cuda", 0)


def test_command_says_which_kernels_run(monkeypatch, capsys):
    from kernels import __main__ as command

    answers = {"layer_norm": "layer_norm_fwd needs 300,000 bytes of shared memory and the GPU gives a block 232,448"}
    monkeypatch.setattr(command, "this_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(command, "device_problem", lambda *_: None)
    monkeypatch.setattr(command, "describe", lambda: ["cuda:0"])
    monkeypatch.setattr(command, "kernel_problem", lambda name, dtype, index: answers.get(name))
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "cuda:0" and len(lines) == 1 + len(_check.all_specs())
    assert [line.split()[1] for line in lines[1:]].count("triton") == len(lines) - 2
    assert "layer_norm             eager: layer_norm_fwd needs" in "\n".join(lines)


@pytest.mark.parametrize(("problem", "n_embd"), [(None, 768), ("its driver is too old", 128)])
def test_default_preset_is_that_of_the_device_in_use(monkeypatch, problem, n_embd):
    from model.training import options

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(options, "gpu_problem", lambda: problem)
    assert options.default_config([]).n_embd == n_embd
