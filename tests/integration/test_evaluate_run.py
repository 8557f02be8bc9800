"""Measuring and the gate through the whole command."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import models
from command import Run
from conftest import WRITE
from localhub import LocalHub

REPO = "alice/model"

SPOILED = """
import os, runpy, sys
from safetensors import safe_open
from safetensors.torch import save_file
from smolquant.quantize import making

how, quantize_checkpoint = sys.argv.pop(1), making.quantize_checkpoint

def quantize_and_spoil(checkpoint, plans, folders, **options):
    written = quantize_checkpoint(checkpoint, plans, folders, **options)
    path = folders["int8"] / "model.safetensors"
    if how == "cut short":
        os.truncate(path, path.stat().st_size - 100)
        return written
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    if how == "not a number":
        tensors["model.layers.1.self_attn.q_proj._weight_scale"].fill_(float("nan"))
    else:
        tensors["model.norm.weight"].mul_(1e5)
    save_file(tensors, path, metadata)
    return written

making.quantize_checkpoint = quantize_and_spoil
runpy.run_module("smolquant", run_name="__main__")
"""
"""The command, whose int8 weights do not get to the disk as they were meant."""

LITTLE_MEMORY = """
import runpy
from smolquant.evaluate import measure

measure._LIBRARIES_BYTES = 10**15
runpy.run_module("smolquant", run_name="__main__")
"""
"""The command, where measuring takes more memory than any machine has."""

NOT_LAYER_BY_LAYER = """
import runpy
from smolquant.model.layerwise import StreamedModel

def hidden_states(self, ids):
    raise TypeError("forward() takes\\nno such thing")

StreamedModel.hidden_states = hidden_states
runpy.run_module("smolquant", run_name="__main__")
"""
"""The command, with a model whose forward is not made for running layer by layer."""

HEAD_FAILS = """
import runpy
from smolquant.model.layerwise import StreamedModel

def head_rows(self, start, stop):
    raise AttributeError("no head")

StreamedModel.head_rows = head_rows
runpy.run_module("smolquant", run_name="__main__")
"""
"""The command, with a model whose head is not where others have it."""

GPU_OUT_OF_MEMORY = """
import runpy, torch
from smolquant.model.layerwise import StreamedModel

def hidden_states(self, ids):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

StreamedModel.hidden_states = hidden_states
runpy.run_module("smolquant", run_name="__main__")
"""
"""The command, on a GPU that is too small."""

NOT_ROUNDED = """
import runpy
from smolquant.quantize.planned import VariantPlan

VariantPlan.error_bounds = property(lambda plan: dict.fromkeys((t.source.name for t in plan.tensors), 0))
runpy.run_module("smolquant", run_name="__main__")
"""
"""The command, to which every rounding is too much."""

RunSmolquant = Callable[..., Run]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"<{(i * i) % 317}>" for i in range(600)))
    return path


@pytest.fixture
def evaluated(smolquant: RunSmolquant, hub: LocalHub, checkpoint: Path, text: Path) -> RunSmolquant:
    def run(*options: str, timed: bool = False) -> Run:
        measured = ("--evaluate", "always", "--eval-text", str(text), "--eval-tokens", "200")
        return smolquant(
            "quantize",
            *(checkpoint, REPO, "--quant-type", "both", *measured, *options),
            hub=hub,
            token=WRITE.value,
            actions=True,
            timed=timed,
        )

    return run


def test_what_was_measured_stands_in_record_report_card_and_summary(
    evaluated: RunSmolquant, hub: LocalHub
) -> None:
    run = evaluated("--max-perplexity-increase", "int8=50,int4=500", timed=True)

    assert run.exit_code == 0, run.log
    for variant in ("int8", "int4"):
        record = json.loads(hub.read(REPO, f"{variant}/quantization.json"))
        assert len(record["behaviour"]["token_ids"]) == len(record["behaviour"]["margins"]) > 10
        metrics = record["metrics"]
        assert metrics == run.report["variants"][variant]["metrics"]
        assert metrics["mean_kl"] > 0
        assert metrics["tokens_per_second"] > 0
        assert metrics["peak_memory_bytes"] > 0
        assert metrics["text"] == "text.txt (plain text)"
        assert metrics["tokens_asked"] == 200
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
    assert again.outputs["changed"] == "false"
    assert "Within the limits" in again.summary, "what was measured once is judged again"


@pytest.mark.fault(
    "quality",
    "What is published already is worse than a new limit",
    "Exit 6.",
)
def test_limits_hold_for_what_is_published_already(evaluated: RunSmolquant, hub: LocalHub) -> None:
    assert evaluated().exit_code == 0
    published = hub.repo(REPO).head

    tightened = evaluated("--max-kl", "int8=10,int4=0.000001", "--tag", "v2")

    assert tightened.exit_code == 6, tightened.log
    assert "int4: mean KL divergence is" in tightened.annotations[0]
    assert hub.repo(REPO).head == published
    assert not hub.repo(REPO).tags
    assert "Within the limits" not in tightened.summary


def test_a_limit_is_held_against_the_text_that_was_asked_for(
    evaluated: RunSmolquant, hub: LocalHub, tmp_path: Path
) -> None:
    assert evaluated().exit_code == 0
    other = tmp_path / "other.txt"
    other.write_text(" ".join(f"<{(i * i * i) % 313}>" for i in range(600)))

    unlimited = evaluated("--eval-text", str(other), "--evaluate", "auto")
    assert unlimited.outputs["changed"] == "false", "the weights are the same on any text"

    limited = evaluated("--eval-text", str(other), "--max-kl", "10")
    assert limited.exit_code == 0, limited.log
    metrics = json.loads(hub.read(REPO, "int4/quantization.json"))["metrics"]
    assert metrics["text"] == "other.txt (plain text)"

    assert "int4 is made again: it was not measured as asked for now" in limited.log

    fewer = evaluated("--eval-text", str(other), "--eval-tokens", "100", "--max-kl", "10")
    assert fewer.report["variants"]["int8"]["metrics"]["tokens"] < 100


def test_a_variant_without_numbers_gets_them_where_they_are_demanded(
    evaluated: RunSmolquant, hub: LocalHub
) -> None:
    assert evaluated("--evaluate", "never").exit_code == 0
    assert json.loads(hub.read(REPO, "int8/quantization.json"))["metrics"] is None
    assert evaluated().exit_code == 0
    assert json.loads(hub.read(REPO, "int8/quantization.json"))["metrics"]["mean_kl"] > 0


def test_what_an_earlier_run_left_is_published_only_if_it_was_measured_as_asked(
    evaluated: RunSmolquant, smolquant: RunSmolquant, checkpoint: Path, text: Path
) -> None:
    measured = ("--evaluate", "always", "--eval-text", text, "--eval-tokens", "100")
    saved = smolquant("quantize", checkpoint, "--save-only", "--quant-type", "both", *measured)
    assert saved.exit_code == 0, saved.log
    otherwise = evaluated()
    assert "has what an earlier run made" not in otherwise.log
    assert otherwise.report["variants"]["int8"]["metrics"]["tokens_asked"] == 200


def test_what_an_earlier_run_measured_as_asked_is_published(
    evaluated: RunSmolquant, smolquant: RunSmolquant, checkpoint: Path, text: Path
) -> None:
    measured = ("--evaluate", "always", "--eval-text", text, "--eval-tokens", "200")
    saved = smolquant("quantize", checkpoint, "--save-only", "--quant-type", "both", *measured)
    assert saved.exit_code == 0, saved.log
    run = evaluated("--max-kl", "10")
    assert run.exit_code == 0, run.log
    assert "has what an earlier run made" in run.log
    assert "Within the limits" in run.summary


@pytest.mark.fault(
    "quality",
    "A variant computes garbage",
    "Exit 6 without any limit; nothing is published.",
)
@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("cut short", "int8 does not load back"),
        ("not a number", "int8 computes NaN or infinity"),
        ("far too large", "something is broken"),
    ],
)
def test_garbage_does_not_go_out_whatever_was_asked_for(
    smolquant: RunSmolquant, hub: LocalHub, checkpoint: Path, *, text: Path, how: str, said: str
) -> None:
    run = smolquant(
        how,
        *("quantize", checkpoint, REPO, "--evaluate", "auto", "--eval-text", text),
        hub=hub,
        token=WRITE.value,
        actions=True,
        script=SPOILED,
    )
    assert run.exit_code == 6, run.log
    (annotation,) = run.annotations
    assert said in annotation
    assert "Nothing was published" in run.summary
    with pytest.raises(KeyError):
        hub.repo(REPO)


@pytest.mark.fault(
    "quality",
    "A weight is further from its source than rounding can put it",
    "Exit 6 with the weight; nothing is published.",
)
@pytest.mark.parametrize("options", [(), ("--evaluate", "never", "--low-disk", "always")])
def test_weights_beyond_their_bound_do_not_go_out(
    smolquant: RunSmolquant, hub: LocalHub, checkpoint: Path, options: tuple[str, ...]
) -> None:
    arguments = ("quantize", checkpoint, REPO, *options)
    run = smolquant(*arguments, hub=hub, token=WRITE.value, actions=True, script=NOT_ROUNDED)
    assert run.exit_code == 6, run.log
    assert "further from their source" in run.annotations[0]
    with pytest.raises(KeyError):
        hub.repo(REPO)


@pytest.mark.fault(
    "model",
    "The source computes NaN or infinity on the text to measure on",
    "Exit 3.",
)
def test_a_source_that_computes_nonsense_is_unusable(
    smolquant: RunSmolquant, hub: LocalHub, checkpoint: Path, text: Path
) -> None:
    state = load_file(checkpoint / "model.safetensors")
    state["model.norm.weight"].fill_(3e38)
    save_file(state, checkpoint / "model.safetensors", metadata={"format": "pt"})
    arguments = ("quantize", checkpoint, REPO, "--evaluate", "auto", "--eval-text", text)
    run = smolquant(*arguments, hub=hub, token=WRITE.value, actions=True)
    assert run.exit_code == 3, run.log
    assert "own predictions are not finite" in run.annotations[0]
    with pytest.raises(KeyError):
        hub.repo(REPO)


@pytest.mark.fault(
    "quality",
    "A variant is worse than the owner's limit",
    "Exit 6 with the numbers and what may help; nothing is published, and nothing is measured again.",
)
def test_a_release_that_got_worse_than_allowed_does_not_go_out(
    evaluated: RunSmolquant, hub: LocalHub, tmp_path: Path
) -> None:
    run = evaluated("--max-kl", "int8=10,int4=0.000001")

    assert run.exit_code == 6
    assert len(run.annotations) == 1
    assert "int4: mean KL divergence is" in run.annotations[0]
    assert "int8: " not in run.annotations[0]
    assert run.report["error"]["exit_code"] == 6
    assert run.report["variants"]["int4"]["metrics"]["mean_kl"] > 0, "the numbers are reported"
    assert "Nothing was published" in run.summary
    with pytest.raises(KeyError):
        hub.repo(REPO)  # it was not even created

    assert "What was made stays in quantized (int8/, int4/)" in run.annotations[0]
    assert "--int4-method calibrated" in run.annotations[0]
    marked = [line for line in run.summary.splitlines() if line.startswith("| ❌")]
    assert len(marked) == 2, "in the table, and among the other numbers"
    assert all("int4" in row for row in marked)
    assert run.report["variants"]["int4"]["refused"].startswith("int4: mean KL divergence is")
    assert run.report["variants"]["int8"]["refused"] is None

    relented = evaluated("--max-kl", "int8=10,int4=20")
    assert relented.exit_code == 0, relented.log
    assert "::group::Evaluate" not in relented.log, "nothing is measured again"
    assert (
        relented.report["variants"]["int4"]["metrics"] == run.report["variants"]["int4"]["metrics"]
    )
    assert hub.read(REPO, "int4/quantization.json")


@pytest.mark.fault(
    "quality",
    "A variant is worse than the owner's limit, and the others may go out without it",
    "Exit 6; the others are published, without the tag.",
)
def test_part_of_a_release_goes_out_where_that_is_allowed(
    evaluated: RunSmolquant, hub: LocalHub, tmp_path: Path
) -> None:
    partly = evaluated("--max-kl", "int8=10,int4=0.000001", "--allow-partial", "--tag", "v1")

    assert partly.exit_code == 6, partly.log
    assert (partly.outputs["changed"], partly.outputs["int4-url"]) == ("true", "")
    assert partly.outputs["int8-url"]
    assert (
        "Only int8, within the limits, was published; v1 was not tagged." in partly.annotations[0]
    )
    assert hub.read(REPO, "int8/quantization.json")
    with pytest.raises(KeyError):
        hub.read(REPO, "int4/quantization.json")
    assert not hub.repo(REPO).tags
    assert "int4" not in hub.read(REPO, "README.md").decode()
    assert "`int8` is published to" in partly.summary.replace("[", "").replace("]", "")
    head = hub.repo(REPO).head

    again = evaluated("--max-kl", "int8=10,int4=0.000001", "--allow-partial", "--tag", "v1")
    assert (again.exit_code, again.outputs["changed"]) == (6, "false"), again.log
    assert "::group::Evaluate" not in again.log
    assert hub.repo(REPO).head == head

    whole = evaluated("--max-kl", "10", "--tag", "v1")
    assert whole.exit_code == 0, whole.log
    assert hub.repo(REPO).tags == {"v1": hub.repo(REPO).head}
    assert hub.read(REPO, "int4/quantization.json")


def test_a_refused_variant_is_no_part_of_a_folder_that_is_saved(
    smolquant: RunSmolquant, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    def save(*options: str) -> Run:
        measured = ("--evaluate", "always", "--eval-text", text, "--eval-tokens", "100")
        types = ("--save-only", "--quant-type", "both")
        return smolquant("quantize", checkpoint, *types, *measured, *options)

    place = tmp_path / "quantized"
    partly = save("--max-kl", "int8=10,int4=0.000001", "--allow-partial")
    assert partly.exit_code == 6, partly.log
    assert (place / "int8/README.md").is_file()
    assert (place / "int4/quantization.json").is_file()
    assert not (place / "int4/README.md").exists()
    assert "int4" not in (place / "README.md").read_text()

    saved = save("--max-kl", "10")
    assert saved.exit_code == 0, saved.log
    assert "== Evaluate" not in saved.log
    assert "int4" in (place / "README.md").read_text()
    before = (place / "int4/quantization.json").read_bytes()

    worse = save("--max-kl", "int4=0.000001", "--group-size", "32")
    assert worse.exit_code == 6, worse.log
    assert "The int4 that was saved before stays" in worse.log
    assert (place / "int4/quantization.json").read_bytes() == before


@pytest.mark.fault(
    "quality",
    "A limit is set on what was not measured",
    "Exit 6; nothing is published.",
)
def test_a_gate_without_measurements_fails_rather_than_passes(
    smolquant: RunSmolquant, hub: LocalHub, tmp_path: Path
) -> None:
    """Without a tokenizer nothing can be measured; `auto` says so, and the gate holds."""
    bare = models.save(tmp_path / "bare", models.FAMILIES["smollm3"]())
    options = ("--save-only", "--evaluate", "auto")
    ungated = smolquant("quantize", bare, *options, actions=True)
    assert ungated.exit_code == 0, ungated.log
    assert "::notice title=Not measured%3A int8::" in ungated.log
    assert "tokenizer" in ungated.summary
    assert "tokenizer" in ungated.report["unmeasured"]

    gated = smolquant("quantize", bare, *options, "--max-kl", "5", "--force", actions=True)
    assert gated.exit_code == 6
    assert "was not measured" in gated.annotations[0]
    assert "Save the tokenizer beside the model" in gated.annotations[0]
    assert "--evaluate never" not in gated.annotations[0], "which a limit does not go with"
    assert "::group::Quantize" not in gated.log, "before the work"

    demanded = smolquant(
        "quantize", bare, "--save-only", "--evaluate", "always", "--force", actions=True
    )
    assert demanded.exit_code == 3
    assert "tokenizer" in demanded.annotations[0]
    assert "::group::Quantize" not in demanded.log, "before the work"


@pytest.mark.parametrize(
    ("script", "reason", "asked", "code"),
    [
        (LITTLE_MEMORY, "Measuring needs 1000 TB of memory, and", "always", 4),
        (GPU_OUT_OF_MEMORY, "Measuring ran out of memory: OutOfMemoryError: CUDA", "always", 4),
        (HEAD_FAILS, "AttributeError: no head", "always", 3),
        (NOT_LAYER_BY_LAYER, "TypeError: forward() takes no such thing", "auto", 0),
    ],
)
def test_where_it_cannot_be_measured_that_is_said(
    smolquant: RunSmolquant,
    checkpoint: Path,
    text: Path,
    *,
    script: str,
    reason: str,
    asked: str,
    code: int,
) -> None:
    arguments = ("quantize", checkpoint, "--save-only", "--eval-text", text)
    run = smolquant(*arguments, "--evaluate", asked, actions=True, script=script)
    assert run.exit_code == code, run.log
    if code:
        assert reason in run.annotations[0]
    else:
        assert reason in run.report["unmeasured"]
        assert "Not measured" in run.summary


def test_limits_are_not_kept_where_it_cannot_be_measured(
    smolquant: RunSmolquant, checkpoint: Path, text: Path
) -> None:
    reason = "Measuring needs 1000 TB of memory, and"
    arguments = ("quantize", checkpoint, "--save-only", "--eval-text", text)
    gated = (*arguments, "--evaluate", "auto", "--max-kl", "5")
    run = smolquant(*gated, actions=True, script=LITTLE_MEMORY)
    assert run.exit_code == 6
    assert reason in run.annotations[0]
    assert "::notice" not in run.log, "one annotation tells it"

    relented = smolquant(*arguments, "--evaluate", "never", "--force", actions=True)
    assert "going on from" in relented.log, "what was made before was of use"


@pytest.mark.fault(
    "input",
    "Options of measuring contradict each other",
    "Exit 2.",
)
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--evaluate", "never", "--max-kl", "1"), "needs measurements"),
        (("--max-perplexity-increase", "int5=1"), "not a variant"),
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


@pytest.mark.fault(
    "input",
    "The text to measure on is shorter than asked for",
    "Exit 2 with both numbers.",
)
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
    assert "::group::Quantize" not in run.log, "before the work"
