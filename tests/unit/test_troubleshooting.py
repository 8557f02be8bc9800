"""The messages that docs/troubleshooting.md explains are ones that a reader can meet."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from snippets import ROOT

ANYTHING = "…"
UPSTREAM = {
    "Repo id must be in the form": ("huggingface_hub", "utils/_validators.py"),
    "Loading an torchao quantized model requires torchao library": (
        "transformers",
        "quantizers/quantizer_torchao.py",
    ),
    "Invalid torchao safetensors metadata": ("transformers", "quantizers/quantizer_torchao.py"),
    "Skipping import of cpp extensions due to incompatible torch version": (
        "torchao",
        "__init__.py",
    ),
    "Failed to load ": ("torchao", "__init__.py"),
    "Weights only load failed": ("torch", "serialization.py"),
    "No module named ": ("importlib", "_bootstrap.py"),
}
"""What other libraries say, and the package and file that say it."""

FOUND_BY_RUNNING = {"'_OpNamespace' 'mslk' object has no attribute"}
"""What torch says of kernels that are not there; test_documented_commands.py meets it."""


def explained() -> list[str]:
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    return [message for _, message in re.findall(r"^\| (`+)(.+?)\1 ", page, re.MULTILINE)]


@cache
def said_by_smolquant() -> str:
    """Every text in the sources, a line each, with :data:`ANYTHING` for what is filled in."""
    files = sorted((ROOT / "entrypoint/smolquant").rglob("*.py"))
    return "\n".join(text for path in files for text in texts(path))


def texts(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        parts = node.values if isinstance(node, ast.JoinedStr) else [node]
        literal = [
            part.value if isinstance(part, ast.Constant) else ANYTHING
            for part in parts
            if isinstance(part, ast.Constant | ast.FormattedValue)
        ]
        if literal and all(isinstance(one, str) for one in literal):
            yield " ".join("".join(map(str, literal)).split())


def is_said(message: str) -> bool:
    """Whether the parts of a message stand in one text, in their order."""
    parts = [re.escape(part.strip()) for part in message.split(ANYTHING)]
    return bool(re.search(".*".join(parts), said_by_smolquant()))


@pytest.mark.parametrize("message", explained())
def test_the_message_is_one_of_ours_or_of_the_installed_libraries(message: str) -> None:
    theirs = [text for text in UPSTREAM if message.startswith(text)]
    if theirs:
        package, file = UPSTREAM[theirs[0]]
        spec = find_spec(package)
        assert spec and spec.origin
        assert theirs[0] in (Path(spec.origin).parent / file).read_text(encoding="utf-8")
    elif message not in FOUND_BY_RUNNING:
        assert len(message.replace(ANYTHING, "")) > 10, "so short a text is everywhere"
        assert is_said(message)


def test_a_message_that_nobody_says_is_noticed() -> None:
    assert not is_said("… is said by nobody at all")
    assert is_said("… is gated, and this account was not granted access")
