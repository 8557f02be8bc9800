"""A small model of the same architecture: its own config, with fewer layers, narrower, and of few tokens.

Shrinking is guesswork, as every family has its own constraints, so there are several configs, the
smallest first, and whoever builds one of them says whether it works.
"""

import copy
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

VOCABULARY = 256
"""Rows of the small model's tables."""

_LEAST_LAYERS = 2
_GROUP = 256
"""The largest group of columns that a scheme shares a scale over; what divides it matters to the plan."""

_WIDTH = re.compile(r"size|dim|rank|inner|width|d_model|d_ff|n_embd|lru")
_NO_WIDTH = re.compile(
    r"vocab|window|chunk|image|patch|head|kernel|conv|state|block|batch|context|merge|position"
)
_HEADS = re.compile(r"heads?$")
_TOKEN = re.compile(r"token_(id|ids|index)$")


def smaller_configs(model: PreTrainedModel) -> Iterator[PretrainedConfig]:
    """``model``'s config shrunk, further first; at last the config itself.

    Every width keeps its greatest common divisor with the largest group size, so that a scheme decides
    about the small weight as about the large one.

    Args:
        model: the skeleton; only its modules and its config are looked at.
    """
    layers = _layers_that_show_all(model)
    for fewer_layers, narrower, fewer_tokens in (
        (True, True, True),
        (False, True, True),
        (True, False, True),
        (True, False, False),
    ):
        entries = copy.deepcopy(model.config.to_dict())
        try:
            if narrower:
                _narrow(model.config, entries)
            if fewer_tokens:
                _cut_vocabulary(model.config, entries)
            if fewer_layers:
                _cut_layers(model.config, entries, layers)
            yield type(model.config).from_dict(entries)
        except Exception:  # noqa: S112 - a config class may raise anything at what it is not made for
            continue
    yield copy.deepcopy(model.config)


def _layers_that_show_all(model: PreTrainedModel) -> int:
    """How many of the first layers there have to be for every kind of layer to be among them."""
    text = model.config.get_text_config(decoder=True)
    layers = max(
        (module for module in model.modules() if isinstance(module, nn.ModuleList)),
        key=lambda modules: sum(parameter.numel() for parameter in modules.parameters()),
        default=nn.ModuleList(),
    )
    by_layer = [
        entry
        for entry in text.to_dict().values()
        if isinstance(entry, list)
        and len(entry) == len(layers)
        and all(isinstance(item, str | bool) for item in entry)
    ]
    seen, enough = set(), _LEAST_LAYERS
    for place, layer in enumerate(layers):
        structure = frozenset(
            (name, type(module).__name__, *(n for n, _ in module.named_parameters(recurse=False)))
            for name, module in layer.named_modules()
        )
        kind = (structure, *(entry[place] for entry in by_layer))
        if kind not in seen:
            seen.add(kind)
            enough = max(enough, place + 1)
    return enough


def _parts(
    config: PretrainedConfig, entries: dict[str, Any]
) -> Iterator[tuple[PretrainedConfig, dict[str, Any]]]:
    """``config`` and the configs nested in it, each with its own entries."""
    yield config, entries
    for name in getattr(config, "sub_configs", {}):
        part = getattr(config, name, None)
        if isinstance(part, PretrainedConfig) and isinstance(entries.get(name), dict):
            yield from _parts(part, entries[name])


def _cut_layers(config: PretrainedConfig, entries: dict[str, Any], layers: int) -> None:
    for part, own in _parts(config, entries):
        key = next((k for k in (_key(part, "num_hidden_layers"), "depth") if _is_int(own.get(k))), None)
        depth = own[key] if key else getattr(part, "num_hidden_layers", None)
        if depth is None or depth <= layers:
            continue
        if key:
            own[key] = layers
        for name, value in list(own.items()):
            if isinstance(value, list) and len(value) == depth:
                own[name] = value[:layers]
            elif isinstance(value, list) and value and all(_is_int(v) and 0 <= v < depth for v in value):
                own[name] = [v for v in value if v < layers]  # numbers of layers
            elif _is_int(value) and "layer" in name and name != key:
                own[name] = min(value, layers)


def _cut_vocabulary(config: PretrainedConfig, entries: dict[str, Any]) -> None:
    for part, own in _parts(config, entries):
        for name, value in own.items():
            if name.endswith("vocab_size") and _is_int(value):
                own[name] = min(value, VOCABULARY)
            elif _TOKEN.search(name):
                own[name] = _small_ids(name, value)


def _small_ids(name: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_small_ids(name, item) for item in value]
    if not _is_int(value) or value < VOCABULARY:
        return value
    return VOCABULARY - 1 - sum(map(ord, name)) % 64  # far from one another, for most names


def _narrow(config: PretrainedConfig, entries: dict[str, Any]) -> None:
    text = config.get_text_config(decoder=True)
    hidden, small = text.hidden_size, _small_hidden(text)
    for part, own in _parts(config, entries):
        is_text = part is text
        for name, value in own.items():
            if name == _key(part, "hidden_size"):
                own[name] = small if is_text else value
            elif is_text and _HEADS.search(name) and _is_int(value):
                own[name] = _small_heads(text, value)
            elif _WIDTH.search(name) and not _NO_WIDTH.search(name):
                own[name] = _small_width(value, hidden, small, multiples_only=not is_text)


def _small_hidden(text: PretrainedConfig) -> int:
    hidden: int = text.hidden_size
    small = _divisor(hidden)
    if not _has_own_head_dim(text):
        heads = getattr(text, "num_attention_heads", 1) or 1
        small = math.lcm(small, hidden // heads * min(heads, 2))
    return min(hidden, small)


def _small_heads(text: PretrainedConfig, heads: int) -> int:
    all_heads: int = getattr(text, "num_attention_heads", heads) or heads
    if _has_own_head_dim(text) or text.hidden_size % all_heads:
        small = min(all_heads, 2)
    else:
        small = _small_hidden(text) * all_heads // text.hidden_size
    return max(1, heads * small // all_heads)


def _has_own_head_dim(text: PretrainedConfig) -> bool:
    own = text.to_dict()
    return own.get("head_dim") is not None and own.get("hidden_size") is not None


def _small_width(value: Any, hidden: int, small: int, *, multiples_only: bool) -> Any:
    if isinstance(value, list):
        return [_small_width(v, hidden, small, multiples_only=multiples_only) for v in value]
    if not _is_int(value) or value <= 0:
        return value
    if value % hidden == 0:
        return value // hidden * small
    if multiples_only or value < 2 * _divisor(value):
        return value
    return _divisor(value)


def _divisor(width: int) -> int:
    return max(math.gcd(width, _GROUP), 1) if width % 32 == 0 else width


def _key(config: PretrainedConfig, attribute: str) -> str:
    names: Mapping[str, str] = config.attribute_map
    return names.get(attribute, attribute)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
