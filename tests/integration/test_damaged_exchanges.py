"""Reading and publishing through a proxy that damages one exchange with the Hub after the other.

Whatever happens to any of the requests, what was asked for is done right, or a refusal says why; a
repository is as it was or complete; and the same again, undisturbed, completes it.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save

import faulty_proxy
from faulty_proxy import Fault, FaultyProxy
from localhub import LocalHub, Token
from publications import publication
from smolquant.checkpoint.repository import HubSource
from smolquant.errors import SmolquantError
from smolquant.hub import Hub
from smolquant.publish.commit import publish
from smolquant.publish.operations import COMMIT_TITLE, Publication
from smolquant.publish.target import inspect_target

MODEL, WRITE = "alice/model", "hf_write"
OWNERS = b"---\nlicense: mit\n---\n# Mine\n\nWhat I have written.\n"
WEIGHTS = {"model.embed_tokens.weight": torch.arange(4096.0), "norm": torch.ones(8)}

FAULTS: dict[str, Fault] = {
    "late": faulty_proxy.delay(0.05),
    "HTTP 500": faulty_proxy.status(500),
    "HTTP 404": faulty_proxy.status(404),
    "unheard": faulty_proxy.unheard,
    "answer lost": faulty_proxy.lost,
    "cut in the head": faulty_proxy.cut_head,
    "cut in the body": faulty_proxy.cut_body,
    "longer length": faulty_proxy.too_long,
    "shorter length": faulty_proxy.too_short,
    "a flipped bit": faulty_proxy.flipped,
}

each_fault = pytest.mark.parametrize("fault", FAULTS.values(), ids=list(FAULTS))


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))  # between tries
    with LocalHub(tmp_path / "hub", [Token(WRITE, "alice")]) as hub:
        hub.create_repo(MODEL)
        files = {"config.json": b'{"model_type": "llama"}', "model.safetensors": save(WEIGHTS)}
        hub.commit(MODEL, files)
        yield hub


@pytest.fixture
def proxy(server: LocalHub) -> Iterator[FaultyProxy]:
    with FaultyProxy([server.url, server.storage_url]) as running:
        yield running


def client(proxy: FaultyProxy, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A client whose cache is empty."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return Hub(WRITE, endpoint=proxy.url)


def requests_of(proxy: FaultyProxy, work: Callable[[], object]) -> int:
    """How many requests the work takes that nothing disturbs."""
    before = len(proxy.requests)
    work()
    return len(proxy.requests) - before


def is_refusal(error: SmolquantError, codes: set[int]) -> bool:
    return error.exit_code in codes and bool(error.hint) and "\n" not in str(error)


def read_model(hub: Hub, *, streamed: bool) -> dict[str, torch.Tensor]:
    source = HubSource(hub, MODEL, None)
    assert source.identity
    with source.checkpoint(streamed=streamed) as checkpoint:
        read = {
            name: checkpoint.read_rows(tensor, 0, tensor.rows)
            for name, tensor in checkpoint.layout.tensors.items()
        }
        checkpoint.verify()
    source.require_unchanged()
    return read


@pytest.mark.fault(
    "hub",
    "While a model is read, any exchange is late, refused, cut, lost, of a wrong length, or flips a bit",
    "The model is read to the bit, or exit 3 or 5 says why.",
)
@each_fault
@pytest.mark.parametrize("streamed", [False, True], ids=["fetched", "streamed"])
def test_a_model_is_read_to_the_bit_or_refused(
    proxy: FaultyProxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: Fault,
    streamed: bool,
) -> None:
    def read(cache: str) -> dict[str, torch.Tensor]:
        return read_model(client(proxy, tmp_path / cache, monkeypatch), streamed=streamed)

    for number in range(requests_of(proxy, lambda: read("undisturbed"))):
        proxy.strike(fault, number)
        try:
            tensors = read(f"cache {number}")
        except SmolquantError as error:
            assert is_refusal(error, {3, 5}), (proxy.requests, error)
            continue
        assert tensors.keys() == WEIGHTS.keys(), proxy.requests
        assert all(torch.equal(tensors[name], WEIGHTS[name]) for name in WEIGHTS), proxy.requests


@pytest.mark.fault(
    "hub",
    "While variants are published, any exchange is late, refused, cut, lost or of a wrong length",
    "Done, or exit 5 says why; the repository is as before or complete, and a second run completes it.",
)
@each_fault
def test_a_repository_is_as_before_or_complete(
    server: LocalHub,
    proxy: FaultyProxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: Fault,
) -> None:
    what = publication(tmp_path / "made", "int8")

    def release(repo: str) -> str:
        hub = client(proxy, tmp_path / f"cache of {repo}", monkeypatch)
        return publish(hub, inspect_target(hub, repo), what, notify=lambda line: None).commit_sha

    def create(repo: str) -> str:
        server.create_repo(repo)
        server.commit(repo, {"README.md": OWNERS})
        return repo

    count = requests_of(proxy, lambda: release(create("alice/undisturbed")))
    assert count > 5
    for number in range(count):
        repo = create(f"alice/r{number}")
        before = server.repo(repo).head
        proxy.strike(fault, number)
        try:
            sha = release(repo)
            assert sha == server.repo(repo).head, proxy.requests[-count:]
        except SmolquantError as error:
            assert is_refusal(error, {5}), (proxy.requests[-count:], error)
        proxy.calm()
        if server.repo(repo).head != before:
            assert_complete(server, repo, what)
        release(repo)
        assert_complete(server, repo, what)


def assert_complete(server: LocalHub, repo: str, what: Publication) -> None:
    """The owner's text is there, and every file of the variant, made in one commit."""
    card = server.read(repo, "README.md")
    assert b"What I have written." in card
    assert b"[int8](int8/README.md)" in card
    for variant, folder in what.variants.items():
        for name in what.records[variant].files:
            assert server.read(repo, f"{variant}/{name}") == (folder / name).read_bytes()
    titles = [commit.title for commit in server.repo(repo).commits]
    assert titles.count(COMMIT_TITLE) == 1
