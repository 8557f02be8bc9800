"""Schemes speak for themselves: no other module knows one by its name."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import smolquant
from smolquant.schemes import BY_VARIANT, SCHEMES

PACKAGE = Path(smolquant.__file__).parent
NAMES = sorted({*SCHEMES, *BY_VARIANT}, key=len, reverse=True)
NAMED = re.compile(rf"(?<![\w-])(?:{'|'.join(NAMES)})(?![\w-])")
TEMPLATES = [*PACKAGE.rglob("*.j2")]
MODULES = [path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE / "schemes"]
DEFAULTS = {
    "settings.py": {"quant_types"},
    "runtime/load.py": {"variant"},
}
"""Module -> fields and parameters whose defaults name a scheme: what a user gets who chooses none."""


def strings(tree: ast.Module, module: str) -> Iterator[ast.Constant]:
    """String literals, parts of f-strings among them; without docstrings, allowed defaults and help."""
    left_out = set[ast.AST]()
    for node in ast.walk(tree):
        match node:
            case ast.Expr(value=ast.Constant()):
                left_out.add(node.value)
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.Call(args=[default, *_])) if (
                name in DEFAULTS.get(module, ())
            ):
                left_out.add(default)
            case ast.arguments():
                positional = [*node.posonlyargs, *node.args][-len(node.defaults) or None :]
                arguments = [*positional, *node.kwonlyargs]
                defaults = zip(arguments, [*node.defaults, *node.kw_defaults], strict=False)
                left_out |= {
                    default
                    for argument, default in defaults
                    if default is not None and argument.arg in DEFAULTS.get(module, ())
                }
            case ast.keyword(arg="help") if module == "cli.py":
                left_out |= set(ast.walk(node.value))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in left_out:
            yield node


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_names_a_scheme(path: Path) -> None:
    module = path.relative_to(PACKAGE).as_posix()
    found = [
        f"{module}:{node.lineno}: {node.value!r}"
        for node in strings(ast.parse(path.read_text("utf-8")), module)
        if NAMED.search(str(node.value))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_no_template_names_a_scheme(path: Path) -> None:
    found = [
        f"{path.name}:{number}: {line.strip()}"
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if NAMED.search(line)
    ]
    assert not found, "\n".join(found)


def test_what_would_be_found() -> None:
    """Names by themselves and in sentences, and nothing that only contains one."""
    program = '''
"""int4 in a docstring."""
def load(variant="int4", other="int8", *, embeddings="source"):
    """int8_dynamic too."""
    return f"use {variant} or float8 here", "--int4-method", "int8-url", "uint8", "x.int8_weight_only"
'''
    found = [node.value for node in strings(ast.parse(program), "runtime/load.py")]
    named = [text for text in found if NAMED.search(str(text))]
    assert sorted(map(str, named)) == [" or float8 here", "int8", "x.int8_weight_only"]
