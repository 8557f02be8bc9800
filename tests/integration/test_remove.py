"""``smolquant remove``: a variant and its part of the card are taken out, and nothing else is."""

import io
import os

os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # read when huggingface_hub is imported

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from huggingface_hub import constants

from command import Run
from conftest import OTHER, READ, WRITE
from localhub import LocalHub, Repo
from publications import IDENTITY, make_variant, publication
from smolquant.cli import cli
from smolquant.errors import HubError, InputError, SmolquantError
from smolquant.hub import Hub
from smolquant.publish import attempts
from smolquant.publish.branches import put_in_step
from smolquant.publish.commit import publish
from smolquant.publish.local import write_cards
from smolquant.publish.operations import Publication
from smolquant.publish.section import BEGIN
from smolquant.publish.target import inspect_target
from smolquant.remove import from_repository
from smolquant.report import overview
from smolquant.report.console import Console

REPO = "alice/tiny"
CARD = """---
license: mit  # as agreed
tags:
- mine
---

# Mine

Years of work.
"""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """A Hub with the owner's model, and two variants of it with their branches."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(attempts, "_FIRST_PAUSE", 0.01)
    with LocalHub(tmp_path / "hub", [WRITE, READ, OTHER]) as server:
        server.create_repo(REPO)
        server.commit(REPO, {"README.md": CARD.encode(), "model.safetensors": b"main" * 100})
        hub = Hub(token=WRITE.value, endpoint=server.url)
        what = publication(tmp_path, "int8", "int4", branches=True)
        publish(hub, inspect_target(hub, REPO), what, notify=lambda line: None)
        list(put_in_step(hub, REPO, what.records, lambda line: None))
        yield server


@pytest.fixture
def client(server: LocalHub) -> Hub:
    return Hub(token=WRITE.value, endpoint=server.url)


def remove(hub: Hub, variant: str, *, create_pr: bool = False) -> list[str]:
    lines: list[str] = []
    from_repository(hub, REPO, variant, create_pr=create_pr, notify=lines.append)
    return lines


def paths(server: LocalHub, revision: str = "main") -> set[str]:
    return set(server.repo(REPO).files(revision))


def card(server: LocalHub) -> str:
    return server.read(REPO, "README.md").decode()


def test_one_commit_takes_a_variant_out_and_leaves_the_rest(server: LocalHub, client: Hub) -> None:
    before, picture = server.repo(REPO).head, server.read(REPO, overview.FILE_NAME)
    lines = remove(client, "int8")
    commits = server.repo(REPO).commits
    assert commits[0].parent == before
    assert commits[0].title == "Remove the quantized variant int8"
    assert not any(path.startswith("int8/") for path in paths(server))
    assert {"int4/model.safetensors", "model.safetensors"} <= paths(server)
    assert "Years of work." in card(server)
    assert "int4/README.md" in card(server) and "int8" not in card(server)
    assert server.read(REPO, overview.FILE_NAME) != picture
    assert set(server.repo(REPO).branches) == {"main", "int4"}
    assert lines[-1] == "Deleted the branch int8"


def test_with_the_last_variant_the_card_is_the_owners_again(server: LocalHub, client: Hub) -> None:
    remove(client, "int8")
    remove(client, "int4")
    assert card(server) == CARD
    assert paths(server) == {"README.md", "model.safetensors", ".gitattributes"}


def test_a_card_is_left_without_front_matter_and_without_a_warning(
    server: LocalHub, client: Hub
) -> None:
    """The client warns of such a card, and warnings are errors here."""
    own = card(server).partition("# Mine")[2]
    server.commit(REPO, {"README.md": f"# Mine{own}".encode()})
    remove(client, "int8")
    remove(client, "int4")
    assert card(server) == "# Mine\n\nYears of work.\n"


def test_variants_of_an_older_source_stay_marked(
    server: LocalHub, client: Hub, tmp_path: Path
) -> None:
    newer, name = "sha256:" + "b" * 64, "int8_dynamic"
    made = make_variant(tmp_path, name, identity=newer)
    what = Publication({name: tmp_path / name}, {name: made}, newer)
    publish(client, inspect_target(client, REPO), what, notify=lambda line: None)
    assert "[int4](int4/README.md) †" in card(server)
    remove(client, "int8")
    assert "[int4](int4/README.md) †" in card(server)
    assert "[int8_dynamic](int8_dynamic/README.md) †" not in card(server)
    remove(client, "int8_dynamic")
    assert "[int4](int4/README.md) †" in card(server)


def test_a_pull_request_leaves_main_and_the_branch_alone(server: LocalHub, client: Hub) -> None:
    head = server.repo(REPO).head
    lines = remove(client, "int8", create_pr=True)
    assert server.repo(REPO).head == head
    assert "int8" in server.repo(REPO).branches
    assert not any(path.startswith("int8/") for path in paths(server, "refs/pr/1"))
    assert any("/discussions/1" in line for line in lines)
    assert "the same command without --create-pr deletes it" in lines[-1]


@pytest.mark.fault(
    "record",
    "`smolquant remove` is asked for what is not a variant",
    "Exit 2 with what is there and what may be meant; nothing changes.",
)
@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("int88", r"'int88' is not a variant\. What alice/tiny has: int8 and int4"),
        ("float8", r"has no float8\. What alice/tiny has"),
        ("notes", "'notes' is not a variant"),
        ("../int8", "'../int8' is not a variant"),
    ],
)
def test_what_is_no_variant_is_refused(
    server: LocalHub, client: Hub, asked: str, message: str
) -> None:
    server.commit(REPO, {"notes/quantization.json": b"{}", "notes/mine.txt": b"work"})
    head = server.repo(REPO).head
    with pytest.raises(InputError, match=message) as refused:
        remove(client, asked)
    assert refused.value.hint
    assert server.repo(REPO).head == head


@pytest.mark.fault(
    "meanwhile",
    "Others push while a variant is removed",
    "The removal is made again on their commit; what they have pushed stays.",
)
def test_a_concurrent_push_is_followed(server: LocalHub, client: Hub) -> None:
    def push(repo: Repo) -> None:
        server.before_commit = None
        server.commit(REPO, {"README.md": CARD.replace("Years", "Decades").encode()})

    server.before_commit = push
    remove(client, "int8")
    assert "Decades of work." in card(server)
    assert "int4/README.md" in card(server) and "int8" not in card(server)


@pytest.mark.fault(
    "hub",
    "The answer to a removal is lost",
    "What was made is found and reported; it is not made twice.",
)
def test_a_removal_whose_answer_is_lost_is_found(server: LocalHub, client: Hub) -> None:
    count = len(server.repo(REPO).commits)
    server.alter_next("POST", "/commit/main$", lambda body: b"<html>", status=502)
    lines = remove(client, "int8")
    assert any("its answer was lost" in line for line in lines)
    assert len(server.repo(REPO).commits) == count + 1


@pytest.mark.fault(
    "hub",
    "The branch of a removed variant cannot be deleted",
    "Exit 5, and that the variant is removed; the same command then deletes the branch alone.",
)
def test_a_branch_that_stays_behind_is_deleted_by_the_next_run(
    server: LocalHub, client: Hub
) -> None:
    server.fail_next("DELETE", "/branch/int8$", 403)
    with pytest.raises(HubError, match="int8 is removed from main of alice/tiny, but its branch"):
        remove(client, "int8")
    head = server.repo(REPO).head
    assert remove(client, "int8") == ["Deleted the branch int8"]
    assert server.repo(REPO).head == head
    with pytest.raises(InputError, match="has no int8"):
        remove(client, "int8")


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_branch_with_somebody_elses_commits_stays(
    server: LocalHub, client: Hub, when: str
) -> None:
    def push(repo: Repo | None = None) -> None:
        server.before_commit = None
        server.commit(REPO, {"mine.txt": b"years of work"}, revision="int8")

    if when == "meanwhile":
        server.before_commit = push
    else:
        push()
    assert "smolquant has not made what it holds" in remove(client, "int8")[-1]
    assert server.read(REPO, "mine.txt", "int8") == b"years of work"
    assert not any(path.startswith("int8/") for path in paths(server))


@pytest.mark.fault(
    "hub",
    "The token may not write where a variant is removed, or sees no such repository",
    "Exit 5; nothing changes.",
)
def test_without_rights_nothing_is_removed(server: LocalHub, client: Hub) -> None:
    head = server.repo(REPO).head
    with pytest.raises(HubError, match="does not have the rights"):
        remove(Hub(token=READ.value, endpoint=server.url), "int8")
    with pytest.raises(HubError, match="bob/none does not exist, or is private"):
        from_repository(client, "bob/none", "int8", create_pr=False, notify=print)
    assert server.repo(REPO).head == head


def test_who_may_only_read_a_repository_may_propose(server: LocalHub) -> None:
    head = server.repo(REPO).head
    lines = remove(Hub(token=OTHER.value, endpoint=server.url), "int8", create_pr=True)
    assert any("/discussions/1" in line for line in lines)
    with pytest.raises(HubError, match="The token has the role read"):
        remove(Hub(token=READ.value, endpoint=server.url), "int8", create_pr=True)
    assert server.repo(REPO).head == head


def test_a_variant_whose_record_cannot_be_read_can_be_removed(
    server: LocalHub, client: Hub
) -> None:
    server.commit(REPO, {"int8/quantization.json": b"damaged"})
    remove(client, "int8")
    assert not any(path.startswith("int8/") for path in paths(server))


# A folder with the same layout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    there = tmp_path / "quantized"
    there.mkdir()
    (there / "README.md").write_text(CARD)
    records = {name: make_variant(there, name) for name in ("int8", "int4")}
    write_cards(
        there,
        records,
        source_identity=IDENTITY,
        base_model=None,
        license_entries={},
        tracking_urls={},
    )
    return there


def command(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, ["remove", *map(str, arguments)], obj=Console({}, io.StringIO()))


def test_a_folder_is_left_as_it_was_before_its_variants(folder: Path) -> None:
    assert command(folder, "int8").exit_code == 0
    text = (folder / "README.md").read_text()
    assert BEGIN in text and "int4/README.md" in text and "int8" not in text
    assert not (folder / "int8").exists()
    assert "int8" not in (folder / overview.FILE_NAME).read_text()
    assert command(folder, "int4").exit_code == 0
    assert (folder / "README.md").read_text() == CARD
    assert [path.name for path in folder.iterdir()] == ["README.md"]


@pytest.mark.fault(
    "record",
    "`smolquant remove` is asked for what is not a variant",
    "Exit 2 with what is there and what may be meant; nothing changes.",
)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["int"], "is not a variant"),
        (["int8", "--create-pr"], "is a folder"),
    ],
)
def test_refusals_of_a_folder(folder: Path, arguments: list[str], message: str) -> None:
    refused = command(folder, *arguments)
    assert isinstance(refused.exception, SmolquantError)
    assert message in str(refused.exception)
    assert (folder / "int8").is_dir()


@pytest.mark.fault(
    "machine",
    "The folder of a variant that is to be removed is a link",
    "Exit 2; nothing is deleted through it.",
)
def test_nothing_is_deleted_through_a_link(folder: Path, tmp_path: Path) -> None:
    (folder / "int8").rename(tmp_path / "elsewhere")
    (folder / "int8").symlink_to(tmp_path / "elsewhere")
    assert isinstance(command(folder, "int8").exception, InputError)
    assert (tmp_path / "elsewhere/model.safetensors").is_file()


# The whole command


@pytest.mark.fault(
    "record",
    "`smolquant remove` is asked for what is not a variant",
    "Exit 2 with what is there and what may be meant; nothing changes.",
)
def test_the_command_removes_and_refuses(smolquant: Callable[..., Run], server: LocalHub) -> None:
    removed = smolquant("remove", REPO, "int8", hub=server, token=WRITE.value)
    assert removed.exit_code == 0, removed.log
    assert f"Removed int8 from {REPO}: {server.url}/{REPO}/commit/" in removed.log
    refused = smolquant("remove", REPO, "int8", hub=server, token=WRITE.value, actions=True)
    assert refused.exit_code == 2
    assert len(refused.annotations) == 1
    assert f"{REPO} has no int8. What {REPO} has: int4." in refused.annotations[0]
    nowhere = smolquant("remove", "./nowhere", "int8", hub=server)
    assert nowhere.exit_code == 2
    assert "neither a folder that is there nor a Hub id" in nowhere.log
