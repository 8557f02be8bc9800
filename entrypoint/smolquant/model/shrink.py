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

from smolquant.model.trunk import trunk_of

VOCABULARY = 256
"""Rows of the small model's tables."""

_LEAST_LAYERS = 2
_LEAST_GROUP = 32
_WIDTH = re.compile(r"size|dim|rank|inner|width|d_model|d_ff|n_embd|lru")
_NO_WIDTH = re.compile(
    r"vocab|window|chunk|image|patch|head|kernel|conv|state|block|batch|context|merge|position"
)
_TOWER_WIDTHS = ("embed_dim", "d_model", "hidden_size", "hidden_dim")
_TOWER_HEADS = ("num_attention_heads", "num_heads", "attention_heads", "encoder_attention_heads")
_EXPERTS = re.compile(r"(moe_)?(num|n)_(routed_|local_)?experts")
_CHOSEN_EXPERTS = re.compile(r"experts_per_tok(en)?$|^moe_(top_?)?k$|^top_k_experts$")
_MOST_EXPERTS, _MOST_CHOSEN = 16, 4
"""Enough for eight groups of two, of which families choose some."""

_HEADS = re.compile(r"heads$|n_head$|n_?groups$")
_LAYER_NUMBER = re.compile(r"layers?(_idx|_id|_interval)?$")
_NO_NUMBERS = re.compile(r"size|section|shape|stride|kernel|ratio")
_TOKEN = re.compile(r"token_(id|ids|index)$")


def smaller_configs(
    model: PreTrainedModel, language: nn.Module, group_size: int
) -> Iterator[PretrainedConfig]:
    """``model``'s config shrunk, the smallest first; at last the config itself.

    Layers are cut from the end, so the names of those that stay mean the same in both models. Every width
    keeps its greatest common divisor with ``group_size``, so that a scheme decides about the small weight
    as about the large one.

    Args:
        model: the skeleton; only its modules and its config are looked at.
        language: the part of it that reads and writes text.
        group_size: columns that share a scale.
    """
    layers = _layers_that_show_all(model.config, language)
    for others, narrower, fewer_heads, fewer_tokens, fewer_layers in (
        (True, True, True, True, True),
        (False, True, True, True, True),
        (True, True, False, True, True),
        (False, True, False, True, True),
        (False, True, True, True, False),
        (False, False, False, True, True),
        (False, False, False, False, True),
    ):
        entries = copy.deepcopy(model.config.to_dict())
        try:
            if others:
                _cut_experts(model.config, entries)
            if narrower:
                _narrow(model.config, entries, group_size, fewer_heads=fewer_heads, towers=others)
            if fewer_tokens:
                _cut_vocabulary(model.config, entries)
            if fewer_layers:
                _cut_layers(model.config, entries, layers)
            yield type(model.config).from_dict(entries)
        except Exception:  # noqa: S112 - a config class may raise anything at what it is not made for
            continue
    yield copy.deepcopy(model.config)


def _layers_that_show_all(config: PretrainedConfig, language: nn.Module) -> int:
    """How many of the first layers there have to be for every kind of layer to be among them."""
    text = config.get_text_config(decoder=True)
    try:
        _, layers = trunk_of(language)
    except NotImplementedError:
        return _LEAST_LAYERS
    by_layer = [
        entry
        for entry in text.to_dict().values()
        if isinstance(entry, list)
        and len(entry) == len(layers)
        and all(isinstance(item, str) or item in (0, 1) for item in entry)
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
        key = next(
            (k for k in (_key(part, "num_hidden_layers"), "depth") if _is_int(own.get(k))), None
        )
        depth = own[key] if key else getattr(part, "num_hidden_layers", None)
        if depth is None or depth <= layers:
            continue
        if key:
            own[key] = layers
        for name, value in list(own.items()):
            if isinstance(value, list) and len(value) == depth:
                own[name] = value[:layers]
            elif _has_numbers(value) and "label" not in name:
                own[name] = {number: one for number, one in value.items() if int(number) < layers}
            elif (
                isinstance(value, list)
                and value
                and all(_is_int(v) and 0 <= v < depth for v in value)
                and not _NO_NUMBERS.search(name)
            ):
                own[name] = [v for v in value if v < layers] or [layers - 1]  # numbers of layers
            elif _is_int(value) and _LAYER_NUMBER.search(name) and name != key:
                own[name] = min(value, layers)


def _cut_vocabulary(config: PretrainedConfig, entries: dict[str, Any]) -> None:
    for _, own in _parts(config, entries):
        for name, value in own.items():
            if "vocab_size" in name and _is_int(value):
                own[name] = min(value, VOCABULARY)
            elif _TOKEN.search(name):
                own[name] = _small_ids(name, value)


def _small_ids(name: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_small_ids(name, item) for item in value]
    if not _is_int(value) or value < VOCABULARY:
        return value
    return VOCABULARY - 1 - sum(map(ord, name)) % 64  # far from one another, for most names


def _cut_experts(config: PretrainedConfig, entries: dict[str, Any]) -> None:
    for _, own in _parts(config, entries):
        for name, value in own.items():
            if not _is_int(value):
                continue
            if _EXPERTS.fullmatch(name):
                own[name] = min(value, _MOST_EXPERTS)
            elif _CHOSEN_EXPERTS.search(name):
                own[name] = min(value, _MOST_CHOSEN)


def _narrow(
    config: PretrainedConfig,
    entries: dict[str, Any],
    group_size: int,
    *,
    fewer_heads: bool,
    towers: bool,
) -> None:
    text = config.get_text_config(decoder=True)
    hidden, small = text.hidden_size, _small_hidden(text, group_size)
    for part, own in _parts(config, entries):
        is_text = part is text
        if towers and not is_text and part is not config:
            _narrow_tower(own, hidden, small)
            continue
        for entries_of_it in (own, *_by_layer(own)):
            for name, value in entries_of_it.items():
                if name == _key(part, "hidden_size"):
                    entries_of_it[name] = small if is_text else value
                elif is_text and _HEADS.search(name) and _is_int(value):
                    entries_of_it[name] = _small_heads(text, value, small) if fewer_heads else value
                elif _is_width(name) and (is_text or value == hidden):
                    entries_of_it[name] = _small_width(value, hidden, small, group_size)


def _by_layer(own: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Entries of single layers that differ from the rest, as in transformers' ``per_layer_config``."""
    for value in own.values():
        if _has_numbers(value):
            yield from (entries for entries in value.values() if isinstance(entries, dict))


def _has_numbers(value: Any) -> bool:
    """Whether it maps numbers of layers to something."""
    return isinstance(value, dict) and bool(value) and all(str(key).isdigit() for key in value)


def _narrow_tower(own: dict[str, Any], hidden: int, small: int) -> None:
    """Narrow what sees or hears to two heads; what is as wide as the text part, ``hidden``, follows it."""
    key = next((name for name in _TOWER_WIDTHS if _is_int(own.get(name))), None)
    heads = next((own[name] for name in _TOWER_HEADS if _is_int(own.get(name))), 1)
    if key is None or own[key] % heads:
        return
    width, fewer = own[key], min(heads, 2)
    narrow = width // heads * fewer
    for name, value in own.items():
        if not _is_int(value) or value <= 0:
            continue
        if _HEADS.search(name):
            own[name] = max(1, value * fewer // heads)
        elif name != key and value == hidden and _is_width(name):
            own[name] = small
        elif name == key or (_is_width(name) and value % width == 0):
            own[name] = value // width * narrow
        elif _is_width(name):
            own[name] = math.gcd(value, 128)


def _is_width(name: str) -> bool:
    return bool(_WIDTH.search(name)) and not _NO_WIDTH.search(name)


def _small_hidden(text: PretrainedConfig, group_size: int) -> int:
    hidden: int = text.hidden_size
    small: int = _divisor(hidden, group_size)
    heads = getattr(text, "num_attention_heads", None)
    if heads and not _has_own_head_dim(text):
        small = math.lcm(small, hidden // heads * min(heads, 2))
    return min(hidden, small)


def _small_heads(text: PretrainedConfig, heads: int, small_hidden: int) -> int:
    """``heads``, of whatever kind, in the proportion that leaves the width of one as it is."""
    all_heads: int = getattr(text, "num_attention_heads", None) or 0
    if all_heads and _has_own_head_dim(text):
        return max(1, heads * min(all_heads, 2) // all_heads)
    hidden: int = text.hidden_size
    return max(1, heads * small_hidden // hidden)


def _has_own_head_dim(text: PretrainedConfig) -> bool:
    return text.to_dict().get("head_dim") is not None


def _small_width(value: Any, hidden: int, small: int, group_size: int) -> Any:
    if isinstance(value, list):
        return [_small_width(v, hidden, small, group_size) for v in value]
    if not _is_int(value) or value <= 0:
        return value
    if value in (hidden, 2 * hidden):  # may have to stay so
        return value // hidden * small
    return _divisor(value, group_size)


def _divisor(width: int, group_size: int) -> int:
    """A width that as many columns of a group go into; an odd one stays, as something may hang on it."""
    return math.gcd(width, group_size) if width % _LEAST_GROUP == 0 else width


def _key(config: PretrainedConfig, attribute: str) -> str:
    names: Mapping[str, str] = config.attribute_map
    return names.get(attribute, attribute)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
