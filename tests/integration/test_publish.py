"""Publishing with the official client to a Hub on this machine."""

import os

os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # read when huggingface_hub is imported

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants

from localhub import LocalHub, Token
from publications import IDENTITY, make_variant, publication, sha256
from smolquant.checkpoint.download import RemoteFile
from smolquant.checkpoint.folder import FolderSource, LocalFile
from smolquant.errors import HubError, InputError
from smolquant.hub import Hub
from smolquant.publish import attempts
from smolquant.publish.commit import Published, publish, tag_commit
from smolquant.publish.local import write_cards
from smolquant.publish.main_model import MainModel, main_model_change
from smolquant.publish.operations import COMMIT_TITLE, Publication
from smolquant.publish.section import BEGIN
from smolquant.publish.target import (
    Target,
    check_tag,
    check_write_access,
    inspect_target,
)
from smolquant.report import overview

REPO = "alice/tiny"
PICTURE = overview.FILE_NAME
WRITE, READ, OTHER, FINE = "hf_write", "hf_read", "hf_other", "hf_fine"
TOKENS = [
    Token(WRITE, "alice", orgs=["lab"]),
    Token(READ, "alice", role="read"),
    Token(OTHER, "bob"),
    Token(FINE, "alice", role="fineGrained", orgs=["lab"], scope=["alice/other"]),
]
PART = 4096
"""Bytes above which an upload comes in parts: the larger files here take that road."""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(attempts, "_FIRST_PAUSE", 0.01)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    with LocalHub(tmp_path / "hub", TOKENS, multipart_threshold=PART, part_size=PART) as hub:
        yield hub


@pytest.fixture
def hub(server: LocalHub) -> Hub:
    return Hub(token=WRITE, endpoint=server.url)


def write_local(output_dir: Path, what: Publication) -> None:
    write_cards(
        output_dir,
        what.records,
        source_identity=what.source_identity,
        base_model=what.base_model,
        license_entries={},
        tracking_urls={},
    )


def checkpoint(folder: Path, weights: bytes = b"main weights" * 1000) -> Mapping[str, LocalFile]:
    folder.mkdir(parents=True, exist_ok=True)
    contents = {"model.safetensors": weights, "config.json": b"{}\n", "tokenizer.json": b"{}\n"}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return FolderSource(folder).files


def run(hub: Hub, what: Publication, repo: str = REPO) -> Published:
    return publish(hub, inspect_target(hub, repo), what, notify=lambda line: None)


def content(server: LocalHub, path: str, revision: str = "main") -> str:
    return server.read(REPO, path, revision).decode()


def paths(server: LocalHub, under: str = "", revision: str = "main") -> set[str]:
    files = server.repo(REPO).files(revision)
    return {path.removeprefix(under) for path in files if path.startswith(under)}


VARIANT_FILES = {"README.md", "config.json", "model.safetensors", "quantization.json"}


# What is published


def test_a_new_repository_gets_everything_in_one_commit(
    server: LocalHub, hub: Hub, tmp_path: Path
) -> None:
    files = checkpoint(tmp_path / "main")
    lines: list[str] = []
    what = publication(tmp_path, "int8", "int4", main_model=MainModel(files))
    published = publish(hub, inspect_target(hub, REPO), what, notify=lines.append)

    repo = server.repo(REPO)
    assert [commit.title for commit in repo.commits] == [COMMIT_TITLE, "initial commit"]
    assert published.commit_sha == repo.head
    assert published.repo_url == f"{server.url}/{REPO}"
    assert published.commit_url == f"{server.url}/{REPO}/commit/{repo.head}"
    assert published.pull_request_url is None
    assert published.variant_urls == {
        name: f"{server.url}/{REPO}/tree/main/{name}" for name in ("int8", "int4")
    }
    assert not repo.private
    assert paths(server, "int8/") == paths(server, "int4/") == VARIANT_FILES
    assert server.read(REPO, "int8/model.safetensors") == b"weights" * 1000
    assert server.read(REPO, "model.safetensors") == files["model.safetensors"].path.read_bytes()
    assert {"config.json", "tokenizer.json", "README.md"} <= paths(server)
    assert "base_model: alice/tiny" in content(server, "int8/README.md")
    root = content(server, "README.md")
    assert "| main model |" in root
    assert "[int8](int8/README.md)" in root
    assert "[int4](int4/README.md)" in root
    assert any(line.startswith("Creating") for line in lines)
    assert f"]({PICTURE})" in root
    assert "int4" in content(server, PICTURE)


def test_the_picture_is_drawn_again_of_all_variants_that_are_there(
    server: LocalHub, hub: Hub, tmp_path: Path
) -> None:
    run(hub, publication(tmp_path / "first", "int4"))
    first = content(server, PICTURE)
    run(hub, publication(tmp_path / "second", "int8"))
    second = content(server, PICTURE)
    assert first != second
    assert ">int4<" in second
    assert ">int8<" in second
    run(hub, publication(tmp_path / "second", "int8"))
    assert content(server, PICTURE) == second


@pytest.mark.fault(
    "text",
    "A file of the owner's has the name of our picture",
    "It stays, and the card has no picture.",
)
def test_a_picture_of_the_owners_is_not_replaced(
    server: LocalHub, hub: Hub, tmp_path: Path
) -> None:
    server.create_repo(REPO)
    server.commit(REPO, {PICTURE: b"<svg>mine</svg>"})
    run(hub, publication(tmp_path))
    assert content(server, PICTURE) == "<svg>mine</svg>"
    assert PICTURE not in content(server, "README.md")
    own = tmp_path / "own.svg"
    own.write_bytes(b"<svg>mine, too</svg>")
    main = MainModel(checkpoint(tmp_path / "main"), extras={PICTURE: own})
    run(hub, publication(tmp_path, main_model=main), "alice/other")
    assert server.read("alice/other", PICTURE) == own.read_bytes()
    assert PICTURE not in server.read("alice/other", "README.md").decode()


def test_what_was_published_is_read_back(server: LocalHub, hub: Hub, tmp_path: Path) -> None:
    what = publication(tmp_path, "int8", main_model=MainModel(checkpoint(tmp_path / "main")))
    published = run(hub, what)
    target = inspect_target(hub, REPO)
    assert target.exists
    assert target.head == published.commit_sha
    assert target.readme == content(server, "README.md")
    assert target.records == what.records
    assert target.unreadable == ()
    assert target.folders == {"int8": tuple(sorted(VARIANT_FILES))}
    assert target.root_files["model.safetensors"].sha256 == sha256(b"main weights" * 1000)
    assert target.root_files["config.json"].sha256 is None


@pytest.mark.fault(
    "machine",
    "Other files lie in a variant's folder",
    "Only recorded ones are published.",
)
def test_only_recorded_files_are_published(server: LocalHub, hub: Hub, tmp_path: Path) -> None:
    what = publication(tmp_path)
    (tmp_path / "int8" / "model-00009-of-00009.safetensors").write_bytes(b"of an earlier run")
    run(hub, what)
    assert paths(server, "int8/") == VARIANT_FILES


def test_the_owners_readme_and_files_are_kept(server: LocalHub, hub: Hub, tmp_path: Path) -> None:
    server.create_repo(REPO)
    readme = "---\r\nlicense: apache-2.0\r\n---\r\n\r\n# Mine\r\n\r\nText.\r\n"
    server.commit(REPO, {"README.md": readme.encode(), "notes.txt": b"n\n", "int8.txt": b"t\n"})
    run(hub, publication(tmp_path))
    text = server.read(REPO, "README.md").decode()
    assert text.startswith("---\r\nlicense: apache-2.0\r\ntags:\r\n- torchao\r\n- smolquant\r\n---")
    assert "\r\n\r\n# Mine\r\n\r\nText.\r\n" in text
    assert BEGIN in text
    assert {"notes.txt", "int8.txt"} <= paths(server)
    assert "license: apache-2.0" in content(server, "int8/README.md")


def test_other_variants_are_left_alone_and_stay_in_the_card(
    server: LocalHub, hub: Hub, tmp_path: Path
) -> None:
    run(hub, publication(tmp_path / "first", "int4"))
    before = {path: e for path, e in server.repo(REPO).files().items() if path.startswith("int4/")}
    run(hub, publication(tmp_path / "second", "int8"))
    after = {path: e for path, e in server.repo(REPO).files().items() if path.startswith("int4/")}
    assert before == after
    assert len(server.repo(REPO).commits) == 3
    assert "[int4](int4/README.md)" in content(server, "README.md")
    assert "[int8](int8/README.md)" in content(server, "README.md")


def test_stale_files_of_this_runs_variants_go_in_the_same_commit(
    server: LocalHub, hub: Hub, tmp_path: Path
) -> None:
    server.create_repo(REPO)
    stale = ["int8/model-00001-of-00002.safetensors", "int8/old/deep.json", "int8/odd [name].txt"]
    server.commit(REPO, {**dict.fromkeys(stale, b"stale\n"), "int4/keep.txt": b"kept\n"})
    run(hub, publication(tmp_path))
    assert paths(server, "int8/") == VARIANT_FILES
    assert "int4/keep.txt" in paths(server)
    assert len(server.repo(REPO).commits) == 3


def test_publishing_the_same_again_makes_no_commit(
    server: LocalHub, hub: Hub, tmp_path: Path
) -> None:
    what = publication(tmp_path, main_model=MainModel(checkpoint(tmp_path / "main")))
    first = run(hub, what)
    assert run(hub, what).commit_sha == first.commit_sha
    assert len(server.repo(REPO).commits) == 2


def test_a_private_repository(server: LocalHub, hub: Hub, tmp_path: Path) -> None:
    run(hub, publication(tmp_path, private=True))
    assert server.repo(REPO).private
    assert not inspect_target(Hub(token=OTHER, endpoint=server.url), REPO).exists


def test_a_pull_request_leaves_main_as_it_is(server: LocalHub, hub: Hub, tmp_path: Path) -> None:
    server.create_repo(REPO)
    head = server.repo(REPO).head
    published = run(hub, publication(tmp_path, create_pr=True))
    assert server.repo(REPO).head == head
    assert published.pull_request_url == f"{server.url}/{REPO}/discussions/1"
    assert paths(server, "int8/", "refs/pr/1") == VARIANT_FILES
    assert published.variant_urls["int8"] == f"{server.url}/{REPO}/tree/refs%2Fpr%2F1/int8"


def test_variants_of_another_repo_never_bring_its_weights(
    server: LocalHub, hub: Hub, tmp_path: Path
) -> None:
    made = make_variant(tmp_path, repo="bob/base", revision="b" * 40)
    what = Publication(
        variants={"int8": tmp_path / "int8"},
        records={"int8": made},
        source_identity=IDENTITY,
        base_model="bob/base",
        license_entries={"license": "mit"},
    )
    run(hub, what)
    assert not {"model.safetensors", "config.json"} & paths(server)
    root = content(server, "README.md")
    assert "base_model: bob/base" in root
    assert "base_model_relation: quantized" in root
    assert "main model" not in root
    assert "license: mit" in content(server, "int8/README.md")


# The main model


def published_main(server: LocalHub, files: Mapping[str, bytes]) -> None:
    server.create_repo(REPO)
    server.commit(REPO, files)


def test_equal_main_weights_are_left_alone(server: LocalHub, hub: Hub, tmp_path: Path) -> None:
    weights = b"main weights" * 1000
    published_main(server, {"model.safetensors": weights, "config.json": b'{"owner": 1}\n'})
    run(hub, publication(tmp_path, main_model=MainModel(checkpoint(tmp_path / "main", weights))))
    assert content(server, "config.json") == '{"owner": 1}\n'
    assert "tokenizer.json" not in paths(server)


@pytest.mark.fault(
    "hub",
    "The repository holds other main weights",
    "Exit 2 without --replace-main; they stay.",
)
@pytest.mark.parametrize(
    "remote",
    [
        {"model.safetensors": b"other"},
        {"model-00001-of-00001.safetensors": b"x", "model.safetensors.index.json": b"{}"},
        {"pytorch_model.bin": b"main weights" * 1000},
    ],
)
def test_different_main_weights_are_refused_and_nothing_changes(
    server: LocalHub, hub: Hub, tmp_path: Path, remote: dict[str, bytes]
) -> None:
    published_main(server, remote)
    head = server.repo(REPO).head
    what = publication(tmp_path, main_model=MainModel(checkpoint(tmp_path / "main")))
    with pytest.raises(InputError, match="other weights") as caught:
        run(hub, what)
    assert caught.value.exit_code == 2
    assert "--replace-main" in caught.value.hint
    assert server.repo(REPO).head == head


def test_replace_main_deletes_the_old_weights(server: LocalHub, hub: Hub, tmp_path: Path) -> None:
    old = {
        "model-00001-of-00002.safetensors": b"1",
        "model-00002-of-00002.safetensors": b"2",
        "model.safetensors.index.json": b"{}",
        "pytorch_model.bin": b"3",
        "adapter_model.safetensors": b"not the main model's",
    }
    published_main(server, old)
    files = checkpoint(tmp_path / "main")
    run(hub, publication(tmp_path, main_model=MainModel(files, replace=True)))
    assert {path for path in paths(server) if "model" in path and "/" not in path} == {
        "model.safetensors",
        "adapter_model.safetensors",
    }
    assert server.read(REPO, "model.safetensors") == b"main weights" * 1000


@pytest.mark.fault(
    "hub",
    "The repository holds other main weights",
    "Exit 2 without --replace-main; they stay.",
)
def test_weights_that_git_holds_are_compared_too(
    server: LocalHub, hub: Hub, tmp_path: Path
) -> None:
    files = checkpoint(tmp_path / "main", b"small")
    what = publication(tmp_path, main_model=MainModel(files))
    target = inspect_target(hub, REPO)
    git = hashlib.sha1(b"blob 5\0small").hexdigest()
    assert what.main_model is not None
    equal = {"model.safetensors": RemoteFile(5, None, git)}
    assert not main_model_change(what.main_model, equal).add
    with pytest.raises(InputError):
        main_model_change(what.main_model, {"model.safetensors": RemoteFile(5, None, "0" * 40)})
    assert main_model_change(what.main_model, target.root_files).add.keys() == files.keys()


# Others who push at the same time


def push_before_ours(server: LocalHub, files: Mapping[str, bytes]) -> None:
    def push(repo: object) -> None:
        server.commit(REPO, files)

    server.before_commit = push


@pytest.mark.fault(
    "meanwhile",
    "Others push between the decision and the commit",
    "The target is read again, and the commit follows theirs.",
)
def test_a_concurrent_push_is_followed_and_both_are_in_the_card(
    server: LocalHub, hub: Hub, tmp_path: Path
) -> None:
    run(hub, publication(tmp_path / "zero", "int8_dynamic"))
    other = publication(tmp_path / "other", "int4")
    lines: list[str] = []

    def push_other(repo: object) -> None:
        run(hub, other)

    server.before_commit = push_other
    publish(hub, inspect_target(hub, REPO), publication(tmp_path, "int8"), notify=lines.append)
    assert any("meanwhile" in line for line in lines)
    root = content(server, "README.md")
    for variant in ("int8", "int4", "int8_dynamic"):
        assert f"]({variant}/README.md)" in root
        assert f">{variant}<" in content(server, PICTURE), "drawn again after the conflict"
        assert paths(server, f"{variant}/") == VARIANT_FILES
    assert len(server.repo(REPO).commits) == 4


@pytest.mark.fault(
    "meanwhile",
    "The README is edited between the decision and the commit",
    "The edit is kept.",
)
def test_a_readme_edited_meanwhile_is_kept(server: LocalHub, hub: Hub, tmp_path: Path) -> None:
    server.create_repo(REPO)
    push_before_ours(server, {"README.md": b"# Edited\n"})
    run(hub, publication(tmp_path))
    assert "# Edited" in content(server, "README.md")


@pytest.mark.fault(
    "meanwhile",
    "Others push different main weights between the decision and the commit",
    "Exit 2; theirs stay.",
)
def test_different_main_weights_pushed_meanwhile_are_refused(
    server: LocalHub, hub: Hub, tmp_path: Path
) -> None:
    server.create_repo(REPO)
    push_before_ours(server, {"model.safetensors": b"others"})
    with pytest.raises(InputError, match="other weights"):
        run(hub, publication(tmp_path, main_model=MainModel(checkpoint(tmp_path / "main"))))
    assert server.read(REPO, "model.safetensors") == b"others"
    assert paths(server, "int8/") == set()


@pytest.mark.fault(
    "meanwhile",
    "Others push every time",
    "Exit 5 after some attempts.",
)
def test_a_repository_that_never_comes_to_rest_is_given_up(
    server: LocalHub, hub: Hub, tmp_path: Path
) -> None:
    server.create_repo(REPO)
    pushes: list[str] = []

    def push_again(repo: object) -> None:
        pushes.append(server.commit(REPO, {"log.txt": b"%d\n" % len(pushes)}))
        server.before_commit = push_again

    server.before_commit = push_again
    with pytest.raises(HubError, match="kept pushing"):
        run(hub, publication(tmp_path))
    assert len(pushes) == attempts.MAX_TRIES
    assert server.repo(REPO).head == pushes[-1]


@pytest.mark.fault(
    "meanwhile",
    "The repository is created by another job meanwhile",
    "It is used.",
)
def test_a_repository_created_meanwhile_is_used(server: LocalHub, hub: Hub, tmp_path: Path) -> None:
    target = inspect_target(hub, REPO)
    assert not target.exists
    server.create_repo(REPO)
    server.commit(REPO, {"README.md": b"# Theirs\n"})
    publish(hub, target, publication(tmp_path), notify=lambda line: None)
    assert "# Theirs" in content(server, "README.md")


# Failures


@pytest.mark.fault(
    "hub",
    "The Hub refuses a request before the commit",
    "Exit 5; the repository is as before.",
)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/commit/main$"),
        ("POST", "/preupload/"),
        ("POST", "/objects/batch$"),
        ("POST", "/api/validate-yaml$"),
    ],
)
def test_a_failure_before_the_commit_leaves_the_repository_untouched(
    server: LocalHub, hub: Hub, tmp_path: Path, method: str, path: str
) -> None:
    server.create_repo(REPO)
    head = server.repo(REPO).head
    server.fail_next(method, path, 403, times=9)
    with pytest.raises(HubError, match="Publishing to alice/tiny failed") as caught:
        run(hub, publication(tmp_path))
    assert server.repo(REPO).head == head
    assert WRITE not in str(caught.value)


@pytest.mark.fault(
    "hub",
    "The Hub refuses an upload",
    "Exit 5 with its reason; the repository is as before.",
)
def test_a_failure_during_an_upload_tells_the_hubs_reason(
    server: LocalHub, hub: Hub, tmp_path: Path
) -> None:
    server.create_repo(REPO)
    head = server.repo(REPO).head
    server.fail_next("PUT", "", 403, times=9)
    with pytest.raises(HubError, match="Injected failure"):
        run(hub, publication(tmp_path))
    assert server.repo(REPO).head == head


@pytest.mark.fault(
    "hub",
    "The Hub has no Xet, or Xet is out",
    "Exit 5, and that it is Xet.",
)
def test_a_hub_without_xet_is_told_as_such(
    server: LocalHub, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    with pytest.raises(HubError, match="xet-write-token") as caught:
        run(hub, publication(tmp_path))
    assert "HF_HUB_DISABLE_XET=1" in caught.value.hint
    assert WRITE not in str(caught.value)


@pytest.mark.fault(
    "hub",
    "The Hub has no Xet, or Xet is out",
    "Exit 5, and that it is Xet.",
)
def test_an_outage_of_xet_itself_is_told_as_such(
    server: LocalHub, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_storage(*args: object, **kwargs: object) -> None:
        raise RuntimeError("Data processing error: CAS service error")

    monkeypatch.setattr(hub.api, "preupload_lfs_files", no_storage)
    with pytest.raises(HubError, match="CAS service error"):
        run(hub, publication(tmp_path))


@pytest.mark.fault(
    "hub",
    "The commit into a new repository fails",
    "Exit 5; the next run fills it.",
)
def test_a_new_repository_that_could_not_be_filled_is_filled_by_the_next_run(
    server: LocalHub, hub: Hub, tmp_path: Path
) -> None:
    server.fail_next("POST", "/commit/main$", 500, times=attempts.MAX_TRIES)
    with pytest.raises(HubError, match="HTTP 500"):
        run(hub, publication(tmp_path))
    assert len(server.repo(REPO).commits) == 1
    run(hub, publication(tmp_path))
    assert paths(server, "int8/") == VARIANT_FILES


@pytest.mark.fault(
    "text",
    "The Hub refuses the card's front matter",
    "Exit 2 with the entry.",
)
def test_front_matter_that_the_hub_does_not_take_is_bad_input(
    server: LocalHub, hub: Hub, tmp_path: Path
) -> None:
    server.create_repo(REPO)
    server.commit(REPO, {"README.md": b"---\nbase_model: a b c\n---\n"})
    with pytest.raises(InputError, match="base_model"):
        run(hub, publication(tmp_path))


@pytest.mark.fault(
    "text",
    "The README is not UTF-8",
    "Exit 2 where the card is made from it; otherwise it counts as none.",
)
def test_a_readme_that_is_not_text_is_bad_input(server: LocalHub, hub: Hub) -> None:
    server.create_repo(REPO)
    server.commit(REPO, {"README.md": b"\xff\xfe"})
    with pytest.raises(InputError, match="UTF-8"):
        inspect_target(hub, REPO)


@pytest.mark.fault(
    "text",
    "The front matter is broken YAML",
    "Exit 2 with the line, before any work.",
)
def test_front_matter_that_cannot_be_read_is_refused_before_any_work(
    server: LocalHub, hub: Hub
) -> None:
    server.create_repo(REPO)
    server.commit(REPO, {"README.md": b"---\ntags: [a\n---\n"})
    with pytest.raises(InputError, match=r"front matter .*\(line \d\)"):
        inspect_target(hub, REPO)


@pytest.mark.fault(
    "record",
    "A published record cannot be read",
    "A warning; the variant is left alone.",
)
def test_unreadable_records_are_told_and_left_alone(
    server: LocalHub, hub: Hub, tmp_path: Path
) -> None:
    server.create_repo(REPO)
    elsewhere = make_variant(tmp_path / "elsewhere", "int4").to_json().encode()
    server.commit(
        REPO,
        {
            "int4/quantization.json": b"{",
            "copied/quantization.json": elsewhere,
            "binary/quantization.json": b"\xff",
            "notes/text.txt": b"no variant\n",
        },
    )
    target = inspect_target(hub, REPO)
    assert target.records == {}
    assert set(target.unreadable) == {"int4", "copied", "binary"}
    run(hub, publication(tmp_path))
    assert content(server, "int4/quantization.json") == "{"


# Rights


def check(server: LocalHub, token: str | None, repo: str = REPO) -> None:
    hub = Hub(token=token, endpoint=server.url)
    check_write_access(hub, inspect_target(hub, repo))


@pytest.mark.parametrize("repo", [REPO, "lab/tiny"])
@pytest.mark.parametrize("exists", [True, False])
def test_a_token_with_write_rights_passes(server: LocalHub, repo: str, exists: bool) -> None:
    if exists:
        server.create_repo(repo)
    check(server, WRITE, repo)


@pytest.mark.fault(
    "hub",
    "The token may not write",
    "Exit 5, before any work.",
)
@pytest.mark.parametrize(
    ("token", "repo", "exists", "why"),
    [
        (None, REPO, True, "needs a Hugging Face token"),
        (None, REPO, False, "needs a Hugging Face token"),
        (READ, REPO, True, "does not have the rights"),
        (READ, REPO, False, "role read"),
        (OTHER, REPO, True, "does not have the rights"),
        (OTHER, REPO, False, "no member of alice"),
        (WRITE, "nobody/tiny", False, "no member of nobody"),
        (FINE, REPO, True, "does not have the rights"),
        (FINE, "lab/tiny", False, "fine-grained"),
        ("hf_unknown", REPO, True, "does not accept the token"),
        ("hf_unknown", REPO, False, "does not accept the token"),
    ],
)
def test_a_token_without_rights_is_refused_before_any_work(
    server: LocalHub, token: str | None, repo: str, exists: bool, why: str
) -> None:
    if exists:
        server.create_repo(repo)
    with pytest.raises(HubError, match=why) as caught:
        check(server, token, repo)
    assert caught.value.exit_code == 5
    assert caught.value.hint
    if token is not None:
        assert token not in str(caught.value)
    assert not [r for r in server.requests if r.method != "GET"]


def test_a_fine_grained_token_for_a_repository_may_create_it(server: LocalHub) -> None:
    check(server, FINE, "alice/other")


@pytest.mark.fault(
    "hub",
    "The target is another's private repository",
    "Exit 5, before any work.",
)
def test_a_private_repository_of_others_looks_missing_and_is_refused(server: LocalHub) -> None:
    server.create_repo(REPO, private=True)
    with pytest.raises(HubError, match="hidden from this token"):
        check(server, OTHER)


def test_the_token_of_the_environment_is_used(
    server: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", WRITE)
    check(server, None)


@pytest.mark.fault(
    "hub",
    "The target is gated",
    "Exit 5, named as that.",
)
def test_a_gated_repository_is_told_as_such(server: LocalHub) -> None:
    server.create_repo(REPO).gated = "manual"
    server.commit(REPO, {"README.md": b"# Gated\n"})
    with pytest.raises(HubError, match="gated"):
        inspect_target(Hub(token=OTHER, endpoint=server.url), REPO)


# Tags


def test_a_commit_is_tagged_and_may_be_again(server: LocalHub, hub: Hub, tmp_path: Path) -> None:
    published = run(hub, publication(tmp_path))
    for _ in range(2):
        tag_commit(hub, REPO, "v1.0", published.commit_sha)
        assert server.repo(REPO).tags == {"v1.0": published.commit_sha}


@pytest.mark.fault(
    "hub",
    "The tag names another commit already",
    "Exit 2, before any work; it is not moved.",
)
def test_a_tag_that_is_in_the_way_is_refused_before_any_work(server: LocalHub, hub: Hub) -> None:
    check_tag(hub, Target(REPO, exists=False), "v1")
    server.create_repo(REPO)
    target = inspect_target(hub, REPO)
    assert target.head is not None
    check_tag(hub, target, "v1")
    hub.api.create_tag(REPO, tag="v1")
    check_tag(hub, target, "v1", expected=target.head)
    for expected in (None, "0" * 40):
        with pytest.raises(InputError, match="already exists") as caught:
            check_tag(hub, target, "v1", expected=expected)
        assert target.head[:7] in str(caught.value)


@pytest.mark.fault(
    "meanwhile",
    "The tag is given to another commit meanwhile",
    "Exit 5, and that the commit is published; the tag is not moved.",
)
def test_a_tag_given_meanwhile_is_not_moved(server: LocalHub, hub: Hub, tmp_path: Path) -> None:
    server.create_repo(REPO)
    before = server.repo(REPO).head
    hub.api.create_tag(REPO, tag="v1")
    published = run(hub, publication(tmp_path))
    with pytest.raises(HubError, match=r"published .*another commit"):
        tag_commit(hub, REPO, "v1", published.commit_sha)
    assert server.repo(REPO).tags == {"v1": before}


# Without a Hub


def test_saving_locally_writes_the_cards_and_needs_no_hub(tmp_path: Path) -> None:
    write_local(tmp_path, publication(tmp_path, "int4"))
    root = (tmp_path / "README.md").read_text()
    assert re.search(rf'smolquant.load\(\s*"{tmp_path.as_posix()}",\s*variant="int4",?\s*\)', root)
    assert "main model" not in root
    card = (tmp_path / "int4" / "README.md").read_text()
    assert f'folder = "{tmp_path.as_posix()}"\nvariant = "int4"\n' in card
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "int4", PICTURE]
    assert f"]({PICTURE})" in root
    made = json.loads((tmp_path / "int4" / "quantization.json").read_text())
    assert {path.name for path in (tmp_path / "int4").iterdir()} == {
        "README.md", "quantization.json", *made["files"],
    }  # fmt: skip


@pytest.mark.fault(
    "text",
    "A file of the owner's has the name of our picture",
    "It stays, and the card has no picture.",
)
def test_saving_locally_replaces_no_picture_of_the_owners(tmp_path: Path) -> None:
    (tmp_path / PICTURE).write_bytes(b"mine")
    write_local(tmp_path, publication(tmp_path, "int4"))
    assert (tmp_path / PICTURE).read_bytes() == b"mine"
    assert PICTURE not in (tmp_path / "README.md").read_text()
    elsewhere = tmp_path / "elsewhere.svg"
    (tmp_path / PICTURE).unlink()
    (tmp_path / PICTURE).symlink_to(elsewhere)
    write_local(tmp_path, publication(tmp_path, "int4"))
    assert not elsewhere.exists()


@pytest.mark.fault(
    "record",
    "A variant of an earlier run in the output folder is cut off",
    "The card does not show it.",
)
def test_saving_locally_keeps_the_readme_and_shows_earlier_whole_variants(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(b"# Mine\r\n")
    make_variant(tmp_path, "int8_dynamic")
    (tmp_path / "int8_dynamic" / "model.safetensors").write_bytes(b"cut off")
    write_local(tmp_path, publication(tmp_path, "int4"))
    write_local(tmp_path, publication(tmp_path, "int8"))
    text = (tmp_path / "README.md").read_bytes().decode()
    assert "# Mine\r\n" in text
    assert text.count(BEGIN) == 1
    assert "[int4](int4/README.md)" in text
    assert "[int8](int8/README.md)" in text
    assert "[int8\\_dynamic]" not in text
    assert "\n" not in text.replace("\r\n", "")


@pytest.mark.fault(
    "text",
    "The README is not UTF-8",
    "Exit 2 where the card is made from it; otherwise it counts as none.",
)
def test_saving_beside_a_readme_that_is_not_text_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="UTF-8"):
        write_local(tmp_path, publication(tmp_path))


def test_a_relative_folder_is_named_so_that_it_is_not_taken_for_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_local(Path("quantized"), publication(Path("quantized"), "int8"))
    assert 'folder = "./quantized"\n' in Path("quantized/README.md").read_text()


def test_saving_locally_names_the_source_of_the_variants(tmp_path: Path) -> None:
    made = make_variant(tmp_path, repo="bob/base")
    what = replace(publication(tmp_path), records={"int8": made}, base_model="bob/base")
    write_local(tmp_path, what)
    for path in ("README.md", "int8/README.md"):
        assert "base_model: bob/base" in (tmp_path / path).read_text()
