"""SIGINT and SIGTERM end a run in whichever phase it is, in time, with one message and no traceback."""

import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from command import CancelledRun, run_cancelled
from conftest import WRITE
from localhub import LocalHub, blobs

IN_TIME = 7.0
"""Seconds; a runner kills a container 10 s after its first signal."""

pytestmark = pytest.mark.fault(
    "cancelled",
    "SIGINT or SIGTERM comes while the run imports, quantizes, measures, uploads or waits for the Hub",
    "Exit 130 or 143 within 7 s, in one message and without a traceback; nothing is published after that.",
)

Cancel = Callable[..., CancelledRun]


@pytest.fixture
def cancelled(tmp_path: Path) -> Iterator[Cancel]:
    """Runs the command and cancels it; it must end as it promises, and leave no process behind."""

    def run(*arguments: str | Path, at: str, number: signal.Signals, **options: object) -> None:
        ready = options.pop("ready", None) or (lambda line: at in line)
        run = run_cancelled(*arguments, folder=tmp_path, ready=ready, number=number, **options)  # type: ignore[arg-type]
        assert run.exit_code == 128 + number, run.log
        assert run.seconds < IN_TIME, run.log
        assert "Traceback" not in run.log, run.log
        assert run.log.count("error: The run was cancelled") == 1, run.log

    yield run  # type: ignore[misc]
    deadline = time.monotonic() + 20
    while left := [
        process for process in Path("/proc").glob("[0-9]*") if works_in(process, tmp_path)
    ]:
        assert time.monotonic() < deadline, [(one / "cmdline").read_text() for one in left]
        time.sleep(0.1)


def works_in(process: Path, folder: Path) -> bool:
    try:
        return (process / "cwd").readlink() == folder
    except OSError:  # it has ended, or is another's
        return False


IMPORTS_LOSE_IT = """
import runpy, sys, time
from smolquant import cancellation

cancellation.GRACE_SECONDS = 1.0

class Loses:
    def find_spec(self, name, path=None, target=None):
        if name != "transformers":
            return None
        sys.meta_path.remove(self)
        print("importing", flush=True)
        try:
            time.sleep(20)
        except BaseException:
            pass  # as code in C does that cannot pass an exception on
        time.sleep(20)

sys.meta_path.insert(0, Loses())
runpy.run_module("smolquant", run_name="__main__")
"""


def test_while_it_imports_libraries_that_lose_the_exception(
    cancelled: Cancel, checkpoint: Path
) -> None:
    arguments = ("quantize", checkpoint, "--save-only")
    cancelled(*arguments, at="importing", number=signal.SIGINT, script=IMPORTS_LOSE_IT)


def test_while_it_quantizes(cancelled: Cancel, smollm2: Path, tmp_path: Path) -> None:
    arguments = ("quantize", smollm2, "--save-only", "--quant-type", "both")
    cancelled(*arguments, at="== Quantize", number=signal.SIGTERM)
    assert not list((tmp_path / "quantized").glob("int*"))


def test_while_it_measures(cancelled: Cancel, checkpoint: Path) -> None:
    arguments = ("quantize", checkpoint, "--save-only", "--evaluate", "always")
    cancelled(*arguments, at="== Evaluate", number=signal.SIGINT)


def test_while_it_uploads_to_a_hub_that_stops_reading(
    cancelled: Cancel, checkpoint: Path, hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck, released = threading.Event(), threading.Event()
    write = blobs.Incoming.write

    def write_some(incoming: blobs.Incoming, chunk: bytes) -> None:
        write(incoming, chunk)
        if incoming.size > 100_000:  # weights
            stuck.set()
            released.wait(60)

    def ready(line: str) -> bool:
        return "Uploading" in line and stuck.wait(60)

    monkeypatch.setattr(blobs.Incoming, "write", write_some)
    cancelled(
        *("quantize", checkpoint, "alice/new"),
        at="",
        ready=ready,
        number=signal.SIGTERM,
        hub=hub,
        token=WRITE.value,
    )
    released.set()
    assert len(hub.repo("alice/new").commits) == 1, "nothing is committed"


def test_while_it_waits_for_a_silent_hub(cancelled: Cancel) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(60)
        connections = []

        def ready(line: str) -> bool:
            connections.append(silent.accept()[0])
            return True

        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        cancelled(
            *("quantize", "octocat/model", "--save-only"),
            at="",
            ready=ready,
            number=signal.SIGINT,
            env={"HF_ENDPOINT": address},
        )
        for connection in connections:
            connection.close()
