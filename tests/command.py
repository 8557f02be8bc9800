"""Runs the command as a process of its own, and reads what it left for the runner."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import prepared

_OURS = Path(__file__).resolve().parent.parent / "entrypoint"


@dataclass(frozen=True)
class Run:
    """What a finished run showed and wrote."""

    exit_code: int
    log: str
    """stdout and stderr together."""
    folder: Path

    @property
    def annotations(self) -> list[str]:
        """The error annotations in the log."""
        return [line for line in self.log.splitlines() if line.startswith("::error")]

    @cached_property
    def outputs(self) -> dict[str, str]:
        """The step outputs, parsed as the runner parses them."""
        outputs, lines = {}, iter((self.folder / "github_output").read_text().splitlines())
        for line in lines:
            name, _, delimiter = line.partition("<<")
            value = []
            for part in lines:
                if part == delimiter:
                    break
                value.append(part)
            outputs[name] = "\n".join(value)
        return outputs

    @cached_property
    def summary(self) -> str:
        return (self.folder / "github_summary").read_text()

    @cached_property
    def report(self) -> dict[str, Any]:
        report: dict[str, Any] = json.loads((self.folder / "quantized/report.json").read_text())
        return report


_KILLED_AFTER = """
import os, runpy, signal, sys
from smolquant.quantize.workfolder import Journal

add, left = Journal.add, int(sys.argv.pop(1))

def add_and_die(journal, shard):
    global left
    add(journal, shard)
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)

Journal.add = add_and_die
runpy.run_module("smolquant", run_name="__main__")
"""
"""The command, killed the moment it has noted its n-th finished shard."""


_UNTIMED = """
from smolquant.evaluate import speed

speed.measure_speeds = lambda source, variants, **_: speed._Found().speeds(variants)
"""
"""Measuring tells nothing about speed, as where no model fits in memory: loading and timing take 15 s."""

_TIMED = """
from smolquant.evaluate import speed

speed.SECONDS_A_MODEL = 0.5
"""
"""Each model is timed in as many rounds as at least, and in short ones."""

_RUN = """
import runpy

runpy.run_module("smolquant", run_name="__main__")
"""


def run_smolquant(
    *arguments: str | Path,
    folder: Path,
    hub: Any = None,
    token: str | None = None,
    actions: bool = False,
    env: Mapping[str, str] | None = None,
    script: str | None = None,
    timed: bool = False,
) -> Run:
    """Run ``smolquant`` in ``folder``.

    Args:
        hub: the local Hub to talk to; None leaves no Hub within reach.
        token: given as HF_TOKEN.
        actions: as inside GitHub Actions, with the runner's files fresh.
        env: further variables, such as INPUT_*.
        script: Python that runs the command after a change to its parts.
        timed: whether measuring loads the models and times them, too.
    """
    environ = _environ(hub, token)
    if timed or "--evaluate" in arguments:
        script = (_TIMED if timed else _UNTIMED) + (script or _RUN)
    if actions:
        for name in ("github_output", "github_summary"):
            (folder / name).write_text("")
        environ |= {
            "GITHUB_ACTIONS": "true",
            "GITHUB_OUTPUT": str(folder / "github_output"),
            "GITHUB_STEP_SUMMARY": str(folder / "github_summary"),
            "GITHUB_WORKSPACE": str(folder),
        }
    exit_code, log = prepared.run(
        list(map(str, arguments)),
        folder,
        {**environ, **(env or {})},
        script=script,
        timeout=300,
    )
    return Run(exit_code, log, folder)


def run_killed(
    arguments: Sequence[str], folder: Path, after: int, hub: Any = None, token: str | None = None
) -> None:
    """Run ``smolquant`` in ``folder``, and kill it the moment it has noted its n-th finished shard."""
    exit_code, log = prepared.run(
        [str(after), *arguments],
        folder,
        _environ(hub, token),
        script=_KILLED_AFTER,
        timeout=300,
    )
    assert exit_code == -signal.SIGKILL, log


@dataclass(frozen=True)
class CancelledRun:
    """How a run ended after a signal."""

    exit_code: int
    log: str
    seconds: float
    """From the signal to the end."""


def run_cancelled(
    *arguments: str | Path,
    folder: Path,
    ready: Callable[[str], bool],
    number: signal.Signals,
    hub: Any = None,
    token: str | None = None,
    env: Mapping[str, str] | None = None,
    script: str | None = None,
) -> CancelledRun:
    """Run ``smolquant`` in ``folder``, and send it a signal at a point of its work.

    Args:
        ready: is given each line of the log as it comes, and says whether that point has come.
        script: as for :func:`run_smolquant`.
    """
    process = subprocess.Popen(
        [
            sys.executable,
            *(["-c", script] if script else ["-m", "smolquant"]),
            *map(str, arguments),
        ],
        cwd=folder,
        env={**_environ(hub, token), **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    lines = []
    with process:
        for line in process.stdout:
            lines.append(line)
            if ready(line):
                break
        else:
            raise AssertionError("".join(lines))
        process.send_signal(number)
        asked = time.monotonic()
        try:
            rest, _ = process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        seconds = time.monotonic() - asked
    return CancelledRun(process.returncode, "".join(lines) + rest, seconds)


def _environ(hub: Any, token: str | None) -> dict[str, str]:
    # The home is in the run's own folder, by a name that is the same for all: see prepared.py.
    environ = {**os.environ, "PYTHONPATH": str(_OURS), "HF_HOME": "hf_home"}
    # Measuring takes processes of its own; the tests of it ask for it with --evaluate.
    environ["INPUT_EVALUATE"] = "never"
    environ["HF_ENDPOINT"] = hub.url if hub else "http://127.0.0.1:9"
    if token:
        environ["HF_TOKEN"] = token
    return environ
