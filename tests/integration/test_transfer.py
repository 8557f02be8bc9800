"""Bytes that go to the Hub and come from it are told as they move, over HTTP and by Xet, each once."""

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from conftest import WRITE
from localhub import LocalHub
from publications import publication
from smolquant.checkpoint.download import list_files, snapshot
from smolquant.hub import Hub
from smolquant.publish.commit import publish
from smolquant.publish.target import inspect_target
from smolquant.transfer import bars, following_xet

REPO = "alice/model"
WEIGHTS = os.urandom(3_000_000)


class Shown:
    """What is shown of files on their way."""

    def __init__(self) -> None:
        self.labels: list[tuple[str, int]] = []
        self.told: list[int] = []
        self.advance = self.told.append

    @contextmanager
    def progress(self, label: str, n_bytes: int) -> Iterator["Shown"]:
        self.labels.append((label, n_bytes))
        yield self


def test_weights_are_told_as_they_are_sent_and_as_they_come(
    hub: LocalHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sent = Shown()
    client = Hub(WRITE.value, endpoint=hub.url, progress=sent.progress)
    what = publication(tmp_path, content=WEIGHTS)
    hub.fail_next("PUT", ".*", 503)
    publish(client, inspect_target(client, REPO), what, notify=lambda line: None)
    assert sent.labels[0][0] == "uploading"
    assert len(WEIGHTS) <= sum(sent.told) <= sent.labels[0][1]
    assert len(sent.told) > 10
    assert capsys.readouterr() == ("", "")  # the client's own bars would disturb what is shown

    told: list[int] = []
    commit = list_files(client, REPO, None).commit
    name = "int8/model.safetensors"
    folder = snapshot(client, REPO, commit, [name], doing="reading", bars=bars(told.append))
    assert (folder / name).read_bytes() == WEIGHTS
    assert sum(told) == len(WEIGHTS)


class _Tokens(BaseHTTPRequestHandler):
    """Says that Xet stores what it is sent in a folder, as its own tests do."""

    def do_GET(self) -> None:
        told = {
            "X-Xet-Cas-Url": f"local://{self.server.folder}",  # type: ignore[attr-defined]
            "X-Xet-Access-Token": "token",
            "X-Xet-Token-Expiration": str(2**33),
        }
        body = json.dumps(
            {"casUrl": told["X-Xet-Cas-Url"], "accessToken": "token", "exp": 2**33}
        ).encode()
        self.send_response(200)
        for name, value in {**told, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Nothing."""


def test_what_xet_sends_is_told_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With Xet itself, called as the client calls it where it is not told to do without."""
    from huggingface_hub import CommitOperationAdd, _commit_api

    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    file = tmp_path / "model.safetensors"
    file.write_bytes(WEIGHTS)
    told: list[int] = []
    with ThreadingHTTPServer(("127.0.0.1", 0), _Tokens) as server:
        server.folder = tmp_path / "store"  # type: ignore[attr-defined]
        server.folder.mkdir()  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with following_xet(told.append):
            _commit_api._upload_xet_files(
                additions=[CommitOperationAdd("int8/model.safetensors", str(file))],
                repo_type="model",
                repo_id=REPO,
                headers={"authorization": "Bearer token"},
                endpoint=f"http://127.0.0.1:{server.server_port}",
                revision="main",
            )
        server.shutdown()
    assert sum(told) == len(WEIGHTS)
