import json
import math
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest

from limits import files_of_at_most
from smolquant.errors import HubError
from smolquant.record import Metrics
from smolquant.report.files import (
    MAX_SUMMARY_BYTES,
    own_like_workspace,
    step_outputs,
    write_outputs,
    write_report,
    write_summary,
)
from smolquant.schemes import BY_VARIANT
from smolquant.schemes.int8_weight_only import Int8WeightOnly
from smolquant.secrecy import remember
from unit.report_samples import REPO_URL, SHA, run_result, variant_result


def read_outputs(path: Path) -> dict[str, str]:
    """The outputs as the runner reads them: ``name<<delimiter``, value, delimiter."""
    lines = iter(path.read_text().split("\n"))
    outputs = {}
    for line in lines:
        if not line:
            continue
        name, delimiter = line.split("<<", 1)
        value: list[str] = []
        while (part := next(lines)) != delimiter:
            value.append(part)
        outputs[name] = "\n".join(value)
    return outputs


def test_outputs_of_a_published_run(tmp_path: Path) -> None:
    file = tmp_path / "output"
    result = run_result("int8", "int8_dynamic", trackio_url="https://t.example")
    write_outputs(result, {"GITHUB_OUTPUT": str(file)})
    not_made = {scheme.output_name: "" for scheme in BY_VARIANT.values()}
    assert read_outputs(file) == not_made | {
        "repo-url": REPO_URL,
        "commit-sha": SHA,
        "pull-request-url": "",
        "branches": "",
        "int8-url": f"{REPO_URL}/tree/main/int8",
        "int8-dynamic-url": f"{REPO_URL}/tree/main/int8_dynamic",
        "trackio-url": "https://t.example",
        "report": "quantized/report.json",
        "changed": "true",
    }


def test_every_scheme_has_an_output(monkeypatch: pytest.MonkeyPatch) -> None:
    class Toy(Int8WeightOnly):
        variant: ClassVar = "of_a_toy"

    monkeypatch.setitem(BY_VARIANT, "of_a_toy", Toy())
    result = run_result(variants={"of_a_toy": variant_result("int8")})
    outputs = step_outputs(result, {})
    assert outputs["of-a-toy-url"] == f"{REPO_URL}/tree/main/int8"
    assert list(outputs)[-4:] == ["of-a-toy-url", "trackio-url", "report", "changed"]


@pytest.mark.fault(
    "text",
    "A value holds what looks like another step output",
    "It stays one value.",
)
def test_a_value_cannot_smuggle_in_another_output(tmp_path: Path) -> None:
    file = tmp_path / "output"
    result = run_result("int8", repo_url="https://x.example\nEOF\nchanged<<EOF\nfalse\nEOF")
    write_outputs(result, {"GITHUB_OUTPUT": str(file)})
    outputs = read_outputs(file)
    assert outputs["changed"] == "true"
    assert outputs["repo-url"] == result.repo_url


@pytest.mark.fault(
    "machine",
    "An earlier step left the last line of the outputs' file open",
    "Ours begin on a line of their own.",
)
@pytest.mark.parametrize(
    ("before", "after"), [("", ""), ("mine=1", "mine=1\n"), ("mine=1\n", "mine=1\n"), ("é", "é\n")]
)
def test_a_line_that_an_earlier_step_left_open_never_joins_ours(
    tmp_path: Path, before: str, after: str
) -> None:
    file = tmp_path / "output"
    file.write_text(before, encoding="utf-8")
    write_outputs(run_result("int8"), {"GITHUB_OUTPUT": str(file)})
    assert file.read_text(encoding="utf-8").startswith(f"{after}repo-url<<")


def test_delimiters_differ_from_run_to_run(tmp_path: Path) -> None:
    file = tmp_path / "output"
    for _ in range(2):
        write_outputs(run_result("int8"), {"GITHUB_OUTPUT": str(file)})
    assert len(set(re.findall(r"<<(.+)", file.read_text()))) == 2


def test_outputs_of_a_run_that_failed_early(tmp_path: Path) -> None:
    file = tmp_path / "output"
    result = run_result(
        error=HubError("no"), repo_url=None, commit_sha=None, source=None, changed=False
    )
    write_outputs(result, {"GITHUB_OUTPUT": str(file)})
    outputs = read_outputs(file)
    assert outputs.pop("report") == "quantized/report.json"
    assert outputs.pop("changed") == "false"
    assert set(outputs.values()) == {""}


def test_the_report_is_named_as_later_steps_on_the_host_find_it(tmp_path: Path) -> None:
    environ = {"GITHUB_OUTPUT": str(tmp_path / "output"), "GITHUB_WORKSPACE": "/github/workspace"}
    result = run_result("int8", output_dir=Path("/github/workspace/out"))
    write_outputs(result, environ)
    assert read_outputs(tmp_path / "output")["report"] == "out/report.json"


def test_nothing_is_written_where_no_runner_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for environ in ({}, {"GITHUB_OUTPUT": "", "GITHUB_STEP_SUMMARY": ""}):
        write_outputs(run_result("int8"), environ)
        write_summary("text", environ)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault(
    "machine",
    "The step's outputs cannot be written whole",
    "None of them is; the file is as before.",
)
def test_outputs_that_do_not_fit_leave_no_half_of_one(tmp_path: Path) -> None:
    file = tmp_path / "output"
    file.write_text("before=1")
    with files_of_at_most(200), pytest.raises(OSError, match="File too large"):
        write_outputs(run_result("int8"), {"GITHUB_OUTPUT": str(file)})
    assert file.read_text() == "before=1"


@pytest.mark.fault(
    "secret",
    "A message, an address or a name holds a token",
    "It reaches no file: neither report.json, outputs nor summary.",
)
def test_no_secret_reaches_any_file(tmp_path: Path) -> None:
    environ = {
        "GITHUB_OUTPUT": str(tmp_path / "output"),
        "GITHUB_STEP_SUMMARY": str(tmp_path / "summary"),
    }
    remember("hf_secret")
    result = run_result("int8", repo_url="https://hf_secret@x.example", error=HubError("hf_secret"))
    write_outputs(result, environ)
    write_summary("hf_secret", environ)
    write_report(result, tmp_path)
    for file in tmp_path.iterdir():
        assert "***" in file.read_text()
        assert "hf_secret" not in file.read_text()


def test_the_summary_is_appended(tmp_path: Path) -> None:
    file = tmp_path / "summary"
    file.write_text("before\n")
    write_summary("→ after\n", {"GITHUB_STEP_SUMMARY": str(file)})
    assert file.read_text() == "before\n→ after\n"


@pytest.mark.fault(
    "machine",
    "The job summary is longer than the runner takes",
    "Its last details go; the verdict stays.",
)
def test_a_summary_too_long_loses_its_last_details_and_keeps_the_verdict(tmp_path: Path) -> None:
    file = tmp_path / "summary"
    file.write_text("x" * 1000)
    small = "<details>small</details>\n\n"
    huge = f"<details>{'y' * MAX_SUMMARY_BYTES}</details>\n"
    write_summary("verdict\n\n" + small + huge, {"GITHUB_STEP_SUMMARY": str(file)})
    text = file.read_text()
    assert text.startswith("x" * 1000 + "verdict\n\n" + small.strip())
    assert "yyy" not in text
    assert "left out" in text


@pytest.mark.fault(
    "machine",
    "The job summary is too long, and has no details to drop",
    "It is cut between two characters.",
)
def test_a_summary_without_details_is_cut_at_a_character(tmp_path: Path) -> None:
    file = tmp_path / "summary"
    write_summary("→" * MAX_SUMMARY_BYTES, {"GITHUB_STEP_SUMMARY": str(file)})
    assert MAX_SUMMARY_BYTES - 4 <= file.stat().st_size <= MAX_SUMMARY_BYTES
    assert file.read_text().startswith("→→")


@pytest.mark.fault(
    "machine",
    "The file of the job summary is full already",
    "It is left as it is.",
)
def test_a_full_summary_file_is_left_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "summary"
    file.write_text("x" * MAX_SUMMARY_BYTES)
    write_summary("more", {"GITHUB_STEP_SUMMARY": str(file)})
    assert file.stat().st_size == MAX_SUMMARY_BYTES


def test_the_report_holds_what_the_design_promises(tmp_path: Path) -> None:
    metrics = Metrics(perplexity=12.5, source_perplexity=12.0)
    result = run_result(variants={"int8": variant_result("int8", metrics=metrics)})
    path = write_report(result, tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "report.json"
    report = json.loads(path.read_text())
    assert list(report) == [
        "source", "variants", "commit_sha", "branches", "trackio_url", "unmeasured", "error",
    ]  # fmt: skip
    assert report["source"]["identity"] == result.source.identity  # type: ignore[union-attr]
    assert report["commit_sha"] == SHA
    assert report["error"] is None
    assert report["unmeasured"] is None
    int8 = report["variants"]["int8"]
    assert int8.pop("metrics")["perplexity"] == 12.5
    assert int8 == {
        "quant_type": "int8_weight_only",
        "size_bytes": 1_300_123,
        "source_size_bytes": 2_000_000,
        "quantized_tensors": 3,
        "kept_tensors": 4,
        "dropped_tensors": 0,
        "seconds": 12.34,
        "peak_memory_bytes": 1_000_000,
        "url": f"{REPO_URL}/tree/main/int8",
        "up_to_date": False,
        "refused": None,
    }


def test_the_report_says_why_nothing_was_measured(tmp_path: Path) -> None:
    remember("hf_secret")
    result = run_result("int8", unmeasured="It needs hf_secret GB.")
    report = json.loads(write_report(result, tmp_path).read_text())
    assert report["unmeasured"] == "It needs *** GB."


def test_the_report_of_a_failure_says_what_to_do(tmp_path: Path) -> None:
    error = HubError("No write access.", hint="Use another token.")
    path = write_report(run_result(error=error, source=None), tmp_path)
    assert json.loads(path.read_text())["error"] == {
        "type": "HubError",
        "message": "No write access.",
        "hint": "Use another token.",
        "exit_code": 5,
    }


def test_the_report_of_a_bug_has_exit_code_1(tmp_path: Path) -> None:
    path = write_report(run_result(error=KeyError("lm_head")), tmp_path)
    error = json.loads(path.read_text())["error"]
    assert (error["type"], error["exit_code"]) == ("KeyError", 1)
    assert "'lm_head'" in error["message"]


@pytest.mark.fault(
    "record",
    "A measured number is NaN or infinity",
    "It is null in report.json.",
)
def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    metrics = Metrics(perplexity=math.inf, mean_kl=math.nan)
    result = run_result(variants={"int8": variant_result("int8", metrics=metrics)})
    report = json.loads(write_report(result, tmp_path).read_text())
    assert report["variants"]["int8"]["metrics"]["perplexity"] is None
    assert report["variants"]["int8"]["metrics"]["mean_kl"] is None


@pytest.mark.fault(
    "machine",
    "report.json cannot be written",
    "The old one stays whole.",
)
def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    write_report(run_result("int8"), tmp_path)
    before = (tmp_path / "report.json").read_text()
    unwritable = replace(run_result("int8"), commit_sha=object())  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        write_report(unwritable, tmp_path)
    assert (tmp_path / "report.json").read_text() == before
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def owner(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_uid, status.st_gid


@pytest.mark.fault(
    "machine",
    "The container runs as root",
    "What it writes belongs to the workspace's owner.",
)
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_roots_files_are_given_to_the_owner_of_the_workspace(tmp_path: Path) -> None:
    workspace, outside = tmp_path / "workspace", tmp_path / "outside"
    made = workspace / "quantized" / "int8"
    made.mkdir(parents=True)
    outside.mkdir()
    (outside / "file").touch()
    (made / "model.safetensors").touch()
    (made / "link").symlink_to(outside)
    (workspace / "other").touch()
    os.chown(workspace, 1234, 2345)
    own_like_workspace(
        [workspace / "quantized", outside, made / "link" / "file", workspace / "missing"],
        {"GITHUB_WORKSPACE": str(workspace)},
    )
    given = [workspace / "quantized", made, made / "model.safetensors", made / "link"]
    assert [owner(path) for path in given] == [(1234, 2345)] * 4
    kept = [outside, outside / "file", workspace / "other"]
    assert [owner(path) for path in kept] == [(os.getuid(), os.getgid())] * 3


@pytest.mark.parametrize("workspace", [None, "", "/does/not/exist"])
def test_without_a_workspace_nothing_changes_hands(tmp_path: Path, workspace: str | None) -> None:
    file = tmp_path / "file"
    file.touch()
    own_like_workspace([file], {} if workspace is None else {"GITHUB_WORKSPACE": workspace})
    assert owner(file) == (os.getuid(), os.getgid())
