"""The Docker engine under the tests, spoken to by its command line as GitHub's runner does."""

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
_SCRIPT = REPOSITORY / "tools" / "engine.sh"


class NoEngineError(Exception):
    """No engine answers and none can be started here; the message says why."""


@dataclass(frozen=True)
class Engine:
    """An engine that answers at ``host`` (a DOCKER_HOST)."""

    host: str

    @classmethod
    def up(cls, name: str) -> "Engine":
        """The ``plain`` engine, or the ``gpu`` one, which accepts ``--gpus``.

        Raises NoEngineError.
        """
        done = subprocess.run([_SCRIPT, "up", name], check=False, capture_output=True, text=True)
        if done.returncode:
            raise NoEngineError(done.stderr.strip())
        return cls(done.stdout.strip())

    @property
    def socket(self) -> str:
        """The path of the engine's socket."""
        return self.host.removeprefix("unix://")

    def docker(self, *args: str, check: bool = True) -> str:
        """Run the docker client to its end and return what it wrote to stdout."""
        done = subprocess.run(
            [_client(), *args],
            check=False,
            env=self._env(),
            capture_output=True,
            text=True,
            timeout=900,
        )
        if check and done.returncode:
            raise AssertionError(f"docker {args[0]} ended with {done.returncode}:\n{done.stderr}")
        return done.stdout

    def popen(self, *args: str, env: Mapping[str, str]) -> subprocess.Popen[str]:
        """Start the docker client with ``env`` in its environment, for ``-e NAME`` to pass on."""
        return subprocess.Popen(
            [_client(), *args],
            env={**self._env(), **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def shell(
        self, command: str, folder: Path, env: Mapping[str, str]
    ) -> subprocess.CompletedProcess[str]:
        """Run a line of shell in ``folder``, whose docker client speaks to this engine."""
        return subprocess.run(
            ["sh", "-c", command],
            cwd=folder,
            env={**self._env(), **env},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    def receive(self, image: str, source: "Engine") -> None:
        """Have ``image`` here too, as ``source`` has it."""
        identity = ("image", "inspect", "--format", "{{.Id}}", image)
        if self.docker(*identity, check=False) == source.docker(*identity):
            return
        save = subprocess.Popen(
            [_client(), "save", image], env=source._env(), stdout=subprocess.PIPE
        )
        with save:
            subprocess.run(
                [_client(), "load", "--quiet"], env=self._env(), stdin=save.stdout, check=True
            )

    def _env(self) -> dict[str, str]:
        return dict(os.environ) | {"DOCKER_HOST": self.host}


def _client() -> str:
    """The docker client's full path, found before a step's own PATH comes into play."""
    client = shutil.which("docker")
    assert client, "tools/engine.sh leaves a docker client"
    return client
