"""The scheduled workflow for model owners: its commands are the command's own, and it opens one issue."""

import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from smolquant.cli import cli
from smolquant.errors import CheckpointError, SmolquantError

EXAMPLE = Path(__file__).resolve().parents[2] / "examples/canary.yml"
WORKFLOW: dict[Any, Any] = yaml.safe_load(EXAMPLE.read_text("utf-8"))
MODEL = WORKFLOW["env"]["MODEL"]

GH = """#!/bin/sh
case "$2" in
list) printf '%s' "$OPEN" ;;
*) printf '%s\\n' "$@" >> "$ASKED" ;;
esac
"""
"""GitHub's client, as far as what it is asked for: the service itself cannot be had here."""


def step_of(job: str, name: str) -> dict[str, Any]:
    step: dict[str, Any]
    (step,) = (step for step in WORKFLOW["jobs"][job]["steps"] if step.get("name") == name)
    return step


def test_it_runs_a_command_line_that_the_command_takes() -> None:
    (line,) = (one for one in step_of("check", "Check")["run"].splitlines() if "smolquant" in one)
    words = shlex.split(line.partition("||")[0].replace("$MODEL", MODEL))
    assert words[:2] == ["smolquant", "check"]
    context = cli.commands["check"].make_context("check", words[2:])
    assert isinstance(context, click.Context)
    assert context.params["repo_or_folder"] == MODEL


def test_it_looks_each_week_and_what_it_may_do_is_open_an_issue() -> None:
    assert "schedule" in WORKFLOW[True], "YAML reads the key `on` as true"
    assert WORKFLOW["permissions"] == WORKFLOW["jobs"]["check"]["permissions"] == {}
    tell = WORKFLOW["jobs"]["tell"]
    assert tell["permissions"] == {"issues": "write"}
    told = [
        f"needs.check.outputs.code == '{one.exit_code}'"
        for one in (CheckpointError, SmolquantError)
    ]
    assert (tell["needs"], tell["if"]) == (
        "check",
        f"${{{{ failure() && ({' || '.join(told)}) }}}}",
    )
    assert WORKFLOW["jobs"]["check"]["outputs"] == {"code": "${{ steps.check.outputs.code }}"}


@pytest.mark.parametrize("code", [0, 3, 5])
def test_how_the_check_ended_is_handed_on(tmp_path: Path, code: int) -> None:
    """A Hub that is down for an hour is no broken variant, and opens no issue."""
    command, output = tmp_path / "smolquant", tmp_path / "output"
    command.write_text(f"#!/bin/sh\nexit {code}\n")
    command.chmod(0o755)
    done = subprocess.run(
        ["bash", "-e", "-c", step_of("check", "Check")["run"]],
        env={
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            **{"MODEL": MODEL, "GITHUB_OUTPUT": str(output)},
        },
        check=False,
    )
    assert done.returncode == code
    assert output.read_text() == f"code={code}\n"


@pytest.mark.fault(
    "record",
    "A published variant no longer works with the newest libraries",
    "The canary workflow opens an issue, and comments on it while it is open.",
)
@pytest.mark.parametrize(
    ("open_issue", "asked"),
    [("", ["issue", "create", "--title", "The title"]), ("17", ["issue", "comment", "17"])],
)
def test_it_opens_one_issue(tmp_path: Path, open_issue: str, asked: list[str]) -> None:
    gh, told = tmp_path / "gh", tmp_path / "asked"
    gh.write_text(GH)
    gh.chmod(0o755)
    subprocess.run(
        [
            "bash",
            "-e",
            "-c",
            step_of("tell", "Open an issue, or comment on the one that is open")["run"],
        ],
        env={
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            **{"OPEN": open_issue, "ASKED": str(told), "MODEL": MODEL},
            **{"TITLE": "The title", "RUN": "https://example.com/run"},
        },
        check=True,
    )
    body = f"`smolquant check {MODEL}` failed: what differs is in the summary of https://example.com/run."
    assert told.read_text().splitlines() == [*asked, "--body", body]
