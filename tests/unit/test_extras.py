"""What travels from a checkpoint folder beside config, tokenizer and weights, and what stays."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from smolquant.checkpoint.download import RemoteFile
from smolquant.checkpoint.extras import Extras, find_extras
from smolquant.checkpoint.files import LARGEST_EXTRA, is_license, pictures_shown
from smolquant.checkpoint.folder import FolderSource
from smolquant.errors import InputError
from smolquant.publish.cards import root_card, same_owner_text
from smolquant.publish.front_matter import own_readme
from smolquant.publish.main_model import MainModel, main_model_change

README = "---\nlicense: mit\ntags:\n- mine\n---\n\n# Mine\n\nText.\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint as far as its files' names go."""
    path = tmp_path / "model"
    write(path, {"config.json": "{}", "tokenizer.json": "{}", "model.safetensors": "weights"})
    return path


def write(folder: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def extras(folder: Path) -> Extras:
    return FolderSource(folder).extras


@pytest.mark.parametrize(
    "name",
    [
        *("LICENSE", "LICENSE.txt", "License.md", "LICENCE", "LICENSE-2.0", "LICENSE_CODE"),
        *("NOTICE", "NOTICE.txt", "THIRD_PARTY_NOTICES.txt", "COPYING", "COPYING.LESSER.txt"),
        *("USE_POLICY.md", "ACCEPTABLE_USE_POLICY.md", "TERMS_OF_USE.md", "MODEL_LICENSE"),
        *("Tongyi Qianwen LICENSE AGREEMENT", "Community License for the Model.pdf", "UNLICENSE"),
    ],
)
def test_terms_of_use_are_known_by_their_names(name: str) -> None:
    assert is_license(name)


@pytest.mark.parametrize(
    "name",
    [
        *("license.py", "LICENSE.safetensors", "license_key.json", "original/LICENSE"),
        *(
            "license.p12",
            "LICENSE.mp3",
            "notice.7z",
            "search_terms.txt",
            "licensed.txt",
            "notes.md",
            "LICENSE\n",
            "policy.md",
        ),
    ],
)
def test_other_files_are_no_terms_of_use(name: str) -> None:
    assert not is_license(name)


def test_what_belongs_to_the_model_travels_and_the_rest_is_listed(folder: Path) -> None:
    write(folder, {"README.md": f"{README}\n![loss](assets/loss.png)\n"})
    travelling = ["LICENSE", "NOTICE", "README_zh.md", "CITATION.cff", "SYSTEM_PROMPT.txt"]
    travelling += ["video_preprocessor_config.json", "mergekit_config.yml", "assets/loss.png"]
    staying = ["optimizer.pt", "rng_state.pth", "training_args.bin", "trainer_state.json", ".env"]
    staying += ["NOTES.md", "train.py", "other.png"]
    write(folder, dict.fromkeys([*travelling, *staying], "text"))
    write(folder, {"checkpoint-5/model.safetensors": "w", ".git/HEAD": "x", "runs/LICENSE": "x"})

    found = extras(folder)

    assert sorted(found.names) == sorted(travelling)
    assert sorted(found.left_behind) == sorted([*staying, "checkpoint-5/", ".git/", "runs/"])
    assert found.readme == folder / "README.md"
    assert not found.refused


def test_processor_configs_are_auxiliary_files_without_being_part_of_the_identity(
    folder: Path,
) -> None:
    """Published variants would otherwise become stale."""
    write(folder, {"preprocessor_config.json": "{}"})
    before = FolderSource(folder)
    write(folder, {"video_preprocessor_config.json": "{}", "README.md": README, "LICENSE": "x"})
    after = FolderSource(folder)

    assert after.auxiliary_files == [
        "config.json",
        "preprocessor_config.json",
        "tokenizer.json",
        "video_preprocessor_config.json",
    ]
    assert after.identity == before.identity
    assert after.state == before.state


def test_folders_whose_files_travel_are_not_told_to_stay(folder: Path) -> None:
    write(folder, {"additional_chat_templates/tool.jinja": "{{ x }}", "runs/events.log": "x"})
    assert extras(folder).left_behind == ("runs/",)


@pytest.mark.fault(
    "text",
    "The README shows a picture whose name no file can have",
    "It counts as not there.",
)
def test_a_picture_whose_name_no_file_can_have_is_not_there(folder: Path) -> None:
    write(folder, {"README.md": f"![long]({'x' * 300}.png) ![there](there.png)", "there.png": "x"})
    assert extras(folder).documents == ("there.png",)


@pytest.mark.fault(
    "checkpoint",
    "Extra files are links out of the folder, or large",
    "They stay behind, and that is said.",
)
def test_links_are_followed_only_inside_the_folder_and_large_files_stay(folder: Path) -> None:
    outside = folder.parent / "secret"
    outside.write_text("secret")
    write(folder, {"texts/license.txt": "terms"})
    (folder / "LICENSE").symlink_to("texts/license.txt")
    for name in ("NOTICE", "README.md", "video_preprocessor_config.json"):
        (folder / name).symlink_to(outside)
    with (folder / "COPYING").open("wb") as file:
        file.truncate(LARGEST_EXTRA + 1)

    found = extras(folder)

    assert found.names == ("LICENSE",)
    assert found.readme is None
    assert set(found.refused) == {
        "NOTICE",
        "README.md",
        "video_preprocessor_config.json",
        "COPYING",
    }
    assert FolderSource(folder).auxiliary_files == ["config.json", "tokenizer.json"]


def test_a_snapshot_in_the_hubs_cache_links_to_its_blobs(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "abc"
    write(tmp_path / "models--a--b" / "blobs", {"1": "terms"})
    snapshot.mkdir(parents=True)
    (snapshot / "LICENSE").symlink_to("../../blobs/1")
    assert find_extras(snapshot, ()).licenses == ("LICENSE",)


def test_pictures_that_a_readme_shows() -> None:
    shown = pictures_shown(
        '![a](./a.png) ![b](img/b%20c.SVG "title") <img width="3" src="d.jpg"> ![](a.png)'
        "![x](https://host/x.png) ![x](/etc/x.png) ![x](../x.png) ![x](.git/x.png) ![x](notes.md)"
        "[not shown](z.png)"
    )
    assert shown == ["a.png", "d.jpg", "img/b c.SVG"]


def main(folder: Path, *, replace: bool = False) -> MainModel:
    source = FolderSource(folder)
    files = {name: source.folder / name for name in source.extras.names}
    return MainModel(source.files, replace=replace, extras=files)


def remote(main: MainModel, **changes: str) -> dict[str, RemoteFile]:
    """The main model's own files as they would stand at a root."""
    return {
        name: RemoteFile(file.size, changes.get(name, file.sha256), "")
        for name, file in main.files.items()
    }


@pytest.mark.fault(
    "hub",
    "A file that would travel is in the repository already",
    "It is not replaced.",
)
def test_extra_files_go_to_the_root_with_the_model_and_replace_nothing(folder: Path) -> None:
    write(folder, {"LICENSE": "x", "CITATION.cff": "y"})
    asked = main(folder)
    assert {"LICENSE", "CITATION.cff", "config.json"} <= main_model_change(asked, {}).add.keys()
    there = {"LICENSE": RemoteFile(5, None, "0" * 40)}
    assert "LICENSE" not in main_model_change(asked, there).add


def test_beside_equal_weights_only_a_missing_license_is_added(folder: Path) -> None:
    write(folder, {"LICENSE": "x", "CITATION.cff": "y"})
    asked = main(folder)
    there = remote(asked)
    assert main_model_change(asked, there).add == {"LICENSE": folder / "LICENSE"}
    there["LICENSE"] = RemoteFile(5, None, "0" * 40)
    assert not main_model_change(asked, there).add


def test_a_successor_brings_its_own_license(folder: Path) -> None:
    write(folder, {"LICENSE": "x"})
    asked = main(folder, replace=True)
    there = remote(asked, **{"model.safetensors": "0" * 64})
    there["LICENSE"] = RemoteFile(5, None, "0" * 40)
    assert "LICENSE" in main_model_change(asked, there).add


def rendered(readme: str) -> str:
    return root_card(readme, {}, location="a/b", has_main_model=True, source_identity=None)


@pytest.mark.parametrize(
    ("edit", "same"),
    [
        (lambda text: text, True),
        (lambda text: text.replace("\n", "\r\n"), True),
        (lambda text: text.replace("Text.", "Another text."), False),
        (lambda text: text.replace("license: mit", "license: other"), False),
    ],
)
def test_a_readme_is_compared_without_our_part(edit: Callable[[str], str], same: bool) -> None:
    assert same_owner_text(README, edit(rendered(README))) == same


@pytest.mark.fault(
    "text",
    "The README is not UTF-8",
    "Exit 2 where the card is made from it; otherwise it counts as none.",
)
def test_a_readme_that_cannot_be_read_matters_only_where_it_is_needed(folder: Path) -> None:
    (folder / "README.md").write_bytes(b"\xff\xfe")
    source = FolderSource(folder)
    assert own_readme(source, needed=False) is None
    with pytest.raises(InputError, match="UTF-8"):
        own_readme(source, needed=True)
