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
from snippets import DOCUMENTED_REPO, ONLY_READ, REPO, ROOT, commands, in_language

RUN_HERE = {"smolquant", "python", "ls"}
NEEDS_A_SCRIPT = re.compile(r"\$|/output-checkpoint")
"""Variables and a folder of a reader's own script; tests/unit/test_documented.py reads such commands."""

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
    documented = dict.fromkeys(line for one in in_language("sh") for line in commands(one.text))
    ran = [
        line
        for line in documented
        if line.split()[0] in RUN_HERE and line not in ONLY_READ and not NEEDS_A_SCRIPT.search(line)
    ]
    assert len(ran) > 10
    for line in ran:
        code, log = run(["bash", "-c", line.replace(DOCUMENTED_REPO, REPO)], folder, environ)
        assert code == 0, f"{line}\n{log}"

    programs = [STOCK_INT4, *(one.text for one in in_language("python"))]
    programs = [program.replace(DOCUMENTED_REPO, REPO) for program in programs]
    code, log = run([sys.executable, "-c", RUN_ALL], folder, environ, json.dumps(programs))
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    (told,) = re.findall(r"^\| `(.*'mslk'.*?)` \|", page, re.MULTILINE)
    assert code == 0, log
    assert told in log
