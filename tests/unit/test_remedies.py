"""What a failed run says of the workflow file follows from what its error names."""

import re
from pathlib import Path

import pytest
import yaml

from smolquant.errors import (
    CheckpointError,
    GateError,
    HubError,
    InputError,
    MachineError,
    SmolquantError,
)
from smolquant.hub import HOW_TO_SIGN_IN
from smolquant.record import Metrics
from smolquant.report.failure import Failure
from smolquant.report.remedies import INPUTS, workflow_change

ACTION = yaml.safe_load((Path(__file__).parents[2] / "action.yml").read_text("utf-8"))
MEASURED = {
    "int8": Metrics(perplexity_increase_percent=0.3, mean_kl=0.004),
    "int4": Metrics(perplexity_increase_percent=30.74, mean_kl=0.2871),
    "float8": None,
}


def change(error: SmolquantError) -> str:
    return workflow_change(Failure.of(error), MEASURED)


def inputs(error: SmolquantError) -> dict[str, object]:
    """The lines that the summary shows, as the workflow file would be read."""
    (block,) = re.findall(r"```yaml\n(.*?)\n```", change(error), re.DOTALL)
    given: dict[str, object] = yaml.safe_load(block)["with"]
    return given


def test_every_example_is_an_input_of_the_action() -> None:
    assert {name for name, _ in INPUTS.values()} <= ACTION["inputs"].keys()


def test_options_that_the_hint_names_become_lines_of_the_workflow_file() -> None:
    error = InputError("No.", hint="Add --replace-main, or --force; nothing else helps.")
    assert inputs(error) == {"replace-main": True, "force": True}
    assert "one of these lines" in change(error)
    alone = InputError("No.", hint="Add --trust-remote-code.")
    assert inputs(alone) == {"trust-remote-code": True}
    assert "this line" in change(alone)


def test_a_failed_gate_shows_the_limits_that_would_be_kept() -> None:
    error = GateError(
        "int4: perplexity changed by 30.74 %, above --max-perplexity-increase 5 %. Nothing.",
        hint="Choose a smaller --group-size, or keep modules with --skip.",
    )
    assert inputs(error) == {
        "group-size": 64,
        "skip": "model.layers.0.*",
        "max-perplexity-increase": "int8=1,int4=31",
    }
    by_kl = GateError("int4: mean KL divergence is 0.2871, above --max-kl 0.1. Nothing.")
    assert inputs(by_kl) == {"max-kl": "int8=0.01,int4=0.29"}


def test_values_that_the_error_advises_are_those_of_the_workflow_file() -> None:
    error = GateError(
        "int4: perplexity changed by 42.7 %, above --max-perplexity-increase 5 %. Nothing.",
        hint="For int4, in order of promise: --int4-method calibrated (slow), --group-size 32 (5 bits a "
        r"weight), --skip 'layers\.15\.mlp\.down_proj' (its error is the largest). --evaluate always needs "
        "memory.",
    )
    advised = inputs(error)
    assert advised["int4-method"] == "calibrated"
    assert advised["group-size"] == 32
    assert advised["skip"] == r"layers\.15\.mlp\.down_proj"
    assert advised["evaluate"] == "never"  # the words name what to leave out


def test_a_missing_token_is_given_from_a_secret() -> None:
    missing = HubError("No token.", hint=HOW_TO_SIGN_IN)
    assert inputs(missing) == {"hf-token": "${{ secrets.HF_TOKEN }}"}
    assert "*Secrets and variables*" in change(missing), "the line alone does not bring it"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MachineError("No memory.", hint="Close others."), "`runs-on` name a runner with more"),
        (CheckpointError("A shard is missing.", hint="Upload it."), "nothing has to change"),
        (HubError("Busy.", hint="Run again later."), ""),
    ],
)
def test_where_no_option_is_named_it_says_what_else_helps(error: SmolquantError, said: str) -> None:
    shown = change(error)
    assert said in shown
    assert bool(shown) == bool(said)
