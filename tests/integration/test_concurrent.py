"""Two jobs of one workflow publish into one repository at once, each its own variant."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from command import Run, run_smolquant
from conftest import WRITE
from localhub import LocalHub, Repo

REPO = "alice/model"
JOBS = ("int8_weight_only", "int4_weight_only")


def run_both(hub: LocalHub, tmp_path: Path, model: str | Path) -> list[Run]:
    """Both jobs, each on a machine of its own; the first to commit is overtaken by the other."""

    def run(quant_type: str) -> Run:
        folder = tmp_path / quant_type
        folder.mkdir()
        arguments = ("quantize", model, REPO, "--quant-type", quant_type)
        return run_smolquant(*arguments, folder=folder, hub=hub, token=WRITE.value, actions=True)

    overtaken = threading.Event()

    def wait_for_the_other(repo: Repo) -> None:
        before = repo.head
        for _ in range(600):
            if repo.head != before:
                overtaken.set()
                return
            threading.Event().wait(0.1)

    hub.before_commit = wait_for_the_other
    with ThreadPoolExecutor() as pool:
        runs = list(pool.map(run, JOBS))
    assert overtaken.is_set(), "\n".join(run.log for run in runs)
    return runs


def from_the_repository(hub: LocalHub, checkpoint: Path) -> str:
    """The usual case: the model was released already."""
    hub.create_repo(REPO)
    hub.commit(REPO, {path.name: path for path in checkpoint.iterdir()})
    return REPO


def from_a_checkpoint(_hub: LocalHub, checkpoint: Path) -> Path:
    """Both create the repository and bring the main model along."""
    return checkpoint


@pytest.mark.fault(
    "meanwhile",
    "Jobs publish different variants into one repository at once",
    "All end up in it and in its card.",
)
@pytest.mark.parametrize("source", [from_the_repository, from_a_checkpoint])
def test_both_variants_end_up_in_the_root_card(
    hub: LocalHub,
    checkpoint: Path,
    tmp_path: Path,
    source: Callable[[LocalHub, Path], str | Path],
) -> None:
    runs = run_both(hub, tmp_path, source(hub, checkpoint))

    for run in runs:
        assert run.exit_code == 0, run.log
        assert run.outputs["changed"] == "true"
    repo = hub.repo(REPO)
    assert {"int8/model.safetensors", "int4/model.safetensors", "model.safetensors"} <= (
        repo.files().keys()
    )
    card = hub.read(REPO, "README.md").decode()
    assert "- **int8** has " in card
    assert "- **int4** has " in card
    assert "another source" not in card
    ours = {run.outputs["commit-sha"] for run in runs}
    assert len(ours) == 2
    assert repo.head in ours
