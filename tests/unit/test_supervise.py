"""The first process and its child: what the one does when the other ends."""

import signal
import subprocess
import sys
import textwrap

import pytest

_OUTLINE = """
import os, signal, sys, time
from smolquant.supervise import run_in_child

def killed(number):
    print(f"told by the first process, {number}", flush=True)
    return 4 if number is None else 128 + number

"""


def start(child: str, before: str = "") -> subprocess.Popen[str]:
    """A first process that does ``before``, and whose child does ``child``."""
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"{_OUTLINE}\n{before}\nrun_in_child(killed)\n{textwrap.dedent(child)}",
        ],
        stdout=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": ":".join(sys.path)},
    )


@pytest.mark.parametrize("code", [0, 2, 143])
def test_it_ends_as_its_child_does(code: int) -> None:
    process = start(f"print('the child speaks'); sys.exit({code})")
    assert process.communicate(timeout=30)[0] == "the child speaks\n"
    assert process.returncode == code


@pytest.mark.fault(
    "cancelled",
    "The kernel kills the run in its container",
    "Exit 4 with an annotation: memory ran out.",
)
def test_a_killed_child_is_told_of() -> None:
    process = start("os.kill(os.getpid(), signal.SIGKILL)")
    assert process.communicate(timeout=30)[0] == "told by the first process, None\n"
    assert process.returncode == 4


@pytest.mark.fault(
    "cancelled",
    "The run crashes in its container",
    "The exit code tells the signal.",
)
def test_a_crash_keeps_its_number() -> None:
    process = start("os.kill(os.getpid(), signal.SIGSEGV)")
    assert process.communicate(timeout=30)[0] == ""
    assert process.returncode == 139


@pytest.mark.fault(
    "cancelled",
    "A signal arrives while the container starts",
    "It is passed on.",
)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_comes_while_the_child_is_made_is_passed_on(number: signal.Signals) -> None:
    process = start(
        "time.sleep(20)",
        before=f"""
fork = os.fork
def signalled_fork():
    child = fork()
    if child:
        os.kill(os.getpid(), {int(number)})
    return child
os.fork = signalled_fork
""",
    )
    process.communicate(timeout=15)
    assert process.returncode == 128 + number


@pytest.mark.fault(
    "cancelled",
    "A signal reaches the container",
    "The run ends by it: 130 or 143.",
)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_child(number: signal.Signals) -> None:
    process = start(
        """
        signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        print("ready", flush=True)
        time.sleep(30)
        """
    )
    assert process.stdout
    process.stdout.readline()
    process.send_signal(number)
    process.communicate(timeout=10)
    assert process.returncode == 128 + number


@pytest.mark.fault(
    "cancelled",
    "The run does not end by the signal",
    "It is killed before the runner would.",
)
def test_a_child_that_does_not_end_is_killed_in_time() -> None:
    """As one that waits for a thread in a library, which no exception of ours ends."""
    process = start(
        """
        import threading
        stuck = threading.Thread(target=time.sleep, args=(30,))
        stuck.start()
        print("ready", flush=True)
        while True:
            try:
                stuck.join()
            except KeyboardInterrupt:
                pass
        """,
        before="from smolquant import supervise; supervise.GRACE_SECONDS = 0.5",
    )
    assert process.stdout
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=10)[0] == "told by the first process, 2\n"
    assert process.returncode == 130


def test_another_processs_end_is_not_the_runs() -> None:
    """As the first process of a container it is handed every orphan."""
    process = start("time.sleep(0.2); sys.exit(3)", before="os.fork() or os._exit(9)")
    process.communicate(timeout=30)
    assert process.returncode == 3
