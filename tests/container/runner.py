"""GitHub's runner, as far as a Docker container action can see it.

The real one is a program of its own; what it does for a container action is one ``docker run`` with
fixed mounts, the step's inputs and the context as variables, and three files to write commands to.
"""

import os
import re
import secrets
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from container.engine import Engine

# Who owns a checkout: as on GitHub's hosted machines, where these tests can arrange that.
OWNER = (1001, 127) if os.geteuid() == 0 else (os.getuid(), os.getgid())

# Programs that nothing in the image may find through the workflow's own PATH.
_HOSTILE_PROGRAMS = ("python", "python3", "sh", "bash", "git", "nvidia-smi", "smolquant")

_CONTEXT = {
    "CI": "true",
    "GITHUB_ACTIONS": "true",
    "GITHUB_ACTION": "__self",
    "GITHUB_ACTOR": "octocat",
    "GITHUB_API_URL": "https://api.github.com",
    "GITHUB_EVENT_NAME": "push",
    "GITHUB_EVENT_PATH": "/github/workflow/event.json",
    "GITHUB_JOB": "quantize",
    "GITHUB_REF": "refs/tags/v1.0",
    "GITHUB_REF_NAME": "v1.0",
    "GITHUB_REF_TYPE": "tag",
    "GITHUB_REPOSITORY": "octocat/model",
    "GITHUB_RUN_ATTEMPT": "1",
    "GITHUB_RUN_ID": "1234567890",
    "GITHUB_RUN_NUMBER": "7",
    "GITHUB_SERVER_URL": "https://github.com",
    "GITHUB_SHA": "0123456789abcdef0123456789abcdef01234567",
    "GITHUB_WORKFLOW": "release",
    "GITHUB_WORKSPACE": "/github/workspace",
    "HOME": "/github/home",
    "RUNNER_ARCH": "X64",
    "RUNNER_NAME": "GitHub Actions 1",
    "RUNNER_OS": "Linux",
    "RUNNER_TEMP": "/github/runner_temp",
    "RUNNER_TOOL_CACHE": "/opt/hostedtoolcache",
}

_COMMAND_FILES = {
    "GITHUB_ENV": "set_env",
    "GITHUB_OUTPUT": "set_output",
    "GITHUB_PATH": "add_path",
    "GITHUB_STATE": "save_state",
    "GITHUB_STEP_SUMMARY": "step_summary",
}

_ANNOTATION = re.compile(r"^::(?P<kind>error|warning|notice)(?P<properties> [^:]*)?::(?P<text>.*)$")


@dataclass(frozen=True)
class Finished:
    """What a step left behind."""

    returncode: int
    stdout: str
    stderr: str
    outputs: dict[str, str]
    summary: str
    seconds: float

    def annotations(self, kind: str) -> list[str]:
        """The texts of the step's annotations of one kind, unescaped as GitHub shows them."""
        found = (_ANNOTATION.match(line) for line in self.stdout.splitlines())
        return [
            match["text"].replace("%0D", "\r").replace("%0A", "\n").replace("%25", "%")
            for match in found
            if match and match["kind"] == kind
        ]


@dataclass
class Step:
    """A step under way."""

    client: subprocess.Popen[str]
    container: str
    engine: Engine
    command_files: Path
    suffix: str
    started: float = field(default_factory=time.monotonic)

    def cancel(self, number: signal.Signals = signal.SIGINT) -> None:
        """A cancelled workflow: the runner signals its docker client, which passes it on."""
        self.client.send_signal(number)

    def wait(self, timeout: float = 300) -> Finished:
        """Wait for the end, at most ``timeout`` seconds, after which the container is removed."""
        try:
            stdout, stderr = self.client.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.engine.docker("rm", "--force", self.container)
            stdout, stderr = self.client.communicate(timeout=30)
            raise AssertionError(f"no end after {timeout} s:\n{stdout}\n{stderr}") from None
        return Finished(
            returncode=self.client.returncode,
            stdout=stdout,
            stderr=stderr,
            outputs=parse_outputs(self._command_file("set_output")),
            summary=self._command_file("step_summary"),
            seconds=time.monotonic() - self.started,
        )

    def state(self) -> dict[str, str]:
        """What the step saved for its post step, which finds it as STATE_ variables."""
        return parse_outputs(self._command_file("save_state"))

    def _command_file(self, name: str) -> str:
        return (self.command_files / f"{name}_{self.suffix}").read_text()


@dataclass(frozen=True)
class Runner:
    """Runs an image as the steps of one job, in the folders under ``root``."""

    engine: Engine
    image: str
    root: Path

    def __post_init__(self) -> None:
        for name in ("home", "file_commands", "workflow", "runner_temp", "workspace"):
            (self.root / name).mkdir(parents=True)
        (self.root / "workflow" / "event.json").write_text("{}")
        hostile = self.workspace / "hostile-bin"
        hostile.mkdir()
        for name in _HOSTILE_PROGRAMS:
            program = hostile / name
            program.write_text("#!/bin/sh\necho hostile program >&2\nexit 99\n")
            program.chmod(0o755)
        for path in (self.workspace, hostile, *hostile.iterdir()):
            os.chown(path, *OWNER)

    @property
    def workspace(self) -> Path:
        """The checkout, on this side."""
        return self.root / "workspace"

    def run_as_runner(
        self,
        inputs: Mapping[str, str] | None = None,
        *,
        env: Mapping[str, str] | None = None,
        args: Sequence[str] = (),
        options: Sequence[str] = (),
        timeout: float = 300,
    ) -> Finished:
        """Run one step to its end; see :meth:`start`."""
        return self.start(inputs, env=env, args=args, options=options).wait(timeout)

    def start(
        self,
        inputs: Mapping[str, str] | None = None,
        *,
        env: Mapping[str, str] | None = None,
        args: Sequence[str] = (),
        options: Sequence[str] = (),
    ) -> Step:
        """Start one step with these ``inputs`` (as under ``with:``).

        ``env`` is the workflow's own, ``args`` are the action's, ``options`` go to ``docker run``.
        """
        suffix = secrets.token_hex(16)
        variables = _CONTEXT | {"PATH": "/github/workspace/hostile-bin"}
        for variable, name in _COMMAND_FILES.items():
            path = self.root / "file_commands" / f"{name}_{suffix}"
            path.touch()
            variables[variable] = f"/github/file_commands/{path.name}"
        variables |= env or {}
        for key, value in (inputs or {}).items():
            variables[f"INPUT_{key.replace(' ', '_').upper()}"] = value

        container = f"smolquant-test-{suffix}"
        command = ["run", "--rm", "--name", container, "--workdir", "/github/workspace"]
        for variable in variables:
            command += ["-e", variable]
        command += ["-v", f"{self.engine.socket}:/var/run/docker.sock"]
        for name in ("home", "file_commands", "workflow", "runner_temp", "workspace"):
            command += ["-v", f"{self.root / name}:/github/{name}"]
        client = self.engine.popen(*command, *options, self.image, *args, env=variables)
        return Step(client, container, self.engine, self.root / "file_commands", suffix)


def owners(folder: Path) -> set[tuple[int, int]]:
    """User and group ids of everything in ``folder``."""
    return {(path.lstat().st_uid, path.lstat().st_gid) for path in folder.rglob("*")}


def parse_outputs(text: str) -> dict[str, str]:
    """Read a ``GITHUB_OUTPUT`` file as the runner does; what it would refuse is a ValueError."""
    outputs: dict[str, str] = {}
    lines = iter(text.splitlines())
    for line in lines:
        name, heredoc, delimiter = line.partition("<<")
        if not heredoc or "=" in name:
            name, equals, value = line.partition("=")
            if not equals:
                raise ValueError(f"neither name=value nor name<<delimiter: {line!r}")
            outputs[name] = value
            continue
        value_lines = []
        for value_line in lines:
            if value_line == delimiter:
                break
            value_lines.append(value_line)
        else:
            raise ValueError(f"the value of {name!r} never ends")
        outputs[name] = "\n".join(value_lines)
    return outputs
