"""The folder that a killed run leaves to the next."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import smolquant
from smolquant.errors import CheckpointError, MachineError
from smolquant.quantize.workfolder import FinishedShard, WorkFolder, work_folder

HOLD = """
import sys
from pathlib import Path
from smolquant.quantize.workfolder import work_folder
with work_folder(Path(sys.argv[1]), "int8", sys.argv[2]) as work:
    print(work.root, flush=True)
    sys.stdin.read()
"""


def finish(work: WorkFolder, name: str, content: bytes) -> Path:
    path = work.folder / name
    path.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    work.journal.add(FinishedShard(name, len(content), digest, {"w": 0.5}))
    return path


def interrupted(output: Path, key: str) -> Path:
    """A folder with one finished shard and one half-written; its root."""
    with pytest.raises(KeyboardInterrupt), work_folder(output, "int8", key) as work:
        finish(work, "1.safetensors", b"whole")
        (work.folder / "2.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt
    return work.root


def test_what_is_finished_is_found_again_and_nothing_else(tmp_path: Path) -> None:
    interrupted(tmp_path, "a")
    with work_folder(tmp_path, "int8", "a") as work:
        assert work.finished_bytes == 5
        assert work.journal.shards["1.safetensors"].errors == {"w": 0.5}
        assert [path.name for path in work.folder.iterdir()] == ["1.safetensors"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault(
    "cancelled",
    "A finished shard of a killed run was changed",
    "It is made again.",
)
@pytest.mark.parametrize("content", [b"WHOLE", b"who", None])
def test_a_shard_that_is_not_what_was_noted_is_not_trusted(
    tmp_path: Path, content: bytes | None
) -> None:
    shard = interrupted(tmp_path, "a") / "int8/1.safetensors"
    shard.unlink() if content is None else shard.write_bytes(content)
    with work_folder(tmp_path, "int8", "a") as work:
        assert work.finished_bytes == 0
        assert list(work.folder.iterdir()) == []


@pytest.mark.fault(
    "cancelled",
    "A kill cut off the last line of the journal",
    "It is ignored; that shard is made again.",
)
@pytest.mark.parametrize("line", ['{"name": "2.safe', "[]", '{"name": "3"}'])
def test_a_line_cut_off_by_the_kill_is_ignored(tmp_path: Path, line: str) -> None:
    with (interrupted(tmp_path, "a") / "finished.jsonl").open("a") as journal:
        journal.write(line)
    with work_folder(tmp_path, "int8", "a") as work:
        assert set(work.journal.shards) == {"1.safetensors"}


@pytest.mark.fault(
    "checkpoint",
    "A checkpoint is found to be unusable after some shards",
    "Nothing half-made is left.",
)
def test_a_failure_that_would_come_again_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError), work_folder(tmp_path, "int8", "a") as work:
        finish(work, "1.safetensors", b"whole")
        raise CheckpointError("The weight 'w' holds NaN.", hint="")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault(
    "machine",
    "The disk is full while shards are written",
    "Exit 4; finished shards stay for the next run.",
)
def test_a_full_disk_leaves_what_is_finished(tmp_path: Path) -> None:
    with pytest.raises(MachineError), work_folder(tmp_path, "int8", "a") as work:
        finish(work, "1.safetensors", b"whole")
        raise MachineError("No space.", hint="")
    with work_folder(tmp_path, "int8", "a") as work:
        assert work.finished_bytes == 5


@pytest.mark.fault(
    "cancelled",
    "A signal arrives before the first shard is finished",
    "Nothing is left.",
)
def test_an_interruption_before_the_first_shard_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), work_folder(tmp_path, "int8", "a"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault(
    "meanwhile",
    "Two runs make the same variant in one folder",
    "They never share a working folder.",
)
def test_two_processes_never_share_a_folder(tmp_path: Path) -> None:
    """Neither with the same work nor, where the other's looks abandoned, with other work."""
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path), "a"],
        env={**os.environ, "PYTHONPATH": str(Path(smolquant.__file__).parent.parent)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout is not None
    theirs = Path(other.stdout.readline().strip())
    try:
        for key in ("a", "b"):
            with work_folder(tmp_path, "int8", key) as work:
                assert work.root != theirs
                assert theirs.is_dir()
        other.kill()
        other.wait()
        with work_folder(tmp_path, "int8", "b"):
            assert not theirs.exists(), "its process is dead, and other work was asked for"
    finally:
        other.kill()
        other.communicate()
