"""What README.md and docs/ tell a reader to write is what the command, the action and make take."""

import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from smolquant.cli import cli, quantize
from smolquant.parameters import input_variable
from smolquant.settings import make_settings
from snippets import (
    ONLY_READ,
    PAGES,
    REPO,
    ROOT,
    RUN_IN_A_CONTAINER,
    RUN_IN_A_SHELL,
    SHELL_VARIABLES,
    WORKFLOWS_ONLY_READ,
    Snippet,
    as_workflow,
    commands,
    in_language,
    snippets,
    words,
)

ACTION = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CHECKED = {"python", "sh", "yaml"}
NO_CODE = {"", "mermaid"}
"""Trees of folders, and diagrams."""

OURS = re.compile(r"[\w-]+/smolquant-action(?:/(?P<workflow>\.github/workflows/\w+\.yml))?@v\d+")
IMAGE = re.compile(r"ghcr\.io/[\w-]+/smolquant-action:\S+")
DOCKER_FLAGS = {"--rm", "-e", "HF_TOKEN", "-v", "/here:/github/workspace", "--gpus", "all"}


def identified(snippet: object) -> str:
    return str(snippet)


@pytest.fixture(autouse=True)
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader's folder, with a checkpoint and text files in it."""
    (tmp_path / "checkpoint").mkdir()
    monkeypatch.chdir(tmp_path)


def test_each_block_is_in_a_language_that_is_checked() -> None:
    assert {one.language for one in snippets()} <= CHECKED | NO_CODE


def test_each_command_is_run_or_there_is_a_reason_why_not() -> None:
    documented = {line for one in in_language("sh") for line in commands(one.text)}
    run = {line for line in documented if line.split()[0] in RUN_IN_A_SHELL | RUN_IN_A_CONTAINER}
    assert documented - run - ONLY_READ.keys() == set()


def test_what_is_only_read_stands_there() -> None:
    documented = {line for one in in_language("sh") for line in commands(one.text)}
    assert set(ONLY_READ) <= documented
    workflows = "".join(one.text for one in in_language("yaml"))
    assert all(part in workflows for part in WORKFLOWS_ONLY_READ)


def parse(arguments: list[str]) -> None:
    """Have the real command read its arguments, and `quantize` its settings; nothing runs."""
    arguments = [word.replace("/output-checkpoint", "checkpoint") for word in arguments]
    if arguments == ["--version"]:
        return
    name, *rest = arguments
    context = cli.commands[name].make_context(name, rest)
    if name == "quantize":
        settings_of(context.params)


def settings_of(params: dict[str, Any]) -> None:
    make_settings(**{k: v for k, v in params.items() if k not in ("quiet", "as_json")})


def parse_docker(arguments: list[str]) -> None:
    assert arguments[0] == "run"
    if "debian:bookworm-slim" in arguments:
        return
    (image,) = (number for number, word in enumerate(arguments) if IMAGE.fullmatch(word))
    assert set(arguments[1:image]) <= DOCKER_FLAGS
    parse(arguments[image + 1 :])


def parse_make(targets: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert set(targets) <= set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))


def parse_pip(arguments: list[str]) -> None:
    command, *requirements = arguments
    assert command == "install"
    for requirement in requirements:
        name, _, extras = requirement.rstrip("]").partition("[")
        if name == PROJECT["name"]:
            assert set(filter(None, extras.split(","))) <= PROJECT["optional-dependencies"].keys()


def parse_python(arguments: list[str]) -> None:
    if arguments[0] == "-c":
        compile(arguments[1], "<documented>", "exec")


PROGRAMS: Mapping[str, Callable[[list[str]], None]] = {
    "smolquant": parse,
    "docker": parse_docker,
    "make": parse_make,
    "pip": parse_pip,
    "python": parse_python,
}


@pytest.mark.parametrize("snippet", in_language("sh"), ids=identified)
def test_commands_are_what_the_programs_take(snippet: Snippet) -> None:
    for command in commands(snippet.text):
        program, *arguments = words(command)
        if program in PROGRAMS:
            PROGRAMS[program](arguments)


@pytest.mark.parametrize("snippet", in_language("python"), ids=identified)
def test_programs_are_python(snippet: Snippet) -> None:
    compile(snippet.text, str(snippet), "exec")


def mappings(value: Any) -> Iterator[dict[Any, Any]]:
    """Every mapping in a document, the outer ones first."""
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value:
        if isinstance(inner, dict | list):
            yield from mappings(inner)


def filled(value: object) -> str:
    """An input as the runner passes it, with expressions replaced."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return re.sub(r"\$\{\{.*?\}\}", "v1.0", text)


def check_step(given: Mapping[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """The action has these inputs, and the command takes their values."""
    assert given.keys() <= ACTION["inputs"].keys()
    with monkeypatch.context() as patch:
        for name, value in given.items():
            patch.setenv(input_variable(name), filled(value))
        settings_of(quantize.make_context("quantize", []).params)


def check_workflow(path: str, job: Mapping[str, Any]) -> None:
    """The reusable workflow has these inputs and secrets, and gets all that it requires."""
    called = yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))[True]["workflow_call"]
    given = job.get("with", {})
    assert given.keys() <= called["inputs"].keys()
    assert {name for name, one in called["inputs"].items() if one.get("required")} <= given.keys()
    assert job.get("secrets", {}).keys() <= called["secrets"].keys()


@pytest.mark.parametrize("snippet", in_language("yaml"), ids=identified)
def test_workflows_use_what_the_action_has(
    snippet: Snippet, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = list(mappings(yaml.safe_load(snippet.text)))
    ids = {one["id"] for one in found if "id" in one}
    for step, output in re.findall(r"steps\.([\w-]+)\.outputs\.([\w-]+)", snippet.text):
        assert step in ids
        assert output in ACTION["outputs"]
    for one in found:
        if used := OURS.fullmatch(str(one.get("uses", ""))):
            if used["workflow"]:
                check_workflow(used["workflow"], one)
            else:
                check_step(one["with"], monkeypatch)
        elif "run" in one and one["run"].startswith("smolquant "):
            parse(words(one["run"])[1:])


def test_workflows_are_workflows(tmp_path: Path) -> None:
    paths = []
    for number, snippet in enumerate(in_language("yaml")):
        paths.append(tmp_path / f"{number}.yml")
        paths[-1].write_text(as_workflow(snippet.text), encoding="utf-8")
    program = Path(sys.executable).with_name("check-jsonschema")
    schema = ["--builtin-schema", "vendor.github-workflows"]
    checked = subprocess.run(
        [program, *schema, *paths], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout


def test_the_readme_names_every_command() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"| `smolquant {name} " in text for name in cli.commands)


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", "SECURITY.md"])
def test_links_lead_to_a_page_and_a_heading(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"(?:\]\(|src=\")(?!https?:)([^)\"\s]+)[)\"]", text):
        path, _, anchor = target.partition("#")
        place = (ROOT / page).parent / path if path else ROOT / page
        assert place.exists(), f"{page} leads to {target}"
        if anchor:
            assert anchor in anchors(place.read_text(encoding="utf-8")), f"{page}: {target}"


def anchors(text: str) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in headings}


def test_the_reader_of_shell_leaves_out_what_is_no_command() -> None:
    text = 'a b \\\n  c   # what it is\n# a remark\nif [ "$X" = y ]; then\n    d "$REPO_NAME"\nfi\n'
    assert commands(text) == ["a b c", 'd "$REPO_NAME"']
    assert words(commands(text)[1]) == ["d", SHELL_VARIABLES["REPO_NAME"]]
    assert words("x your-username/model-name") == ["x", REPO]
