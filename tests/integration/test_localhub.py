"""The local Hub, held against the client that the product uses on the real one."""

import os

os.environ["HF_HUB_DISABLE_XET"] = "1"  # read when huggingface_hub is imported

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    ModelInfo,
    RepoFile,
    RepoFolder,
    get_hf_file_metadata,
    hf_hub_url,
)
from huggingface_hub._oidc import exchange_oidc_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

import localhub
from localhub import LocalHub, Token

ID = "ann/model"
TOKENS = [
    Token("hf_ann", "ann", orgs=["lab"]),
    Token("hf_ann_read", "ann", role="read"),
    Token("hf_ann_fine", "ann", role="fineGrained", orgs=["lab"], scope=["ann/model"]),
    Token("hf_bob", "bob"),
]
PART = 1000  # bytes


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LocalHub]:
    with LocalHub(tmp_path / "hub", TOKENS, multipart_threshold=PART, part_size=PART) as hub:
        yield hub


@pytest.fixture
def api(hub: LocalHub) -> HfApi:
    return HfApi(endpoint=hub.url, token="hf_ann")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Where the client keeps its downloads."""
    return tmp_path / "cache"


def api_of(hub: LocalHub, token: str | bool) -> HfApi:
    return HfApi(endpoint=hub.url, token=token)


def status_of(error: pytest.ExceptionInfo[HfHubHTTPError]) -> int:
    return error.value.response.status_code


def add(path: str, content: bytes = b"x\n") -> CommitOperationAdd:
    return CommitOperationAdd(path, content)


# Repos


def test_a_created_repo_has_an_initial_commit(hub: LocalHub, api: HfApi) -> None:
    url = api.create_repo(ID, private=True)
    assert (url.repo_id, url.repo_type) == (ID, "model")
    info = api.model_info(ID)
    assert info.private is True
    assert info.sha == hub.repo(ID).head
    assert api.list_repo_files(ID) == [".gitattributes"]
    assert [commit.title for commit in api.list_repo_commits(ID)] == ["initial commit"]


def test_creating_twice_is_refused_unless_exist_ok(api: HfApi) -> None:
    api.create_repo(ID)
    with pytest.raises(HfHubHTTPError) as error:
        api.create_repo(ID)
    assert status_of(error) == 409
    assert api.create_repo(ID, exist_ok=True).repo_id == ID


def test_repos_are_created_only_where_the_token_may_write(hub: LocalHub, api: HfApi) -> None:
    assert api.create_repo("lab/model").repo_id == "lab/model"
    refused: list[tuple[str | bool, str, int]] = [
        ("hf_ann", "bob/model", 403),
        ("hf_ann_read", "ann/other", 403),
        ("hf_ann_fine", "ann/other", 403),
        (False, "ann/other", 401),
    ]
    for token, repo_id, status in refused:
        with pytest.raises(HfHubHTTPError) as error:
            api_of(hub, token).create_repo(repo_id)
        assert status_of(error) == status
    assert api_of(hub, "hf_ann_fine").create_repo(ID).repo_id == ID


def test_datasets_and_spaces_live_beside_models(hub: LocalHub, api: HfApi, cache: Path) -> None:
    for kind in ("dataset", "space"):
        api.create_repo(ID, repo_type=kind, space_sdk="static" if kind == "space" else None)
        api.upload_file(
            path_or_fileobj=b"a,b\n", path_in_repo="t/a.csv", repo_id=ID, repo_type=kind
        )
        path = api.hf_hub_download(ID, "t/a.csv", repo_type=kind, cache_dir=cache)
        assert Path(path).read_bytes() == b"a,b\n"
    with pytest.raises(RepositoryNotFoundError):
        api.model_info(ID)


def test_a_deleted_repo_is_gone(hub: LocalHub, api: HfApi) -> None:
    api.create_repo(ID)
    with pytest.raises(HfHubHTTPError) as error:
        api_of(hub, "hf_bob").delete_repo(ID)
    assert status_of(error) == 403
    api.delete_repo(ID)
    with pytest.raises(RepositoryNotFoundError):
        api.model_info(ID)
    with pytest.raises(KeyError):
        hub.repo(ID)


# Upload and download


def test_a_folder_goes_up_in_one_commit_and_comes_back(
    hub: LocalHub, api: HfApi, tmp_path: Path
) -> None:
    weights = bytes(range(256)) * 14  # 3584 bytes: three whole parts and a rest
    files = {
        "config.json": b"{}\n",
        "empty.txt": b"",
        "int8/model.safetensors": weights,
        "int8/small.bin": b"\0" * 10,
    }
    for path, content in files.items():
        (tmp_path / "up" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "up" / path).write_bytes(content)
    api.create_repo(ID)

    done = api.upload_folder(repo_id=ID, folder_path=tmp_path / "up", commit_message="int8")

    assert done.oid == hub.repo(ID).head
    assert len(hub.repo(ID).commits) == 2
    large = {path for path, entry in hub.repo(ID).files().items() if entry.lfs}
    assert large == {"int8/model.safetensors", "int8/small.bin"}
    parts = [r for r in hub.requests if r.method == "PUT" and r.path.rsplit("/", 1)[1].isdigit()]
    assert len(parts) == 4
    down = api.snapshot_download(ID, local_dir=tmp_path / "down")
    for path, content in files.items():
        assert (Path(down) / path).read_bytes() == content == hub.read(ID, path)


def test_what_is_there_is_not_sent_again(hub: LocalHub, api: HfApi) -> None:
    api.create_repo(ID)
    ahead = add("a.safetensors", b"weights")
    api.preupload_lfs_files(ID, [ahead])
    assert api.create_commit(ID, [ahead], commit_message="one").oid == hub.repo(ID).head
    api.create_commit(ID, [add("b.safetensors", b"weights")], commit_message="two")
    assert [r.method for r in hub.requests].count("PUT") == 1

    # A file that equals the repo's is no change, and the client makes no commit of it.
    head = hub.repo(ID).head
    same = [add("b.safetensors", b"weights")]
    assert api.create_commit(ID, same, commit_message="three").oid == head == hub.repo(ID).head


def test_files_and_folders_are_deleted_and_copied(hub: LocalHub, api: HfApi) -> None:
    hub.create_repo(ID)
    hub.commit(ID, {"a.txt": b"a", "int8/x": b"x", "int8/y/z": b"z", "w.bin": b"w", "int80": b""})
    api.create_commit(
        ID,
        [
            CommitOperationDelete("a.txt"),
            CommitOperationDelete("int8/"),
            CommitOperationCopy("w.bin", "copy/w.bin"),
        ],
        commit_message="tidy",
    )
    assert set(hub.repo(ID).files()) == {".gitattributes", "w.bin", "copy/w.bin", "int80"}
    assert hub.read(ID, "copy/w.bin") == b"w"
    with pytest.raises(EntryNotFoundError, match="doesn't exist"):
        api.delete_file("a.txt", ID)


def test_corrupt_uploads_are_refused(hub: LocalHub, api: HfApi) -> None:
    api.create_repo(ID)
    oid = "ab" * 32
    answer = httpx2.post(
        f"{hub.url}/{ID}.git/info/lfs/objects/batch",
        headers={"authorization": "Bearer hf_ann"},
        json={"operation": "upload", "objects": [{"oid": oid, "size": 3}]},
    ).json()
    actions = answer["objects"][0]["actions"]
    assert httpx2.put(actions["upload"]["href"], content=b"abc").status_code == 400
    verified = httpx2.post(actions["verify"]["href"], json={"oid": oid, "size": 3})
    assert verified.status_code == 404
    line = {"key": "lfsFile", "value": {"path": "a.bin", "algo": "sha256", "oid": oid, "size": 3}}
    header = {"key": "header", "value": {"summary": "no such object"}}
    committed = httpx2.post(
        f"{hub.url}/api/models/{ID}/commit/main",
        headers={"authorization": "Bearer hf_ann"},
        content=f"{json.dumps(header)}\n{json.dumps(line)}\n",
    )
    assert committed.status_code == 400
    assert len(hub.repo(ID).commits) == 1


def test_head_tells_commit_etag_and_size(hub: LocalHub, api: HfApi, cache: Path) -> None:
    hub.create_repo(ID)
    sha = hub.commit(ID, {"int8/model.safetensors": b"weights", "int8/config.json": b"{}"})
    files = hub.repo(ID).files()
    for name, etag in [
        ("model.safetensors", files["int8/model.safetensors"].sha256),
        ("config.json", files["int8/config.json"].oid),
    ]:
        url = hf_hub_url(ID, name, subfolder="int8", endpoint=hub.url)
        told = get_hf_file_metadata(url)
        assert (told.commit_hash, told.etag) == (sha, etag)
        assert told.size == files[f"int8/{name}"].size
    path = api.hf_hub_download(
        ID, "config.json", subfolder="int8", revision=sha[:8], cache_dir=cache
    )
    assert Path(path).read_bytes() == b"{}"
    assert Path(path).resolve().name == files["int8/config.json"].oid  # as git itself names it


def test_ranges_of_a_file(hub: LocalHub) -> None:
    hub.create_repo(ID)
    hub.commit(ID, {"model.safetensors": bytes(range(100))})
    url = hf_hub_url(ID, "model.safetensors", endpoint=hub.url)
    part = httpx2.get(url, headers={"range": "bytes=10-19"}, follow_redirects=True)
    assert str(part.url).startswith(hub.storage_url)
    assert part.status_code == 206
    assert part.content == bytes(range(10, 20))
    assert part.headers["content-range"] == "bytes 10-19/100"
    assert part.history[0].headers["x-repo-commit"] == hub.repo(ID).head
    beyond = httpx2.get(url, headers={"range": "bytes=100-"}, follow_redirects=True)
    assert beyond.status_code == 416


def test_listings(hub: LocalHub, api: HfApi) -> None:
    hub.create_repo(ID)
    sha = hub.commit(ID, {"a.md": b"hi\n", "int8/m.safetensors": b"w", "int8/sub/c.json": b"{}"})

    top = {item.path: type(item) for item in api.list_repo_tree(ID)}
    assert top == {".gitattributes": RepoFile, "a.md": RepoFile, "int8": RepoFolder}
    below = {item.path for item in api.list_repo_tree(ID, "int8", recursive=True, revision=sha)}
    assert below == {"int8/m.safetensors", "int8/sub", "int8/sub/c.json"}
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(ID, "int4"))

    asked = ["int8/m.safetensors", "int8", "not/there"]
    found = {item.path: item for item in api.get_paths_info(ID, asked)}
    assert set(found) == {"int8/m.safetensors", "int8"}
    weights, entry = found["int8/m.safetensors"], hub.repo(ID).files()["int8/m.safetensors"]
    assert isinstance(weights, RepoFile) and weights.lfs is not None
    assert (weights.lfs.sha256, weights.size) == (entry.sha256, 1)

    info = api.repo_info(ID, files_metadata=True)
    assert isinstance(info, ModelInfo) and info.siblings is not None
    siblings = {sibling.rfilename: sibling for sibling in info.siblings}
    assert siblings["int8/m.safetensors"].lfs is not None
    assert siblings["int8/m.safetensors"].lfs.sha256 == entry.sha256
    # The name git gives to these three bytes, from `printf 'hi\n' | git hash-object --stdin`.
    assert siblings["a.md"].blob_id == "45b983be36b73c0788dc9cbcb76cbb80fc7bb057"


def test_errors_name_what_is_missing(hub: LocalHub, api: HfApi, cache: Path) -> None:
    hub.create_repo(ID)
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download(ID, "none.json", cache_dir=cache)
    with pytest.raises(RevisionNotFoundError):
        api.hf_hub_download(ID, "none.json", revision="v9", cache_dir=cache)
    with pytest.raises(RevisionNotFoundError):
        api.model_info(ID, revision="0" * 40)
    with pytest.raises(RepositoryNotFoundError):
        api.hf_hub_download("ann/none", "none.json", cache_dir=cache)


@pytest.mark.parametrize("revision", ["refs/pr/1", "refs%2Fpr%2F1", "HEAD", "main"])
def test_revisions_as_other_clients_write_them(hub: LocalHub, revision: str) -> None:
    hub.create_repo(ID).discuss("a draft", "", "ann", base="main")
    for url in (f"{hub.url}/api/models/{ID}/tree/{revision}", f"{hub.url}/{ID}/resolve/{revision}"):
        answer = httpx2.get(f"{url}/.gitattributes" if "resolve" in url else url)
        assert answer.status_code == 200


# Commits, refs, pull requests


def test_a_stale_parent_is_refused(hub: LocalHub, api: HfApi) -> None:
    api.create_repo(ID)
    old = hub.repo(ID).head
    new = api.create_commit(ID, [add("a")], commit_message="a", parent_commit=old).oid
    with pytest.raises(HfHubHTTPError) as error:
        api.create_commit(ID, [add("b")], commit_message="b", parent_commit=old)
    assert status_of(error) == 412
    assert hub.repo(ID).head == new
    api.create_commit(ID, [add("b")], commit_message="b", parent_commit=new[:7])
    assert [c.title for c in api.list_repo_commits(ID)] == ["b", "a", "initial commit"]


def test_a_hook_can_get_in_between(hub: LocalHub, api: HfApi) -> None:
    api.create_repo(ID)
    rival = api_of(hub, "hf_ann")

    def commit_first(repo: localhub.Repo) -> None:
        assert repo.id == ID
        rival.create_commit(ID, [add("rival.txt")], commit_message="rival")

    hub.before_commit = commit_first
    parent = hub.repo(ID).head
    with pytest.raises(HfHubHTTPError) as error:
        api.create_commit(ID, [add("b")], commit_message="b", parent_commit=parent)
    assert status_of(error) == 412
    # The hook has had its one turn.
    parent = hub.repo(ID).head
    api.create_commit(ID, [add("b")], commit_message="b", parent_commit=parent)
    assert [c.title for c in hub.repo(ID).commits] == ["b", "rival", "initial commit"]


def test_concurrent_commits_are_all_kept(hub: LocalHub, api: HfApi) -> None:
    api.create_repo(ID)
    with ThreadPoolExecutor(4) as pool:
        for number in range(8):
            operations = [add(f"{number}.bin", bytes([number]) * 2500)]
            pool.submit(api.create_commit, ID, operations, commit_message=str(number))
    assert len(hub.repo(ID).commits) == 9
    assert all(hub.read(ID, f"{n}.bin") == bytes([n]) * 2500 for n in range(8))


def test_tags_and_branches(hub: LocalHub, api: HfApi) -> None:
    api.create_repo(ID)
    first = hub.repo(ID).head
    second = hub.commit(ID, {"a": b"a"})
    api.create_tag(ID, tag="v1.0", revision=first)
    api.create_branch(ID, branch="feature/x", revision="v1.0")
    api.create_commit(ID, [add("b")], commit_message="on a branch", revision="feature/x")

    refs = api.list_repo_refs(ID)
    assert {tag.name: tag.target_commit for tag in refs.tags} == {"v1.0": first}
    assert {b.name for b in refs.branches} == {"main", "feature/x"}
    assert hub.repo(ID).head == second
    assert api.model_info(ID, revision="v1.0").sha == first
    assert api.list_repo_files(ID, revision="feature/x") == [".gitattributes", "b"]

    with pytest.raises(HfHubHTTPError) as error:
        api.create_tag(ID, tag="v1.0")
    assert status_of(error) == 409
    with pytest.raises(HfHubHTTPError) as error:
        api.create_branch(ID, branch="feature/x")
    assert status_of(error) == 409
    with pytest.raises(RevisionNotFoundError):
        api.create_tag(ID, tag="v2.0", revision="none")
    with pytest.raises(HfHubHTTPError) as error:
        api.create_tag(ID, tag="v 2")
    assert status_of(error) == 400
    with pytest.raises(RevisionNotFoundError):  # a tag is no branch to commit to
        api.create_commit(ID, [add("c")], commit_message="c", revision="v1.0")

    api.delete_tag(ID, tag="v1.0")
    api.delete_branch(ID, branch="feature/x")
    assert hub.repo(ID).tags == {}
    assert hub.repo(ID).branches == {"main": second}
    with pytest.raises(HfHubHTTPError) as error:
        api.delete_branch(ID, branch="main")
    assert status_of(error) == 403


def test_a_pull_request_from_commit_to_merge(hub: LocalHub, api: HfApi) -> None:
    hub.create_repo(ID)
    base = hub.commit(ID, {"gone": b"", "kept": b"1"})
    # Anyone may propose, but only who may write may merge.
    bob = api_of(hub, "hf_bob")
    done = bob.create_commit(
        ID,
        [CommitOperationDelete("gone"), add("int8/w.bin", b"w" * 2500)],
        commit_message="int8 variant",
        create_pr=True,
    )
    assert (done.pr_num, done.pr_revision) == (1, "refs/pr/1")
    assert hub.repo(ID).head == base
    assert "int8/w.bin" in api.list_repo_files(ID, revision="refs/pr/1")
    refs = api.list_repo_refs(ID, include_pull_requests=True)
    assert refs.pull_requests is not None
    assert [ref.target_commit for ref in refs.pull_requests] == [done.oid]
    api.create_commit(ID, [add("more")], commit_message="more", revision="refs/pr/1")
    with pytest.raises(HfHubHTTPError) as error:
        bob.merge_pull_request(ID, 1)
    assert status_of(error) == 403

    hub.commit(ID, {"kept": b"2"})
    details = api.get_discussion_details(ID, 1)
    assert (details.status, details.conflicting_files) == ("open", [])
    assert [event.type for event in details.events] == ["comment", "commit", "commit"]
    api.merge_pull_request(ID, 1)
    assert set(hub.repo(ID).files()) == {".gitattributes", "kept", "int8/w.bin", "more"}
    assert hub.read(ID, "kept") == b"2"
    details = api.get_discussion_details(ID, 1)
    assert (details.status, details.merge_commit_oid) == ("merged", hub.repo(ID).head)
    assert [d.title for d in api.get_repo_discussions(ID)] == ["int8 variant"]


def test_a_conflicting_pull_request_does_not_merge(hub: LocalHub, api: HfApi) -> None:
    api.create_repo(ID)
    request = api.create_pull_request(ID, "some notes")
    assert (request.num, request.status, request.target_branch) == (1, "draft", "refs/heads/main")
    api.create_commit(ID, [add("notes", b"mine")], commit_message="m", revision="refs/pr/1")
    head = hub.commit(ID, {"notes": b"theirs"})
    assert api.get_discussion_details(ID, 1).conflicting_files == ["notes"]
    with pytest.raises(HfHubHTTPError) as error:
        api.merge_pull_request(ID, 1)
    assert status_of(error) == 409
    assert hub.repo(ID).head == head


def test_cards_are_checked_and_read(hub: LocalHub, api: HfApi) -> None:
    api.create_repo(ID)
    good = b"---\ntags: [torchao]\nlibrary_name: transformers\n---\n# Hi\n"
    api.upload_file(path_or_fileobj=good, path_in_repo="README.md", repo_id=ID)
    info = api.model_info(ID)
    assert (info.tags, info.library_name) == (["torchao"], "transformers")
    assert info.card_data is not None and info.card_data["tags"] == ["torchao"]
    for bad in ("base_model_relation: squeezed", "base_model: not a repo id", "[", "- list"):
        card = f"---\n{bad}\n---\n".encode()
        with pytest.raises(ValueError, match="Invalid metadata"):
            api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id=ID)


# Who may do what


def test_whoami(hub: LocalHub, api: HfApi) -> None:
    told = api.whoami()
    assert (told["name"], told["auth"]["accessToken"]["role"]) == ("ann", "write")
    assert [org["name"] for org in told["orgs"]] == ["lab"]
    fine = api_of(hub, "hf_ann_fine").whoami()["auth"]["accessToken"]
    assert fine["role"] == "fineGrained"
    assert fine["fineGrained"]["scoped"][0]["entity"] == {"type": "model", "name": ID}
    assert "repo.write" in fine["fineGrained"]["scoped"][0]["permissions"]


def test_a_bad_token_is_told_from_a_missing_repo(hub: LocalHub) -> None:
    hub.create_repo(ID)
    bad = api_of(hub, "hf_wrong")
    for call in (bad.whoami, lambda: bad.model_info(ID), lambda: bad.create_repo("ann/other")):
        with pytest.raises(HfHubHTTPError) as error:
            call()
        assert status_of(error) == 401
        assert not isinstance(error.value, RepositoryNotFoundError)


def test_a_private_repo_is_invisible_to_others(hub: LocalHub, api: HfApi) -> None:
    hub.create_repo(ID, private=True)
    api.auth_check(ID)
    api_of(hub, "hf_ann_read").auth_check(ID)
    for token, status in (("hf_bob", 404), (False, 401)):
        other = api_of(hub, token)
        for call in (other.model_info, other.auth_check, other.list_repo_refs):
            with pytest.raises(RepositoryNotFoundError) as error:
                call(ID)
            assert status_of(error) == status
    api.update_repo_settings(ID, private=False)
    assert api_of(hub, False).model_info(ID).private is False


def test_a_gated_repo_opens_to_owner_and_allowed(hub: LocalHub, api: HfApi, cache: Path) -> None:
    hub.create_repo(ID)
    api.update_repo_settings(ID, gated="manual")
    bob = api_of(hub, "hf_bob")
    assert bob.model_info(ID).gated == "manual"  # what it is, is no secret
    for other, status in ((bob, 403), (api_of(hub, False), 401)):
        with pytest.raises(GatedRepoError) as error:
            other.hf_hub_download(ID, ".gitattributes", cache_dir=cache)
        assert status_of(error) == status
        with pytest.raises(GatedRepoError):
            other.auth_check(ID)
    api.hf_hub_download(ID, ".gitattributes", cache_dir=cache / "ann")
    hub.repo(ID).allowed.add("bob")
    bob.hf_hub_download(ID, ".gitattributes", cache_dir=cache)


@pytest.mark.parametrize("token", ["hf_ann_read", "hf_bob"])
def test_without_the_right_to_write_nothing_changes(hub: LocalHub, token: str) -> None:
    repo = hub.create_repo(ID)
    before = dict(repo.refs)
    other = api_of(hub, token)
    other.auth_check(ID)
    for call in (
        lambda: other.auth_check(ID, write=True),
        lambda: other.create_commit(ID, [add("a")], commit_message="a"),
        lambda: other.create_tag(ID, tag="v1"),
        lambda: other.update_repo_settings(ID, private=True),
    ):
        with pytest.raises(HfHubHTTPError) as error:
            call()
        assert status_of(error) == 403
    assert (repo.refs, repo.private) == (before, False)
    with pytest.raises(RepositoryNotFoundError):
        api_of(hub, False).auth_check(ID, write=True)


def test_a_fine_grained_token_writes_only_in_its_scope(hub: LocalHub) -> None:
    hub.create_repo(ID)
    hub.create_repo("lab/model")
    fine = api_of(hub, "hf_ann_fine")
    fine.auth_check(ID, write=True)
    with pytest.raises(HfHubHTTPError) as error:
        fine.auth_check("lab/model", write=True)
    assert status_of(error) == 403


def test_a_trusted_publisher_gets_a_token_for_its_repo_alone(hub: LocalHub) -> None:
    for name in (ID, "ann/other"):
        hub.create_repo(name)
    hub.tokens.trust("the job's id token", ID)

    def exchange(id_token: str, repo_id: str) -> str:
        given = exchange_oidc_token(subject_token=id_token, resource=repo_id, endpoint=hub.url)
        return str(given["access_token"])

    api = api_of(hub, exchange("the job's id token", ID))
    api.create_commit(ID, [add("a.txt")], commit_message="x")
    with pytest.raises(HfHubHTTPError) as beyond:
        api.create_commit("ann/other", [add("a.txt")], commit_message="x")
    assert status_of(beyond) == 403
    for refused in (("another's", ID), ("the job's id token", "ann/other")):
        with pytest.raises(HfHubHTTPError) as error:
            exchange(*refused)
        assert status_of(error) == 401


# The handle


def test_the_log_says_who_asked_for_what_without_the_token(hub: LocalHub, api: HfApi) -> None:
    hub.create_repo(ID)
    hub.commit(ID, {"a.txt": b""})
    api.repo_info(ID, revision="refs/heads/main", files_metadata=True)
    api_of(hub, False).model_info(ID)
    first, second = hub.requests
    assert (first.method, first.status, first.user) == ("GET", 200, "ann")
    assert first.path == f"/api/models/{ID}/revision/refs/heads/main"
    assert "blobs" in first.query
    assert (second.authorized, second.user) == (False, None)
    assert "hf_ann" not in repr(hub.requests) + repr(TOKENS)


def test_injected_failures_strike_as_often_as_asked(hub: LocalHub, api: HfApi) -> None:
    hub.create_repo(ID)
    hub.fail_next("GET", r"^/api/models/ann/", 503, times=2)
    for _ in range(2):
        with pytest.raises(HfHubHTTPError) as error:
            api.model_info(ID)
        assert status_of(error) == 503
    assert api.model_info(ID).id == ID
    assert [request.status for request in hub.requests] == [503, 503, 200]


def test_from_the_command_line(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(localhub.__file__).parents[1])}
    command = [sys.executable, "-m", "localhub", "--data", str(tmp_path), "--token", "eve=hf_eve"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        try:
            api = HfApi(endpoint=url, token="hf_eve")
            assert api.create_repo("eve/model").repo_id == "eve/model"
        finally:
            server.send_signal(signal.SIGTERM)
        assert server.wait(10) == 0
