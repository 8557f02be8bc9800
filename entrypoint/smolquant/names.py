"""Names with a grammar that several modules read: ids on the Hub, and tensors with layer numbers."""

import re
from collections.abc import Iterable

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)


def is_repo_id(text: str) -> bool:
    """Whether ``text`` can be the id of something on the Hub: ``user/name``."""
    return _REPO_ID.fullmatch(text) is not None


def layer_number(name: str) -> int | None:
    """The layer of a tensor or module, the first number among the parts of its name; None without one."""
    return split_at_layer(name)[1]


def split_at_layer(name: str) -> tuple[str, int | None, str]:
    """A name as what comes before its layer number, that number, and what comes after.

    ``model.layers.3.self_attn.q_proj`` is ``("model.layers", 3, "self_attn.q_proj")``; a name without a
    number is ``(name, None, "")``.
    """
    parts = name.split(".")
    for index, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[:index]), int(part), ".".join(parts[index + 1 :])
    return name, None, ""


def pattern_in_every_layer(name: str) -> str:
    """A regular expression for the module or tensor ``name`` in every layer."""
    before, number, after = split_at_layer(name)
    if number is None:
        return re.escape(name)
    return r"\.".join([re.escape(before), r"\d+", *([re.escape(after)] if after else [])])


def without_numbers(name: str) -> str:
    """A name with a ``*`` for each part that is a number."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def shown(names: Iterable[str], most: int = 5) -> str:
    """The first of ``names``, folded and quoted, for a message."""
    folded = [repr(name) for name, _ in fold_names(names)]
    return ", ".join(folded[:most]) + (" and others" if len(folded) > most else "")


def fold_names(names: Iterable[str]) -> list[tuple[str, int]]:
    """Tensor or module names with varying layer numbers folded, each with how many it stands for.

    ``model.layers.0.mlp.down_proj`` … ``model.layers.29.mlp.down_proj`` become
    ``("model.layers.*.mlp.down_proj", 30)``; a number that does not vary is kept.
    The order is that of first appearance.
    """
    groups: dict[str, list[list[str]]] = {}
    for name in names:
        groups.setdefault(without_numbers(name), []).append(name.split("."))
    folded = []
    for members in groups.values():
        columns = (set(column) for column in zip(*members, strict=True))
        pattern = ".".join(column.pop() if len(column) == 1 else "*" for column in columns)
        folded.append((pattern, len(members)))
    return folded
