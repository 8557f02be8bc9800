"""SIGKILL at the moments that no other file has: measuring, sending files, between the commit and its tag.

Each is a hook in the phase itself, so that no time passes between it and the kill.
"""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from command import Run
from conftest import WRITE
from localhub import LocalHub

REPO = "alice/model"

KILLED_AT = """
import importlib, os, runpy, signal, sys

module, name = sys.argv.pop(1).split(":")

def killed(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

place = importlib.import_module(module)
assert hasattr(place, name), "the phase is elsewhere now"
setattr(place, name, killed)
runpy.run_module("smolquant", run_name="__main__")
"""


@pytest.mark.fault(
    "cancelled",
    "The run is killed while it measures, sends files, or sets the tag",
    "The repository is as before or complete; the same command does the rest, and makes nothing again.",
)
@pytest.mark.parametrize(
    ("place", "evaluate", "is_published", "said"),
    [
        ("smolquant.model.layerwise:_window_by_window", "always", False, "going on from"),
        ("smolquant.publish.commit:_create_commit", "never", False, "an earlier run made"),
        ("smolquant.publish.release:tag_commit", "never", True, "up to date"),
    ],
    ids=["measuring", "committing", "tagging"],
)
def test_what_a_killed_run_has_done_is_whole_and_used(
    smolquant: Callable[..., Run],
    hub: LocalHub,
    checkpoint: Path,
    tmp_path: Path,
    place: str,
    evaluate: str,
    is_published: bool,
    said: str,
) -> None:
    hub.create_repo(REPO)
    before = hub.repo(REPO).files("main")
    arguments = ("quantize", checkpoint, REPO, "--tag", "v1", "--evaluate", evaluate)
    asked = {"hub": hub, "token": WRITE.value}
    killed = smolquant(place, *arguments, **asked, script=KILLED_AT)
    assert killed.exit_code == -signal.SIGKILL, killed.log
    left = hub.repo(REPO).files("main")
    assert ("int8/model.safetensors" in left) == is_published
    assert is_published or left.keys() == before.keys()
    assert "v1" not in hub.repo(REPO).tags

    again = smolquant(*arguments, **asked)

    assert again.exit_code == 0, again.log
    assert said in again.log, "what was made is used"
    assert hub.repo(REPO).tags["v1"] == hub.repo(REPO).head
    assert "int8/model.safetensors" in hub.repo(REPO).files("main")
    commits = [commit.title for commit in hub.repo(REPO).commits]
    assert len(commits) == 2, "the one that makes the repository, and one of ours"
    assert not list((tmp_path / "quantized").glob(".int8.*"))
