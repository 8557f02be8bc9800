"""Nothing that lies outside a checkpoint folder is published, whatever the folder links to."""

import os
from pathlib import Path

import pytest

from models import llama, save_with_tokenizer
from smolquant.checkpoint.folder import FolderSource
from smolquant.checkpoint.opening import open_source
from smolquant.errors import CheckpointError
from smolquant.hub import Hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_with_tokenizer(tmp_path / "model", llama(1))


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text("hf_secret")
    return path


@pytest.mark.fault(
    "checkpoint",
    "A file of the checkpoint is a link out of its folder",
    "Exit 3 with the link; what it points to is neither read nor published.",
)
@pytest.mark.parametrize(
    "name",
    ["tokenizer_extra.json", "chat_template.jinja", "config.json", "generation_config.json"],
)
def test_a_file_that_links_out_of_the_folder_is_refused_by_name(
    folder: Path, secret: Path, name: str
) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    with pytest.raises(CheckpointError, match=f"{name} is a link out") as refusal:
        FolderSource(folder)
    assert "cp -L" in refusal.value.hint


@pytest.mark.fault(
    "checkpoint",
    "A tokenizer file is a link to the process's own environment",
    "Exit 3 with the link; what it points to is neither read nor published.",
)
def test_a_file_of_proc_is_no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer_extra.json").symlink_to("/proc/self/environ")
    with pytest.raises(CheckpointError, match=r"tokenizer_extra.json is a link out"):
        FolderSource(folder)


@pytest.mark.fault(
    "checkpoint",
    "A folder of the checkpoint is a link elsewhere",
    "Exit 3 with the link; what it points to is neither read nor published.",
)
def test_a_linked_folder_of_templates_is_refused(folder: Path, secret: Path) -> None:
    elsewhere = secret.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "tool.jinja").write_text("hf_secret")
    (folder / "additional_chat_templates").symlink_to(elsewhere)
    with pytest.raises(CheckpointError, match=r"additional_chat_templates/tool.jinja"):
        FolderSource(folder)


@pytest.mark.fault(
    "checkpoint",
    "Model code is a link out of the folder",
    "Exit 3 with the link; what it points to is neither read nor published.",
)
def test_model_code_that_links_out_is_refused(folder: Path, secret: Path) -> None:
    (folder / "modeling_own.py").symlink_to(secret)
    assert FolderSource(folder).files, "without trust it is not taken along"
    with pytest.raises(CheckpointError, match=r"modeling_own.py"):
        FolderSource(folder, with_code=True)


@pytest.mark.fault(
    "checkpoint",
    "Weights are a link to weights in another folder",
    "They are read, and the link is told.",
)
def test_weights_on_another_disk_are_taken_and_said(folder: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    (folder / "model.safetensors").rename(disk / "weights")
    (folder / "model.safetensors").symlink_to(disk / "weights")
    lines: list[str] = []
    source = open_source(
        Hub(), str(folder), is_folder=True, revision=None, with_code=False, notify=lines.append
    )
    assert source.layout().tensors
    assert lines == [f"model.safetensors is a link to {disk / 'weights'}"]


@pytest.mark.fault(
    "checkpoint",
    "Weights are a link to something that is no weight file",
    "Exit 3 with the link; what it points to is neither read nor published.",
)
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_weights_that_link_to_something_else_are_refused(
    folder: Path, secret: Path, name: str
) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).symlink_to(secret)
    with pytest.raises(CheckpointError, match=f"{name} is a link out"):
        FolderSource(folder)


@pytest.mark.fault(
    "checkpoint",
    "The index is a link out of the folder",
    "Exit 3 with the link; what it points to is neither read nor published.",
)
def test_an_index_that_links_out_is_refused(folder: Path, secret: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").symlink_to(secret)
    with pytest.raises(CheckpointError, match=r"model.safetensors.index.json is a link out"):
        FolderSource(folder)


def test_links_inside_the_folder_and_of_the_hubs_cache_are_followed(
    folder: Path, tmp_path: Path
) -> None:
    (folder / "originals").mkdir()
    (folder / "config.json").rename(folder / "originals/config.json")
    (folder / "config.json").symlink_to("originals/config.json")
    assert "config.json" in FolderSource(folder).files

    snapshot = tmp_path / "models--them--tiny/snapshots/abc"
    blobs = tmp_path / "models--them--tiny/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(p for p in folder.iterdir() if p.is_file()):
        (blobs / str(number)).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    source = FolderSource(snapshot)
    assert source.linked_weights == []
    assert source.layout().tensors


@pytest.mark.fault(
    "checkpoint",
    "A device, a pipe, or a link to nothing has the name of a model's file",
    "Exit 3 with the file; nobody waits for it.",
)
@pytest.mark.parametrize(
    ("target", "what"),
    [
        ("/dev/null", "is a device"),
        ("/dev/stdin", "is a device|is a link out"),
        ("/proc/self/environ", "is a link out"),
        ("nowhere", "is a link to nothing"),
        ("tokenizer_other.json", "is a link to nothing"),
    ],
)
def test_what_is_no_file_is_refused_by_name(folder: Path, target: str, what: str) -> None:
    (folder / "tokenizer_other.json").symlink_to(target)
    with pytest.raises(CheckpointError, match=f"tokenizer_other.json (?:{what})"):
        FolderSource(folder)


@pytest.mark.fault(
    "checkpoint",
    "A device, a pipe, or a link to nothing has the name of a model's file",
    "Exit 3 with the file; nobody waits for it.",
)
def test_a_pipe_is_refused_before_anything_waits_for_it(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model.safetensors is a device, a pipe"):
        FolderSource(folder)


@pytest.mark.fault(
    "checkpoint",
    "A pipe or a link to nothing lies beside the model, under no name of a model's file",
    "It is no matter.",
)
def test_what_is_no_file_of_a_model_may_be_anything(folder: Path) -> None:
    os.mkfifo(folder / "notes.pipe")
    (folder / "data.link").symlink_to("nowhere")
    assert "config.json" in FolderSource(folder).files
