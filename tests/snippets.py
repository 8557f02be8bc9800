"""The fenced blocks of README.md and docs/, which tests hold to what the command and the action take."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from string import Template

from markdown_it import MarkdownIt

import release_names

NAMES = release_names.read()
ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))

REPO, DOCUMENTED_REPO = "alice/model", "your-username/model-name"
"""The repository that stands for the documented one."""

SHELL_VARIABLES = {
    "REPO_NAME": REPO,
    "QUANT_TYPE": "both",
    "DEVICE": "auto",
    "TRACKIO_URL": "local",
    "EXPERIMENT_NAME": "an-experiment",
    "PWD": "/here",
}
"""What a script of the reader's own has set before a documented command."""

RUN_IN_A_SHELL = frozenset({"smolquant", "python", "hf", "ls"})
"""Programs that tests/integration/test_documented_commands.py runs."""

RUN_IN_A_CONTAINER = frozenset({"docker"})
"""Programs that tests/container/test_documented.py runs."""

ONLY_READ = {
    "pip install 'smolquant[action]'": "test_release_workflow.py builds and installs the wheel",
    "export HF_TOKEN=…": "the tests have a token of their own",
    "make demo": "takes minutes; test_smollm2.py publishes and loads the same model",
    "make test": "is what runs these tests",
    "make test-gpu bench-gpu": "needs a GPU",
    "smolquant bench your-username/model-name": "times models for a minute; test_bench_command.py runs it",
    "smolquant sync-trackio ./quantized --trackio-url your-username/trackio": (
        "needs a Space; test_tracking_run.py sends to a server"
    ),
    "smolquant quantize ./checkpoint --save-only --quant-type both --max-kl int8=0.05,int4=0.8": (
        "measures for a minute; test_evaluate_run.py runs the gate"
    ),
    "pip install vllm torchao": "installs gigabytes; docs/serving.md tells what was tried with it",
    "vllm serve your-username/model-name --revision int8": "takes minutes to start",
    "vllm serve model/int8": "takes minutes to start",
    'docker run --rm --gpus all -e HF_TOKEN -v "$PWD:/github/workspace" '
    f"{NAMES.image}:{NAMES.version}-cuda quantize ./checkpoint your-username/model-name --device cuda": (
        "needs a GPU host; test_gpu.py has a stand-in for its image"
    ),
    "sudo nvidia-ctk runtime configure --runtime=docker": "changes a GPU host",
    "sudo systemctl restart docker": "changes a GPU host",
    "docker run --rm --gpus all debian:bookworm-slim nvidia-smi": "needs a GPU host",
}
"""Commands that no test runs as they stand there, and why; those of smolquant are parsed all the same."""

WORKFLOWS_ONLY_READ = {
    "runs-on: [self-hosted, gpu]": "needs a GPU host; test_gpu.py has a stand-in for its image",
}
"""What workflows hold that no test runs, and why; all are read."""


@dataclass(frozen=True)
class Snippet:
    """A fenced block."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@cache
def snippets() -> tuple[Snippet, ...]:
    """All blocks of all pages, in their order."""
    return tuple(one for page in PAGES for one in _of_page(page))


def _of_page(page: str) -> Iterator[Snippet]:
    text = (ROOT / page).read_text(encoding="utf-8")
    for token in MarkdownIt().parse(text):
        if token.type == "fence":
            assert token.map is not None
            yield Snippet(page, token.map[0] + 1, token.info.strip(), token.content)


def in_language(language: str) -> list[Snippet]:
    """The blocks of one language."""
    return [one for one in snippets() if one.language == language]


def commands(text: str) -> list[str]:
    """The commands in lines of shell, without comments and what only frames them."""
    lines = (line.strip() for line in re.sub(r"\s*\\\n\s*", " ", text).splitlines())
    bare = (re.sub(r"\s+#.*", "", line) for line in lines if not line.startswith("#"))
    return [line for line in bare if line and not re.match(r"(if|fi)\b", line)]


def commands_run(programs: frozenset[str]) -> list[str]:
    """The documented commands of these programs that are not only read: each once, in the pages' order."""
    documented = dict.fromkeys(line for one in in_language("sh") for line in commands(one.text))
    return [line for line in documented if line.split()[0] in programs and line not in ONLY_READ]


def workflows_run() -> list[Snippet]:
    """The documented workflows, and parts of them, that are not only read."""
    return [
        one
        for one in in_language("yaml")
        if not any(part in one.text for part in WORKFLOWS_ONLY_READ)
    ]


def as_workflow(text: str) -> str:
    """A whole workflow around a block that is a part of one."""
    if text.startswith("- "):
        steps = "".join(f"      {line}\n" for line in text.splitlines())
        text = f"jobs:\n  quantize:\n    runs-on: ubuntu-latest\n    steps:\n{steps}"
    return text if "on:" in text.split() else f"on: push\n{text}"


def words(command: str) -> list[str]:
    """A command's words, with the variables of a reader's own script filled in."""
    # ${NAME:-default} is the name's value here, as the shell has one.
    named = re.sub(r"\$\{(\w+):-[^}]*\}", r"${\1}", command)
    filled = Template(named).safe_substitute(SHELL_VARIABLES)
    return shlex.split(filled.replace(DOCUMENTED_REPO, REPO))
