import ast
import math
import re
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from smolquant.errors import CheckpointError, GateError, HubError
from smolquant.record import Metrics, TensorRecord
from smolquant.report.plan_text import render_dry_run
from smolquant.report.run_report import PlannedVariant, VariantResult
from smolquant.report.summary import render_summary
from unit.report_samples import (
    REPO_URL,
    SHA,
    SMALLER_GROUP,
    run_result,
    tensors,
    variant_result,
)


def cells(line: str) -> list[str]:
    """The cells of a table row, its unbreakable spaces made plain."""
    return [cell.strip() for cell in line.replace("\u00a0", " ").strip("|").split("|")]


def table(summary: str) -> list[list[str]]:
    """The first table, without the row of rules."""
    lines = summary.split("\n")
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    stop = next(i for i in range(start, len(lines)) if not lines[i].startswith("|"))
    return [cells(line) for line in [lines[start], *lines[start + 2 : stop]]]


def test_a_published_run() -> None:
    summary = render_summary(run_result("int8", "int4"))
    heading, _, second, *_ = summary.split("\n")
    assert heading == f"### ✅ Published `int8` and `int4` to [`you/tiny`]({REPO_URL})"
    assert second == f"Everything is in one commit, [`01234567`]({REPO_URL}/commit/{SHA})."
    assert table(summary) == [
        ["Variant", "Size", "Time"],
        [f"[`int8`]({REPO_URL}/tree/main/int8)", "1.30 MB (65.0%)", "12.3 s"],
        [f"[`int4`]({REPO_URL}/tree/main/int4)", "1.30 MB (65.0%)", "12.3 s"],
    ]
    assert table(summary.partition("<summary>More numbers</summary>")[2]) == [
        ["Variant", "Before", "Quantized / kept"],
        [f"[`int8`]({REPO_URL}/tree/main/int8)", "2.00 MB", "3 / 4"],
        [f"[`int4`]({REPO_URL}/tree/main/int4)", "2.00 MB", "3 / 4"],
    ]
    assert "Stock transformers alone cannot run int4 on a CPU" in summary
    assert "`smolquant 0.1.0` · `torch 2.13.0`" in summary
    assert "```sh\nsmolquant quantize them/tiny you/tiny\n```" in summary


def test_int4_is_not_mentioned_where_there_is_none() -> None:
    assert "int4" not in render_summary(run_result("int8"))


def test_what_was_made_is_told_apart_from_what_was_up_to_date() -> None:
    variants = {"int8": variant_result("int8", up_to_date=True), "int4": variant_result("int4")}
    summary = render_summary(run_result(variants=variants))
    assert summary.startswith("### ✅ Published `int4` to ")
    assert "`int8` had been up to date and was left alone." in summary
    assert table(summary)[1][-1] == "up to date"


def test_two_that_were_up_to_date_are_told_in_the_plural() -> None:
    older = {name: variant_result(name, up_to_date=True) for name in ("int8", "int8_dynamic")}
    summary = render_summary(run_result(variants=older | {"int4": variant_result("int4")}))
    assert "`int8` and `int8_dynamic` had been up to date and were left alone." in summary


def test_nothing_to_do() -> None:
    variants = {"int8": variant_result("int8", up_to_date=True)}
    summary = render_summary(run_result(variants=variants, changed=False, commit_sha=None))
    assert summary.startswith("### ✅ Nothing to do: `int8` of `them/tiny` is up to date\n")
    assert "No commit was made." in summary
    assert "left alone" not in summary


def test_saved_locally() -> None:
    result = run_result(
        "int8", "int4", save_only=True, repo_id=None, repo_url=None, commit_sha=None
    )
    summary = render_summary(result)
    assert summary.startswith("### ✅ Saved `int8` and `int4` of `them/tiny`\n")
    assert "They are in `quantized`. Nothing was published." in summary
    assert 'smolquant.load("./quantized", variant="int4")' in summary
    assert 'folder = "./quantized"\nvariant = "int8"\n' in summary


def test_the_tag_that_was_set_is_named() -> None:
    commit = f"[`01234567`]({REPO_URL}/commit/{SHA})"
    whole = f"Everything is in one commit, {commit}, which has the tag `v1.0`.\n"
    assert whole in render_summary(run_result("int8", tag="v1.0"))
    said = f"\n\nThe commit {commit} has the tag `v1.0`.\n"
    proposed = run_result("int8", tag="v1.0", pull_request_url=f"{REPO_URL}/discussions/3")
    assert said in render_summary(proposed)
    found = {"int8": variant_result("int8", up_to_date=True)}
    assert said in render_summary(run_result(variants=found, changed=False, tag="v1.0"))
    assert "has the tag" not in render_summary(run_result("int8"))


def test_proposed_as_a_pull_request() -> None:
    summary = render_summary(run_result("int8", pull_request_url=f"{REPO_URL}/discussions/3"))
    assert summary.startswith("### ✅ Proposed `int8` to ")
    assert f"[pull request]({REPO_URL}/discussions/3)" in summary
    assert "Once the pull request is merged" in summary


def test_a_failure_says_what_why_and_what_next() -> None:
    error = CheckpointError("The index names a missing shard.", hint="Upload it.")
    result = run_result(error=error, source=None, repo_url=None, commit_sha=None, changed=False)
    summary = render_summary(result)
    assert summary.startswith(
        "### ❌ Unusable checkpoint: `them/tiny`\n\nThe index names a missing shard.\n\n"
        "**What to do:** Upload it.\n\nIn the workflow file, nothing has to change.\n\n"
        "Nothing was published. The exit code is 3.\n"
    )
    assert "| Variant" not in summary
    assert "How to load" not in summary
    assert "repeats this run" in summary


@pytest.mark.fault(
    "hub",
    "Something fails after the commit",
    "The summary says what is published.",
)
def test_a_failure_after_the_commit_does_not_deny_it() -> None:
    summary = render_summary(run_result("int8", error=HubError("The tag exists.")))
    assert "Nothing was published" not in summary
    assert f"in commit [`01234567`]({REPO_URL}/commit/{SHA}). The exit code is 5." in summary
    assert table(summary)[1][0].startswith("[`int8`]")


@pytest.mark.fault(
    "hub",
    "The answer to the commit may be lost",
    "The summary does not say that nothing was published.",
)
def test_a_failure_in_which_a_commits_answer_may_be_lost_does_not_say_that_there_is_none() -> None:
    error = HubError("The Hub did not answer.")
    summary = render_summary(run_result(error=error, commit_sha=None, changed=False))
    assert "\n\nNothing is known to have been published. The exit code is 5.\n" in summary


def test_a_run_that_adds_a_license_beside_what_was_up_to_date_says_both() -> None:
    found = replace(variant_result("int8"), up_to_date=True)
    summary = render_summary(run_result(variants={"int8": found}))
    assert summary.startswith("### ✅ Published files of the main model to [`you/tiny`]")
    assert "`int8` had been up to date and was left alone." in summary


def test_variants_made_again_to_the_same_bytes_were_not_up_to_date() -> None:
    summary = render_summary(run_result("int8", changed=False))
    assert summary.startswith("### ✅ Nothing changed: `int8` of `them/tiny` is up to date")


def test_a_bug_is_called_one() -> None:
    summary = render_summary(run_result(error=KeyError("lm_head"), commit_sha=None))
    assert summary.startswith("### ❌ Unexpected error: `them/tiny`\n\nThis is a bug in smolquant.")
    assert "The exit code is 1." in summary


def test_metrics_are_shown_only_where_measured() -> None:
    metrics = Metrics(perplexity=12.5, source_perplexity=12.0, perplexity_increase_percent=4.166)
    variants = {
        "int8": variant_result("int8", metrics=metrics),
        "int4": variant_result("int4"),
    }
    headers, int8, int4 = table(render_summary(run_result(variants=variants)))
    assert headers == ["Variant", "Size", "Perplexity change", "Time"]
    assert (int8[2], int4[2]) == ("+4.17%", "")


def test_every_metric_is_told_and_explained() -> None:
    metrics = Metrics(
        perplexity=12.5,
        source_perplexity=12.0,
        perplexity_increase_percent=4.166,
        mean_kl=0.01234,
        top1_agreement=0.975,
        tokens_per_second=20.0,
        source_tokens_per_second=10.0,
        prefill_tokens_per_second=80.0,
        source_prefill_tokens_per_second=70.0,
        peak_memory_bytes=600_000_000,
        source_peak_memory_bytes=1_500_000_000,
    )
    summary = render_summary(run_result(variants={"int8": variant_result("int8", metrics=metrics)}))
    headers, int8 = table(summary)
    assert dict(zip(headers[2:4], int8[2:4], strict=True)) == {
        "Perplexity change": "+4.17%",
        "Same top token": "97.5%",
    }
    assert "\n- **Same top token**: how often the variant's first choice" in summary
    more = summary.partition("<summary>More numbers</summary>")[2]
    headers, int8 = table(more)
    assert dict(zip(headers[3:], int8[3:], strict=True)) == {
        "Perplexity": "12.000 → 12.500",
        "Mean KL": "0.0123",
        "Peak memory": "1.50 GB → 600 MB",
    }
    assert "\n`int8` generates 20.0 tokens a second (the original: 10.0) and reads" in more


def test_what_was_nearly_kept_does_not_read_as_wholly_kept() -> None:
    metrics = Metrics(12.0001, 12.0, 0.000833, mean_kl=0.0000123, top1_agreement=0.9996)
    variants = {"int8": variant_result("int8", metrics=metrics)}
    _, int8 = table(render_summary(run_result(variants=variants)))
    assert int8[2:4] == ["+0.000833%", "99.96%"]


def test_a_number_that_is_none_is_not_shown() -> None:
    metrics = Metrics(perplexity=math.inf, mean_kl=math.nan, top1_agreement=0.5)
    variants = {"int8": variant_result("int8", metrics=metrics)}
    summary = render_summary(run_result(variants=variants))
    assert table(summary)[0] == ["Variant", "Size", "Same top token", "Time"]
    assert "nan" not in summary
    assert "inf" not in summary


def test_what_kept_a_run_from_measuring_is_told_under_the_table() -> None:
    summary = render_summary(run_result("int8", unmeasured="It needs 9 GB, and 4 GB are free."))
    assert "|\n\nNot measured: It needs 9 GB, and 4 GB are free.\n" in summary
    early = run_result(unmeasured="No tokenizer.", error=HubError("no"), commit_sha=None)
    assert "\n\nNot measured: No tokenizer.\n" in render_summary(early)
    assert "Not measured" not in render_summary(run_result("int8"))


def test_a_run_that_came_to_no_libraries_names_none() -> None:
    early = render_summary(run_result(command="smolquant quantize x", versions={}))
    assert "<summary>The command that repeats this run</summary>\n\n```sh\nsmolquant" in early
    late = render_summary(run_result(command="smolquant quantize x", versions={"torch": "2.13"}))
    assert "repeats this run</summary>\n\n`torch 2.13`\n\n```sh\nsmolquant" in late


def test_a_run_that_failed_says_nothing_of_kept_limits() -> None:
    """One variant was up to date and within them; then another was not."""
    kept = "int8: mean KL divergence is 0.01, --max-kl 0.1"
    assert "Within the limits" in render_summary(run_result("int8", verdict=kept))
    failed = run_result("int8", verdict=kept, error=GateError("int4 is worse."))
    assert "Within the limits" not in render_summary(failed)


def charts(summary: str) -> list[dict[str, tuple[float, ...]]]:
    """Of each chart: label -> its bar and, where there is a line, the line's value."""
    found = []
    for block in re.findall(r"^```mermaid\n(.*?)\n```$", summary, flags=re.S | re.M):
        labels = re.findall(r'"([^"]*)"', re.findall(r"x-axis \[(.*)\]", block)[0])
        series = [
            map(float, values.split(", "))
            for values in re.findall(r"^    (?:bar|line) \[(.*)\]$", block, flags=re.M)
        ]
        found.append(dict(zip(labels, zip(*series, strict=True), strict=True)))
    return found


def measured(**agreement: float | None) -> dict[str, VariantResult]:
    return {
        name: variant_result(name, metrics=Metrics(top1_agreement=value))
        for name, value in agreement.items()
    }


SMALLER = pytest.approx(65.00615)


def test_sizes_are_charted_beside_the_original() -> None:
    assert charts(render_summary(run_result("int8", "int4"))) == [
        {
            "original, 2.00 MB": (100,),
            "int8, 1.30 MB": (SMALLER,),
            "int4, 1.30 MB": (SMALLER,),
        }
    ]
    planned = {"int4": PlannedVariant("int4_weight_only", tensors("int4"), 1_000_000)}
    (chart,) = charts(render_summary(run_result(planned=planned, dry_run=True, commit_sha=None)))
    assert chart == {"original, 2.00 MB": (100,), "int4, 1.00 MB": (50,)}


def test_quality_is_a_line_in_the_chart_of_sizes() -> None:
    summary = render_summary(run_result(variants=measured(int8=0.974, int4=0.72)))
    assert charts(summary) == [
        {
            "original, 2.00 MB": (100, 100),
            "int8, 1.30 MB, 97.4%": (SMALLER, 97.4),
            "int4, 1.30 MB, 72.0%": (SMALLER, 72),
        }
    ]
    assert 'title "Bars: size' not in summary, "a colon would end the title"
    for some in ({"int8": 0.1, "int4": None}, {"int8": 0.1, "int4": float("nan")}):
        (chart,) = charts(render_summary(run_result(variants=measured(**some))))
        assert {len(values) for values in chart.values()} == {1}


def test_a_failed_gate_shows_what_it_judged() -> None:
    summary = render_summary(
        run_result(
            variants=measured(int8=0.974, int4=0.72),
            error=GateError("int4: mean KL divergence is 0.5, above --max-kl 0.1."),
            commit_sha=None,
        )
    )
    assert "above" in summary
    assert charts(summary)[0]["int4, 1.30 MB, 72.0%"] == pytest.approx((65.00615, 72))


def test_without_a_variant_there_is_no_chart() -> None:
    assert "mermaid" not in render_summary(run_result(error=HubError("no"), commit_sha=None))


@pytest.mark.fault(
    "text",
    "A label holds what would end a chart",
    "It stays inside.",
)
def test_a_label_cannot_leave_its_chart() -> None:
    evil = 'x"]\n```\n%%{init: {}}%% # `b` ;'
    plan = PlannedVariant("int8_weight_only", {"a.weight": TensorRecord(True, 10, 5)}, 5)
    (chart,) = charts(render_summary(run_result(planned={evil: plan}, dry_run=True)))
    assert chart == {"original, 10 B": (100,), "x________%_init_ ____% _ _b_ _, 5 B": (50,)}


def test_the_share_of_embeddings_is_told() -> None:
    summary = render_summary(run_result("int8", "int4"))
    share = "38.5% of `int8` and 38.5% of `int4`"
    assert f"\n\nEmbeddings and output heads make up {share}.\n" in summary
    plan = PlannedVariant("int8_weight_only", {"a.weight": TensorRecord(True, 10, 5)}, 5)
    assert "mbeddings" not in render_summary(run_result(planned={"int8": plan}, dry_run=True))
    assert "embeddings" not in render_dry_run({"int8": plan})


def test_an_output_head_counts_as_embedding_once() -> None:
    kept = {
        "embed.weight": TensorRecord(False, 300, 300, reason="embedding", kind="embedding"),
        "lm_head.weight": TensorRecord(False, 100, 100, reason="output head", kind="output head"),
        "norm.weight": TensorRecord(False, 50, 50, reason="norm", kind="norm"),
    }
    untied = PlannedVariant("int8_weight_only", kept, 800)
    assert "of that  400 B (50.0%) embeddings" in render_dry_run({"int8": untied})
    head = TensorRecord(False, 0, 0, reason="tied to embed.weight, stored once", kind="output head")
    tied = PlannedVariant("int8_weight_only", kept | {"lm_head.weight": head}, 600)
    assert "of that  300 B (50.0%) embeddings" in render_dry_run({"int8": tied})


def test_a_record_that_does_not_tell_what_its_tensors_are_gives_no_share_of_embeddings() -> None:
    older = {name: replace(tensor, kind=None) for name, tensor in tensors("int8").items()}
    plan = PlannedVariant("int8_weight_only", older, 800)
    assert "mbeddings" not in render_dry_run({"int8": plan})
    summary = render_summary(run_result(planned={"int8": plan}, dry_run=True, commit_sha=None))
    assert "mbeddings and output heads" not in summary


def test_exceptions_are_folded_and_shared_where_equal() -> None:
    summary = render_summary(run_result("int8", "int8_dynamic", "int4")).replace("\u00a0", " ")
    assert "\n`int8` and `int8_dynamic`\n" in summary
    norms = "| kept | norm | `model.layers.*.input_layernorm.weight` ×3 | 3.00 kB |"
    assert summary.count(norms) == 2
    assert (
        f"| group 64 | {SMALLER_GROUP} | `model.layers.*.mlp.down_proj.weight` ×3 | 390 kB |"
        in summary
    )
    # The largest first: that is what explains the size.
    assert summary.index("| kept | embedding") < summary.index(norms)


def test_a_plan_without_exceptions_has_no_such_part() -> None:
    plan = PlannedVariant("int8_weight_only", {"a.weight": TensorRecord(True, 10, 5)}, 5)
    assert "What was kept" not in render_summary(run_result(planned={"int8": plan}, dry_run=True))


@pytest.mark.fault(
    "text",
    "A model has thousands of odd names",
    "The summary folds them.",
)
def test_thousands_of_odd_names_stay_readable() -> None:
    odd = {f"m{i:04}x.weight": TensorRecord(False, 1, 1, reason="norm") for i in range(5000)}
    plan = PlannedVariant("int8_weight_only", odd, 5000)
    summary = render_summary(run_result(planned={"int8": plan}, dry_run=True))
    assert "and 4960 more" in summary
    assert len(summary) < 5000


EVIL = "x`|</details><script>alert(1)</script>\n# ![i](http://evil.example/i.png)"


@pytest.mark.fault(
    "text",
    "Names from a model repository hold markdown or HTML",
    "The job summary shows them as text.",
)
def test_nothing_from_a_model_repository_is_taken_for_markdown() -> None:
    plan = PlannedVariant(EVIL, {EVIL: TensorRecord(False, 1, 1, reason=EVIL)}, 1)
    summary = render_summary(
        run_result(
            planned={EVIL: plan},
            model=EVIL,
            versions={EVIL: EVIL},
            command=EVIL,
            error=CheckpointError(EVIL, hint=EVIL),
            unmeasured=EVIL,
        )
    )
    outside_fences = re.sub(r"^(`{3,})sh\n.*?^\1$", "", summary, flags=re.S | re.M)
    assert "<script>" not in outside_fences
    assert outside_fences.count("<details>") == outside_fences.count("\n</details>")
    assert "\n# " not in outside_fences
    assert "](http" not in outside_fences.replace(f"]({REPO_URL}", "").replace(r"\](http\:", "")
    width = {len(re.split(r"(?<!\\)\|", line)) for line in summary.split("\n") if "| kept" in line}
    assert width == {6}


def test_the_load_snippets_are_python() -> None:
    summary = render_summary(run_result("int8", "int4", "int8_dynamic", repo_id='you/"x"'))
    snippets = re.findall(r"```python\n(.*?)\n```", summary, flags=re.S)
    assert len(snippets) == 3
    for snippet in snippets:
        ast.parse(snippet)


def test_no_block_runs_into_another() -> None:
    """GitHub needs a blank line before a table, before a block of HTML and after it."""
    for changes in (
        {},
        {"trackio_url": "https://t.example"},
        {"error": HubError("no")},
        {"unmeasured": "no"},
    ):
        lines = render_summary(run_result("int8", "int4", **changes)).split("\n")
        for before, line in pairwise(lines):
            if line.startswith(("<details>", "</details>", "###")):
                assert before == ""
            if before.startswith(("<details>", "</details>", "###")):
                assert line == ""
            if line.startswith("```mermaid"):
                assert before == ""
            if line.startswith("|") and not before.startswith("|"):
                assert before == ""


def test_the_dry_run_predicts_to_the_byte() -> None:
    planned = {"int4": PlannedVariant("int4_weight_only", tensors("int4"), 1_234_567)}
    assert render_dry_run(planned) == "\n".join(
        [
            "int4 (int4_weight_only)",
            "  size     1,234,567 bytes (1.23 MB, 61.7% of the source)",
            "  of that  500 kB (40.5%) embeddings",
            "  tensors  3 quantized, 4 kept",
            "  kept: embedding (500 kB)",
            "    model.embed_tokens.weight",
            f"  group 64: {SMALLER_GROUP} (390 kB)",
            "    model.layers.*.mlp.down_proj.weight  x3",
            "  kept: norm (3.00 kB)",
            "    model.layers.*.input_layernorm.weight  x3",
        ]
    )
    summary = render_summary(run_result(planned=planned, dry_run=True, commit_sha=None))
    assert summary.startswith("### 📋 Dry run: `int4` of `them/tiny`\n")
    assert table(summary)[1] == ["`int4`", "1.23 MB (61.7%)"]


def test_the_dry_run_says_whose_columns_are_weighted() -> None:
    of_norm = {
        name: replace(tensor, columns_by="norm" if tensor.quantized else None)
        for name, tensor in tensors("int4").items()
    }
    text = render_dry_run({"int4": PlannedVariant("int4_weight_only", of_norm, 1)})
    assert "\n  columns  of 3 tensors weighted by the norm in front\n" in text


def test_the_report_is_light() -> None:
    """`smolquant --help` and early errors wait for none of these."""
    code = (
        "import sys\n"
        "import smolquant.report.console, smolquant.report.files, smolquant.report.summary\n"
        "print([m for m in ('torch', 'jinja2', 'tqdm', 'huggingface_hub') if m in sys.modules])"
    )
    environ = {"PYTHONPATH": str(Path(__file__).parents[2] / "entrypoint")}
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environ, check=True
    )
    assert ran.stdout == "[]\n"


@pytest.mark.parametrize("save_only", [True, False])
def test_a_run_up_to_date_says_where(save_only: bool) -> None:
    variants = {"int8": variant_result("int8", up_to_date=True)}
    summary = render_summary(run_result(variants=variants, changed=False, save_only=save_only))
    assert ("`quantized` holds what" in summary) == save_only
