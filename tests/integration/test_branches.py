"""A branch for each variant, made and kept in step on a Hub on this machine."""

import os

os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # read when huggingface_hub is imported

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants

from command import Run
from conftest import WRITE
from localhub import LocalHub
from publications import publication
from smolquant.errors import HubError, InputError
from smolquant.hub import Hub
from smolquant.publish import attempts
from smolquant.publish.branches import BRANCH_TITLE, InStep, put_in_step
from smolquant.publish.commit import publish
from smolquant.publish.target import check_branches, inspect_target

REPO = "alice/tiny"
AT_ITS_ROOT = {"README.md", "config.json", "model.safetensors", "quantization.json"}
OF_MAIN = {
    "config.json": b'{"model_type": "main"}\n',
    "LICENSE": b"terms\n",
    "NOTES.md": b"the owner's\n",
    ".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n",
}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(attempts, "_FIRST_PAUSE", 0.01)
    with LocalHub(tmp_path / "hub", [WRITE]) as hub:
        hub.create_repo(REPO)
        hub.commit(REPO, OF_MAIN)
        yield hub


@pytest.fixture
def client(server: LocalHub) -> Hub:
    return Hub(token=WRITE.value, endpoint=server.url)


def release(hub: Hub, folder: Path, *variants: str, content: bytes = b"weights" * 1000) -> None:
    what = publication(folder, *variants, content=content, branches=True)
    publish(hub, inspect_target(hub, REPO), what, notify=lambda line: None)


def in_step(hub: Hub) -> list[InStep]:
    return list(put_in_step(hub, REPO, inspect_target(hub, REPO).records, lambda line: None))


def titles(server: LocalHub, revision: str) -> list[str]:
    return [commit.title for commit in server.repo(REPO).history(revision)]


def test_a_branch_has_the_variant_at_its_root_and_nothing_is_sent_again(
    server: LocalHub, client: Hub, tmp_path: Path
) -> None:
    release(client, tmp_path, "int8", "int4")
    before = len(server.requests)
    made = in_step(client)
    assert [(one.variant, one.changed) for one in made] == [("int8", True), ("int4", True)]
    assert made[0].url == f"{server.url}/{REPO}/tree/int8"
    main = server.repo(REPO).files("main")
    for variant in ("int8", "int4"):
        there = server.repo(REPO).files(variant)
        assert there.keys() == AT_ITS_ROOT | {"LICENSE", ".gitattributes"}
        assert all(there[name] == main[f"{variant}/{name}"] for name in AT_ITS_ROOT)
        assert titles(server, variant) == [BRANCH_TITLE, *titles(server, "main")]
    sent = [one.path for one in server.requests[before:] if one.method == "PUT"]
    assert not sent, "the Hub copies large files by itself"
    root = server.read(REPO, "README.md").decode()
    assert "The branches `int8` and `int4` have the variant of that name at the root" in root


def test_what_is_in_step_gets_no_commit_and_what_changed_gets_one(
    server: LocalHub, client: Hub, tmp_path: Path
) -> None:
    release(client, tmp_path, "int8", "int4")
    in_step(client)
    heads = dict(server.repo(REPO).branches)
    assert not any(one.changed for one in in_step(client))
    assert server.repo(REPO).branches == heads
    release(client, tmp_path, "int8", content=b"other" * 1000)
    assert [(one.variant, one.changed) for one in in_step(client)] == [
        ("int8", True),
        ("int4", False),
    ]
    assert server.read(REPO, "model.safetensors", "int8") == b"other" * 1000
    assert titles(server, "int8")[:2] == [BRANCH_TITLE] * 2


@pytest.mark.fault(
    "hub",
    "A branch with a variant's name holds what smolquant has not put there",
    "Exit 2 with --branches, before any work; it stays.",
)
@pytest.mark.parametrize("on", ["main", "ours"])
def test_a_branch_of_somebody_elses_is_refused(
    server: LocalHub, client: Hub, tmp_path: Path, on: str
) -> None:
    release(client, tmp_path, "int8")
    if on == "ours":
        in_step(client)
    else:
        client.api.create_branch(REPO, branch="int8")
    check_branches(client, inspect_target(client, REPO), ["int8"])
    server.commit(REPO, {"mine.txt": b"years of work"}, revision="int8")
    target = inspect_target(client, REPO)
    with pytest.raises(InputError, match="The branch int8 of alice/tiny has commits") as refused:
        check_branches(client, target, ["int8"])
    assert refused.value.hint
    with pytest.raises(HubError, match="a commit by now that smolquant has not made"):
        in_step(client)
    assert server.read(REPO, "mine.txt", "int8") == b"years of work"
    assert target.own_branches == set()


@pytest.mark.fault(
    "hub",
    "A tag has the name of a variant",
    "Exit 2 with --branches, before any work: a revision of that name could be either.",
)
def test_a_tag_with_a_variants_name_is_refused(
    server: LocalHub, client: Hub, tmp_path: Path
) -> None:
    release(client, tmp_path, "int8")
    client.api.create_tag(REPO, tag="int8")
    with pytest.raises(InputError, match="has a tag int8"):
        check_branches(client, inspect_target(client, REPO), ["int8"])


@pytest.mark.fault(
    "hub",
    "A branch of a variant cannot be made after the commit on main",
    "Exit 5 with what is published and what is not; the same command then makes the branches alone.",
)
@pytest.mark.parametrize("where", ["/branch/int4$", "/commit/int4$"])
def test_a_branch_that_fails_is_told_and_healed(
    server: LocalHub, client: Hub, tmp_path: Path, where: str
) -> None:
    release(client, tmp_path, "int8", "int4")
    server.fail_next("POST", where, 403)
    with pytest.raises(HubError) as failed:
        in_step(client)
    told = failed.value.message
    assert "int8, int4 are published on main of alice/tiny" in told
    assert "in step: int8; not known to be: int4" in told
    assert "Run the same command again" in failed.value.hint
    check_branches(client, inspect_target(client, REPO), ["int8", "int4"])
    assert [(one.variant, one.changed) for one in in_step(client)] == [
        ("int8", False),
        ("int4", True),
    ]


@pytest.mark.fault(
    "hub",
    "The answer to the commit on a branch is lost, or another run makes it first",
    "The branch is read again; what was made is not made twice.",
)
@pytest.mark.parametrize("how", ["lost", "garbage", "refused as stale"])
def test_a_commit_on_a_branch_is_made_once(
    server: LocalHub, client: Hub, tmp_path: Path, how: str
) -> None:
    release(client, tmp_path, "int8")
    if how != "refused as stale":
        status = 502 if how == "lost" else 200
        server.alter_next("POST", "/commit/int8$", lambda body: b"<html>", status=status)
    else:
        server.fail_next("POST", "/commit/int8$", 412)
    assert [one.changed for one in in_step(client)] == [True]
    assert titles(server, "int8") == [BRANCH_TITLE, *titles(server, "main")]


@pytest.mark.fault(
    "hub",
    "A small file arrives damaged while the client copies it to a branch",
    "The branch is held against main, and put right.",
)
@pytest.mark.parametrize("name", ["config.json", "quantization.json"])
def test_what_the_client_copies_is_held_against_main(
    server: LocalHub, client: Hub, tmp_path: Path, name: str
) -> None:
    release(client, tmp_path, "int8")
    records = inspect_target(client, REPO).records
    server.alter_next("GET", f"/resolve/[0-9a-f]{{40}}/int8/{name}$", lambda body: b"{}")
    list(put_in_step(client, REPO, records, lambda line: None))
    assert server.read(REPO, name, "int8") == server.read(REPO, f"int8/{name}")
    assert titles(server, "int8")[:2] == [BRANCH_TITLE] * 2


def test_a_copy_of_another_variants_branch_is_not_taken_for_a_variants_own(
    server: LocalHub, client: Hub, tmp_path: Path
) -> None:
    release(client, tmp_path, "int8")
    in_step(client)
    client.api.create_branch(REPO, branch="int4", revision="int8")
    assert inspect_target(client, REPO).own_branches == {"int8"}


def test_code_of_the_models_own_goes_to_the_branch_that_needs_it(
    server: LocalHub, client: Hub, tmp_path: Path
) -> None:
    release(client, tmp_path, "int8", "int4")
    server.commit(REPO, {"modeling_own.py": b"class Own: ...\n"})
    records = dict(inspect_target(client, REPO).records)
    records["int8"] = replace(records["int8"], runs_own_code=True)
    list(put_in_step(client, REPO, records, lambda line: None))
    assert "modeling_own.py" in server.repo(REPO).files("int8")
    assert "modeling_own.py" not in server.repo(REPO).files("int4")


def test_a_variant_that_is_gone_meanwhile_is_passed_over(
    server: LocalHub, client: Hub, tmp_path: Path
) -> None:
    release(client, tmp_path, "int8", "int4")
    records = inspect_target(client, REPO).records
    client.api.delete_folder("int8", REPO)
    made = list(put_in_step(client, REPO, records, lambda line: None))
    assert [one.variant for one in made] == ["int4"]


def test_a_folder_of_another_name_gets_no_branch(
    server: LocalHub, client: Hub, tmp_path: Path
) -> None:
    release(client, tmp_path, "int8")
    record = inspect_target(client, REPO).records["int8"]
    assert list(put_in_step(client, REPO, {"main": record}, lambda line: None)) == []
    assert set(server.repo(REPO).branches) == {"main"}


# The whole command


@pytest.fixture
def run(smolquant: Callable[..., Run], hub: LocalHub, checkpoint: Path) -> Callable[..., Run]:
    def run(*options: str) -> Run:
        arguments = ("quantize", checkpoint, REPO, "--quant-type", "both", *options)
        return smolquant(*arguments, hub=hub, token=WRITE.value, actions=True)

    return run


@pytest.mark.fault(
    "hub",
    "A branch of a variant cannot be made after the commit on main",
    "Exit 5 with what is published and what is not; the same command then makes the branches alone.",
)
def test_a_repository_gets_its_branches_later_and_its_cards_say_so(
    run: Callable[..., Run], hub: LocalHub
) -> None:
    assert run().exit_code == 0
    assert "--revision" not in hub.read(REPO, "README.md").decode()
    weights = hub.repo(REPO).files("main")["int8/model.safetensors"]

    hub.fail_next("POST", "/branch/int4$", 403)
    failed = run("--branches", "--tag", "v1")
    assert failed.exit_code == 5
    assert "in step: int8; not known to be: int4" in failed.annotations[0]
    assert "in commit" in failed.summary and "[`int8`]" in failed.summary
    assert failed.report["branches"].keys() == {"int8"}
    assert failed.outputs["branches"] == "int8" and failed.outputs["changed"] == "true"
    assert not hub.repo(REPO).tags
    for card in ("README.md", "int8/README.md"):
        assert "vllm serve alice/tiny --revision int8" in hub.read(REPO, card).decode()
    head = hub.repo(REPO).head

    healed = run("--branches", "--tag", "v1")
    assert healed.exit_code == 0, healed.log
    assert hub.repo(REPO).head == head == hub.repo(REPO).tags["v1"]
    assert healed.outputs["branches"] == "int8,int4"
    assert "The branches" in healed.summary and "as main has it" in healed.summary
    branches = dict(hub.repo(REPO).branches)
    assert hub.repo(REPO).files("int8")["model.safetensors"] == weights

    again = run("--branches", "--tag", "v1")
    assert again.outputs["changed"] == "false"
    assert hub.repo(REPO).branches == branches


@pytest.mark.fault(
    "hub",
    "A branch with a variant's name holds what smolquant has not put there",
    "Exit 2 with --branches, before any work; it stays.",
)
def test_a_run_does_no_work_for_a_branch_that_it_may_not_make(
    run: Callable[..., Run], hub: LocalHub
) -> None:
    hub.create_repo(REPO)
    hub.repo(REPO).create_ref("refs/heads/int4", "main")
    hub.commit(REPO, {"mine.txt": b"years of work"}, revision="int4")
    refused = run("--branches")
    assert refused.exit_code == 2
    assert "The branch int4 of alice/tiny has commits" in refused.annotations[0]
    assert "::group::Quantize" not in refused.log
    assert len(hub.repo(REPO).commits) == 1
