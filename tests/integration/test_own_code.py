"""Models that bring code of their own: quantized, published, loaded and checked where that is allowed."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import models
from command import Run, run_smolquant
from conftest import WRITE
from localhub import LocalHub

RunSmolquant = Callable[..., Run]

CODE = {
    "configuration_own.py": """
from transformers import LlamaConfig


class OwnConfig(LlamaConfig):
    model_type = "own"
""",
    "modeling_own.py": """
from transformers import LlamaForCausalLM

from .configuration_own import OwnConfig


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
""",
    "tokenization_own.py": """
from transformers import PreTrainedTokenizerFast


class OwnTokenizer(PreTrainedTokenizerFast):
    pass
""",
}

USED = """
import sys, torch, smolquant
where = sys.argv[1]
try:
    smolquant.load(where, "int8")
except Exception as error:
    print(type(error).__name__, error)
model, tokenizer = smolquant.load(where, "int8", trust_remote_code=True)
with torch.no_grad():
    logits = model(**tokenizer("<5> <6> <7>", return_tensors="pt")).logits
print(type(model).__name__, type(tokenizer).__name__, bool(torch.isfinite(logits).all()))
"""


def change(path: Path, **entries: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


@pytest.fixture
def remote(tmp_path: Path) -> Path:
    """A model whose config, model and tokenizer are classes of its own."""
    folder = models.save_with_tokenizer(tmp_path / "remote", models.llama(2))
    for name, text in CODE.items():
        (folder / name).write_text(text)
    change(
        folder / "config.json",
        model_type="own",
        auto_map={
            "AutoConfig": "configuration_own.OwnConfig",
            "AutoModelForCausalLM": "modeling_own.OwnModel",
        },
    )
    change(
        folder / "tokenizer_config.json",
        tokenizer_class="OwnTokenizer",
        auto_map={"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]},
    )
    return folder


def require_usable(where: str, hub: LocalHub | None, folder: Path) -> None:
    """``where`` is loaded with its code, and says that it needs it."""
    environ = {
        **os.environ,
        "HF_HOME": str(folder / "hf_of_a_user"),
        "HF_ENDPOINT": hub.url if hub else "http://127.0.0.1:9",
        "HF_TOKEN": WRITE.value,
    }
    used = subprocess.run(
        [sys.executable, "-c", USED, where],
        cwd=folder,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "OwnModel OwnTokenizer True" in used.stdout, used.stdout + used.stderr
    assert "NeedsOwnCode" in used.stdout
    assert "trust_remote_code=True" in used.stdout

    distrustful = run_smolquant("check", where, folder=folder, hub=hub, token=WRITE.value)
    assert distrustful.exit_code == 2
    assert "int8 is not checked: it needs code of its own" in distrustful.log
    assert "--trust-remote-code" in distrustful.log
    trustful = run_smolquant(
        "check", where, "--trust-remote-code", folder=folder, hub=hub, token=WRITE.value
    )
    assert trustful.exit_code == 0, trustful.log
    assert "int8: works" in trustful.log


def require_snippet_runs(folder: Path) -> None:
    """The first program of the variant's card runs as printed."""
    card = (folder / "quantized/int8/README.md").read_text()
    program = re.findall(r"^```python\n(.*?)^```", card, re.MULTILINE | re.DOTALL)[0]
    assert program.count("trust_remote_code=True") == 2
    environ = {**os.environ, "HF_HOME": str(folder / "hf_of_a_user")}
    ran = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr


@pytest.mark.fault(
    "checkpoint",
    "The model needs Python code of its repository's own",
    "Exit 3 without --trust-remote-code; none of it runs.",
)
def test_a_folder_with_code_is_measured_saved_and_usable(
    smolquant: RunSmolquant, remote: Path, tmp_path: Path
) -> None:
    refused = smolquant("quantize", remote, "--save-only")
    assert refused.exit_code == 3
    assert "needs code of its own" in refused.log

    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"<{number % 300}>" for number in range(80)))
    run = smolquant(
        *("quantize", remote, "--save-only", "--trust-remote-code"),
        *("--evaluate", "always", "--eval-text", text, "--eval-tokens", "64"),
        timed=True,
    )
    assert run.exit_code == 0, run.log
    assert "Not tried" not in run.log
    metrics = json.loads((tmp_path / "quantized/int8/quantization.json").read_text())["metrics"]
    assert metrics["tokens_per_second"] > 0
    require_snippet_runs(tmp_path)
    require_usable("quantized", None, tmp_path)


def test_a_repository_with_code_is_published_into_another_and_usable(
    smolquant: RunSmolquant, remote: Path, hub: LocalHub, tmp_path: Path
) -> None:
    first = smolquant(
        *("quantize", remote, "alice/remote", "--trust-remote-code"), hub=hub, token=WRITE.value
    )
    assert first.exit_code == 0, first.log
    second = smolquant(
        *("quantize", "alice/remote", "alice/other", "--trust-remote-code"),
        hub=hub,
        token=WRITE.value,
    )
    assert second.exit_code == 0, second.log
    assert "Not tried" not in second.log
    made = json.loads((tmp_path / "quantized/int8/tokenizer_config.json").read_text())
    assert made["auto_map"] == {
        "AutoTokenizer": [None, "alice/remote--tokenization_own.OwnTokenizer"]
    }
    require_usable("alice/remote", hub, tmp_path)
    require_usable("alice/other", hub, tmp_path)
