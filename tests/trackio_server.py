"""A real self-hosted Trackio server for tests."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

TOKEN = "write+token"
TRACKIO = Path(sys.executable).with_name("trackio")


class Server:
    """A self-hosted Trackio, as its documentation has it started."""

    def __init__(self, folder: Path, **environ: str) -> None:
        self._folder = folder
        self._environ = environ
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.process = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        self.process = subprocess.Popen(
            [TRACKIO, "show", "--host", "127.0.0.1"],
            env=os.environ
            | {
                "TRACKIO_DIR": str(self._folder),
                "TRACKIO_WRITE_TOKEN": TOKEN,
                "GRADIO_SERVER_PORT": str(self.port),
                "HF_HUB_OFFLINE": "1",
                "BROWSER": "true",
            }
            | self._environ,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for _ in range(300):
            try:
                httpx.get(f"{self.url}/version")
            except httpx.TransportError:
                time.sleep(0.1)
            else:
                return self.process
        raise AssertionError("the Trackio server did not start")

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def call(self, api: str, **arguments: Any) -> Any:
        """Ask the server, as its dashboard does."""
        answer = httpx.post(f"{self.url}/api/{api}", json={"args": [], "kwargs": arguments})
        answer.raise_for_status()
        return answer.json()["data"]

    def runs(self, project: str) -> list[dict[str, Any]]:
        """The runs of the project, with what is stored for each."""
        found = []
        for run in self.call("get_runs_for_project", project=project):
            which = {"project": project, "run": run["name"], "run_id": run["id"]}
            found.append(
                {
                    **run,
                    "logs": self.call("get_logs", **which),
                    "summary": self.call("get_run_summary", **which),
                    "alerts": self.call("get_alerts", project=project, run_id=run["id"]),
                    "artifacts": self.call("get_run_artifacts", **which)["output"],
                }
            )
        return found
