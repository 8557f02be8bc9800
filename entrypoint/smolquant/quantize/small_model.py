"""A small model of the same architecture that runs, and what running a model tells of it.

It is built by transformers from a smaller config with random weights, saved as a checkpoint, and run on a
short prompt. Nothing here knows a family by name, and nothing runs past a deadline.
"""

import copy
import json
import shutil
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from smolquant.checkpoint.files import is_code

_LARGEST = 60_000_000
"""Parameters of a model that is still tried; quantizing more would take longer than anyone waits."""

_PROMPT, _GENERATED = 24, 3
"""Tokens."""

_NOISE = 0.02
"""Added to what a fresh model starts with, so that no two tensors are alike."""


class OutOfTime(BaseException):
    """The deadline has come. Not an ``Exception``, because models' own code catches those."""


class Deadline:
    """The moment at which trying ends."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def check(self) -> None:
        """Go on, or end.

        Raises:
            OutOfTime: the moment has come.
        """
        if time.monotonic() > self._end:
            raise OutOfTime


@dataclass(frozen=True)
class Failure:
    """Where and how running a model failed."""

    module: str
    """The innermost that was entered and not left."""
    class_name: str
    text: str
    place: tuple[object, ...]
    """Equal where it is the same failure again."""


def failure_of(
    model: PreTrainedModel, deadline: Deadline, *, generate: bool = True
) -> Failure | None:
    """Why ``model`` does not run; None where it predicts and, if asked, generates.

    Raises:
        OutOfTime: it is still running at the deadline.
    """
    entered: list[str] = []

    def enter(name: str, *_: object) -> None:
        deadline.check()
        entered.append(name)

    def leave(*_: object) -> None:
        entered.pop()

    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(partial(enter, name)))
        hooks.append(module.register_forward_hook(leave))
    prompt = _prompt(model)
    try:
        with torch.no_grad():
            logits = model(input_ids=prompt, use_cache=False).logits
            if not bool(torch.isfinite(logits).all()):
                class_name = type(model).__name__
                text = f"{class_name} computes NaN or infinity with quantized weights"
                return Failure("", class_name, text, ("not finite",))
            if generate:
                model.generate(prompt, max_new_tokens=_GENERATED, do_sample=False)
    except Exception as error:  # a model's own code may raise anything
        name = entered[-1] if entered else ""
        class_name = type(model.get_submodule(name)).__name__
        frames = tuple((f.filename, f.lineno) for f in traceback.extract_tb(error.__traceback__))
        text = f"{class_name} fails with quantized weights: {first_line(error)}"
        return Failure(name, class_name, text, (name, *frames, str(error)))
    finally:
        for hook in hooks:
            hook.remove()
    return None


def small_model(
    model_class: type[PreTrainedModel],
    configs: Iterable[PretrainedConfig],
    dtype: torch.dtype,
    deadline: Deadline,
    *,
    runs: bool = True,
) -> PreTrainedModel | None:
    """A fresh model that runs unquantized, of the first config that gives one; None where none does.

    Args:
        runs: whether it has to; some models run with a picture only.

    Raises:
        OutOfTime: none has been found by the deadline.
    """
    for given in configs:
        deadline.check()
        config = copy.deepcopy(given)  # building notes things in it
        try:
            with torch.device("meta"):
                size = sum(p.numel() for p in model_class._from_config(config).parameters())
            if size > _LARGEST:
                continue
            model: PreTrainedModel = model_class._from_config(config, dtype=dtype).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn(parameter.shape) * _NOISE)
            model.tie_weights()
            if not runs or failure_of(model, deadline, generate=False) is None:
                return model
        except Exception:  # noqa: S112 - what a config that was only guessed at may raise
            continue
    return None


def save(small: PreTrainedModel, folder: Path, source: Path, config: Mapping[str, Any]) -> Path:
    """``small`` as transformers saves it, beside the model's own code."""
    small.save_pretrained(folder)
    for path in source.glob("*.py"):
        if is_code(path.name):
            shutil.copyfile(path, folder / path.name)
    if "auto_map" in config:
        saved = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**saved, "auto_map": config["auto_map"]}))
    return folder


def _prompt(model: PreTrainedModel) -> torch.Tensor:
    table = model.get_input_embeddings().weight
    assert isinstance(table, torch.Tensor)
    rows = table.shape[0]
    return (torch.arange(3, 3 + _PROMPT) % rows).unsqueeze(0)


def first_line(error: BaseException) -> str:
    """What ``error`` says at first, or its kind if it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


@contextmanager
def undisturbed() -> Iterator[None]:
    """With a fixed seed, one thread, and without transformers' words about a model that is not the user's.

    Threads wait for one another longer than a small model computes.
    """
    verbosity, threads = transformers_logging.get_verbosity(), torch.get_num_threads()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            yield
    finally:
        torch.set_num_threads(threads)
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
