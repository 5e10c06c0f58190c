"""Launch tables: the options that a kernel is launched with, by GPU, dtype and widths.

A kernel's file declares default options and the values that each may take. `python -m kernels tune` measures them and
writes one JSON file per GPU, which `choose` reads:

    $KERNELS_TABLES or $XDG_CACHE_HOME/gpt2-kernels or ~/.cache/gpt2-kernels, GPU.json        the user's own
    kernels/tuned/GPU.json                                                                    the committed ones

The first that has an entry counts, else the default. An entry counts where everything is equal: name, compute
capability and multiprocessors of the GPU, the version of Triton, the source and the default of the kernel, its key.
"""

import contextlib
import functools
import hashlib
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ._dispatch import warn_once
from ._launch import table_device
from ._registry import all_specs
from ._triton import tl, triton

Options = dict[str, int]  # BLOCK_M, num_warps, num_stages, ...: tl.constexpr arguments, options of a launch, grid sizes
Space = Mapping[str, Sequence[int]]  # the values that each option may take; an option without an entry is fixed

SCHEMA = 1
COMMITTED = Path(__file__).parent / "tuned"
COMMAND = "python -m kernels tune"


@dataclass(frozen=True)
class Gpu:
    """What must be equal for a table to hold. arch: compute capability, 90 for 9.0; sms: multiprocessors."""

    name: str
    arch: int
    sms: int
    triton: str


@dataclass(frozen=True)
class Choice:
    """One call of `choose`."""

    kernel: str
    default: Options
    space: Space
    key: dict[str, Any]

    @property
    def id(self) -> str:
        return entry_id(self.kernel, plain_key(self.key))


@dataclass(frozen=True)
class Table:
    """A file of launch tables. entries: by `entry_id`, as kernels/_tune.py writes them."""

    path: str
    gpu: Gpu
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)


_override: Callable[[Choice], Options] | None = None
_loaded: dict[torch.device, list[Table]] = {}
_chosen: dict[tuple[Any, ...], Options | None] = {}  # by kernel, device and key; None for the default


def choose(kernel: str, default: Options, space: Space, device: torch.device, **key: Any) -> Options:
    """The options of a kernel under a key: what was measured on this GPU, or else the default.

    kernel: the name of the @triton.jit function without its dressing (attention_fwd). default, space: declared next to
    each other in the kernel's file; a launch may turn some options into its grid. key: dtype and widths, never the
    batch or the length of a sequence, so that a table chosen once holds for all of them.
    """
    if _override is not None:
        return dict(_override(Choice(kernel, default, space, key)))
    where = table_device(device)
    if where is None:
        return default
    index = (kernel, where, *key.values())
    if index not in _chosen:
        _chosen[index] = _look_up(Choice(kernel, default, space, key), where)
    options = _chosen[index]
    return default if options is None else dict(options)  # a copy: a launch may take options out of it


@contextlib.contextmanager
def overriding(override: Callable[[Choice], Options]) -> Iterator[None]:
    """Inside the block `choose` returns what this function does, on every device."""
    global _override
    previous, _override = _override, override
    try:
        yield
    finally:
        _override = previous


@contextlib.contextmanager
def surveying() -> Iterator[list[Choice]]:
    """Inside the block `choose` gives defaults, and writes down what it was asked."""
    choices: list[Choice] = []
    with overriding(lambda choice: choices.append(choice) or choice.default):  # type: ignore[func-returns-value]
        yield choices


@contextlib.contextmanager
def untuned() -> Iterator[None]:
    """Inside the block, or the function that it decorates, every launch has its default options."""
    with overriding(lambda choice: choice.default):
        yield


def _look_up(choice: Choice, device: torch.device) -> Options | None:
    for table in tables(device):
        if (entry := table.entries.get(choice.id)) is not None:
            if (problem := _stale(entry, choice)) is None:
                return entry["chosen"]
            warn_once(f"{choice.kernel} runs by its default launch options: {problem} since {table.path}: {COMMAND}")
    return None


def _stale(entry: Mapping[str, Any], choice: Choice) -> str | None:
    """What has changed since an entry was measured; None where it still counts."""
    if entry["source"] != source_hash(choice.kernel):
        return "its source has changed"
    if entry["default"] != choice.default:
        return "its default has changed"
    chosen, space = entry["chosen"], choice.space
    allowed = {name: (value, *space.get(name, ())) for name, value in choice.default.items()}
    if chosen.keys() != allowed.keys() or any(value not in allowed[name] for name, value in chosen.items()):
        return "the values that its options may take have changed"
    return None


def plain_key(key: Mapping[str, Any]) -> dict[str, Any]:
    """A key as JSON has it: dtypes by name."""
    return {k: str(v).removeprefix("torch.") if isinstance(v, torch.dtype) else v for k, v in key.items()}


def entry_id(kernel: str, key: Mapping[str, Any]) -> str:
    """What an entry is found by. key: plain."""
    return f"{kernel} {json.dumps(key, sort_keys=True)}"


@functools.cache
def source_hash(kernel: str) -> str:
    """SHA-256 of a kernel's source, of the @triton.jit functions that it calls, and of the constants they name.

    Of all kernel files of this package for a choice that is not a kernel's own, such as a number of rows.
    """
    modules = [vars(sys.modules[spec.fn.__module__]) for spec in all_specs().values()]
    named = (f"_{kernel}_kernel", f"{kernel}_kernel")
    found = [names[name] for names in modules for name in named if name in names]
    if found:
        parts = list(dict.fromkeys(_sources(found[0], set())))
    else:
        parts = [file.read_text() for file in sorted(Path(__file__).parent.glob("[!_]*.py"))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _sources(function: Any, seen: set[int]) -> Iterator[str]:
    """function: of @triton.jit, compiled or interpreted; its line in the file does not count, unlike in Triton."""
    function = getattr(function, "fn", function)
    if id(function) in seen:
        return
    seen.add(id(function))
    yield inspect.getsource(function)
    for name in function.__code__.co_names:
        value = function.__globals__.get(name)
        if inspect.isfunction(getattr(value, "fn", None)):
            yield from _sources(value, seen)
        elif isinstance(value, int | float | str) or type(value) is getattr(tl, "constexpr", None):
            yield f"{name} = {value!r}"


# --- files -----------------------------------------------------------------------------------------------------------


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    p = torch.cuda.get_device_properties(device)
    return Gpu(p.name, 10 * p.major + p.minor, p.multi_processor_count, str(triton.__version__))


def _file_name(gpu: Gpu) -> str:
    return re.sub(r"[^a-z0-9]+", "-", gpu.name.lower()).strip("-") + ".json"


def user_file(gpu: Gpu) -> Path:
    """Where the user's own table of a GPU lies."""
    own, cache = os.environ.get("KERNELS_TABLES"), os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(own or Path(cache) / "gpt2-kernels").expanduser() / _file_name(gpu)


def read(path: Path, gpu: Gpu) -> Table | None:
    """The table in a file; None where there is none. ValueError for one that is damaged, or made for something else."""
    try:
        data = json.loads(path.read_bytes())
        if data["schema"] != SCHEMA:
            raise ValueError(f"{path} has schema {data['schema']}, and this version reads {SCHEMA}")
        made = Gpu(**data["gpu"])
        entries = {entry_id(entry["kernel"], entry["key"]): entry for entry in data["entries"]}
        if not all({"source", "default", "chosen"} <= entry.keys() for entry in entries.values()):
            raise KeyError("entries")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is damaged") from None
    if made != gpu:
        wrong = ", ".join(f"{k} {v}" for k, v in asdict(made).items() if v != asdict(gpu)[k])
        raise ValueError(f"{path} was made for {wrong}")
    return Table(str(path), gpu, entries)


def write(table: Table, **more: Any) -> None:
    """Write a table atomically, a line per entry. more: what else the file says. OSError as it comes."""
    path = Path(table.path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"schema": SCHEMA, "gpu": asdict(table.gpu), **more}, indent=1).removesuffix("\n}")
    text += ',\n "entries": [\n' + ",\n".join(map(json.dumps, table.entries.values())) + "\n]\n}\n"
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# --- what is in force ------------------------------------------------------------------------------------------------


def _cuda(device: torch.device) -> torch.device:
    """As tensors name it, with its number."""
    return device if device.index is not None else torch.device("cuda", torch.cuda.current_device())


def tables(device: torch.device) -> list[Table]:
    """The tables in force on a device, the first one first; none on a CPU. Files are read once."""
    if device.type != "cuda":
        return []
    device = _cuda(device)
    if device not in _loaded:
        gpu, _loaded[device] = gpu_of(device), []
        for path in (user_file(gpu), COMMITTED / _file_name(gpu)):
            try:
                table = read(path, gpu)
            except ValueError as error:
                warn_once(f"kernels run by their default launch options: {error}; measure again: {COMMAND}")
            else:
                _loaded[device] += [] if table is None else [table]
    return _loaded[device]


def use_tables(device: torch.device, given: Sequence[Table] | None = None) -> None:
    """From here on these tables are in force, as far as they are of this GPU; None: those of the files, read anew.

    So that several processes launch alike: `use_tables(device, tables_of_rank_0)`.
    """
    if device.type == "cuda":
        device = _cuda(device)
        _loaded.pop(device, None)
        if given is not None:
            _loaded[device] = [table for table in given if table.gpu == gpu_of(device)]
    _chosen.clear()


def launch_tables(device: torch.device) -> str | None:
    """A hash of the launch options in force on a device, for a report or a log; None: the defaults alone."""
    merged: dict[str, Any] = {}
    for table in tables(device):
        merged = {name: [entry["source"], entry["chosen"]] for name, entry in table.entries.items()} | merged
    return hashlib.sha256(json.dumps(merged, sort_keys=True).encode()).hexdigest()[:12] if merged else None


def describe(device: torch.device) -> Iterator[str]:
    """Which tables are in force on a GPU, and why, line by line."""
    if launch_tables(device) is None:
        yield f"launch tables: untimed defaults, there is none for this GPU: {COMMAND}"
        return
    yield f"launch tables: {launch_tables(device)}"
    for table in tables(device):
        entries = table.entries.values()
        faster = sum(entry["chosen"] != entry["default"] for entry in entries)
        stale = sorted({entry["kernel"] for entry in entries if entry["source"] != source_hash(entry["kernel"])})
        text = f"  {table.path}: {len(entries)} measured, {faster} of them faster than the default"
        yield text + (f"; stale, their source has changed: {', '.join(stale)}: {COMMAND}" if stale else "")
