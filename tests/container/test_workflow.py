"""Workflows as the pages print them, the example for model repositories, and the self-test of this one."""

import re
from pathlib import Path

import pytest

import models
from container.act import Workflows
from container.engine import REPOSITORY, Engine
from container.runner import OWNER, owners
from localhub import LocalHub, Token
from snippets import DOCUMENTED_REPO, NAMES, REPO, Snippet, as_workflow, workflows_run

pytestmark = pytest.mark.container

WRITE = Token("hf_alice_writes", "alice")
EXAMPLE = Snippet(
    "examples/release.yml", 1, "yaml", (REPOSITORY / "examples/release.yml").read_text()
)


@pytest.fixture
def workflows(engine: Engine, image: str, hub: LocalHub, tmp_path: Path) -> Workflows:
    """Runs a workflow in a repository of its own."""
    return Workflows(engine, image, hub, WRITE.value, tmp_path / "github")


def asked_for(workflow: str) -> set[str]:
    """The variants that a documented workflow makes."""
    both = "quantize.yml@" in workflow or re.search(r"quant-type:? both", workflow)
    return {"int8", "int4"} if both else {"int8"}


def model_for(workflow: str, folder: Path) -> Path:
    """A small model. Measuring takes half a minute, and only a gate gets the tokenizer that it needs."""
    save = models.save_with_tokenizer if "max-perplexity-increase" in workflow else models.save
    return save(folder / "checkpoint", models.FAMILIES["smollm3"]())


@pytest.mark.parametrize("documented", [*workflows_run(), EXAMPLE], ids=str)
def test_a_documented_workflow(
    workflows: Workflows, image: str, tmp_path: Path, documented: Snippet
) -> None:
    """As it stands there, but for the model's name and the name of a job's image."""
    text = as_workflow(documented.text).replace(DOCUMENTED_REPO, REPO)
    hub = workflows.hub
    hub.create_repo(REPO)
    hub.commit(REPO, {path.name: path for path in model_for(text, tmp_path).iterdir()})

    ran = workflows.run(text.replace(f"{NAMES.image}:{NAMES.version}", image))

    assert ran.returncode == 0, ran.log
    repo = hub.repo(REPO)
    made = {path.split("/")[0] for path in repo.files() if path.endswith("/quantization.json")}
    assert made == asked_for(text)
    assert repo.tags == ({"v1.0": repo.head} if "ref_name" in text else {})
    for variant in re.findall(r"outputs\.(\w+)-url", text):
        assert f"| {hub.url}/{REPO}/tree/main/{variant}\n" in ran.log, "what echo wrote"
    assert owners(ran.workspace / "quantized") <= {OWNER}
    if "steps:" in text and "container:" not in text:
        assert "Success - Post" in ran.log, "the step that looks for a container left behind"


def test_the_self_test(workflows: Workflows, smollm2: Path) -> None:
    """The workflow that GitHub runs for each change, on a real model, against a Hub of our own."""
    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    workflows.hub.create_repo(name)
    workflows.hub.commit(name, {path.name: path for path in smollm2.iterdir()})
    text = (REPOSITORY / ".github/workflows/self-test.yml").read_text()
    ran = workflows.run(text, action_beside=True)
    assert ran.returncode == 0, ran.log
    assert "The next step has what was made" in ran.log
