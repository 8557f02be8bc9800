"""`make docs`: the README's table of options, made from the command itself."""

from pathlib import Path

import click

from smolquant.cli import quantize

BEGIN, END = "<!-- options:begin (make docs) -->\n", "<!-- options:end -->"


def table() -> str:
    """Rows of markdown: option, the action's input, default, what it does."""
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
        rows.append(f"| `{option}` | `{', '.join(inputs)}` | {shown} | {help_text}{allowed} |")
    return "\n".join(rows) + "\n"


def with_table(readme: str) -> str:
    """``readme`` with the table between its markers put up to date."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{table()}{END}{after}"


if __name__ == "__main__":
    path = Path("README.md")
    path.write_text(with_table(path.read_text(encoding="utf-8")), encoding="utf-8")
