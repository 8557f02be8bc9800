"""The last lines of a run in the log, and the first."""

from pathlib import Path

from smolquant.beginning import what_is_lost
from smolquant.errors import GateError
from smolquant.record import Metrics
from smolquant.report.closing import render_closing
from smolquant.settings import make_settings
from unit.report_samples import REPO_URL, SHA, run_result, variant_result

MEASURED = Metrics(
    perplexity=20.2,
    source_perplexity=20.0,
    perplexity_increase_percent=1.0,
    mean_kl=0.01,
    top1_agreement=0.9712,
    tokens_per_second=40.0,
    source_tokens_per_second=25.04,
)


def test_a_published_run_ends_with_its_numbers_its_place_and_the_next_command() -> None:
    variants = {
        "int8": variant_result("int8", metrics=MEASURED),
        "int4": variant_result("int4", up_to_date=True),
    }
    result = run_result(variants=variants, verdict="int8: perplexity changed by +1 %")
    table, notes = render_closing(result).split("\n\n")
    heading, original, int8, int4 = table.splitlines()
    for cells, line in (
        (("variant", "size", "perplexity", "same top token", "tokens/s"), heading),
        (("original", "20.000", "25.0"), original),
        (("int8", "+1%", "97.1%", "40.0"), int8),
        (("int4", "up to date"), int4),
    ):
        assert all(cell in line for cell in cells), line
    assert {line.index("20.000") for line in (original,)} == {int8.index("+1%")}
    assert notes.splitlines() == [
        "limits     kept: int8: perplexity changed by +1 %",
        f"published  {REPO_URL}",
        f"commit     {SHA}",
        "next       smolquant chat you/tiny --variant int8",
    ]


def test_what_is_not_known_takes_no_room() -> None:
    result = run_result("int8", save_only=True, output_dir=Path("my out"), commit_sha=None)
    closing = render_closing(result)
    assert "perplexity" not in closing
    assert "limits" not in closing
    assert closing.splitlines()[-2:] == [
        "saved  my out/int8",
        "next   smolquant chat 'my out' --variant int8",
    ]


def test_a_proposed_run_is_merged_before_it_is_tried() -> None:
    url = f"{REPO_URL}/discussions/1"
    closing = render_closing(run_result("int8", pull_request_url=url))
    assert closing.splitlines()[-1] == f"next      review and merge {url}"


def test_measuring_without_a_limit_says_how_to_set_one() -> None:
    result = run_result(variants={"int8": variant_result("int8", metrics=MEASURED)})
    assert "none were set; --max-perplexity-increase 5 would set one" in render_closing(result)


def test_a_failed_gate_marks_its_row_and_leaves_the_next_step_to_the_error() -> None:
    result = run_result(
        variants={"int8": variant_result("int8", metrics=MEASURED)},
        refused={"int8": "perplexity changed by 1 %"},
        error=GateError("int8 lost too much."),
    )
    closing = render_closing(result)
    assert closing.splitlines()[2].endswith("above its limit")
    assert "limits  int8 fails" in closing
    assert "next" not in closing


def test_files_that_nobody_asked_for_are_named() -> None:
    result = run_result("int8", files=[Path("out/report.json"), Path("out/events.jsonl")])
    assert "files      out/report.json, out/events.jsonl" in render_closing(result)


def test_a_run_without_variants_ends_without_a_table() -> None:
    assert render_closing(run_result()) == ""


def test_what_is_lost_with_a_container_is_told_with_the_way_to_keep_it(tmp_path: Path) -> None:
    saved = make_settings(
        model_path=str(tmp_path), repo_name=None, save_only=True, output_dir=str(tmp_path / "out")
    )
    assert what_is_lost(saved).startswith("The variants are lost with it.")
    assert f'-v "$PWD/quantized:{tmp_path}/out"' in what_is_lost(saved)
    published = make_settings(model_path=str(tmp_path), repo_name="you/tiny")
    assert what_is_lost(published).startswith("report.json is lost with it.")
