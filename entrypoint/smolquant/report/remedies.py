"""What the owner of a failed run can change in the workflow file: the options that its error names."""

import math
import re
from collections.abc import Callable, Mapping

from smolquant.errors import CheckpointError, MachineError
from smolquant.record import Metrics
from smolquant.report.failure import Failure
from smolquant.report.measures import MEAN_KL, PERPLEXITY_INCREASE, Measure
from smolquant.text import Markdown, code_block

_OPTION = re.compile(r"--([a-z][a-z0-9-]*)(?: ('[^']*'|[\w.]+) \()?|\b(HF_TOKEN)\b")
"""An option, with a value where the words in brackets after it tell what that is worth. In the quotation
marks of a pattern YAML, too, takes a backslash for what it is."""

INPUTS = {
    "HF_TOKEN": ("hf-token", "${{ secrets.HF_TOKEN }}"),
    "token": ("hf-token", "${{ secrets.HF_TOKEN }}"),
    "allow-partial": ("allow-partial", "true"),
    "calibration-text": ("calibration-text", "texts/domain.txt"),
    "device": ("device", "cpu"),
    "dtype": ("dtype", "bfloat16"),
    "eval-text": ("eval-text", "texts/domain.txt"),
    "eval-tokens": ("eval-tokens", "2048"),
    "evaluate": ("evaluate", "never"),
    "force": ("force", "true"),
    "group-size": ("group-size", "64"),
    "int4-method": ("int4-method", "calibrated"),
    "low-disk": ("low-disk", "always"),
    "max-shard-size": ("max-shard-size", "500MB"),
    "output-dir": ("output-dir", "./variants"),
    "replace-main": ("replace-main", "true"),
    "revision": ("revision", "main"),
    "save-only": ("save-only", "true"),
    "skip": ("skip", '"model.layers.0.*"'),
    "tag": ("tag", "${{ github.ref_name }}"),
    "trackio-url": ("trackio-url", "https://trackio.example.com"),
    "trust-remote-code": ("trust-remote-code", "true"),
}
"""What an error calls it -> the action's input, and an example of what it may be."""

_WHERE_IT_COMES_FROM = (
    "The line brings what the secret of that name holds. It is set in the repository on GitHub, under "
    "*Settings*, *Secrets and variables*, *Actions*; a run that comes from a fork gets none."
)

_LIMITS: dict[str, tuple[Measure, Callable[[float], float]]] = {
    "max-perplexity-increase": (PERPLEXITY_INCREASE, math.ceil),
    "max-kl": (MEAN_KL, lambda nats: math.ceil(100 * nats) / 100),
}
"""Option -> what it limits, and how its value is rounded up to a limit that is kept."""


def workflow_change(failure: Failure, measured: Mapping[str, Metrics | None]) -> Markdown:
    """A paragraph and the lines to add to the workflow file; empty where nothing there would help.

    Args:
        measured: each variant that was made, with what was measured of it: limits that would be kept.
    """
    found = _OPTION.findall(failure.hint)
    advised = {option: value for option, value, _ in found if value}
    named = [option or token for option, _, token in found]
    named += [option for option in _LIMITS if f"--{option} " in failure.message]
    examples = {name: INPUTS[name] for name in named if name in INPUTS}
    inputs = {key: advised.get(name, example) for name, (key, example) in examples.items()}
    inputs |= {
        name: limits for name in named if name in _LIMITS if (limits := _limits(name, measured))
    }
    if inputs:
        lines = "\n".join(["with:", *(f"  {name}: {value}" for name, value in inputs.items())])
        what = "one of these lines" if len(inputs) > 1 else "this line"
        told = f"**In the workflow file**, give the step {what}, with the value that you need:"
        about = f"\n\n{_WHERE_IT_COMES_FROM}" if "hf-token" in inputs else ""
        return Markdown(f"{told}\n\n{code_block(lines, 'yaml')}{about}")
    if failure.exit_code == MachineError.exit_code:
        return Markdown(
            "**In the workflow file**, let `runs-on` name a runner with more memory and disk."
        )
    if failure.exit_code == CheckpointError.exit_code:
        return Markdown("In the workflow file, nothing has to change.")
    return Markdown("")


def _limits(option: str, measured: Mapping[str, Metrics | None]) -> str:
    """``int8=1,int4=31``: limits that this run's variants keep; empty where nothing was measured."""
    measure, up = _LIMITS[option]
    values = {name: measure.value(metrics) for name, metrics in measured.items()}
    return ",".join(
        f"{name}={max(up(value), 0):g}" for name, value in values.items() if value is not None
    )
