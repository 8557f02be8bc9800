"""`make docs`: blocks of README.md, docs/ and action.yml that follow code and tests; names everywhere."""

import itertools
import re
import tomllib
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


def quality() -> str:
    """The rows of docs/quality.md's first table for what the command makes by default, or calibrated."""
    heading, rule, *rows = measured("quality.md").splitlines()
    chosen = [row for row in rows if _cells(row)[1:3] in _AS_RELEASED]
    return "\n".join([heading, rule, *chosen]) + "\n"


_AS_RELEASED = (["row", ""], ["128", "search"], ["128", "calibrated"])
"""Group and method: the default group size, and the methods that a release is likely to be made with."""


def performance() -> str:
    """The rows of docs/performance.md's first table that say most, without what they are computed from."""
    heading, rule, *rows = measured("performance.md").splitlines()
    shown = [row for row in rows if _cells(row)[0] in _SHOWN_COSTS]
    columns = [number for number, name in enumerate(_cells(heading)) if name in _SHOWN_COLUMNS]
    return "".join(
        f"| {' | '.join(_cells(row)[column] for column in columns)} |\n"
        for row in (heading, rule, *shown)
    )


_SHOWN_COSTS = (
    "stock transformers + torchao, int8",
    "smolquant, int8_weight_only",
    "smolquant, both",
)
_SHOWN_COLUMNS = ("", "wall", "CPU", "peak memory", "written")


def _cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip().removeprefix("|").removesuffix("|").split("|")]


def versions() -> str:
    """Rows of markdown: what pyproject.toml asks for, and what each is for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    rows = [
        "| | versions | |",
        "| :-- | :-- | :-- |",
        f"| Python | {project['requires-python']} | |",
    ]
    wanted = {"": project["dependencies"], **project["optional-dependencies"]}
    for extra, requirements in wanted.items():
        what = f"`smolquant[{extra}]`, what the action installs" if extra else ""
        for requirement in requirements:
            rows.append(_REQUIREMENT.sub(rf"| \1 | \2 | {what} |", requirement))
    return "\n".join(rows) + "\n"


_REQUIREMENT = re.compile(r"([\w-]+)(.+)")


def hardware() -> str:
    """Rows of markdown: the machines that each scheme runs on, as it says itself."""
    rows = ["| variant | runs with | GPU of compute capability |", "| :-- | :-- | :-- |"]
    for scheme in SCHEMES.values():
        least = scheme.cuda_capability
        gpu = f"{least[0]}.{least[1]} or more; on no CPU" if least else ""
        rows.append(f"| `{scheme.variant}/` | {scheme.loading} | {gpu} |")
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


def servers() -> str:
    """Rows of markdown: for each variant, whether vLLM reads it, and what it is given."""
    rows = ["| variant | vLLM | what it is given |", "| :-- | :-- | :-- |"]
    for scheme in SCHEMES.values():
        name = scheme.variant
        given = f"`--revision {name}`, or the folder `{name}/` after a download"
        needed = scheme.cuda_capability
        gpu = f", on a GPU of compute capability {needed[0]}.{needed[1]} or more" if needed else ""
        rows.append(
            f"| `{name}` | yes{gpu} | {given} |"
            if scheme.vllm_loads
            else f"| `{name}` | no | nothing; load it with {scheme.loading} |"
        )
    return "\n".join(rows) + "\n"


def outputs() -> str:
    """The action's outputs that hold the addresses of variants, in YAML."""
    return "".join(
        f"  {scheme.output_name}:\n    description: Address of the {scheme.variant} variant.\n"
        for scheme in SCHEMES.values()
    )


def types() -> str:
    """The action's input that names schemes, in YAML, as the command describes it."""
    option = next(one for one in quantize.params if one.name == "quant_type")
    assert isinstance(option, click.Option)
    described = yaml.safe_dump(option.help, default_style='"', width=10**6).strip()
    return f"  quant-type:\n    description: {described}\n    default: {option.default}\n"


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
    "action.yml": Page("  # {} (make docs)\n", "  # {}", {"types": types, "variants": outputs}),
    "README.md": Page(
        "<!-- {} (make docs) -->\n",
        "<!-- {} -->",
        {
            "tree": tree,
            "schemes": schemes,
            "options": options,
            "outputs": step_outputs,
            "quality": quality,
            "performance": performance,
            "runtime": runtime_page.summary,
        },
    ),
    "docs/faults.md": Page(
        "<!-- {} (make docs) -->\n", "<!-- {} -->", {"faults": lambda: sections(all_faults())}
    ),
    "docs/migration.md": Page(
        "<!-- {} (make docs) -->\n",
        "<!-- {} -->",
        {"hardware": hardware, "versions": versions},
    ),
    "docs/serving.md": Page("<!-- {} (make docs) -->\n", "<!-- {} -->", {"servers": servers}),
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
