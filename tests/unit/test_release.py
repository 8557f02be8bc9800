"""What may be published into a repository as it stands, decided before the work; no process, no Hub."""

import io
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from models import llama, save_with_tokenizer
from smolquant.checkpoint.download import RemoteFile
from smolquant.checkpoint.files import sha256_of
from smolquant.checkpoint.folder import FolderSource
from smolquant.errors import InputError
from smolquant.hub import Hub
from smolquant.publish import operations, release
from smolquant.publish.branches import Branch
from smolquant.publish.target import Target
from smolquant.report.console import Console
from smolquant.secrecy import remember
from smolquant.settings import Settings, make_settings
from unit.report_samples import variant_record

REPO = "alice/model"


@pytest.fixture
def source(tmp_path: Path) -> FolderSource:
    return FolderSource(save_with_tokenizer(tmp_path / "source", llama(1)))


def settings(source: FolderSource, **options: Any) -> Settings:
    return make_settings(model_path=str(source.folder), repo_name=REPO, **options)


def main_model(source: FolderSource, **changes: str) -> dict[str, RemoteFile]:
    """The source as it would stand at a repository's root."""
    return {
        name: RemoteFile(file.size, changes.get(name, sha256_of(file.path)), "")
        for name, file in source.files.items()
    }


class Tagged(Hub):
    """A Hub of which only the tags are asked."""

    def __init__(self, **tags: str) -> None:
        super().__init__()
        refs = [SimpleNamespace(name=name, target_commit=sha) for name, sha in tags.items()]
        object.__setattr__(self, "_refs", SimpleNamespace(tags=refs))

    @property
    def api(self) -> Any:
        return SimpleNamespace(list_repo_refs=lambda repo_id: cast("Any", self)._refs)


def test_a_local_checkpoint_becomes_the_main_model_where_there_is_none(
    source: FolderSource,
) -> None:
    empty, asked = Target(REPO, exists=True, head="a" * 40), settings(source)
    assert release.changes_main_model(source, empty, asked)
    filled = Target(REPO, exists=True, root_files=main_model(source))
    assert not release.changes_main_model(source, filled, asked)


@pytest.mark.fault(
    "hub",
    "The repository holds other main weights",
    "Exit 2 without --replace-main; they stay.",
)
def test_other_weights_at_the_root_are_replaced_only_where_that_was_asked(
    source: FolderSource,
) -> None:
    other = Target(
        REPO, exists=True, root_files=main_model(source, **{"model.safetensors": "0" * 64})
    )
    with pytest.raises(InputError, match="--replace-main"):
        release.check(Hub(), other, source, settings(source), ["int8"])
    asked = settings(source, replace_main=True)
    release.check(Hub(), other, source, asked, ["int8"])
    assert release.changes_main_model(source, other, asked)


@pytest.mark.fault(
    "hub",
    "The repository holds something else in a variant's folder",
    "Exit 2 without --force; it stays.",
)
def test_a_folder_of_something_else_is_refused_unless_forced(source: FolderSource) -> None:
    taken = Target(REPO, exists=True, folders={"int8": ("notes.md",)})
    with pytest.raises(InputError, match="something other than a variant"):
        release.check(Hub(), taken, source, settings(source), ["int8"])
    release.check(Hub(), taken, source, settings(source), ["int4"])
    release.check(Hub(), taken, source, settings(source, force=True), ["int8"])


@pytest.mark.fault(
    "hub",
    "The tag names another commit already",
    "Exit 2, before any work; it is not moved.",
)
def test_a_tag_that_names_another_commit_is_refused(source: FolderSource) -> None:
    head = "a" * 40
    target = Target(REPO, exists=True, head=head, root_files=main_model(source))
    asked = settings(source, tag="v1")
    release.check(Tagged(v1=head), target, source, asked, [])
    release.check(Tagged(v2=head), target, source, asked, ["int8"])
    with pytest.raises(InputError, match="already exists"):
        release.check(Tagged(v1=head), target, source, asked, ["int8"])
    with pytest.raises(InputError, match="already exists"):
        release.check(Tagged(v1="b" * 40), target, source, asked, [])


def with_int8(source: FolderSource, readme: str | None = None, **branches: Branch) -> Target:
    """A target that has the source as its main model, and one variant of it."""
    head, record = "a" * 40, variant_record("int8")
    made = replace(record, source=replace(record.source, identity=source.identity))
    files = main_model(source)
    return Target(REPO, True, head, readme, {"int8": made}, root_files=files, branches=branches)


@pytest.mark.fault(
    "hub",
    "The tag names another commit already",
    "Exit 2, before any work; it is not moved.",
)
def test_a_tag_stays_though_the_card_is_to_name_a_branch(source: FolderSource) -> None:
    target, asked = with_int8(source), settings(source, tag="v1", branches=True)
    assert release.changes_root(source, target, asked)
    with pytest.raises(InputError, match="already exists"):
        release.check(Tagged(v1="a" * 40), target, source, asked, [])
    added = operations.operations(
        target, operations.Publication({}, {}, source.identity, branches=True)
    )
    card = next(one for one in added if one.path_in_repo == "README.md")
    with card.as_file() as file:  # type: ignore[union-attr]
        told = with_int8(source, file.read().decode())
    assert not release.changes_root(source, told, asked), "its card names the branch already"
    release.check(Tagged(v1="a" * 40), told, source, asked, [])


def test_a_run_without_branches_says_which_it_leaves_behind(source: FolderSource) -> None:
    log = io.StringIO()
    ours = Branch("c" * 40, {}, "ours")
    target = with_int8(source, int8=ours, int4=replace(ours, whose="another's"))
    release.announce(source, target, settings(source), ["int8", "int4"], Console({}, log))
    assert "The branches stay as they are: int8" in log.getvalue()
    log.truncate(0)
    release.announce(source, target, settings(source, branches=True), ["int8"], Console({}, log))
    assert "branches" not in log.getvalue()


def test_nobody_looks_at_a_repository_that_nothing_is_published_to(source: FolderSource) -> None:
    asked = make_settings(model_path=str(source.folder), repo_name=None, save_only=True)
    assert release.open_target(Hub(), asked, warn=lambda title, text: None) is None


@pytest.mark.fault(
    "secret",
    "A file to publish holds a token",
    "Exit 2 with the file; the token is not shown.",
)
def test_a_token_in_a_file_that_travels_is_refused_before_the_work(source: FolderSource) -> None:
    remember("hf_of_this_run")
    (source.folder / "tokenizer_config.json").write_text('{"auth": "hf_of_this_run"}')
    target, console = Target(REPO, exists=True), Console({}, io.StringIO())
    with pytest.raises(InputError, match=r"tokenizer_config.json holds a token"):
        release.announce(source, target, settings(source), ["int8"], console)


@pytest.mark.fault(
    "secret",
    "The repository's own README holds a token",
    "Exit 2; it is not published again.",
)
def test_a_token_in_the_repositorys_own_card_is_not_published_again(source: FolderSource) -> None:
    remember("hf_of_this_run")
    target = Target(REPO, exists=True, readme="# Mine\nrun with hf%5Fof%5Fthis%5Frun")
    publication = operations.Publication({}, {}, source.identity, base_model=REPO)
    with pytest.raises(InputError, match=r"README.md holds a token"):
        operations.operations(target, publication)
    assert operations.operations(replace(target, readme="# Mine"), publication)


def saving(folder: Path, output_dir: Path) -> None:
    """What a run that saves checks before the work, for a model with code of its own."""
    (folder / "modeling_own.py").write_text("class OwnModel: ...")
    source = FolderSource(folder, with_code=True)
    asked = make_settings(
        model_path=str(folder), repo_name=None, save_only=True, output_dir=str(output_dir)
    )
    release.announce(source, None, asked, ["int8"], Console({}, io.StringIO()))


@pytest.mark.fault(
    "machine",
    "A folder or a link lies where the model's code or the README would be saved",
    "Exit 2 before the work; nothing is written through it.",
)
@pytest.mark.parametrize("name", ["modeling_own.py", "README.md"])
@pytest.mark.parametrize("what", ["folder", "link", "loop"])
def test_what_is_no_file_is_not_replaced_by_a_saved_one(
    source: FolderSource, tmp_path: Path, name: str, what: str
) -> None:
    place = tmp_path / "out" / name
    place.parent.mkdir()
    if what == "folder":
        place.mkdir()
    else:
        place.symlink_to(tmp_path / "elsewhere" if what == "link" else place)
    with pytest.raises(InputError, match=f"{name} (?:exists|is)"):
        saving(source.folder, place.parent)
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.fault(
    "machine",
    "Other code lies in the output folder under the name of the model's",
    "Exit 2; it stays.",
)
def test_foreign_code_in_the_output_folder_is_never_replaced(
    source: FolderSource, tmp_path: Path
) -> None:
    code = tmp_path / "out/modeling_own.py"
    code.parent.mkdir()
    code.write_text("years of work")
    with pytest.raises(InputError, match=r"modeling_own.py exists, and is not the code"):
        saving(source.folder, code.parent)
    assert code.read_text() == "years of work"
    code.write_text("class OwnModel: ...")
    saving(source.folder, code.parent)  # what an earlier run has put there
    saving(source.folder, source.folder)  # or the checkpoint's own
