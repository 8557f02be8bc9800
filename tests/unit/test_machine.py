"""Refusals before the work, with the numbers."""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest

from limits import nobodys_rights
from smolquant import machine
from smolquant.checkpoint.source import Download
from smolquant.errors import MachineError
from smolquant.machine import DiskUse, OutputBytes

GB = 10**9
HERE = Path("/proc")
"""Another file system than the tests' own folder, as a cache may be on."""


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[Path, int]:
    """Free bytes of a folder; a disk that is really full cannot be had."""
    sizes: dict[Path, int] = {}
    monkeypatch.setattr(
        shutil, "disk_usage", lambda folder: SimpleNamespace(free=sizes.get(folder, 0))
    )
    return sizes


@pytest.mark.fault(
    "machine",
    "The disk does not hold the variants, or the model",
    "Exit 4 with both sizes, before the first byte is fetched.",
)
def test_variants_alone(tmp_path: Path, free: dict[Path, int]) -> None:
    free[tmp_path] = GB
    machine.require_disk(tmp_path, GB, Download(0, tmp_path))
    with pytest.raises(MachineError, match=r"take 1\.50 GB, and .* has 1\.00 GB free"):
        machine.require_disk(tmp_path, 3 * GB // 2, Download(0, tmp_path))


@pytest.mark.fault(
    "machine",
    "--output-dir cannot be written to",
    "Exit 4, before the work.",
)
def test_a_folder_of_somebody_else() -> None:
    with TemporaryDirectory() as name:  # tests' own folders lie in one that is closed to others
        Path(name).chmod(0o555)
        with nobodys_rights(), pytest.raises(PermissionError) as refused:
            machine.require_writable(Path(name, "not/yet/there"))
        assert refused.value.filename == name
        Path(name).chmod(0o755)
        machine.require_writable(Path(name, "not/yet/there"))
        assert not list(Path(name).iterdir())


def test_the_download_counts_on_the_same_disk(tmp_path: Path, free: dict[Path, int]) -> None:
    free[tmp_path] = 3 * GB
    cache = tmp_path / "not/yet/there"
    machine.require_disk(tmp_path, GB, Download(2 * GB, cache))
    with pytest.raises(
        MachineError, match=r"1\.00 GB, and the model, .* 2\.50 GB, and .* 3\.00 GB"
    ):
        machine.require_disk(tmp_path, GB, Download(5 * GB // 2, cache))


def test_disks_of_their_own_are_looked_at_one_by_one(tmp_path: Path, free: dict[Path, int]) -> None:
    free |= {tmp_path: 2 * GB, HERE: 2 * GB}
    machine.require_disk(tmp_path, 2 * GB, Download(2 * GB, HERE))
    with pytest.raises(MachineError, match=r"Fetching the model takes 3\.00 GB, and /proc has 2"):
        machine.require_disk(tmp_path, 2 * GB, Download(3 * GB, HERE))
    with pytest.raises(MachineError, match=r"The variants take 3\.00 GB"):
        machine.require_disk(tmp_path, 3 * GB, Download(2 * GB, HERE))


@pytest.mark.parametrize(
    ("asked", "free_gb", "expected"),
    [
        ("auto", 10, DiskUse()),
        ("auto", 4, DiskUse(stream_source=True)),
        ("auto", 3, DiskUse(stream_source=True, send_shards=True)),
        ("never", 10, DiskUse()),
        ("never", 4, None),
        ("always", 10, DiskUse(stream_source=True, send_shards=True)),
        ("always", 1, None),
        ("auto", 1, None),
    ],
)
def test_the_disk_is_spared_where_it_would_not_hold_everything(
    tmp_path: Path,
    free: dict[Path, int],
    asked: str,
    free_gb: int,
    expected: DiskUse | None,
) -> None:
    free[tmp_path] = free_gb * GB
    output, download = OutputBytes(4 * GB, 2 * GB), Download(6 * GB, tmp_path)
    possible = DiskUse(stream_source=True, send_shards=True)
    if expected is None:
        with pytest.raises(MachineError, match=f"has {free_gb}.00 GB free"):
            machine.choose_disk_use(asked, tmp_path, output, download, possible)
    else:
        assert machine.choose_disk_use(asked, tmp_path, output, download, possible) == expected


@pytest.mark.fault(
    "machine",
    "The disk does not hold the variants, or the model",
    "Exit 4 with both sizes, before the first byte is fetched.",
)
def test_what_is_to_be_measured_must_fit(tmp_path: Path, free: dict[Path, int]) -> None:
    output, download = OutputBytes(4 * GB, 2 * GB), Download(6 * GB, tmp_path)
    possible = DiskUse(stream_source=True)
    free[tmp_path] = 4 * GB
    assert machine.choose_disk_use("auto", tmp_path, output, download, possible) == possible
    free[tmp_path] = 3 * GB
    with pytest.raises(
        MachineError, match=r"variants take 4\.00 GB, and .* has 3\.00 GB"
    ) as caught:
        machine.choose_disk_use("auto", tmp_path, output, download, possible)
    assert "--evaluate never" in caught.value.hint


@pytest.mark.fault(
    "machine",
    "The memory does not hold the run",
    "Exit 4 with both sizes, before the first byte is fetched.",
)
def test_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_bytes", lambda: 10**8)
    with pytest.raises(MachineError, match=r"134 MB of memory .* 100 MB is available"):
        machine.require_memory()
