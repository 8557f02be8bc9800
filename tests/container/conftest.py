"""A Docker engine, the image built on it, and GitHub's runner to run it."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from container.engine import REPOSITORY, Engine, NoEngineError
from container.runner import Runner

IMAGE = "smolquant:test"


@contextmanager
def _one_worker_at_a_time(common: Path) -> Iterator[bool]:
    """Where pytest runs in several processes; whether this is the first that comes so far."""
    with common.open("a") as note:
        fcntl.flock(note, fcntl.LOCK_EX)
        yield not common.stat().st_size
        note.write("done\n")


@pytest.fixture(scope="session")
def common(tmp_path_factory: pytest.TempPathFactory, testrun_uid: str) -> Path:
    """The beginning of a path that all processes of this run have, and no other run."""
    return tmp_path_factory.getbasetemp().parent / f"container-{testrun_uid}"


def _engine(name: str, common: Path) -> Engine:
    try:
        with _one_worker_at_a_time(common.with_suffix(f".{name}")):
            return Engine.up(name)
    except NoEngineError as reason:
        message = f"no Docker engine ({name}): {reason}"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)


@pytest.fixture(scope="session")
def engine(common: Path) -> Engine:
    """An engine without a GPU: this machine's own, or one from Debian's packages."""
    return _engine("plain", common)


@pytest.fixture(scope="session")
def image(engine: Engine, common: Path) -> str:
    """The default image, built from this checkout."""
    with _one_worker_at_a_time(common.with_suffix(".image")) as is_first:
        if is_first:
            engine.docker("build", "--tag", IMAGE, str(REPOSITORY))
    return IMAGE


@pytest.fixture(scope="session")
def gpu_engine(engine: Engine, image: str, common: Path) -> Engine:
    """An engine that accepts ``--gpus`` although there is no GPU behind it; it has the image."""
    gpu = _engine("gpu", common)
    with _one_worker_at_a_time(common.with_suffix(".received")):
        gpu.receive(image, engine)
    return gpu


@pytest.fixture
def make_runner(image: str, tmp_path: Path) -> Callable[[Engine], Runner]:
    """Makes a runner on an engine, with a new job's empty folders."""
    return lambda engine: Runner(engine, image, tmp_path / "job")


@pytest.fixture
def runner(engine: Engine, make_runner: Callable[[Engine], Runner]) -> Runner:
    """A runner on the engine without a GPU."""
    return make_runner(engine)
