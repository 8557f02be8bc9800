"""A signal ends the process in time, whatever a library makes of the exception that it raises."""

import signal
import subprocess
import sys
import textwrap
import time

import pytest

_OUTLINE = """
import signal, sys, threading, time
from smolquant import cancellation
from smolquant.errors import Cancelled

cancellation.GRACE_SECONDS = 0.5

def tell(cancelled):
    print("told by the other thread", flush=True)
    return cancelled.exit_code

def wait():
    print("ready", flush=True)
    time.sleep(30)

def work():
{work}

signal.pthread_sigmask(signal.SIG_BLOCK, cancellation.SIGNALS)
{before}
cancellation.listen(tell)
try:
    cancellation.deliver()
    work()
    error = None
except BaseException as raised:
    cancellation.begin_to_tell()
    error = cancellation.received() or raised
    print(f"told by the main thread: {{type(error).__name__}}", flush=True)
{after}
sys.exit(error.exit_code if error else 0)
"""


def ended(work: str, *, before: str = "", after: str = "", signals: int = 1) -> tuple[int, str]:
    """Exit code and output of a process that is cancelled as soon as it works."""
    program = _OUTLINE.format(
        work=textwrap.indent(textwrap.dedent(work), "    "), before=before, after=after
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    with process:
        assert process.stdout is not None
        before_that = "".join(iter(process.stdout.readline, "ready\n"))
        started = time.monotonic()
        for _ in range(signals):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.05)
        output = process.communicate(timeout=20)[0]
    assert time.monotonic() - started < 5
    return process.returncode, before_that + output


MAIN, OTHER = "told by the main thread: Cancelled\n", "told by the other thread\n"
LOSSES = {
    "nothing loses it": ("wait()", MAIN),
    "it becomes another error": (
        "try:\n    wait()\nexcept BaseException:\n    raise ImportError('no such module')",
        MAIN,
    ),
    "it is caught": ("try:\n    wait()\nexcept BaseException:\n    time.sleep(30)", OTHER),
    "a destructor drops it": (
        "class Part:\n    def __del__(self): wait()\npart = Part()\ndel part\ntime.sleep(30)",
        MAIN,
    ),
    "a thread is waited for": (
        "other = threading.Thread(target=time.sleep, args=(30,))\nother.start()\n"
        "try:\n    wait()\nfinally:\n    other.join()",
        OTHER,
    ),
}


@pytest.mark.fault(
    "cancelled",
    "A library catches, drops or replaces the exception of a signal, or waits for a thread after it",
    "The run ends as cancelled all the same, five seconds later at the latest, and says so once.",
)
@pytest.mark.parametrize(("work", "told"), LOSSES.values(), ids=list(LOSSES))
def test_the_end_comes_in_time_and_is_told_once(work: str, told: str) -> None:
    assert ended(work) == (143, told)


@pytest.mark.fault(
    "cancelled",
    "A second signal comes while the first is being told of",
    "It changes nothing.",
)
def test_a_second_signal_does_not_disturb_the_telling() -> None:
    after = "time.sleep(0.3)\nprint('and written', flush=True)"
    assert ended("wait()", after=after, signals=3) == (143, MAIN + "and written\n")


@pytest.mark.fault(
    "cancelled",
    "The end of a cancelled run hangs after it was told",
    "It is cut short.",
)
def test_an_end_that_hangs_after_it_was_told_is_cut_short() -> None:
    assert ended("wait()", after="time.sleep(30)") == (143, MAIN)


@pytest.mark.fault(
    "cancelled",
    "A signal comes before the command has loaded its own modules",
    "It waits for the handler, and the run ends as cancelled.",
)
def test_a_signal_that_came_before_the_handler_is_delivered() -> None:
    before = 'print("ready", flush=True); time.sleep(0.5)'
    assert ended("raise AssertionError('not to be reached')", before=before) == (143, MAIN)


def test_what_is_no_cancellation_is_told_as_it_is() -> None:
    dropped = (
        "class Part:\n    def __del__(self): raise KeyError('mine')\npart = Part()\ndel part\n"
    )
    code, output = ended(f"{dropped}wait()")
    assert code == 143
    assert "KeyError: 'mine'" in output
    assert output.endswith(MAIN)
