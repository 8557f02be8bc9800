"""A Docker engine, the image built on it, and GitHub's runner to run it."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from container.engine import REPOSITORY, Engine, NoEngineError
from container.runner import Runner

IMAGE = "smolquant:test"


def _engine(name: str) -> Engine:
    try:
        return Engine.up(name)
    except NoEngineError as reason:
        message = f"no Docker engine ({name}): {reason}"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)


@pytest.fixture(scope="session")
def engine() -> Engine:
    """An engine without a GPU: this machine's own, or one from Debian's packages."""
    return _engine("plain")


@pytest.fixture(scope="session")
def image(engine: Engine) -> str:
    """The default image, built from this checkout."""
    engine.docker("build", "--tag", IMAGE, str(REPOSITORY))
    return IMAGE


@pytest.fixture(scope="session")
def gpu_engine(engine: Engine, image: str) -> Engine:
    """An engine that accepts ``--gpus`` although there is no GPU behind it; it has the image."""
    gpu = _engine("gpu")
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
