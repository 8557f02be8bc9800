"""However a run ends, all that can be told of it is told, and its exit code stands."""

import errno
import io
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from smolquant import ending as ending_module
from smolquant.ending import Ending
from smolquant.errors import GateError, InputError
from smolquant.record import Metrics
from smolquant.report.console import Console
from smolquant.report.run_report import PlannedVariant, RunReport
from unit.report_samples import variant_result


def end(
    folder: Path, environ: Mapping[str, str], error: BaseException | None = None
) -> tuple[int, str]:
    """The exit code of a run that ends with ``error``, and what the log says."""
    log = io.StringIO()
    report = RunReport(model="user/model", output_dir=folder / "out")
    with Ending(report, Console({}, log), environ) as ending:
        if error is not None:
            raise error
    return ending.exit_code, log.getvalue()


def test_a_failure_is_told_everywhere(tmp_path: Path) -> None:
    environ = {
        "GITHUB_OUTPUT": str(tmp_path / "outputs"),
        "GITHUB_STEP_SUMMARY": str(tmp_path / "summary"),
    }
    code, log = end(tmp_path, environ, GateError("Too much was lost.", hint="Take int8."))
    assert code == 6
    assert "error: Too much was lost." in log
    assert json.loads((tmp_path / "out/report.json").read_text())["error"]["exit_code"] == 6
    assert "Too much was lost." in (tmp_path / "summary").read_text()
    assert "changed<<" in (tmp_path / "outputs").read_text()


@pytest.mark.fault(
    "machine",
    "The runner's files or report.json cannot be written",
    "A warning for each; the exit code stands.",
)
@pytest.mark.parametrize("error", [None, GateError("Too much was lost.")])
def test_files_that_cannot_be_written_are_warnings_and_the_exit_code_stands(
    tmp_path: Path, error: BaseException | None
) -> None:
    (tmp_path / "out").write_text("a file where the folder should be")
    for name in ("outputs", "summary"):
        (tmp_path / name).mkdir()
    environ = {
        "GITHUB_OUTPUT": str(tmp_path / "outputs"),
        "GITHUB_STEP_SUMMARY": str(tmp_path / "summary"),
    }
    code, log = end(tmp_path, environ, error)
    assert code == (0 if error is None else 6)
    for consequence in ("no report.json", "no outputs", "no job summary"):
        assert consequence in log
    assert f"{tmp_path / 'summary'} cannot be written to: Is a directory." in log
    assert "bug" not in log


@pytest.mark.fault(
    "machine",
    "One file of the report cannot be written",
    "The others are.",
)
def test_one_file_that_cannot_be_written_leaves_the_others(tmp_path: Path) -> None:
    environ = {
        "GITHUB_OUTPUT": str(tmp_path / "missing/outputs"),
        "GITHUB_STEP_SUMMARY": str(tmp_path / "summary"),
    }
    code, log = end(tmp_path, environ)
    assert code == 0
    assert "The step has no outputs" in log
    assert "user/model" in (tmp_path / "summary").read_text()


@pytest.mark.fault(
    "machine",
    "Files cannot be given to the workspace's owner",
    "A warning; the exit code stands.",
)
def test_a_workspace_whose_files_cannot_be_given_away_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted", "out")

    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(os, "chown", refuse)
    code, log = end(tmp_path, {"GITHUB_WORKSPACE": str(tmp_path)})
    assert code == 0
    assert "out cannot be written to: Operation not permitted." in log


@pytest.mark.fault(
    "machine",
    "The machine refuses a file: a full disk, no rights, a limit, a place that went away",
    "Exit 4 with the place and the next step.",
)
@pytest.mark.parametrize(
    ("number", "next_step"),
    [
        (errno.ENOSPC, "Make room there"),
        (errno.EDQUOT, "Make room there"),
        (errno.EROFS, "Give access there"),
        (errno.EACCES, "Give access there"),
        (errno.EFBIG, "ulimit -f"),
        (errno.EMFILE, "ulimit -n"),
        (errno.EAGAIN, "ulimit -u"),
        (errno.EIO, "Look at the disk"),
        (errno.ENOENT, "was taken away while the run went on"),
        (errno.ENOTDIR, "Look at what lies there"),
        (errno.EISDIR, "--output-dir, what is downloaded to HF_HOME"),
    ],
)
def test_what_the_machine_refuses_is_no_bug_and_says_where(
    tmp_path: Path, number: int, next_step: str
) -> None:
    code, log = end(tmp_path, {}, OSError(number, os.strerror(number), "/data/model"))
    assert code == 4
    assert f"/data/model could not be used: {os.strerror(number)}." in log
    assert next_step in log
    assert "bug" not in log


@pytest.mark.fault(
    "machine",
    "A file cannot be moved",
    "The place that it was to have is named.",
)
def test_of_two_files_the_one_that_was_to_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError) as moved:
        (tmp_path / "missing").rename(tmp_path / "there")
    _, log = end(tmp_path, {}, moved.value)
    assert f"{tmp_path / 'there'} could not be used" in log


@pytest.mark.fault(
    "machine",
    "The system gives the process no more threads or memory",
    "Exit 4, and which.",
)
@pytest.mark.parametrize(
    ("error", "what"),
    [
        (RuntimeError("can't start new thread"), "no more threads"),
        (ImportError("x.so: failed to map segment from shared object"), "ran out of memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "ran out of memory"),
    ],
)
def test_limits_of_processes_and_memory_are_the_machines(
    tmp_path: Path, error: Exception, what: str
) -> None:
    code, log = end(tmp_path, {}, error)
    assert code == 4
    assert what in log


@pytest.mark.fault(
    "machine",
    "The system fails in a way that is not known",
    "Exit 1, called a bug.",
)
@pytest.mark.parametrize(
    "error", [OSError(errno.EINVAL, "Invalid argument"), OSError("odd"), ImportError("no x")]
)
def test_other_errors_of_the_system_are_unexpected(tmp_path: Path, error: Exception) -> None:
    code, log = end(tmp_path, {}, error)
    assert code == 1
    assert "This is a bug" in log


@pytest.mark.fault(
    "machine",
    "The job summary cannot be made",
    "That is told; the exit code stands.",
)
def test_a_summary_that_cannot_be_made_hides_no_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: object) -> str:
        raise KeyError("a field")

    monkeypatch.setattr(ending_module, "render_summary", broken)
    environ = {"GITHUB_STEP_SUMMARY": str(tmp_path / "summary")}
    code, log = end(tmp_path, environ, GateError("Too much was lost."))
    assert code == 6
    assert "There is no job summary" in log
    assert "KeyError" in log


@pytest.mark.fault(
    "machine",
    "The runner's files or report.json cannot be written",
    "A warning for each; the exit code stands.",
)
@pytest.mark.parametrize("error", [None, GateError("Too much was lost.")])
def test_files_of_the_runner_on_a_full_disk_are_warnings(
    tmp_path: Path, error: BaseException | None
) -> None:
    full = {"GITHUB_OUTPUT": "/dev/full", "GITHUB_STEP_SUMMARY": "/dev/full"}
    code, log = end(tmp_path, full, error)
    assert code == (0 if error is None else 6)
    assert log.count("/dev/full cannot be written to: No space left on device.") == 2


@pytest.mark.fault(
    "machine",
    "The machine's or the GPU's memory runs out",
    "Exit 4, and whose it was.",
)
@pytest.mark.parametrize(
    ("error", "what"),
    [(MemoryError(), "machine"), (torch.OutOfMemoryError("CUDA out of memory"), "GPU")],
)
def test_whose_memory_ran_out_is_told(tmp_path: Path, error: Exception, what: str) -> None:
    code, log = end(tmp_path, {}, error)
    assert code == 4
    assert f"The {what} ran out of memory." in log


def test_a_run_that_another_process_has_told_is_not_told_again(tmp_path: Path) -> None:
    report = RunReport(model="user/model", output_dir=tmp_path / "out")
    with Ending(report, Console({}, io.StringIO()), {}) as ending:
        ending.passed_on = 5
    assert ending.exit_code == 5
    assert not (tmp_path / "out").exists()


@pytest.mark.fault(
    "secret",
    "An unexpected error holds a token",
    "Exit 1; the file of details to attach holds none.",
)
def test_an_unexpected_error_leaves_a_file_to_attach_without_secrets(tmp_path: Path) -> None:
    log = io.StringIO()
    console = Console({}, log)
    console.mask("hf_secret")
    report = RunReport(
        model="user/model", output_dir=tmp_path / "out", command="smolquant quantize user/model"
    )
    with Ending(report, console, {}) as ending:
        try:
            raise ConnectionResetError("https://u:hf%5Fsecret@host reset")
        except ConnectionResetError as cause:
            raise KeyError("hf_secret") from cause
    assert ending.exit_code == 1
    details = (tmp_path / "out/error-details.txt").read_text()
    assert "command: smolquant quantize user/model" in details
    assert "torchao: " in details
    assert "Traceback (most recent call last)" in details
    assert "https://u:***@host reset" in details
    assert "hf_secret" not in details + log.getvalue()
    assert f"Please attach {tmp_path / 'out/error-details.txt'}" in log.getvalue()


def test_a_file_where_the_folder_should_be_is_told_of_once(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    code, log = end(tmp_path, {}, InputError("out is not a folder."))
    assert code == 2
    assert "out is not a folder." in log
    assert "report.json" not in log


def test_an_expected_error_leaves_none(tmp_path: Path) -> None:
    end(tmp_path, {}, GateError("Too much was lost."))
    assert not (tmp_path / "out/error-details.txt").exists()


@pytest.mark.parametrize("error", [None, GateError("Too much was lost.")])
def test_a_script_gets_the_report_alone(tmp_path: Path, error: BaseException | None) -> None:
    log, answer = io.StringIO(), io.StringIO()
    report = RunReport(model="user/model", output_dir=tmp_path / "out")
    with Ending(report, Console({}, log), {}, json_stream=answer):
        if error is not None:
            raise error
    assert answer.getvalue() == (tmp_path / "out/report.json").read_text()
    assert (json.loads(answer.getvalue())["error"] is None) is (error is None)


def test_a_script_gets_a_dry_runs_sizes(tmp_path: Path) -> None:
    answer = io.StringIO()
    plan = PlannedVariant("int8_weight_only", {}, 1_234)
    report = RunReport("user/model", tmp_path / "out", dry_run=True, planned={"int8": plan})
    with Ending(report, Console({}, io.StringIO()), {}, json_stream=answer):
        pass
    told = json.loads(answer.getvalue())["planned"]
    assert told == {"int8": {"quant_type": "int8_weight_only", "predicted_bytes": 1_234}}
    assert not (tmp_path / "out").exists()


@pytest.mark.fault(
    "machine",
    "Nobody reads the report that --json writes",
    "A warning; the exit code stands.",
)
def test_a_report_that_nobody_reads_is_a_warning(tmp_path: Path) -> None:
    log = io.StringIO()
    report = RunReport(model="user/model", output_dir=tmp_path / "out")
    with Path("/dev/full").open("w") as full:
        with Ending(report, Console({}, log), {}, json_stream=full) as ending:
            pass
        with suppress(OSError):
            full.close()
    assert ending.exit_code == 0
    assert "There is no report on stdout" in log.getvalue()


def test_a_failed_run_shows_its_numbers_above_the_error(tmp_path: Path) -> None:
    log = io.StringIO()
    metrics = Metrics(perplexity_increase_percent=7.0)
    report = RunReport(
        model="user/model",
        output_dir=tmp_path / "out",
        variants={"int8": variant_result("int8", metrics=metrics)},
    )
    with Ending(report, Console({}, log), {}):
        raise GateError("Too much was lost.")
    assert 0 < log.getvalue().index("+7%") < log.getvalue().index("error: Too much was lost.")
    assert log.getvalue().count("original") == 1
