"""docs/stability.md promises what there is: names in Python, and options that say when they will go."""

import re

import click
import pytest
from click.testing import CliRunner

import smolquant
from smolquant.parameters import InputOption
from snippets import ROOT


def test_what_python_programs_may_use_is_there() -> None:
    page = (ROOT / "docs/stability.md").read_text(encoding="utf-8")
    promised = page.partition("**From Python**")[2].partition("\n- ")[0]
    assert set(re.findall(r"`smolquant\.(\w+)`", promised)) == set(smolquant.__all__) - {
        "__version__"
    }


@pytest.mark.parametrize(
    ("arguments", "environ"), [(["--old", "x"], {}), ([], {"INPUT_OLD": "x"}), ([], {})]
)
def test_a_deprecated_option_says_so_when_it_is_used(
    arguments: list[str], environ: dict[str, str]
) -> None:
    @click.command()
    @click.option("--old", cls=InputOption, envvar="INPUT_OLD", deprecated="Use --new.")
    def command(old: str | None) -> None:
        click.echo(f"old is {old}")

    ran = CliRunner().invoke(command, arguments, env=environ)
    assert ran.stdout == f"old is {'x' if arguments or environ else None}\n"
    assert ("Use --new." in ran.stderr) == bool(arguments or environ)
