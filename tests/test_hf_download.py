"""Downloads from a server on localhost that answers as huggingface.co does: what is resumed, verified and refused."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import safetensors.torch
import torch
from commands import exit_code
from hf_folders import TOKENIZERS, same, write_run

from model import checkpoint, files, hf

constants = pytest.importorskip("huggingface_hub.constants", reason="needs the huggingface_hub package")
ROOT = Path(__file__).parent.parent
VERSION = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves the files of a folder as the model openai-community/gpt2.

    cut: bytes of model.safetensors after which each connection breaks; 0: never. requests: (method, file,
    Range) of each request for a file. Set `lfs` to the SHA-256 that the server says model.safetensors has.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files = {path.name: path.read_bytes() for path in folder.iterdir()}
        self.files["README.md"] = self.files["onnx/model.safetensors"] = b"not for us"
        self.lfs = files.sha256(folder / "model.safetensors")
        self.cut = 0
        self.requests: list[tuple[str, str, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def listing(self) -> dict:
        siblings = [{"rfilename": name, "size": len(data), "blobId": "0" * 40} for name, data in self.files.items()]
        for sibling in siblings:
            if sibling["rfilename"] == "model.safetensors":
                sibling["lfs"] = {"sha256": self.lfs, "size": sibling["size"], "pointerSize": 100}
        return {"id": "openai-community/gpt2", "sha": VERSION, "siblings": siblings}


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if re.fullmatch("/api/models/openai-community/gpt2(/revision/.*)?", path):
            return self.answer(200, json.dumps(self.server.listing()).encode())
        name = path.removeprefix(f"/openai-community/gpt2/resolve/{VERSION}/")
        if name not in self.server.files:
            return self.answer(404, b"", X_Error_Code="RepoNotFound" if "/api/" in path else "EntryNotFound")
        span = self.headers.get("Range")
        self.server.requests.append((self.command, name, span))
        data = self.server.files[name]
        is_large = name == "model.safetensors"
        headers = {"X_Repo_Commit": VERSION, "ETag": f'"{self.server.lfs if is_large else name}"'}
        if span is None:
            return self.answer(200, data, **headers)
        start = int(re.fullmatch(r"bytes=(\d+)-(\d*)", span)[1])
        headers["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        return self.answer(206, data[start:], **headers)

    do_HEAD = do_GET

    def answer(self, status: int, data: bytes, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.server.cut and len(data) > self.server.cut and "model.safetensors" in self.path:
            data = data[: self.server.cut]
            self.close_connection = True
        with contextlib.suppress(ConnectionError):
            self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    root = tmp_path_factory.mktemp("download")
    model = write_run(root / "run", TOKENIZERS["char"], n_embd=64)
    hf.export(root / "run", root / "hf")
    return model, root / "hf"


@pytest.fixture
def server(exported, tmp_path, monkeypatch):
    """The server, and huggingface_hub as if HF_ENDPOINT and HF_HOME had been set before its import."""
    with Hub(exported[1]) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server
        server.shutdown()


@pytest.fixture
def cli(capsys, tmp_path):
    """Runs the command for tmp_path/run; returns exit code, stdout, stderr."""

    def call(name="gpt2") -> tuple[int, str, str]:
        return exit_code(hf.main, hf.HFConfig, "download", name, tmp_path / "run"), *capsys.readouterr()

    return call


def error(err: str) -> str:
    """The error itself, without the bars of progress before it."""
    return err[err.index("error: ") :]


@pytest.mark.slow
def test_download_through_hf_endpoint(exported, server, tmp_path):
    """The command as a user starts it; a second time nothing is fetched."""
    env = {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
    argv = [sys.executable, "-m", "model.hf", "download", "gpt2", str(tmp_path / "run")]
    done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    size = sum(len(server.files[name]) for name in ("config.json", "model.safetensors", "tokenizer.json"))
    assert f"{server.url}/openai-community/gpt2, version {VERSION}: 3 files, {size / 1000:.1f} kB" in done.stdout
    model, tokenizer = checkpoint.load_model(tmp_path / "run")
    assert same(model, exported[0]) and tokenizer.equals(TOKENIZERS["char"])
    assert {name for _, name, _ in server.requests} == {"config.json", "model.safetensors", "tokenizer.json"}


def test_download_fetches_nothing_twice(server, cli, tmp_path):
    for _ in range(2):
        code, out, _ = cli()
        assert code == 0 and f"complete, in {tmp_path}/cache" in out
        (tmp_path / "run").rename(tmp_path / f"run-{len(list(tmp_path.iterdir()))}")
    got = [name for method, name, _ in server.requests if method == "GET"]
    assert sorted(got) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_download_is_resumed_where_the_connection_broke(exported, server, cli, tmp_path, monkeypatch):
    server.cut = 100_000
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)  # what is written at once, 10 MiB
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    code, _, err = cli()
    assert code == 0, err
    assert same(checkpoint.load_model(tmp_path / "run")[0], exported[0])
    spans = [span for method, name, span in server.requests if (method, name) == ("GET", "model.safetensors")]
    size = len(server.files["model.safetensors"])
    assert size > 400_000 and spans == [None, *(f"bytes={start}-" for start in range(100_000, size, 100_000))]


def test_download_that_is_not_what_the_server_has_is_refused(server, cli, tmp_path):
    data = bytearray(server.files["model.safetensors"])
    data[-1] ^= 1
    server.files["model.safetensors"] = bytes(data)
    code, _, err = cli()
    assert code == 2 and not (tmp_path / "run").exists()
    assert re.match(r"error: \S+/model.safetensors is not what http://\S+ has \(SHA-256\): remove \S+, and", error(err))
    assert Path(re.search(r"remove (\S+),", err)[1]).is_file()


def test_download_of_an_unknown_model(server, cli):
    code, _, err = cli("nobody/nothing")
    assert code == 2 and error(err).endswith(" has no public model nobody/nothing: check its name\n")


def test_download_of_a_repository_without_weights(server, cli):
    server.files = {"README.md": b"empty"}
    code, _, err = cli()
    assert code == 2 and err.startswith("error: openai-community/gpt2 has no weights that can be read: neither model.")


def test_download_takes_old_weights_where_there_are_no_others(exported, server, cli, tmp_path):
    torch.save(safetensors.torch.load(server.files["model.safetensors"]), tmp_path / "weights")
    server.files["pytorch_model.bin"] = (tmp_path / "weights").read_bytes()
    assert cli()[0] == 0
    assert "pytorch_model.bin" not in {name for _, name, _ in server.requests}
    (tmp_path / "run").rename(tmp_path / "new")
    del server.files["model.safetensors"]
    code, out, err = cli()
    assert code == 0 and "3 files" in out, err
    assert same(checkpoint.load_model(tmp_path / "run")[0], exported[0])


def test_download_without_a_network(server, cli, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the port "discard": nobody listens
    code, out, err = cli()
    assert code == 2 and out == "" and err.count("\n") == 2
    assert err.startswith("error: could not download openai-community/gpt2 from http://127.0.0.1:9: ")
    assert err.endswith(f"or copy a folder here: python -m model.hf import FOLDER {tmp_path / 'run'}\n")


def test_download_needs_the_package(cli, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert cli() == (2, "", "error: to download models needs a package: python -m pip install huggingface_hub\n")
