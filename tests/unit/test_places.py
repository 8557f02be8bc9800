"""A place that no folder can be in is refused at once, with the reason and the next step."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from smolquant import cli
from smolquant.errors import InputError
from smolquant.places import is_file, is_folder, is_on_mount, output_folder
from smolquant.report.console import Console

LONG = "a" * 300


@pytest.fixture
def places(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("a file")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    return tmp_path


@pytest.mark.fault(
    "input",
    "--output-dir is a file, a link to nothing or to itself, too long, too deep, or not UTF-8",
    "Exit 2 with the reason.",
)
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("file", "it is not a folder"),
        ("file/below", "not a directory"),
        ("dangling", "dangling is a link to nothing"),
        ("dangling/below", "dangling is a link to nothing"),
        ("loop", "too many levels of symbolic links"),
        (LONG, "file name too long"),
        ("folder/" * 900, "file name too long|folders deep"),
        ("a/" * 1500, "more than 200 folders deep"),
        (os.fsdecode(b"caf\xe9"), "not UTF-8"),
    ],
)
def test_what_cannot_be_the_output_folder_is_refused(places: Path, name: str, why: str) -> None:
    with pytest.raises(InputError, match=why) as refused:
        output_folder(f"{places}/{name}")
    assert "--output-dir" in refused.value.message
    assert len(str(refused.value)) < 900


@pytest.mark.parametrize("name", ["folder", "link", "link/below", "new", "new/below"])
def test_a_folder_that_can_be_made_is_taken(places: Path, name: str) -> None:
    assert output_folder(str(places / name)) == places / name
    assert not (places / "new").exists()


@pytest.mark.fault(
    "input",
    "A text is too long for a path, holds a null, or names a link to itself",
    "It names neither a file nor a folder.",
)
def test_a_text_that_is_no_path_names_nothing(places: Path) -> None:
    assert is_folder(str(places)) and is_file(str(places / "file"))
    for text in (LONG, "a\0b", str(places / "loop")):
        assert not is_folder(text) and not is_file(text)


@pytest.mark.fault(
    "input",
    "The model, --output-dir or --eval-text is no place that can be used",
    "Exit 2 with what to do, and no traceback.",
)
@pytest.mark.parametrize("option", [["--output-dir", "file"], ["--eval-text", LONG], []])
def test_the_command_ends_with_2_and_no_traceback(
    places: Path, monkeypatch: pytest.MonkeyPatch, option: list[str]
) -> None:
    monkeypatch.chdir(places)
    log = io.StringIO()
    model = "folder" if option else LONG
    assert cli.run(["quantize", model, "--save-only", *option], Console({}, log)) == 2
    assert "what to do: " in log.getvalue()
    assert "Traceback" not in log.getvalue()


@pytest.mark.fault(
    "machine",
    "stdin, stdout and stderr are closed",
    "No file of the run's gets a number of theirs, so nothing is printed into it.",
)
def test_standard_streams_that_were_closed_are_no_files_of_ours(tmp_path: Path) -> None:
    """Whoever writes to number 2 would write into the first file that is opened."""
    program = (
        "import sys; from smolquant.cli import _hold_standard_streams as hold; hold();"
        "print('lost'); file = open('out', 'w'); file.write(str(file.fileno()))"
    )
    closed = f'exec {sys.executable} -c "{program}" <&- >&- 2>&-'
    subprocess.run(["bash", "-c", closed], cwd=tmp_path, check=True)
    assert int((tmp_path / "out").read_text()) > 2


MOUNTS = r"""22 1 0:21 / / rw,relatime - overlay overlay rw,lowerdir=/l
23 22 0:22 / /proc rw - proc proc rw
24 22 8:1 /home/me/out /data/my\040out rw,relatime - ext4 /dev/sda1 rw
odd
"""


@pytest.mark.parametrize(
    ("place", "is_mounted"),
    [
        ("/data/my out", True),
        ("/data/my out/quantized", True),
        ("/data/my out/../quantized", False),
        ("/work", False),
        ("/", False),
        ("/data/my\\040out", False),
        ("/procedures", False),
    ],
)
def test_a_folder_is_on_a_mount_or_inside_the_container(place: str, is_mounted: bool) -> None:
    assert is_on_mount(Path(place), MOUNTS) is is_mounted
