"""A process computes with no more threads than its container or job may have CPUs."""

from pathlib import Path

import pytest
import torch

from smolquant import threads


@pytest.fixture
def groups(tmp_path: Path) -> Path:
    """The root of control groups without limits; this process is in the job's."""
    (tmp_path / "own").write_text("0::/job/step\n")
    (tmp_path / "root/job/step").mkdir(parents=True)
    return tmp_path / "root"


def allowed(groups: Path, cpus: int) -> int:
    return threads.allowed_cpus(cpus, groups, groups.parent / "own")


def test_without_a_limit_it_is_the_cores_it_may_be_scheduled_on(groups: Path) -> None:
    assert allowed(groups, 6) == 6
    (groups / "job/step/cpu.max").write_text("max 100000\n")
    assert allowed(groups, 6) == 6


@pytest.mark.parametrize(
    ("quota", "cpus"), [("200000", 2), ("150000", 2), ("20000", 1), ("9900000", 6)]
)
def test_a_quota_limits_it_and_part_of_a_cpu_counts_as_one(
    groups: Path, quota: str, cpus: int
) -> None:
    (groups / "job/step/cpu.max").write_text(f"{quota} 100000\n")
    assert allowed(groups, 6) == cpus


def test_the_tightest_of_nested_groups_counts(groups: Path) -> None:
    (groups / "job/step/cpu.max").write_text("400000 100000\n")
    (groups / "job/cpu.max").write_text("300000 100000\n")
    assert allowed(groups, 6) == 3


def test_version_one(groups: Path) -> None:
    (groups.parent / "own").write_text("4:memory:/other\n3:cpu,cpuacct:/job\n")
    folder = groups / "cpu/job"
    folder.mkdir(parents=True)
    (folder / "cpu.cfs_period_us").write_text("50000\n")
    (folder / "cpu.cfs_quota_us").write_text("100000\n")
    assert allowed(groups, 6) == 2
    (folder / "cpu.cfs_quota_us").write_text("-1\n")
    assert allowed(groups, 6) == 6


@pytest.mark.parametrize("text", ["", "words and words\n", "100000\n", "100000 0\n"])
def test_what_cannot_be_read_limits_nothing(groups: Path, text: str) -> None:
    (groups / "job/step/cpu.max").write_text(text)
    assert allowed(groups, 6) == 6


def test_a_machine_that_tells_of_no_groups(tmp_path: Path) -> None:
    assert threads.allowed_cpus(6, tmp_path, tmp_path / "nowhere") == 6


def test_torch_gets_fewer_threads_never_more_and_a_choice_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(threads, "allowed_cpus", lambda: 1)
    try:
        assert threads.use_allowed_threads({"OMP_NUM_THREADS": "7"}) == before
        assert threads.use_allowed_threads({}) == 1 == torch.get_num_threads()
        monkeypatch.setattr(threads, "allowed_cpus", lambda: 64)
        assert threads.use_allowed_threads({}) == 1
    finally:
        torch.set_num_threads(before)
