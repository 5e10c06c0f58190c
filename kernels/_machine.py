"""What this machine has for the kernels: GPU, driver, versions, a C compiler; and what is missing, with its remedy."""

import functools
import os
import platform
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch

from ._triton import HAS_TRITON, INTERPRET, triton

# The first drivers that run each major version of CUDA: CUDA Toolkit release notes, "CUDA minor version compatibility".
MIN_DRIVER = {12: 525, 13: 580}
NVIDIA = "0x10de"  # PCI vendor
PCI = Path("/sys/bus/pci/devices")
DRIVER = Path("/proc/driver/nvidia/version")


def this_device() -> torch.device:
    """The device that is checked: a GPU where there is one that torch can use."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def driver_version() -> str | None:
    """The version of NVIDIA's driver, such as "580.95.05", or None where there is none."""
    try:
        text = DRIVER.read_text()
    except OSError:  # under WSL the driver is that of Windows
        if (command := shutil.which("nvidia-smi")) is None:
            return None
        query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
        text = subprocess.run(query, capture_output=True, text=True).stdout
    version = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", text)
    return version[0] if version else None


def nvidia_smi(device: torch.device, query: str) -> str:
    """What nvidia-smi answers for a CUDA device, such as "90.05, 1980"; "" where it cannot run."""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)  # nvidia-smi may number devices differently
    chosen = f"--id=GPU-{uuid}" if uuid else f"--id={device.index or 0}"
    command = ("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits", chosen)
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def gpu_state(device: torch.device) -> dict[str, float]:
    """Clocks, power and temperature of a CUDA device now, as far as the card says."""
    names = ("sm_mhz", "memory_mhz", "watts", "celsius")
    values = nvidia_smi(device, "clocks.sm,clocks.mem,power.draw,temperature.gpu").split(",")
    pairs = zip(names, values, strict=False)
    return {name: float(v) for name, v in pairs if re.fullmatch(r"\s*[\d.]+", v)}  # "[N/A]" where a card does not say


def _has_nvidia_gpu() -> bool:
    """Whether one is on the PCI bus, with or without a driver."""

    def read(device: Path, name: str) -> str:
        try:
            return (device / name).read_text().strip()
        except OSError:
            return ""

    displays = (device for device in PCI.glob("*") if read(device, "class").startswith("0x03"))
    return any(read(device, "vendor") == NVIDIA for device in displays) or driver_version() is not None


def gpu_problem() -> str | None:
    """Why torch cannot use this machine's NVIDIA GPU, and what helps; None where it can, or where there is none.

    A GPU that CUDA_VISIBLE_DEVICES hides is not missed.
    """
    if torch.version.hip is not None:
        return None
    if torch.cuda.is_available():
        return _too_old()
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1") or not _has_nvidia_gpu():
        return None
    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is built without CUDA: pip install --force-reinstall torch, from PyPI's index"
        )
    driver = driver_version()
    if driver is None:
        return "no NVIDIA driver is loaded: install one, or start a container with --gpus all"
    needed = MIN_DRIVER.get(int(torch.version.cuda.split(".")[0]))
    if needed is not None and int(driver.split(".")[0]) < needed:
        return (
            f"driver {driver} is too old for CUDA {torch.version.cuda} of this torch, which needs {needed}: update the "
            "driver, or choose a torch for an older CUDA on pytorch.org/get-started"
        )
    return f"torch for CUDA {torch.version.cuda} does not start on driver {driver}: see what nvidia-smi says"


def _too_old() -> str | None:
    """Of the GPU that torch would use: whether this torch has code for it."""
    capability = torch.cuda.get_device_capability()
    known = [int(name.split("_")[1].rstrip("af")) for name in torch.cuda.get_arch_list()]
    if not known or capability[0] * 10 + capability[1] >= min(known):
        return None
    return (
        "the GPU has compute capability {}.{} and this torch has code for {:.1f} and newer: "
        "choose a torch for an older CUDA on pytorch.org/get-started".format(*capability, min(known) / 10)
    )


@functools.cache
def build_problem() -> str | None:
    """Why Triton could not build the small C file that launches its kernels, once per machine; None where it can."""
    if not HAS_TRITON or triton.knobs.build.impl is not None:
        return None
    own = os.environ.get("CC")  # Triton takes it without a look at others
    if not any(map(shutil.which, ("gcc", "clang") if own is None else (own,))):
        wrong = "" if own is None else f", and CC={own} is none"
        return f"Triton needs a C compiler{wrong}: apt install gcc, or name one in CC"
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # as Triton does, for Debian
    if not (Path(sysconfig.get_paths(scheme)["include"]) / "Python.h").exists():
        version = ".".join(platform.python_version_tuple()[:2])
        return f"Triton needs Python's C headers: apt install python{version}-dev"
    return None


def describe(problem: str | None) -> Iterator[str]:
    """A few lines: device, versions, the backend that "auto" picks, and why. problem: of Triton on the device."""
    python = f"python {platform.python_version()} on {platform.system()} {platform.machine()}"
    yield f"{python}, torch {torch.__version__}, {f'triton {triton.__version__}' if HAS_TRITON else 'no triton'}"
    if this_device().type == "cuda":
        for i in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(i)
            yield (
                f"cuda:{i} {gpu.name}, compute capability {gpu.major}.{gpu.minor}, "
                f"{gpu.multi_processor_count} multiprocessors, {gpu.total_memory / 2**20:,.0f} MiB"
            )
        yield f"driver {driver_version() or 'unknown'}, CUDA {torch.version.cuda}"
    else:
        problem = "there is no CUDA device"
        yield f"no CUDA device; CPU with {torch.get_num_threads()} threads"
    if missing := gpu_problem():
        yield f"an NVIDIA GPU is here, but {missing}"
    if this_device().type == "cuda" and (missing := build_problem()):
        yield missing
    if INTERPRET:
        yield "TRITON_INTERPRET=1: the kernels are interpreted, one program after the other, by NumPy"
    yield "backend auto picks: " + (f"eager, because {problem}" if problem else "triton")
