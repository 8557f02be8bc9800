"""Refusals before the work, with the numbers."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from smolquant import machine
from smolquant.checkpoint.source import Download
from smolquant.errors import MachineError

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


def test_variants_alone(tmp_path: Path, free: dict[Path, int]) -> None:
    free[tmp_path] = GB
    machine.require_disk(tmp_path, GB, Download(0, tmp_path))
    with pytest.raises(MachineError, match=r"take 1\.50 GB, and .* has 1\.00 GB free"):
        machine.require_disk(tmp_path, 3 * GB // 2, Download(0, tmp_path))


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


def test_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_bytes", lambda: 10**8)
    with pytest.raises(MachineError, match=r"134 MB of memory .* 100 MB can be had"):
        machine.require_memory()
