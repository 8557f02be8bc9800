"""The two locks answer pyproject.toml and differ in nothing but torch's build. No engine needed."""

import pytest

from container.engine import REPOSITORY
from locks import Lock, read_lock, requirements, unanswered

CPU = read_lock(REPOSITORY / "requirements" / "cpu.txt")
CUDA = read_lock(REPOSITORY / "requirements" / "cuda.txt")


@pytest.mark.parametrize("lock", [CPU, CUDA], ids=["cpu", "cuda"])
def test_a_lock_holds_what_pyproject_asks_for(lock: Lock) -> None:
    assert not list(unanswered(lock, requirements(REPOSITORY / "pyproject.toml")))


@pytest.mark.parametrize("lock", [CPU, CUDA], ids=["cpu", "cuda"])
def test_every_package_has_hashes(lock: Lock) -> None:
    assert [name for name, hashes in lock.hashes.items() if not hashes] == []


def test_the_locks_differ_in_torchs_build_alone() -> None:
    cuda_only = CUDA.versions.keys() - CPU.versions.keys()
    assert all(name == "triton" or name.startswith(("cuda-", "nvidia-")) for name in cuda_only)
    shared = {name: CUDA.versions.get(name) for name in CPU.versions}
    assert shared == CPU.versions | {"torch": CPU.versions["torch"].removesuffix("+cpu")}
    assert CPU.versions["torch"].endswith("+cpu")
