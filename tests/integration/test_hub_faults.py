"""A Hub that stalls, is busy, loses an answer, answers oddly, or whose bytes do not arrive as they are."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import CommitOperationAdd, constants
from safetensors.torch import save

from localhub import LocalHub, Token
from publications import publication
from smolquant import wire
from smolquant.checkpoint import remote
from smolquant.checkpoint.repository import HubSource
from smolquant.errors import CheckpointError, HubError, InputError, SmolquantError
from smolquant.hub import Hub, hub_errors
from smolquant.publish import attempts
from smolquant.publish.commit import Published, publish, tag_commit
from smolquant.publish.operations import COMMIT_TITLE, Publication
from smolquant.publish.preupload import PreuploadedShards
from smolquant.publish.target import (
    check_readme,
    check_tag,
    check_write_access,
    find_tag,
    inspect_target,
)

REPO, MODEL, WRITE = "alice/tiny", "alice/model", "hf_write"
CARD = b"---\nlicense: mit\n---\n# Tiny\n"
CONFIG = b'{"model_type": "llama", "hidden_size": 16}\n'
WEIGHTS = save({"model.embed_tokens.weight": torch.arange(4096.0)}, {"format": "pt"})
PATIENCE = 0.4
"""Seconds that a client waits whose Hub stalls."""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """A Hub with a repository to publish into, which has a card, and one with a model."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for module in (attempts, wire):
        monkeypatch.setattr(module, "_FIRST_PAUSE", 0.01)
    with LocalHub(tmp_path / "hub", [Token(WRITE, "alice")]) as hub:
        hub.create_repo(REPO)
        hub.commit(REPO, {"README.md": CARD})
        hub.create_repo(MODEL)
        hub.commit(MODEL, {"config.json": CONFIG, "model.safetensors": WEIGHTS})
        yield hub


@pytest.fixture
def hub(server: LocalHub) -> Hub:
    return Hub(WRITE, endpoint=server.url)


@pytest.fixture
def impatient(server: LocalHub) -> Hub:
    return Hub(WRITE, PATIENCE, endpoint=server.url)


def release(hub: Hub, what: Publication) -> Published:
    """All that a run asks of the Hub in order to publish."""
    target = inspect_target(hub, REPO)
    check_write_access(hub, target)
    check_readme(hub, target.readme, "the card")
    check_tag(hub, target, "v1")
    published = publish(hub, target, what, notify=lambda line: None)
    if not what.create_pr:
        tag_commit(hub, REPO, "v1", published.commit_sha)
    return published


def commits(server: LocalHub, revision: str = "main") -> list[str]:
    """The titles of a revision's commits, newest first."""
    repo = server.repo(REPO)
    return [one.title for one in repo.history(repo.resolve(revision).sha)]


def read_model(hub: Hub) -> None:
    """Read a model as a run does, up to the moment when what was made of it may be kept."""
    source = HubSource(hub, MODEL, None)
    assert source.layout().tensors
    with source.checkpoint() as checkpoint:
        (tensor,) = checkpoint.layout.tensors.values()
        checkpoint.read_rows(tensor, 0, tensor.rows)
        checkpoint.verify()
    source.require_unchanged()


EVERY_REQUEST = [
    ("GET", rf"/api/models/{REPO}$"),
    ("GET", rf"/api/models/{REPO}/tree/"),
    ("GET", r"/resolve/.*/README.md$"),
    ("GET", r"/auth-check/write$"),
    ("POST", r"/api/validate-yaml$"),
    ("GET", r"/refs$"),
    ("POST", r"/preupload/"),
    ("POST", r"/objects/batch$"),
    ("PUT", r"^/lfs/"),
    ("POST", r"^/lfs/verify$"),
    ("POST", r"/commit/main$"),
    ("POST", r"/tag/"),
]
"""Of :func:`release`, as method and path."""
names_of_requests = pytest.mark.parametrize(
    ("method", "path"), EVERY_REQUEST, ids=[f"{method} {path}" for method, path in EVERY_REQUEST]
)


# Time


@pytest.mark.fault(
    "hub",
    "Any one request of a publication is never answered",
    "Exit 5 after the time limit; nothing is committed, or only the tag is missing.",
)
@names_of_requests
def test_no_request_waits_for_ever(
    server: LocalHub, impatient: Hub, tmp_path: Path, method: str, path: str
) -> None:
    server.stall_next(method, path, times=99)
    started = time.monotonic()
    with pytest.raises(HubError, match="in time"):
        release(impatient, publication(tmp_path))
    assert time.monotonic() - started < 10 * PATIENCE
    assert len(commits(server)) == (3 if "/tag/" in path else 2)


@pytest.mark.fault(
    "hub",
    "A request stalls once",
    "It is sent again.",
)
def test_a_request_that_stalls_once_is_sent_again(server: LocalHub, impatient: Hub) -> None:
    server.stall_next("GET", rf"/api/models/{REPO}$")
    assert inspect_target(impatient, REPO).readme == CARD.decode()


@pytest.mark.fault(
    "hub",
    "The storage never answers as the weights are streamed",
    "Exit 5 after the time limit.",
)
def test_streaming_does_not_wait_for_ever(server: LocalHub, impatient: Hub) -> None:
    server.stall_next("GET", "^/blobs/", times=99)
    files = remote.RemoteFiles(impatient, MODEL, server.repo(MODEL).head)
    file = files.open("model.safetensors", len(WEIGHTS), "0" * 64)
    with pytest.raises(HubError, match="in time"):
        file.read_into(memoryview(bytearray(10)), 0)
    file.close()
    files.close()


@pytest.mark.fault(
    "hub",
    "The Hub asks for a pause (429)",
    "It is kept and told, and the request is sent again.",
)
@pytest.mark.parametrize("asked", ["1", "-1"])
def test_the_pause_that_the_hub_asks_for_is_kept_and_told(server: LocalHub, asked: str) -> None:
    lines: list[str] = []
    hub = Hub(WRITE, 30, lines.append, server.url)
    server.fail_next("GET", rf"/api/models/{REPO}$", 429, headers={"Retry-After": asked})
    started = time.monotonic()
    assert inspect_target(hub, REPO).exists
    assert (time.monotonic() - started > 1) is (asked == "1")
    assert ["429" in line and " s" in line for line in lines] == [True]


@pytest.mark.fault(
    "hub",
    "The Hub asks for a pause of more than an hour",
    "Exit 5 at once, with the time after which to run again.",
)
def test_a_pause_beyond_the_patience_is_not_waited_for(server: LocalHub, hub: Hub) -> None:
    server.fail_next("GET", rf"/api/models/{REPO}$", 429, times=9, headers={"Retry-After": "4000"})
    with pytest.raises(HubError, match="too many requests.*Run again in 4000 seconds"):
        inspect_target(hub, REPO)
    assert [one.status for one in server.requests].count(429) == 1


@pytest.mark.fault(
    "hub",
    "The storage refuses uploads (503), and asks for a pause of more than an hour",
    "Exit 5 without that pause; nothing is published.",
)
def test_an_upload_is_not_put_off_for_as_long_as_a_server_likes(
    server: LocalHub, hub: Hub, tmp_path: Path
) -> None:
    server.fail_next("PUT", "^/lfs/", 503, times=9, headers={"Retry-After": "4000"})
    with pytest.raises(HubError, match="HTTP 503"):
        release(hub, publication(tmp_path))
    assert len(commits(server)) == 2


# A busy Hub


@pytest.mark.fault(
    "hub",
    "Any one request of a publication is answered with 503",
    "It is sent again; there is one commit, and its tag.",
)
@names_of_requests
def test_one_503_anywhere_is_overcome(
    server: LocalHub, hub: Hub, tmp_path: Path, method: str, path: str
) -> None:
    server.fail_next(method, path, 503)
    published = release(hub, publication(tmp_path))
    assert [one.status for one in server.requests].count(503) == 1
    assert published.commit_sha == server.repo(REPO).head == find_tag(hub, REPO, "v1")
    assert commits(server)[0] == COMMIT_TITLE and len(commits(server)) == 3


@pytest.mark.fault(
    "hub",
    "Requests are answered with 503 while a model is read",
    "They are sent again.",
)
def test_one_503_while_a_model_is_read_is_overcome(server: LocalHub, hub: Hub) -> None:
    for path in (f"{MODEL}$", "/tree/", "/resolve/.*config", "/resolve/.*safetensors", "^/blobs/"):
        server.fail_next("GET", path, 503)
    read_model(hub)
    assert [one.status for one in server.requests].count(503) == 5


@pytest.mark.fault(
    "hub",
    "The commit of shards that were sent early is answered with 503",
    "It is made all the same, and no shard is sent twice.",
)
def test_a_repeated_commit_sends_nothing_again(server: LocalHub, hub: Hub, tmp_path: Path) -> None:
    what = publication(tmp_path)
    uploads = PreuploadedShards(hub, REPO, create_pr=False)
    uploads.send("int8", tmp_path / "int8/model.safetensors")
    server.fail_next("POST", "/commit/main$", 503)
    release(hub, replace(what, preuploaded=uploads.operations))
    assert not (tmp_path / "int8/model.safetensors").exists()
    assert [one.method for one in server.requests].count("PUT") == 1
    assert len(commits(server)) == 3


# A lost answer


LOST: dict[str, dict[str, Any]] = {
    "busy": {"status": 503, "change": lambda body: b"busy"},
    "garbage": {"change": lambda body: b"\0\xff<html>"},
    "of another shape": {"change": lambda body: b"[1, 2]"},
    "without the sha": {"change": lambda body: b'{"success": true}'},
    "with an odd sha": {"change": lambda body: body.replace(b'"commitOid":"', b'"commitOid":"../')},
}


@pytest.mark.fault(
    "hub",
    "The answer to the commit, or to the pull request, is lost or garbage",
    "What was made is found and reported; it is not made twice.",
)
@pytest.mark.parametrize("lost", LOST.values(), ids=list(LOST))
@pytest.mark.parametrize("ahead", [False, True], ids=["at once", "shards sent ahead"])
def test_a_commit_whose_answer_is_lost_is_found_and_not_made_twice(
    server: LocalHub, hub: Hub, tmp_path: Path, lost: dict[str, Any], ahead: bool
) -> None:
    what = publication(tmp_path)
    if ahead:
        uploads = PreuploadedShards(hub, REPO, create_pr=False)
        uploads.send("int8", tmp_path / "int8/model.safetensors")
        what = replace(what, preuploaded=uploads.operations)
    server.alter_next("POST", "/commit/main$", **lost)
    published = release(hub, what)
    assert published.commit_sha == server.repo(REPO).head
    assert published.commit_url.endswith(f"{REPO}/commit/{published.commit_sha}")
    assert published.variant_urls == {"int8": f"{server.url}/{REPO}/tree/main/int8"}
    assert len(commits(server)) == 3


@pytest.mark.fault(
    "meanwhile",
    "The answer to the commit is lost, and others push on it",
    "Ours is found below theirs, and reported.",
)
def test_a_found_commit_is_reported_though_others_have_pushed_on_it(
    server: LocalHub, hub: Hub, tmp_path: Path
) -> None:
    def push_and_lose(body: bytes) -> bytes:
        server.commit(REPO, {"notes.txt": b"of others"})
        return b"lost"

    server.alter_next("POST", "/commit/main$", push_and_lose, status=504)
    published = release(hub, publication(tmp_path))
    ours = server.repo(REPO).history(server.repo(REPO).head)
    assert [one.sha for one in ours][1] == published.commit_sha
    assert len(commits(server)) == 4


@pytest.mark.fault(
    "hub",
    "The answer to the commit, or to the pull request, is lost or garbage",
    "What was made is found and reported; it is not made twice.",
)
def test_a_pull_request_whose_answer_is_lost_is_found(
    server: LocalHub, hub: Hub, tmp_path: Path
) -> None:
    server.alter_next("POST", "/commit/main$", lambda body: b"busy", status=503)
    published = release(hub, publication(tmp_path, create_pr=True))
    assert published.pull_request_url == f"{server.url}/{REPO}/discussions/1"
    assert published.variant_urls == {"int8": f"{server.url}/{REPO}/tree/refs%2Fpr%2F1/int8"}
    assert list(server.repo(REPO).discussions) == [1]
    assert len(commits(server)) == 2 and len(commits(server, "refs/pr/1")) == 3


@pytest.mark.fault(
    "meanwhile",
    "Another run's commit of the same title comes in between",
    "It is not taken for ours, which follows it.",
)
def test_anothers_commit_is_not_taken_for_ours(server: LocalHub, hub: Hub, tmp_path: Path) -> None:
    others = publication(tmp_path / "others", content=b"other weights" * 999)

    def push(repo: object) -> None:
        publish(hub, inspect_target(hub, REPO), others, notify=lambda line: None)

    server.before_commit = push
    published = release(hub, publication(tmp_path))
    assert published.commit_sha == server.repo(REPO).head
    assert commits(server)[:2] == [COMMIT_TITLE] * 2


@pytest.mark.fault(
    "hub",
    "The answer to the commit is lost, and the Hub does not answer any more",
    "Exit 5, and that it is not known whether the variants are published.",
)
def test_where_the_hub_is_gone_after_a_commit_that_is_said(
    server: LocalHub, impatient: Hub, tmp_path: Path
) -> None:
    target = inspect_target(impatient, REPO)
    server.alter_next("POST", "/commit/main$", lambda body: b"busy", status=503)
    server.stall_next("GET", "/commits/", times=99)
    with pytest.raises(HubError, match="not known whether the variants are published"):
        publish(impatient, target, publication(tmp_path), notify=lambda line: None)


# Odd answers


def without(*keys: str) -> Callable[[bytes], bytes]:
    def change(body: bytes) -> bytes:
        answer = json.loads(body)
        for one in answer if isinstance(answer, list) else [answer]:
            for key in keys:
                one.pop(key, None)
        return json.dumps(answer).encode()

    return change


def with_value(key: str, value: object) -> Callable[[bytes], bytes]:
    """The answer, or what is listed in it, with another value for a key."""

    def change(body: bytes) -> bytes:
        answer = json.loads(body)
        rows = answer if isinstance(answer, list) else answer.get("files", [answer])
        for one in rows:
            one[key] = value
        return json.dumps(answer).encode()

    return change


def instead(content: bytes) -> Callable[[bytes], bytes]:
    return lambda body: content


def to_href(href: object) -> Callable[[bytes], bytes]:
    """An LFS batch that sends uploads elsewhere."""

    def change(body: bytes) -> bytes:
        answer = json.loads(body)
        for one in answer["objects"]:
            one["actions"]["upload"]["href"] = href
        return json.dumps(answer).encode()

    return change


_INFO, _TREE = rf"/api/models/{REPO}$", rf"/api/models/{REPO}/tree/"
_PREUPLOAD, _BATCH, _COMMIT = "/preupload/", "/objects/batch$", "/commit/main$"
ODD = {
    "info: garbage": ("GET", _INFO, instead(b"\xff\0<html>")),
    "info: a list": ("GET", _INFO, instead(b"[]")),
    "info: null": ("GET", _INFO, instead(b"null")),
    "info: no sha": ("GET", _INFO, without("sha")),
    "info: an evil sha": ("GET", _INFO, with_value("sha", "../../etc")),
    "info: siblings": ("GET", _INFO, with_value("siblings", [{}])),
    "tree: garbage": ("GET", _TREE, instead(b"{")),
    "tree: a text": ("GET", _TREE, instead(b'"tree"')),
    "tree: numbers": ("GET", _TREE, instead(b"[1]")),
    "tree: no path": ("GET", _TREE, without("path")),
    "tree: no size": ("GET", _TREE, without("size")),
    "tree: no oid": ("GET", _TREE, without("oid")),
    "tree: an odd oid": ("GET", _TREE, with_value("oid", 5)),
    "tree: up": ("GET", _TREE, with_value("path", "../../README.md")),
    "tree: absolute": ("GET", _TREE, with_value("path", "/etc/passwd")),
    "tree: a path of a number": ("GET", _TREE, with_value("path", 5)),
    "tree: odd lfs": ("GET", _TREE, with_value("lfs", {"oid": "x", "size": 1, "pointerSize": 1})),
    "card: odd": ("POST", "/validate-yaml", instead(b"<html>")),
    "card: no reasons": ("POST", "/validate-yaml", instead(b'{"errors": [5]}')),
    "tags: garbage": ("GET", "/refs$", instead(b"null")),
    "preupload: garbage": ("POST", _PREUPLOAD, instead(b"")),
    "preupload: empty": ("POST", _PREUPLOAD, instead(b"{}")),
    "preupload: no files": ("POST", _PREUPLOAD, instead(b'{"files": []}')),
    "preupload: evil paths": ("POST", _PREUPLOAD, with_value("path", "../../x")),
    "preupload: an odd mode": ("POST", _PREUPLOAD, with_value("uploadMode", "carrier pigeon")),
    "preupload: ignored": ("POST", _PREUPLOAD, with_value("shouldIgnore", True)),
    "batch: garbage": ("POST", _BATCH, instead(b"<html>")),
    "batch: empty": ("POST", _BATCH, instead(b"{}")),
    "batch: odd objects": ("POST", _BATCH, instead(b'{"objects": [5]}')),
    "batch: no address": ("POST", _BATCH, to_href(None)),
    "batch: no such scheme": ("POST", _BATCH, to_href("gopher://storage/x")),
    "batch: no address at all": ("POST", _BATCH, to_href("http://[::1")),
    "batch: an empty address": ("POST", _BATCH, to_href("")),
    "commit: nothing made": ("POST", _COMMIT, None),
}


@pytest.mark.fault(
    "hub",
    "An answer while variants are published is garbage, lacks a field, or has an impossible one",
    "Exit 5 in one line; the repository is as before.",
)
@pytest.mark.fault(
    "hub",
    "A listing of the Hub names a path that is absolute, leads out of the repository, or is no path",
    "Exit 5 in one line; the repository is as before.",
)
@pytest.mark.fault(
    "hub",
    "The Hub names no usable address to upload to",
    "Exit 5 in one line; the repository is as before.",
)
@pytest.mark.fault(
    "hub",
    "The Hub says that it has committed, and has not",
    "Exit 5 in one line; the repository is as before.",
)
@pytest.mark.parametrize(("method", "path", "change"), ODD.values(), ids=list(ODD))
def test_an_odd_answer_is_told_in_one_line_and_leaves_the_repository_as_it_was(
    server: LocalHub,
    hub: Hub,
    tmp_path: Path,
    method: str,
    path: str,
    change: Callable[[bytes], bytes] | None,
) -> None:
    if change is None:
        server.fail_next(method, path, 200, times=99)
    else:
        status = 400 if "yaml" in path else None
        server.alter_next(method, path, change, times=99, status=status)
    head = server.repo(REPO).head
    with pytest.raises(SmolquantError) as caught:
        release(hub, publication(tmp_path))
    told = caught.value
    assert told.exit_code == 5, str(told)
    assert "\n" not in str(told) and told.hint and len(str(told)) < 700
    assert server.repo(REPO).head == head


@pytest.mark.fault(
    "hub",
    "The repository's .gitignore would drop a shard",
    "Exit 5, named as that; the shard stays on the disk.",
)
def test_where_a_gitignore_would_drop_a_shard_it_is_not_taken_as_sent(
    server: LocalHub, hub: Hub, tmp_path: Path
) -> None:
    publication(tmp_path)
    shard = tmp_path / "int8/model.safetensors"
    server.alter_next("POST", _PREUPLOAD, with_value("shouldIgnore", True))
    with pytest.raises(HubError, match=r"\.gitignore"):
        PreuploadedShards(hub, REPO, create_pr=False).send("int8", shard)
    assert shard.exists()


# Bytes that do not arrive as they are


def flipped(body: bytes) -> bytes:
    return body[:-5] + bytes([body[-5] ^ 1]) + body[-4:]


DAMAGE = {"flipped": flipped, "shorter": lambda body: body[:-1], "longer": lambda body: body + b" "}
damaged_how = pytest.mark.parametrize("change", DAMAGE.values(), ids=list(DAMAGE))


@pytest.mark.fault(
    "hub",
    "A bit of a small file flips on the way",
    "The file is fetched again.",
)
@pytest.mark.fault(
    "hub",
    "A small file arrives shorter or longer than it is",
    "Exit 5.",
)
@damaged_how
def test_a_small_file_that_arrives_damaged_is_fetched_again(
    server: LocalHub, hub: Hub, change: Callable[[bytes], bytes]
) -> None:
    server.alter_next(
        "GET", "/resolve/.*/config.json", change, times=1 if change is flipped else 99
    )
    if change is flipped:
        assert (HubSource(hub, MODEL, None).folder / "config.json").read_bytes() == CONFIG
        return
    with pytest.raises(HubError, match="config.json|whole"):
        HubSource(hub, MODEL, None)


@pytest.mark.fault(
    "hub",
    "A small file arrives damaged each time",
    "Exit 5 with its name; it is not kept, and the next run fetches it anew.",
)
def test_a_small_file_that_stays_damaged_is_refused_and_not_kept(
    server: LocalHub, hub: Hub, tmp_path: Path
) -> None:
    server.alter_next("GET", "/resolve/.*/config.json", flipped, times=2)
    with pytest.raises(HubError, match=r"config\.json did not arrive as it is on the Hub"):
        HubSource(hub, MODEL, None)
    assert not list((tmp_path / "cache").rglob("config.json"))
    assert (HubSource(hub, MODEL, None).folder / "config.json").read_bytes() == CONFIG


@pytest.mark.fault(
    "hub",
    "The target's README arrives damaged",
    "Exit 5; no card is made from it.",
)
def test_a_card_that_arrives_damaged_is_not_edited(server: LocalHub, hub: Hub) -> None:
    server.alter_next("GET", "/resolve/.*/README.md", flipped, times=99)
    with pytest.raises(HubError, match=r"README\.md did not arrive"):
        inspect_target(hub, REPO)


@pytest.mark.fault(
    "hub",
    "Fetched weights are damaged",
    "Exit 5: their sha256 differs; the next run fetches them anew.",
)
def test_fetched_weights_that_are_damaged_are_not_kept_and_healed_by_the_next_run(
    server: LocalHub, hub: Hub
) -> None:
    header_read = 1
    server.alter_next("GET", "^/blobs/", flipped, skip=header_read)
    with pytest.raises(HubError, match="its sha256 differs"):
        read_model(hub)
    read_model(hub)


@pytest.mark.fault(
    "machine",
    "Fetched weights rot in the cache on the disk",
    "Exit 5: their sha256 differs.",
)
def test_weights_that_rot_in_the_cache_are_found(hub: Hub, tmp_path: Path) -> None:
    require_found_in_cache(flipped(WEIGHTS), hub, tmp_path / "cache")


def require_found_in_cache(damaged: bytes, hub: Hub, cache: Path) -> None:
    read_model(hub)
    (weights,) = cache.rglob("model.safetensors")
    weights.resolve().write_bytes(damaged)
    with pytest.raises(HubError, match="its sha256 differs"):
        read_model(hub)


@pytest.mark.fault(
    "hub",
    "Damaged bytes of the Hub's weights look like a damaged checkpoint",
    "Exit 5; the checkpoint is not blamed.",
)
def test_what_damage_looks_like_is_not_blamed_on_the_checkpoint(hub: Hub, tmp_path: Path) -> None:
    require_found_in_cache(WEIGHTS[:-1], hub, tmp_path / "cache")


@pytest.mark.fault(
    "hub",
    "Damaged bytes of the Hub's weights look like a damaged checkpoint",
    "Exit 5; the checkpoint is not blamed.",
)
def test_what_is_streamed_is_not_blamed_on_the_checkpoint_either(
    server: LocalHub, hub: Hub
) -> None:
    source = HubSource(hub, MODEL, None)
    assert source.layout().tensors
    for damaged, told in ((False, CheckpointError), (True, HubError)):
        if damaged:
            server.alter_next("GET", "^/blobs/", flipped)  # the one chunk
        with pytest.raises(told), source.checkpoint(streamed=True) as checkpoint:
            (tensor,) = checkpoint.layout.tensors.values()
            checkpoint.read_rows(tensor, 0, tensor.rows)
            raise CheckpointError("It holds NaN.")


@pytest.mark.fault(
    "meanwhile",
    "The fetched copy of a model changes while it is read",
    "Exit 5.",
)
def test_a_fetched_copy_that_changes_under_the_run_is_refused(hub: Hub) -> None:
    source = HubSource(hub, MODEL, None)
    (weights,) = source.fetch_weights()
    source.require_unchanged()
    weights.resolve().write_bytes(WEIGHTS)
    with pytest.raises(HubError, match="changed while it was read"):
        source.require_unchanged()


@pytest.mark.fault(
    "hub",
    "A weight file's header arrives as garbage",
    "It is read again; exit 3 where it stays so.",
)
def test_a_header_that_cannot_be_read_is_read_again_before_the_file_is_blamed(
    server: LocalHub, hub: Hub
) -> None:
    garbage = lambda body: b"\xff" * len(body)  # noqa: E731
    server.alter_next("GET", "^/blobs/", garbage)
    assert HubSource(hub, MODEL, None).layout().tensors
    server.alter_next("GET", "^/blobs/", garbage, times=9)
    with pytest.raises(CheckpointError, match="truncated or corrupt"):
        HubSource(hub, MODEL, None).layout()


@pytest.mark.fault(
    "meanwhile",
    "A file of a variant changes before it is sent",
    "Exit 2 with the file; nothing is published.",
)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_that_changes_before_it_is_sent_is_not_published(
    server: LocalHub, hub: Hub, tmp_path: Path, name: str
) -> None:
    what = publication(tmp_path)
    (tmp_path / "int8" / name).write_bytes(b"other content")
    with pytest.raises(InputError, match=f"int8/{name} was changed"):
        release(hub, what)
    assert len(commits(server)) == 2


@pytest.mark.fault(
    "hub",
    "Rows of a streamed file that are read out of order differ from those that its digest was computed of",
    "Exit 5.",
)
@pytest.mark.parametrize("hashed_before", [False, True])
def test_rows_that_are_read_out_of_order_are_those_of_the_file_too(
    server: LocalHub, hub: Hub, monkeypatch: pytest.MonkeyPatch, hashed_before: bool
) -> None:
    monkeypatch.setattr(remote, "CHUNK_BYTES", 5000)

    def read_apart(start: int, size: int) -> None:
        files = remote.RemoteFiles(hub, MODEL, server.repo(MODEL).head)
        with closing(files), closing(files.open(name, len(WEIGHTS), digest)) as file:
            if hashed_before:
                file.verify()
            file.read_into(memoryview(bytearray(size)), start, sequential=False)
            file.verify()

    name, digest = "model.safetensors", hashlib.sha256(WEIGHTS).hexdigest()
    for start in (0, 4900, 4999, 5000, len(WEIGHTS) - 200):
        read_apart(start, 200)
    read_apart(10, 14_000)
    chunks = -(-len(WEIGHTS) // 5000) if hashed_before else 0
    server.alter_next("GET", "^/blobs/", flipped, skip=chunks)
    with pytest.raises(HubError, match="different when it was read again"):
        read_apart(4900, 200)


# Where requests go


@pytest.mark.fault(
    "secret",
    "The Hub keeps large files at another address",
    "The token is not sent there.",
)
def test_large_files_come_and_go_by_another_origin_that_never_sees_the_token(
    server: LocalHub, hub: Hub, tmp_path: Path
) -> None:
    read_model(hub)
    release(hub, publication(tmp_path))
    stored = [one for one in server.requests if one.path.startswith(("/blobs/", "/lfs/"))]
    assert {one.method for one in stored} == {"GET", "PUT", "POST"}
    assert not any(one.authorized for one in stored if one.method != "POST")
    assert all(one.authorized for one in stored if one.method == "POST"), "the Hub's own verify"
    assert all(one.status < 400 for one in stored)


@pytest.mark.fault(
    "secret",
    "An answer of the Hub names another server that is to verify an upload",
    "That server gets no token; exit 5, and nothing is published.",
)
def test_an_answer_does_not_make_the_client_show_its_token_elsewhere(
    server: LocalHub, hub: Hub, tmp_path: Path
) -> None:
    """The client itself sends its token to whatever address is to verify an upload."""
    with LocalHub(tmp_path / "other", [Token(WRITE, "alice")]) as other:

        def elsewhere(body: bytes) -> bytes:
            return body.replace(
                f"{server.url}/lfs/verify".encode(), f"{other.url}/lfs/verify".encode()
            )

        server.alter_next("POST", _BATCH, elsewhere)
        with pytest.raises(HubError):
            release(hub, publication(tmp_path))
        assert [one.path for one in other.requests] == ["/lfs/verify"]
        assert not other.requests[0].authorized
    assert len(commits(server)) == 2


@pytest.mark.fault(
    "hub",
    "A public Hub's answer leads up- or downloads into a private network",
    "Exit 5, named as that.",
)
@pytest.mark.parametrize("where", ["upload", "download"])
def test_a_public_hub_leads_to_no_private_address(
    server: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    port = server.storage_url.rpartition(":")[2]
    public = [ip_address("8.8.8.8")]
    private = [ip_address("10.0.0.7")]
    monkeypatch.setattr(wire, "_addresses", lambda host: public if host == "localhost" else private)
    hub = Hub(WRITE, endpoint=server.url.replace("127.0.0.1", "localhost"))
    if where == "upload":
        change = to_href(f"http://127.0.0.1:{port}/lfs/x")
        server.alter_next("POST", _BATCH, change)
        with pytest.raises(HubError, match="private network"):
            release(hub, publication(tmp_path))
        assert not any(one.method == "PUT" for one in server.requests)
    else:
        monkeypatch.setattr("localhub.storage.Storage.url", lambda *_: f"http://127.0.0.1:{port}/x")
        with pytest.raises(HubError, match="private network"):
            HubSource(hub, MODEL, None).layout()


# Messages


@pytest.mark.fault(
    "hub",
    "The storage refuses an address that may have expired (403)",
    "Exit 5, told as that and not as a matter of rights.",
)
def test_an_address_of_the_storage_that_has_expired_is_no_matter_of_rights(
    server: LocalHub, hub: Hub
) -> None:
    server.fail_next("GET", "^/blobs/", 403, times=9)
    with pytest.raises(HubError, match="does not accept the address.*may have expired") as caught:
        HubSource(hub, MODEL, None).layout()
    assert "token" not in str(caught.value)


@pytest.mark.fault(
    "hub",
    "A file ends before the range that is asked for (416)",
    "Exit 5: it is shorter than the Hub lists it.",
)
@pytest.mark.parametrize("place", ["^/blobs/", "/resolve/"])
def test_a_range_beyond_the_end_is_told_as_that(server: LocalHub, hub: Hub, place: str) -> None:
    server.fail_next("GET", place, 416, times=9)
    with pytest.raises(HubError, match="shorter than the Hub lists it"):
        HubSource(hub, MODEL, None).layout() if "blobs" in place else HubSource(hub, MODEL, None)


@pytest.mark.fault(
    "hub",
    "The storage refuses an address that may have expired (403)",
    "Exit 5, told as that and not as a matter of rights.",
)
def test_a_lost_upload_is_not_taken_for_a_lost_commit(
    server: LocalHub, hub: Hub, tmp_path: Path
) -> None:
    server.fail_next("PUT", "^/lfs/", 403, times=9)
    with pytest.raises(HubError, match="may have expired"):
        release(hub, publication(tmp_path))
    assert not any("/commits/" in one.path for one in server.requests)


def test_operations_of_the_client_are_as_they_are_read(hub: Hub) -> None:
    """That a file is to be ignored is in a private field, which has to be there."""
    addition = CommitOperationAdd("a.txt", b"a")
    with hub_errors(REPO, "asking"):
        hub.api.preupload_lfs_files(REPO, [addition])
    assert addition._should_ignore is False
