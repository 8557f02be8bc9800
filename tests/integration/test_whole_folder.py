"""A checkpoint folder arrives whole: its README, its licenses, and what else belongs to the model."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from command import Run
from conftest import WRITE
from localhub import LocalHub

REPO, OTHER = "alice/licensed", "alice/other"
RunSmolquant = Callable[..., Run]
LICENSES = {"LICENSE", "NOTICE", "USE_POLICY.md"}
README = """---
license: other
license_name: own-1.0
license_link: LICENSE
language:
- en
- de
base_model: org/base
---

# My model

Trained with care.
"""


@pytest.fixture
def licensed(checkpoint: Path) -> Path:
    """The checkpoint as its owner keeps it: with a README, licenses, and what a trainer leaves."""
    (checkpoint / "README.md").write_text(README)
    for name in (*LICENSES, "optimizer.pt", "training_args.bin"):
        (checkpoint / name).write_text(f"the text of {name}\n")
    (checkpoint / "video_preprocessor_config.json").write_text("{}\n")
    (checkpoint / "runs").mkdir()
    return checkpoint


@pytest.fixture
def publish(smolquant: RunSmolquant, hub: LocalHub) -> RunSmolquant:
    """Publishes a model into a repository, as a step of a workflow."""

    def run(model: str | Path, repo: str = REPO, *options: str, folder: str = "quantized") -> Run:
        arguments = ("quantize", model, repo, "--output-dir", folder, *options)
        return smolquant(*arguments, hub=hub, token=WRITE.value, actions=True)

    return run


def files(hub: LocalHub, repo: str = REPO) -> set[str]:
    return set(hub.repo(repo).files("main"))


def readme(hub: LocalHub, path: str = "README.md", repo: str = REPO) -> str:
    return hub.read(repo, path).decode()


def test_readme_and_licenses_arrive_at_the_root(
    publish: RunSmolquant, hub: LocalHub, licensed: Path
) -> None:
    run = publish(licensed)

    assert run.exit_code == 0, run.log
    assert {*LICENSES, "video_preprocessor_config.json"} <= files(hub)
    assert hub.read(REPO, "LICENSE") == (licensed / "LICENSE").read_bytes()
    for line in README.splitlines():
        assert line in readme(hub)
    assert "[int8](int8/README.md)" in readme(hub)
    assert "license_name: own-1.0" in readme(hub, "int8/README.md")
    assert "int8/video_preprocessor_config.json" in files(hub)
    assert not {f"int8/{name}" for name in LICENSES} & files(hub), "they are beside the variant"
    assert not {"optimizer.pt", "training_args.bin"} & files(hub)
    lines = [line for line in run.log.splitlines() if "optimizer.pt" in line]
    assert lines == ["Stays in the checkpoint folder: optimizer.pt, runs/, training_args.bin"]


def test_the_second_run_has_nothing_to_do(
    publish: RunSmolquant, hub: LocalHub, licensed: Path
) -> None:
    publish(licensed)
    head = hub.repo(REPO).head
    run = publish(licensed)
    assert run.exit_code == 0, run.log
    assert run.outputs["changed"] == "false"
    assert hub.repo(REPO).head == head
    assert "::notice" not in run.log


@pytest.mark.fault(
    "text",
    "The README was edited on the Hub",
    "The edit survives.",
)
def test_a_readme_that_was_edited_on_the_hub_survives(
    publish: RunSmolquant, hub: LocalHub, licensed: Path
) -> None:
    publish(licensed)
    same = publish(licensed, REPO, "--quant-type", "int8_dynamic")
    assert "README.md stays" not in same.log, "only our own part differs"
    edited = readme(hub).replace("Trained with care.", "Trained with more care.")
    hub.commit(REPO, {"README.md": edited.encode()})

    run = publish(licensed, REPO, "--quant-type", "int4_weight_only")

    assert run.exit_code == 0, run.log
    assert "Trained with more care." in readme(hub)
    assert "Trained with care." not in readme(hub)
    assert "[int4](int4/README.md)" in readme(hub)
    assert "license_name: own-1.0" in readme(hub, "int4/README.md")
    assert run.log.count("The repository's README.md stays") == 1


def test_a_readme_that_stands_in_the_repository_wins(
    publish: RunSmolquant, hub: LocalHub, licensed: Path
) -> None:
    hub.create_repo(REPO)
    hub.commit(REPO, {"README.md": b"---\nlicense: mit\n---\n\n# Theirs\n"})
    (licensed / "README.md").write_bytes(b"\xff not UTF-8, and not needed")
    run = publish(licensed)
    assert run.exit_code == 0, run.log
    assert "# Theirs" in readme(hub)
    assert "license: mit" in readme(hub, "int8/README.md")
    assert files(hub) >= LICENSES


@pytest.mark.fault(
    "text",
    "The front matter is broken YAML",
    "Exit 2 with the line, before any work.",
)
def test_a_readme_that_the_card_cannot_be_made_from_is_refused_before_the_work(
    publish: RunSmolquant, licensed: Path
) -> None:
    (licensed / "README.md").write_text("---\nlicense: [mit\n---\n")
    for options in ((REPO,), (REPO, "--dry-run")):
        run = publish(licensed, *options)
        assert run.exit_code == 2
        assert "front matter of README.md cannot be read" in run.annotations[0]
        assert "Quantize" not in run.log


def test_into_another_repository_each_variant_takes_the_licenses_along(
    publish: RunSmolquant, hub: LocalHub, licensed: Path
) -> None:
    publish(licensed)

    run = publish(REPO, OTHER, folder="other")

    assert run.exit_code == 0, run.log
    assert {f"int8/{name}" for name in LICENSES} <= files(hub, OTHER)
    assert not LICENSES & files(hub, OTHER)
    made = json.loads(hub.read(OTHER, "int8/quantization.json"))
    assert made["files"].keys() >= LICENSES
    assert "license_name: own-1.0" in readme(hub, "int8/README.md", OTHER)
    assert "# My model" not in readme(hub, repo=OTHER)

    again = publish(REPO, OTHER, folder="other")
    assert again.outputs["changed"] == "false", again.log


def test_in_the_same_repository_nothing_is_there_twice(
    publish: RunSmolquant, hub: LocalHub, licensed: Path
) -> None:
    publish(licensed)
    run = publish(REPO, REPO, "--quant-type", "int4_weight_only", folder="again")
    assert run.exit_code == 0, run.log
    assert not {f"int4/{name}" for name in LICENSES} & files(hub)


@pytest.mark.parametrize("readme_there", [False, True])
def test_what_is_saved_takes_readme_and_licenses_along(
    smolquant: RunSmolquant, tmp_path: Path, licensed: Path, readme_there: bool
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    if readme_there:
        (out / "README.md").write_text("# Of the output\n")

    run = smolquant("quantize", licensed, "--save-only", "--output-dir", out)

    assert run.exit_code == 0, run.log
    root = (out / "README.md").read_text()
    assert ("# My model" in root) != readme_there
    assert ("# Of the output" in root) == readme_there
    assert "[int8](int8/README.md)" in root
    assert "license_name: own-1.0" in (out / "int8/README.md").read_text()
    for name in LICENSES:
        assert (out / "int8" / name).read_bytes() == (licensed / name).read_bytes()
