"""Many runs publish into one repository at the same moment."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from conftest import WRITE
from localhub import LocalHub
from publications import publication
from smolquant.hub import Hub
from smolquant.publish import attempts
from smolquant.publish.commit import publish
from smolquant.publish.target import inspect_target
from smolquant.schemes import BY_VARIANT

REPO = "alice/tiny"
RUNS = 8


@pytest.mark.fault(
    "meanwhile",
    "Eight jobs publish into one repository at once",
    "Each follows the others; all variants end up in it and in its card.",
)
def test_eight_runs_at_once_are_all_published(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "_FIRST_PAUSE", 0.05)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    hub.create_repo(REPO)
    client = Hub(WRITE.value, endpoint=hub.url)
    assert client.api, "the library's HTTP client is the process's, and made once"
    start = threading.Barrier(RUNS, timeout=20)
    names = [list(BY_VARIANT)[number % len(BY_VARIANT)] for number in range(RUNS)]

    def run(number: int) -> str:
        # Each on a machine of its own; the runs of one variant have different weights.
        what = publication(tmp_path / str(number), names[number], content=bytes([number]) * 5000)
        target = inspect_target(client, REPO)
        start.wait()
        return publish(client, target, what, notify=lambda line: None).commit_sha

    with ThreadPoolExecutor(RUNS) as pool:
        shas = list(pool.map(run, range(RUNS)))

    repo = hub.repo(REPO)
    assert len(set(shas)) == RUNS
    assert {commit.sha for commit in repo.commits} > set(shas)
    card = hub.read(REPO, "README.md").decode()
    records = inspect_target(client, REPO).records
    for variant in BY_VARIANT:
        assert f"**{variant}** has " in card.replace("\\", "")
        made = records[variant]
        assert made.files["model.safetensors"].size == 5000
