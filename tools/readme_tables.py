"""`make docs`: blocks of README.md, docs/ and action.yml that follow code and tests; names everywhere."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import click
import yaml

import release_names
import runtime_page
from fault_page import all_faults, sections
from smolquant.cli import quantize
from smolquant.report import overview
from smolquant.schemes import SCHEMES

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"


def options() -> str:
    """Rows of markdown: each option with the action's input, its default and what it does."""
    rows = ["| option | input | default | |", "| :-- | :-- | :-- | :-- |"]
    for parameter in quantize.params:
        if not isinstance(parameter, click.Option):
            continue
        option = parameter.opts[0]
        variables = parameter.envvar or []
        names = [variables] if isinstance(variables, str) else list(variables)
        inputs = [
            name.removeprefix("INPUT_").lower() for name in names if name.startswith("INPUT_")
        ]
        default = parameter.default
        shown = (
            "" if default in (None, False) or not isinstance(default, str | int) else f"`{default}`"
        )
        choices = parameter.type.choices if isinstance(parameter.type, click.Choice) else ()
        help_text = (parameter.help or "").replace("|", "\\|")
        allowed = f" One of {', '.join(map(str, choices))}." if choices else ""
        named = f"`{', '.join(inputs)}`" if inputs else ""
        rows.append(f"| `{option}` | {named} | {shown} | {help_text}{allowed} |")
    return "\n".join(rows) + "\n"


def measured(page: str) -> str:
    """The first table of a page that `make bench` or `make bench-quality` has written."""
    lines = (DOCS / page).read_text(encoding="utf-8").splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("|"))
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[first:])
    return "\n".join(rows) + "\n"


def tree() -> str:
    """What a repository holds, with a line for each scheme's subfolder."""
    folders = [(f"{scheme.variant}/", scheme.title) for scheme in SCHEMES.values()]
    lines = [
        ("README.md", "your card, with our table between two markers"),
        (overview.FILE_NAME, "size and quality of all variants, in one picture"),
        ("config.json, model.safetensors, tokenizer…", ""),
        *folders,
    ]
    width = max(len(name) for name, told in lines if told) + 4
    drawn = [f"├── {name:<{width}}{told}".rstrip() for name, told in lines]
    drawn[-1] = drawn[-1].replace("├", "└")
    return "\n".join(["```", "your-username/model-name/", *drawn, "```"]) + "\n"


def schemes() -> str:
    """Rows of markdown: each quantization type as its scheme describes it."""
    rows = [
        "| type | folder | what it is | loads with | best for |",
        "| :-- | :-- | :-- | :-- | :-- |",
    ]
    rows += [
        f"| `{name}` | `{scheme.variant}/` | {scheme.title} | {scheme.loading} | {scheme.best_for} |"
        for name, scheme in SCHEMES.items()
    ]
    return "\n".join(rows) + "\n"


def outputs() -> str:
    """The action's outputs that hold the addresses of variants, in YAML."""
    return "".join(
        f"  {scheme.output_name}:\n    description: Address of the {scheme.variant} variant.\n"
        for scheme in SCHEMES.values()
    )


def step_outputs() -> str:
    """Rows of markdown: each output of the action, as action.yml describes it."""
    action = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
    rows = ["| output | |", "| :-- | :-- |"]
    rows += [f"| `{name}` | {told['description']} |" for name, told in action["outputs"].items()]
    return "\n".join(rows) + "\n"


@dataclass(frozen=True)
class Page:
    """A file with blocks that are written here, each between two markers that name it."""

    begin: str
    end: str
    blocks: Mapping[str, Callable[[], str]]
    """What writes a block, by its name in the markers."""


PAGES: Mapping[str, Page] = {
    "action.yml": Page("  # {} (make docs)\n", "  # {}", {"variants": outputs}),
    "README.md": Page(
        "<!-- {} (make docs) -->\n",
        "<!-- {} -->",
        {
            "tree": tree,
            "schemes": schemes,
            "options": options,
            "outputs": step_outputs,
            "performance": lambda: measured("performance.md"),
            "runtime": runtime_page.summary,
        },
    ),
    "docs/faults.md": Page(
        "<!-- {} (make docs) -->\n", "<!-- {} -->", {"faults": lambda: sections(all_faults())}
    ),
    "docs/runtime.md": Page(
        "<!-- {} (make docs) -->\n", "<!-- {} -->", {"runtime": runtime_page.sections}
    ),
}
"""By file, from the repository's root; README.md follows action.yml."""


def with_blocks(name: str, text: str) -> str:
    """The ``text`` of a file of :data:`PAGES` with each of its blocks put up to date.

    Raises:
        ValueError: a marker is missing, or stands there more than once.
    """
    page = PAGES[name]
    for block, content in page.blocks.items():
        begin, end = page.begin.format(f"{block}:begin"), page.end.format(f"{block}:end")
        if (text.count(begin), text.count(end)) != (1, 1):
            raise ValueError(f"{name} has not one block between {begin!r} and {end!r}")
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = f"{before}{begin}{content()}{end}{after}"
    return text


if __name__ == "__main__":
    for page_name in PAGES:
        path = ROOT / page_name
        path.write_text(with_blocks(page_name, path.read_text(encoding="utf-8")), encoding="utf-8")
    release_names.write(release_names.read(), release_names.naming_files())
