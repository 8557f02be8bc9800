"""`make docs`: the tables of docs/faults.md, collected from the tests that show each fault.

A test that shows how the product takes a fault or a hostile input says so with a marker::

    @pytest.mark.fault("hub", "The Hub refuses the commit", "Exit 5; the repository is as before.")

The tests are read by their syntax trees and not run, so the page costs nothing and needs no torch.
"""

import ast
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"

KINDS: Mapping[str, str] = {
    "checkpoint": "A checkpoint that is damaged, incomplete or hostile",
    "model": "A model that cannot be quantized honestly",
    "text": "Hostile or unusual text: names, cards, front matter",
    "record": "Published variants and their records",
    "input": "Options and inputs",
    "hub": "The Hub, and the way to it",
    "meanwhile": "Others who write at the same time",
    "machine": "Memory, disk, files and devices",
    "cancelled": "Signals and kills",
    "secret": "Secrets",
    "tracking": "Trackio",
    "quality": "Variants that are worse than they may be",
}
"""The page's sections in its order: a marker's first argument, and the heading."""


@dataclass(frozen=True)
class Fault:
    """What a marker says, and where it stands."""

    kind: str
    """One of :data:`KINDS`."""
    fault: str
    """What goes wrong, without a full stop."""
    behaviour: str
    """What then happens, in sentences."""
    path: str
    """The test's file, from the repository's root."""
    test: str
    """The test's name."""


def faults_in(source: str, path: str) -> Iterator[Fault]:
    """The faults that the tests of one file show, in its order.

    A marker counts in a test's decorators, inside ``parametrize`` as the ``marks`` of one case, and as the
    file's ``pytestmark``, which is of all its tests.

    Args:
        source: the file's text.
        path: its path, which the page links to.

    Raises:
        ValueError: a marker has other arguments than three texts, or an unknown kind.
    """
    tree = ast.parse(source)
    of_all = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"
    ]
    for test in tree.body:
        if not (isinstance(test, ast.FunctionDef) and test.name.startswith("test_")):
            continue
        for marks in (*of_all, *test.decorator_list):
            for call in ast.walk(marks):
                if isinstance(call, ast.Call) and ast.unparse(call.func) == "pytest.mark.fault":
                    yield Fault(*_texts(call, path), path, test.name)


def _texts(call: ast.Call, path: str) -> tuple[str, str, str]:
    texts = [
        argument.value
        for argument in call.args
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str)
    ]
    if len(texts) != 3 or len(call.args) != 3 or call.keywords or texts[0] not in KINDS:
        raise ValueError(
            f"{path}, line {call.lineno}: a fault is three literal texts, kind, fault and behaviour; "
            f"the kind is one of {', '.join(KINDS)}."
        )
    return texts[0], texts[1], texts[2]


@cache
def all_faults() -> Sequence[Fault]:
    """Every fault that a test shows, by file and place."""
    return [
        fault
        for path in sorted(TESTS.rglob("test_*.py"))
        for fault in faults_in(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())
    ]


def sections(faults: Iterable[Fault]) -> str:
    """Markdown: a heading and a table for each kind; tests that show the same share a row."""
    rows: dict[str, dict[tuple[str, str], list[Fault]]] = {kind: {} for kind in KINDS}
    for fault in faults:
        rows[fault.kind].setdefault((fault.fault, fault.behaviour), []).append(fault)
    return "".join(_section(KINDS[kind], of_kind) for kind, of_kind in rows.items() if of_kind)


def _section(heading: str, rows: Mapping[tuple[str, str], list[Fault]]) -> str:
    lines = [
        f"## {heading}",
        "",
        "| what goes wrong | what happens | shown by |",
        "| :-- | :-- | :-- |",
        *(
            f"| {_cell(fault)} | {_cell(behaviour)} | {', '.join(map(_link, shown))} |"
            for (fault, behaviour), shown in rows.items()
        ),
    ]
    return "\n".join(lines) + "\n\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _link(fault: Fault) -> str:
    return f"[{fault.test.removeprefix('test_')}](../{fault.path})"
