"""Small models with random weights, of a family's own default config."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from families.inputs import Inputs, text_inputs, with_image
from families.kinds import Kind
from families.sizes import CHANGES
from smolquant.model.shrink import smaller_configs

_GROUP_SIZE = 128
"""Columns; widths keep what they share with it, so that int4 decides as it would about a large model."""

_MOST_PARAMETERS = 160_000_000

_SCALES = (1.0, 0.25)
"""Tried one after the other, as some families' own activations overflow sooner than others."""


class CannotBuild(Exception):
    """transformers makes no small model of the family that runs."""


@dataclass(frozen=True)
class Small:
    """A model that runs, and what it is run on."""

    model: PreTrainedModel
    inputs: Inputs


def small_model(kind: Kind, *, dtype: torch.dtype = torch.bfloat16) -> Small:
    """A model of ``kind`` with random weights that runs in ``dtype``, or else in float32.

    Raises:
        CannotBuild: with what transformers says of the smallest.
    """
    import transformers

    failures: list[str] = []
    model_class = getattr(transformers, kind.class_name)
    try:
        config = _default_config(kind, model_class)
        with torch.device("meta"):
            skeleton = model_class(copy.deepcopy(config)).eval()
    except Exception as error:
        raise CannotBuild(f"of its default config: {_told(error)}") from error
    for tried in (dtype, torch.float32):
        for smaller in _smaller(skeleton):
            for scale in _SCALES:
                try:
                    return _built(kind, model_class, smaller, tried, scale)
                except Exception as error:
                    failures.append(f"{str(tried).removeprefix('torch.')}: {_told(error)}")
    raise CannotBuild(failures[0])


def _default_config(kind: Kind, model_class: Any) -> PretrainedConfig:
    config = AutoConfig.for_model(kind.model_type, **CHANGES.get(kind.model_type, {}))
    config = _with_changed_parts(config)
    expected = model_class.config_class
    if type(config) is not expected and isinstance(config.get_text_config(), expected):
        config = config.get_text_config()
    if hasattr(config, "is_decoder") and not kind.sees:
        config.is_decoder = True
        config.is_encoder_decoder = False
    if getattr(config, "causal", None) is False:
        config.causal = True  # XLM's are encoders otherwise
    return config


def _with_changed_parts(config: PretrainedConfig) -> PretrainedConfig:
    """``config`` with the changes of the configs in it, which are models' own types."""
    entries = config.to_dict()
    changes = {
        name: entries[name] | CHANGES[entries[name]["model_type"]]
        for name in config.sub_configs
        if isinstance(entries.get(name), dict) and entries[name].get("model_type") in CHANGES
    }
    return type(config).from_dict(entries | changes) if changes else config


def _smaller(skeleton: PreTrainedModel) -> Iterator[PretrainedConfig]:
    yield from smaller_configs(skeleton, _language(skeleton), _GROUP_SIZE)


def _language(skeleton: PreTrainedModel) -> nn.Module:
    try:
        decoder: nn.Module = skeleton.get_decoder()
    except Exception:
        return skeleton  # type: ignore[no-any-return]
    return decoder


def _built(
    kind: Kind, model_class: Any, config: PretrainedConfig, dtype: torch.dtype, scale: float
) -> Small:
    with torch.device("meta"):
        size = sum(p.numel() for p in model_class(copy.deepcopy(config)).parameters())
    if size > _MOST_PARAMETERS:
        raise ValueError(f"{size:,} parameters are too many")
    torch.manual_seed(0)
    model = model_class._from_config(copy.deepcopy(config), dtype=dtype).eval()
    spread(model, scale)
    inputs = text_inputs(model)
    if kind.sees:
        inputs = with_image(model, inputs) or inputs
    with torch.no_grad():
        logits = model(**inputs.for_model(model)).logits
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("its logits are not finite")
    return Small(model, inputs)


@torch.no_grad()
def spread(model: PreTrainedModel, scale: float) -> None:
    """Give ``model`` reproducible weights, spread so that every layer shows in the logits."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.copy_(noise * scale * parameter.shape[-1] ** -0.5)
        else:
            parameter.copy_(parameter.nan_to_num(0.0, 0.0, 0.0) + noise * 0.1 * scale)
    model.tie_weights()


def _told(error: BaseException) -> str:
    line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {line}"[:300]
