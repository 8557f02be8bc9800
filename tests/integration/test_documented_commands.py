"""What README.md and docs/ tell a reader to type runs, against the local Hub and a small model."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import models
from conftest import WRITE
from localhub import LocalHub
from snippets import (
    DOCUMENTED_REPO,
    REPO,
    ROOT,
    RUN_IN_A_SHELL,
    SHELL_VARIABLES,
    commands_run,
    in_language,
)

STANDS_FOR = {DOCUMENTED_REPO: REPO, "/output-checkpoint": "./checkpoint"}
"""What is here in place of what the pages name."""

RUN_ALL = """
import json, sys
for code in json.load(sys.stdin):
    exec(compile(code, "<documented>", "exec"), {"__name__": "__main__"})
"""

STOCK_INT4 = f"""
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{REPO}", subfolder="int4")
model = AutoModelForCausalLM.from_pretrained("{REPO}", subfolder="int4")
try:
    model.generate(**tokenizer("w1 w2", return_tensors="pt"), max_new_tokens=2)
except AttributeError as error:
    print(error)
"""
"""What docs/troubleshooting.md begins with; it has to run before anything imports smolquant."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reader's folder, with a checkpoint in it."""
    folder = tmp_path_factory.mktemp("reader")
    models.save_with_tokenizer(folder / "checkpoint", models.FAMILIES["smollm3"]())
    return folder


@pytest.fixture(scope="module")
def environ(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A reader's shell, and the documented repository on a Hub of its own."""
    with LocalHub(tmp_path_factory.mktemp("hub"), tokens=[WRITE]) as hub:
        hub.create_repo(REPO)
        hub.commit(REPO, {path.name: path for path in (folder / "checkpoint").iterdir()})
        yield os.environ | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT / "entrypoint"),
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path_factory.mktemp("home")),
            "HF_TOKEN": WRITE.value,
            "INPUT_EVALUATE": "never",
        }


def as_here(text: str) -> str:
    """A documented text with what is here in place of what it names."""
    for documented, here in STANDS_FOR.items():
        text = text.replace(documented, here)
    return text


def run(
    command: list[str], folder: Path, environ: dict[str, str], text: str = ""
) -> tuple[int, str]:
    """The exit code of a command, and what it wrote."""
    ran = subprocess.run(
        command,
        cwd=folder,
        env=environ,
        input=text,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    return ran.returncode, ran.stdout


def test_commands_and_programs_run_as_printed(folder: Path, environ: dict[str, str]) -> None:
    """In the pages' order: the first ones publish what the later ones load."""
    for line in commands_run(RUN_IN_A_SHELL):
        code, log = run(["bash", "-c", as_here(line)], folder, environ | SHELL_VARIABLES)
        assert code == 0, f"{line}\n{log}"

    programs = [
        as_here(text) for text in (STOCK_INT4, *(one.text for one in in_language("python")))
    ]
    code, log = run([sys.executable, "-c", RUN_ALL], folder, environ, json.dumps(programs))
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    (told,) = re.findall(r"^\| `(.*'mslk'.*?)` \|", page, re.MULTILINE)
    assert code == 0, log
    assert told in log
