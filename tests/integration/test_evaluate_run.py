"""Measuring and the gate through the whole command."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import models
from command import Run
from conftest import WRITE
from localhub import LocalHub

REPO = "alice/model"
RunSmolquant = Callable[..., Run]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"<{(i * i) % 317}>" for i in range(600)))
    return path


@pytest.fixture
def evaluated(smolquant: RunSmolquant, hub: LocalHub, checkpoint: Path, text: Path) -> RunSmolquant:
    def run(*options: str) -> Run:
        measured = ("--evaluate", "always", "--eval-text", str(text), "--eval-tokens", "200")
        return smolquant(
            "quantize",
            *(checkpoint, REPO, "--quant-type", "both", *measured, *options),
            hub=hub,
            token=WRITE.value,
            actions=True,
        )

    return run


def test_what_was_measured_stands_in_record_report_card_and_summary(
    evaluated: RunSmolquant, hub: LocalHub
) -> None:
    run = evaluated("--max-perplexity-increase", "int8=50,int4=500")

    assert run.exit_code == 0, run.log
    for variant in ("int8", "int4"):
        metrics = json.loads(hub.read(REPO, f"{variant}/quantization.json"))["metrics"]
        assert metrics == run.report["variants"][variant]["metrics"]
        assert metrics["mean_kl"] > 0
        assert metrics["tokens_per_second"] > 0
        assert metrics["peak_memory_bytes"] > 0
        assert metrics["text"] == "text.txt"
        assert 150 <= metrics["tokens"] <= 200
        card = hub.read(REPO, f"{variant}/README.md").decode()
        assert f"{metrics['perplexity']:.3f}" in card
        assert metrics["machine"] in card
    assert "Perplexity" in run.summary
    assert "Within the limits" in run.summary
    assert "Perplexity" in hub.read(REPO, "README.md").decode()
    int8, int4 = (run.report["variants"][name]["metrics"] for name in ("int8", "int4"))
    assert int8["mean_kl"] < int4["mean_kl"]
    assert int8["source_perplexity"] == int4["source_perplexity"]

    again = evaluated("--max-perplexity-increase", "int8=50,int4=500")
    assert again.exit_code == 0, again.log
    assert again.outputs["changed"] == "false", "what was measured once passes the gate again"


def test_a_release_that_got_worse_than_allowed_does_not_go_out(
    evaluated: RunSmolquant, hub: LocalHub, tmp_path: Path
) -> None:
    run = evaluated("--max-kl", "int8=10,int4=0.000001")

    assert run.exit_code == 6
    assert len(run.annotations) == 1
    assert "int4: mean KL divergence is" in run.annotations[0]
    assert "int8" not in run.annotations[0]
    assert run.report["error"]["exit_code"] == 6
    assert run.report["variants"]["int4"]["metrics"]["mean_kl"] > 0, "the numbers are reported"
    assert "Nothing was published" in run.summary
    with pytest.raises(KeyError):
        hub.repo(REPO)  # it was not even created
    assert not (tmp_path / "quantized/int8").exists()


def test_a_gate_without_measurements_fails_rather_than_passes(
    smolquant: RunSmolquant, hub: LocalHub, tmp_path: Path
) -> None:
    """Without a tokenizer nothing can be measured; `auto` says so, and the gate holds."""
    bare = models.save(tmp_path / "bare", models.FAMILIES["smollm3"]())
    options = ("--save-only", "--evaluate", "auto")
    ungated = smolquant("quantize", bare, *options, actions=True)
    assert ungated.exit_code == 0, ungated.log
    assert "Nothing was measured" in ungated.log

    gated = smolquant("quantize", bare, *options, "--max-kl", "5", "--force", actions=True)
    assert gated.exit_code == 6
    assert "was not measured" in gated.annotations[0]

    demanded = smolquant(
        "quantize", bare, "--save-only", "--evaluate", "always", "--force", actions=True
    )
    assert demanded.exit_code == 3
    assert "tokenizer" in demanded.annotations[0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--evaluate", "never", "--max-kl", "1"), "needs measurements"),
        (
            (
                "--max-perplexity-increase",
                "int5=1",
            ),
            "not a variant",
        ),
        (("--max-perplexity-increase=-1",), "not a number"),
        (("--eval-text", "missing.txt"), "cannot be read"),
        (("--eval-tokens", "1"), "too few"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    smolquant: RunSmolquant, checkpoint: Path, options: tuple[str, ...], said: str
) -> None:
    run = smolquant("quantize", checkpoint, "--save-only", *options, actions=True)
    assert run.exit_code == 2, run.log
    assert said in run.annotations[0]


def test_a_text_that_is_too_short_is_refused(
    smolquant: RunSmolquant, checkpoint: Path, text: Path
) -> None:
    run = smolquant(
        "quantize",
        *(checkpoint, "--save-only", "--evaluate", "always"),
        *("--eval-text", text, "--eval-tokens", "100000"),
        actions=True,
    )
    assert run.exit_code == 2, run.log
    assert "fewer than the 100000" in run.annotations[0]
