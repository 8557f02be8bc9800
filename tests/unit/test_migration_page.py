"""docs/migration.md leads from every option of the older scripts to one that there is."""

import re

import pytest

from smolquant.cli import quantize
from snippets import ROOT

OPTIONS_OF_THE_SCRIPTS = (
    "--quant-type",
    "--device",
    "--group-size",
    "--token",
    "--private",
    "--trackio-url",
    "--experiment-name",
    "--dataset-repo",
    "--save-only",
)


def rows() -> dict[str, str]:
    """What the first table says, by option."""
    page = (ROOT / "docs/migration.md").read_text(encoding="utf-8")
    table = page.partition("| option of the scripts | now |")[2].partition("\n\n")[0]
    return dict(re.findall(r"^\| `(--[\w-]+)` \| (.*) \|$", table, re.MULTILINE))


@pytest.mark.parametrize("option", OPTIONS_OF_THE_SCRIPTS)
def test_an_option_of_the_scripts_has_become_one_of_the_command(option: str) -> None:
    ours = {name for parameter in quantize.params for name in parameter.opts}
    named = set(re.findall(r"`(--[\w-]+)", rows()[option]))
    assert named <= ours
    assert named or "HF_TOKEN" in rows()[option]
