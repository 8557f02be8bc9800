"""The cards' snippets run as printed, against the Hub that they were published to."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from command import Run
from conftest import WRITE
from localhub import LocalHub

REPO = "alice/model"


@pytest.fixture
def hub_with_variants(smolquant: Callable[..., Run], hub: LocalHub, checkpoint: Path) -> LocalHub:
    types = "int8_weight_only,int4_weight_only,int8_dynamic"
    run = smolquant("quantize", checkpoint, REPO, "--quant-type", types, hub=hub, token=WRITE.value)
    assert run.exit_code == 0, run.log
    return hub


def snippets(card: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", card, re.MULTILINE | re.DOTALL)


def require_download(card: str, environ: dict[str, str], folder: Path) -> None:
    """The command for a server brings what it is then given to serve."""
    (commands,) = re.findall(r"^```sh\n(hf download .*?)^```", card, re.MULTILINE | re.DOTALL)
    download, serve = commands.splitlines()
    program = [str(Path(sys.executable).parent / "hf"), *shlex.split(download)[1:]]
    subprocess.run(program, env=environ, cwd=folder, check=True)
    served = folder / shlex.split(serve)[-1]
    assert (served / "config.json").is_file()
    assert list(served.glob("*.safetensors"))


def test_every_snippet_of_every_card_runs_as_printed(
    hub_with_variants: LocalHub, tmp_path: Path
) -> None:
    hub = hub_with_variants
    root = snippets(hub.read(REPO, "README.md").decode())
    cards = {
        variant: snippets(hub.read(REPO, f"{variant}/README.md").decode())
        for variant in ("int8", "int4", "int8_dynamic")
    }
    assert len(root) == 7, "the main model, and transformers and smolquant for each variant"
    assert {len(found) for found in cards.values()} == {2}
    environ = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": WRITE.value,
        "HF_HOME": str(tmp_path / "home"),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    require_download(hub.read(REPO, "int8/README.md").decode(), environ, tmp_path)
    different = dict.fromkeys([*root, *(code for found in cards.values() for code in found)])
    for code in different:
        ran = subprocess.run(
            [sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=False
        )
        assert ran.returncode == 0, f"{code}\n{ran.stderr}"
        assert "<" in ran.stdout, "the small model's words are <0>, <1>, ..."
        assert REPO in code
    assert "smolquant" not in cards["int8"][0], "int8 needs transformers alone"
