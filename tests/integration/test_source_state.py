"""A folder is hashed beside the work: what starts before, and what becomes of a folder that changes."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from transformers import LlamaConfig

from command import Run, run_killed
from conftest import WRITE
from localhub import LocalHub
from models import SIZES, save_with_tokenizer
from smolquant.checkpoint.folder import FolderSource
from smolquant.checkpoint.repository import HubSource
from smolquant.hub import Hub
from smolquant.record import VariantRecord

REPO = "alice/model"
RunSmolquant = Callable[..., Run]

HASHED_LATE = """
import runpy, threading
from smolquant.checkpoint import folder
from smolquant.tracking.recorder import Recorder

first_block, advance, sha256_of = threading.Event(), Recorder.advance, folder.sha256_of

def advance_and_tell(recorder, n_bytes):
    first_block.set()
    advance(recorder, n_bytes)

def wait_and_hash(path):
    if "smolquant-trial" in str(path):  # of the small model that is tried before
        return sha256_of(path)
    if not first_block.wait(20):
        raise TimeoutError("nothing was quantized before the source was hashed")
    return sha256_of(path)

Recorder.advance, folder.sha256_of = advance_and_tell, wait_and_hash
runpy.run_module("smolquant", run_name="__main__")
"""
"""The command, whose source is not hashed before its first block is quantized."""

CHANGED_IN_QUANTIZING = """
import runpy, sys
from pathlib import Path
from smolquant.tracking.recorder import Recorder

how, changed, advance = sys.argv.pop(1), Path(sys.argv.pop(1)), Recorder.advance

def advance_and_change(recorder, n_bytes):
    if how == "removed":
        changed.unlink(missing_ok=True)
    else:
        with changed.open("r+b") as file:
            file.write(b"{")
    advance(recorder, n_bytes)

Recorder.advance = advance_and_change
runpy.run_module("smolquant", run_name="__main__")
"""
"""The command, with a file that is removed, or written to, after every block."""

CHANGED_IN_MEASURING = """
import runpy, sys
from pathlib import Path

import torch
from smolquant.evaluate import Measurement

changed = Path(sys.argv.pop(1))

def run(*_, **__):
    changed.touch()
    return {}

Measurement.windows, Measurement.run = lambda *_: torch.zeros(1, 2, dtype=torch.long), run
runpy.run_module("smolquant", run_name="__main__")
"""
"""The command, with a file that is touched in place of a measurement."""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    sizes = SIZES | {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4}
    return save_with_tokenizer(tmp_path / "source", LlamaConfig(**sizes))


@pytest.mark.parametrize("target", [None, REPO])
def test_quantizing_does_not_wait_for_the_hash(
    tmp_path: Path, source: Path, hub: LocalHub, smolquant: RunSmolquant, target: str | None
) -> None:
    where = target or "--save-only"
    run = smolquant("quantize", source, where, hub=hub, token=WRITE.value, script=HASHED_LATE)
    assert run.exit_code == 0, run.log
    identity = FolderSource(source).identity
    record = VariantRecord.from_json((tmp_path / "quantized/int8/quantization.json").read_text())
    assert record.source.identity == identity
    assert run.report["source"]["identity"] == identity
    assert f"{source}: {identity}" in run.log
    assert f'"source/identity": "{identity}"' in (tmp_path / "quantized/events.jsonl").read_text()


def refused(run: Run, changed: str) -> None:
    """Make sure that it was, and that it left nothing to be taken for a variant."""
    assert run.exit_code == 3, run.log
    assert f"{changed} changed while the checkpoint was being read" in run.log
    assert "Run again when nothing writes to the checkpoint." in run.log
    left = {path.name for path in (run.folder / "quantized").iterdir()}
    assert left == {"events.jsonl", "report.json"}


@pytest.mark.fault(
    "meanwhile",
    "The checkpoint changes while its variants are made",
    "Exit 3; no variant is left.",
)
@pytest.mark.parametrize(
    ("how", "name"), [("written", "model.safetensors"), ("removed", "tokenizer.json")]
)
def test_a_source_that_changes_while_it_is_quantized_is_refused(
    source: Path, smolquant: RunSmolquant, how: str, name: str
) -> None:
    arguments = ("quantize", source, "--save-only", "--quant-type", "both")
    run = smolquant(how, source / name, *arguments, script=CHANGED_IN_QUANTIZING)
    refused(run, name)


@pytest.mark.fault(
    "meanwhile",
    "The checkpoint changes while its variants are measured",
    "Exit 3; nothing is published.",
)
def test_a_source_that_changes_while_it_is_measured_is_refused(
    source: Path, smolquant: RunSmolquant
) -> None:
    arguments = ("quantize", source, "--save-only", "--evaluate", "auto")
    run = smolquant(source / "model.safetensors", *arguments, script=CHANGED_IN_MEASURING)
    refused(run, "model.safetensors")


@pytest.mark.fault(
    "cancelled",
    "A run is killed, and its checkpoint then touched",
    "The next run begins anew.",
)
@pytest.mark.parametrize("touched", ["model.safetensors", "config.json"])
def test_a_killed_run_is_not_gone_on_with_from_a_touched_source(
    tmp_path: Path, source: Path, smolquant: RunSmolquant, touched: str
) -> None:
    arguments = ["quantize", str(source), "--save-only", "--max-shard-size", "1MB"]
    run_killed(arguments, tmp_path, after=2)
    (source / touched).touch()

    again = smolquant(*arguments)

    assert again.exit_code == 0, again.log
    assert "going on from" not in again.log
    assert not list((tmp_path / "quantized").glob(".int*")), "nothing is left behind"


def test_a_killed_run_is_gone_on_with_from_the_same_commit_fetched_again(
    tmp_path: Path, source: Path, hub: LocalHub, smolquant: RunSmolquant
) -> None:
    api = HfApi(endpoint=hub.url, token=WRITE.value)
    api.create_repo(REPO)
    api.upload_folder(repo_id=REPO, folder_path=source)
    arguments = ["quantize", REPO, "--save-only", "--max-shard-size", "1MB"]
    run_killed(arguments, tmp_path, after=2, hub=hub)
    shutil.rmtree(tmp_path / "hf_home")

    again = smolquant(*arguments, hub=hub)

    assert again.exit_code == 0, again.log
    assert "int8: going on from" in again.log


def test_a_commit_is_told_from_others_by_its_identity(
    hub: LocalHub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    api = HfApi(endpoint=hub.url, token=WRITE.value)
    api.create_repo(REPO)
    api.upload_folder(repo_id=REPO, folder_path=source)
    found = HubSource(Hub(WRITE.value, endpoint=hub.url), REPO, None)
    assert found.state == found.identity == FolderSource(source).identity
    assert not (found.folder / "model.safetensors").exists(), "no weights are fetched for it"
