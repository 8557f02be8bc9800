"""The map of modules in CONTRIBUTING.md is the code's: imports run down its rows, and pieces stay small.

The page's table is the only one; these tests read it, and the code by its syntax trees, so that an import
inside a function or under TYPE_CHECKING counts like any other.
"""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGE = ROOT / "entrypoint/smolquant"
PAGE = ROOT / "CONTRIBUTING.md"
TABLE = re.compile(r"<!-- modules:begin -->\n(.*?)<!-- modules:end -->", re.DOTALL)

MOST_LINES = 450
MOST_LINES_OF_A_FUNCTION = 60
LONG_FUNCTIONS = {("cli.py", "quantize")}
"""A command's options are its signature."""

FORBIDDEN = {
    "settings": {"hub", "checkpoint"},
    "evaluate": {"settings"},
    "record": {"*"},
    "errors": {"*"},
}
"""What no edit of the table may allow; ``*`` is every module of ours."""


def _map() -> dict[str, set[str]]:
    """Module or package -> what it may import, in the page's order."""
    found = TABLE.search(PAGE.read_text(encoding="utf-8"))
    assert found, f"{PAGE.name} has no table of modules between its two markers"
    rows: dict[str, set[str]] = {}
    for line in found[1].splitlines()[2:]:  # below the heading
        module, _, imports = (cell.strip() for cell in line.strip("|").split("|"))
        (name,) = re.findall(r"`([^`]+?)/?`", module)
        assert name not in rows, f"{name} has two rows"
        rows[name] = set(re.findall(r"`([^`]+?)/?`", imports))
    return rows


def _row_of(path: Path) -> str:
    """The row that a file of the package belongs to: its folder's, or its own."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def _modules() -> set[str]:
    return {_row_of(path) for path in PACKAGE.rglob("*.py")}


def _imported(tree: ast.AST, modules: set[str]) -> Iterator[str]:
    """Rows that a file imports from, its own included.

    The package itself counts as ``__init__``, but for its version and its place, which are everybody's.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            package, _, rest = (node.module or "").partition(".")
            if package != PACKAGE.name:
                continue
            names = [rest.partition(".")[0]] if rest else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            parts = [alias.name.split(".") for alias in node.names]
            names = [part[1] for part in parts if part[0] == PACKAGE.name and part[1:]]
        else:
            continue
        for name in names:
            if name in modules:
                yield name
            elif name != "__version__":
                yield "__init__"


def _actual() -> dict[str, dict[str, set[str]]]:
    """Row -> the rows that it imports from -> the files that do."""
    modules = _modules()
    arrows: dict[str, dict[str, set[str]]] = {module: defaultdict(set) for module in modules}
    for path in sorted(PACKAGE.rglob("*.py")):
        row = _row_of(path)
        for name in _imported(ast.parse(path.read_text(encoding="utf-8")), modules):
            if name != row:
                arrows[row][name].add(path.relative_to(PACKAGE).as_posix())
    return arrows


def _complain(heading: str, complaints: list[str]) -> None:
    if complaints:
        pytest.fail("\n".join([heading, *complaints]), pytrace=False)


def test_every_module_has_a_row() -> None:
    rows, modules = set(_map()), _modules()
    _complain(
        f"{PAGE.name} and entrypoint/smolquant/ differ:",
        [f"  no row for {name}" for name in sorted(modules - rows)]
        + [f"  a row for {name}, which is not there" for name in sorted(rows - modules)],
    )


def test_modules_import_what_their_row_allows_and_need_all_of_it() -> None:
    allowed, actual = _map(), _actual()
    complaints = []
    for name, imports in actual.items():
        permitted = allowed.get(name, set())
        complaints += [
            f"  {name} -> {other} is not allowed: {', '.join(sorted(files))}"
            for other, files in sorted(imports.items())
            if other not in permitted
        ]
        complaints += [
            f"  {name} -> {other} is allowed, and nothing needs it"
            for other in sorted(permitted - set(imports))
        ]
    _complain(f"Imports differ from the table in {PAGE.name}:", complaints)


def test_no_row_allows_an_import_from_a_row_above() -> None:
    rows = _map()
    place = {name: i for i, name in enumerate(rows)}
    _complain(
        f"The table in {PAGE.name} does not run one way:",
        [
            f"  {name} may import {other}, which is {'above it' if other in place else 'no row'}"
            for name, imports in rows.items()
            for other in sorted(imports)
            if place.get(other, -1) <= place[name]
        ],
    )


def test_the_table_keeps_what_must_stay_apart() -> None:
    rows = _map()
    for name, forbidden in FORBIDDEN.items():
        assert not (rows[name] if "*" in forbidden else rows[name] & forbidden), name
    assert rows["schemes"] <= {"errors"}


def test_imports_are_found_wherever_they_stand() -> None:
    source = """
from typing import TYPE_CHECKING
import json, smolquant.hub
from smolquant import __version__, record, load
if TYPE_CHECKING:
    from smolquant.checkpoint.reader import Layout
def late():
    import smolquant
    from smolquant.text import plain
"""
    modules = {"hub", "record", "checkpoint", "text", "json"}
    found = sorted(_imported(ast.parse(source), modules))
    assert found == ["__init__", "checkpoint", "hub", "record", "text"]


def _sources() -> list[Path]:
    """What people write under entrypoint/, the bundled texts excepted."""
    texts = PACKAGE / "evaluate/text"
    return [
        path
        for path in sorted((ROOT / "entrypoint").rglob("*"))
        if path.is_file()
        and path.suffix in {".py", ".c", ".j2", ""}
        and not path.is_relative_to(texts)
        and not any(part.endswith((".egg-info", "__pycache__")) for part in path.parts)
    ]


def test_no_file_is_too_long_to_be_read() -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in _sources()}
    assert len(lines) > 50
    _complain(
        f"Files of more than {MOST_LINES} lines:",
        [
            f"  {path.relative_to(ROOT)}: {count}"
            for path, count in lines.items()
            if count > MOST_LINES
        ],
    )


def test_the_story_of_a_run_is_read_on_one_screen() -> None:
    assert len((PACKAGE / "pipeline.py").read_text(encoding="utf-8").splitlines()) < 200


def _functions(path: Path) -> list[tuple[str, int]]:
    """Names and lines, without decorators, of the functions in a file of Python or C."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return [
            (node.name, (node.end_lineno or node.lineno) - node.lineno + 1)
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        ]
    whole = re.finditer(r"^\w[^;{}]*?(\w+)\([^;{}]*\)\s*\{\n.*?^\}", text, re.MULTILINE | re.DOTALL)
    return [(function[1], function[0].count("\n") + 1) for function in whole]


def test_no_function_is_too_long_to_be_read() -> None:
    complaints, seen = [], 0
    for path in (path for path in _sources() if path.suffix in {".py", ".c"}):
        functions = _functions(path)
        assert functions or path.suffix == ".py", f"found no function in {path.name}"
        seen += len(functions)
        complaints += [
            f"  {path.relative_to(ROOT)}: {name} has {lines}"
            for name, lines in functions
            if lines > MOST_LINES_OF_A_FUNCTION and (path.name, name) not in LONG_FUNCTIONS
        ]
    assert seen > 500
    _complain(f"Functions of more than {MOST_LINES_OF_A_FUNCTION} lines:", complaints)
