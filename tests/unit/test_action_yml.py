"""action.yml says what the command does: the same inputs, defaults and outputs."""

from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from smolquant.cli import quantize
from smolquant.parameters import input_variable
from smolquant.report.files import step_outputs
from unit.report_samples import run_result

ACTION: dict[str, Any] = yaml.safe_load(
    (Path(__file__).resolve().parents[2] / "action.yml").read_text()
)
INPUTS: dict[str, dict[str, str]] = ACTION["inputs"]


def variables(parameter: click.Parameter) -> list[str]:
    """The environment variables that set ``parameter``, the first to count first."""
    names = parameter.envvar or ()
    return [names] if isinstance(names, str) else list(names)


PARAMETERS = {
    name: parameter
    for parameter in quantize.params
    for name in variables(parameter)
    if name.startswith("INPUT_")
}


FOR_SCRIPTS = {"quiet", "as_json"}
"""How a run speaks to a script that has started it; a step has its log and its outputs."""


def test_every_parameter_is_an_input_and_every_input_a_parameter() -> None:
    assert sorted(map(input_variable, INPUTS)) == sorted(PARAMETERS)
    assert len(PARAMETERS) == len(quantize.params) - len(FOR_SCRIPTS)


def test_an_input_comes_before_other_variables() -> None:
    """`with: hf-token:` is what the step says; HF_TOKEN may be the whole workflow's."""
    inputs = [one for one in quantize.params if one.name not in FOR_SCRIPTS]
    assert all(variables(parameter)[0].startswith("INPUT_") for parameter in inputs)


@pytest.mark.parametrize("name", INPUTS)
def test_a_default_is_the_commands_own(name: str) -> None:
    parameter = PARAMETERS[input_variable(name)]
    default = parameter.to_info_dict()["default"]
    if default is False:
        default = "false"
    assert INPUTS[name].get("default") == (None if default in (None, ()) else str(default))


@pytest.mark.parametrize("name", INPUTS)
def test_choices_are_described(name: str) -> None:
    kind = PARAMETERS[input_variable(name)].type
    if isinstance(kind, click.Choice):
        assert all(choice in INPUTS[name]["description"] for choice in kind.choices)


def test_an_option_that_will_go_is_an_input_that_will_go() -> None:
    """The runner shows an input's deprecationMessage, as the command shows an option's."""
    told = {
        input_variable(name) for name, details in INPUTS.items() if "deprecationMessage" in details
    }
    options = {
        name for name, parameter in PARAMETERS.items() if isinstance(parameter, click.Option)
    }
    assert told == {name for name in options if getattr(PARAMETERS[name], "deprecated", False)}


def test_no_input_is_required() -> None:
    """The command refuses what is missing, in one place and in better words."""
    assert not any(details.get("required") for details in INPUTS.values())


def test_the_outputs_are_what_a_run_writes() -> None:
    assert list(ACTION["outputs"]) == list(step_outputs(run_result(), {}))


def test_everything_is_described() -> None:
    described = [ACTION, *INPUTS.values(), *ACTION["outputs"].values()]
    assert all(len(details["description"]) > 10 for details in described)


def test_it_runs_the_dockerfile_and_leaves_the_entrypoint_to_it() -> None:
    """`entrypoint` or `args` here would be one more place that says how the image starts."""
    assert ACTION["runs"].keys() == {"using", "image", "post-entrypoint"}
    assert (ACTION["runs"]["using"], ACTION["runs"]["image"]) == ("docker", "Dockerfile")
