"""Available memory is the machine's, or less where a control group says so."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from resident import leave_cache, resident_bytes_of
from smolquant import memory

MEMINFO = "MemTotal:       16000000 kB\nMemAvailable:    8000000 kB\n"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 8 GB available and no limits; its control groups' root."""
    (tmp_path / "meminfo").write_text(MEMINFO)
    (tmp_path / "cgroup").write_text("0::/\n")
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


def limit_v2(folder: Path, limit: str, used: int = 400, cache: int = 100) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\nactive_file 40\ninactive_file {cache - 40}\n")


def test_a_machine_without_limits(machine: Path) -> None:
    assert memory.available_bytes(machine, machine.parent / "cgroup") == 8_000_000 * 1024


def test_a_container_sees_its_own_group_at_the_root(machine: Path) -> None:
    limit_v2(machine, "1000")
    assert memory.available_bytes(machine, machine.parent / "cgroup") == 1000 - 400 + 100


def test_an_unlimited_group_limits_nothing(machine: Path) -> None:
    limit_v2(machine, "max")
    assert memory.available_bytes(machine, machine.parent / "cgroup") == 8_000_000 * 1024


def test_the_tightest_of_nested_groups_counts(machine: Path) -> None:
    (machine.parent / "cgroup").write_text("0::/outer/inner\n")
    limit_v2(machine / "outer", "700")
    limit_v2(machine / "outer/inner", "9000")
    assert memory.available_bytes(machine, machine.parent / "cgroup") == 700 - 400 + 100


def test_version_one(machine: Path) -> None:
    (machine.parent / "cgroup").write_text("12:cpu,cpuacct:/job\n4:memory:/job\n")
    folder = machine / "memory/job"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text("5000\n")
    (folder / "memory.usage_in_bytes").write_text("2000\n")
    (folder / "memory.stat").write_text("total_inactive_file 300\ntotal_active_file 200\n")
    assert memory.available_bytes(machine, machine.parent / "cgroup") == 5000 - 2000 + 500


def test_this_machine_has_some() -> None:
    assert memory.available_bytes() > 10**8


def test_the_peak_is_this_process_s_own_and_stays_when_memory_is_given_back() -> None:
    before = memory.peak_bytes()
    ballast = bytearray(before + 50_000_000)
    ballast[::4096] = b"x" * len(ballast[::4096])
    assert memory.peak_bytes() > before + 40_000_000
    del ballast
    assert memory.peak_bytes() > before + 40_000_000


def test_a_mapped_file_s_pages_leave_the_process_and_are_read_again(tmp_path: Path) -> None:
    """What was written over the mapping stays, too."""
    size = 1 << 24
    (tmp_path / "file").write_bytes(bytes(range(256)) * (size >> 8))
    leave_cache(tmp_path / "file")
    mapped = np.memmap(tmp_path / "file", mode="c")
    mapped[5 * 4096] = 77
    wanted = int(mapped.sum(dtype=np.int64))
    assert resident_bytes_of(tmp_path / "file") == size
    memory.page_out(mapped.ctypes.data + 1, size - 2)
    assert resident_bytes_of(tmp_path / "file") < size / 100
    assert mapped.sum(dtype=np.int64) == wanted


def test_memory_of_no_file_keeps_its_values() -> None:
    values = np.arange(1 << 20)
    memory.page_out(values.ctypes.data, values.nbytes)
    memory.page_out(values.ctypes.data, 1)
    assert (values == np.arange(1 << 20)).all()


_FREE_BLOCKS_BENEATH_ANOTHER = """
import sys
from smolquant import memory

def resident():
    return memory._kilobytes(memory._STATUS, "VmRSS:") * 1024

if sys.argv[1] == "returned":
    memory.return_freed_blocks()
del (largest := [bytearray(30_000_000)])[0]  # raises glibc's own threshold
before = resident()
blocks = [bytearray(b"x") * 20_000_000 for _ in range(10)]
kept = blocks[-1]
blocks.clear()
print(resident() - before)
"""


def test_freed_blocks_leave_the_process() -> None:
    left = {
        mode: int(
            subprocess.run(
                [sys.executable, "-c", _FREE_BLOCKS_BENEATH_ANOTHER, mode],
                check=True,
                capture_output=True,
            ).stdout
        )
        for mode in ("kept", "returned")
    }
    assert left["returned"] < 25_000_000
    assert left["kept"] > 150_000_000


@pytest.mark.fault(
    "machine",
    "Memory runs out, in whichever library",
    "Exit 4 and not 1.",
)
def test_out_of_memory_is_told_from_other_failures_however_it_is_raised() -> None:
    import torch

    with pytest.raises(RuntimeError) as on_a_cpu:
        torch.empty(10**15, dtype=torch.int8, device="cpu")
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory."), on_a_cpu.value):
        assert memory.is_out_of_memory(error)
    for other in (RuntimeError("shapes differ"), OSError(28, "No space left"), KeyError("w")):
        assert not memory.is_out_of_memory(other)


def test_garbage_is_given_back_though_it_is_seldom_looked_for() -> None:
    import gc

    class Ring:
        """Two of these refer to each other, as modules with hooks do."""

        def __init__(self) -> None:
            self.block, self.other = bytearray(64 << 20), self

    thresholds = gc.get_threshold()
    gc.set_threshold(10**6)
    try:
        Ring()
        held = _resident()
        memory.give_back_garbage()
        assert held - _resident() > 50 << 20
    finally:
        gc.set_threshold(*thresholds)


def _resident() -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) * 1024
