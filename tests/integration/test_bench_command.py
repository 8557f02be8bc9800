"""``smolquant bench`` measures a user's own model: a folder with variants and their source."""

import io
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

import models
from command import Run, run_smolquant
from smolquant.bench import bench as bench_command
from smolquant.report.console import Console


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A variant beside its source, as in a repository; only to be read."""
    work = tmp_path_factory.mktemp("bench")
    checkpoint = models.save_with_tokenizer(work / "checkpoint", models.FAMILIES["smollm3"]())
    made = run_smolquant("quantize", checkpoint, "--save-only", folder=work)
    assert made.exit_code == 0, made.log
    for path in checkpoint.iterdir():
        if path.is_file():
            (work / "quantized" / path.name).symlink_to(path)
    return work / "quantized"


def bench(*arguments: str | Path, folder: Path) -> Run:
    return run_smolquant("bench", *arguments, folder=folder, timed=True)


def test_a_table_of_a_variant_beside_its_source(folder: Path, tmp_path: Path) -> None:
    run = bench(folder, folder=tmp_path)
    assert run.exit_code == 0, run.log
    lines = run.log.splitlines()
    head = next(number for number, line in enumerate(lines) if line.startswith("model "))
    assert " threads" in lines[head - 1] or " thread," in lines[head - 1]
    source, int8 = lines[head + 1 :]
    assert source.startswith("source ") and "ms/token" in source
    assert int8.startswith("int8 ") and "ms/token" in int8 and " to " in int8
    assert "smolquant, 8 bits" in int8


def test_it_shows_a_sign_of_life_while_it_measures(folder: Path) -> None:
    """On a clock that runs fast, so that measuring lasts long by it on any machine."""
    log = io.StringIO()
    console = Console({}, log, clock=lambda: 100 * time.monotonic())
    done = CliRunner().invoke(bench_command, [str(folder)], obj=console, standalone_mode=False)
    assert done.return_value == 0, done.output
    assert "measuring: " in log.getvalue()


def test_without_a_source_only_the_variants_and_json_for_programs(
    folder: Path, tmp_path: Path
) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "int8").symlink_to(folder / "int8")
    command = [
        sys.executable,
        "-m",
        "smolquant",
        "bench",
        str(alone),
        "--variant",
        "int8",
        "--json",
    ]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "holds no source beside its variants" in run.stderr
    told = json.loads(run.stdout)
    assert told["variants"]["int8"]["decode_tokens_per_second"] > 1
    assert told["variants"]["int8"]["decode_ratio"] is None
    assert told["source"]["decode_tokens_per_second"] is None


@pytest.mark.fault("quality", "`bench` is given a variant that does not run", "Exit 3, by name.")
def test_a_variant_that_does_not_run_is_named(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    (broken / "int8").mkdir(parents=True)
    for path in (folder / "int8").iterdir():
        if path.name != "config.json":
            (broken / "int8" / path.name).symlink_to(path)
    config = json.loads((folder / "int8/config.json").read_text())
    (broken / "int8/config.json").write_text(json.dumps({**config, "model_type": "hal9000"}))
    run = bench(broken, folder=tmp_path)
    assert run.exit_code == 3, run.log
    assert "int8 does not run: " in run.log and "hal9000" in run.log


@pytest.mark.fault(
    "input", "`bench` is given a folder without variants, or one that is not there", "Exit 2."
)
def test_what_is_not_there_is_refused_at_once(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    run = bench(tmp_path / "empty", folder=tmp_path)
    assert run.exit_code == 2 and "has no variants: no int8/, int4/" in run.log
    run = bench(folder, "--variant", "int4", folder=tmp_path)
    assert run.exit_code == 2 and " has no int4. What " in run.log and " has: int8." in run.log
    run = bench(folder, "--source", tmp_path / "empty", folder=tmp_path)
    assert run.exit_code == 2 and "has no weights in it" in run.log
