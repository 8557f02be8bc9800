"""A README's YAML front matter, edited key by key: every other line stays as its owner wrote it."""

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from smolquant.checkpoint.source import Source
from smolquant.errors import InputError

if TYPE_CHECKING:
    import yaml

# What the Hub takes for front matter; its own expression is in huggingface_hub.repocard.
_BLOCK = re.compile(r"\s*---(?:\r\n|\r|\n)([\S\s]*?)(?:\r\n|\r|\n)---[ \t]*(?:\r\n|\n|$)")
_KINDS = {
    **dict.fromkeys(("license", "language", "tags", "datasets", "metrics", "base_model"), "texts"),
    **dict.fromkeys(("license_name", "license_link", "library_name", "pipeline_tag"), "text"),
    "model-index": "mappings",
}
"""Of entries that the Hub knows: what they may be."""
_AS_WRITTEN = {
    "texts": "a text, or a list of texts",
    "text": "a text",
    "mappings": "a list of entries with a name and results",
}
_LONGEST = 500_000
"""Characters; the longest on the Hub, with the results of hundreds of benchmarks, have fewer."""
_MOST_VALUES = 200_000
"""Keys, values and items, each as often as aliases repeat it: a few lines can stand for billions."""
_LONGEST_NUMBER = 1_000
"""Characters of a number, which YAML may write in base 60."""

_LICENSE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Readme:
    """A README in two parts; ``front`` is YAML without its fences, or empty where there is none."""

    front: str
    body: str
    newline: str = "\n"

    @classmethod
    def split(cls, text: str) -> "Readme":
        """Take a README apart; its first line decides which line ends the whole has."""
        newline = "\r\n" if "\r\n" in text.partition("\n")[0] + "\n" else "\n"
        match = _BLOCK.match(text)
        if match is None:
            return cls("", text, newline)
        return cls(match[1], text[match.end() :], newline)

    def join(self) -> str:
        """The whole README."""
        if not self.front:
            return self.body
        return self.newline.join(("---", self.front, "---", self.body))

    def values(self) -> dict[str, Any]:
        """The front matter's entries.

        Raises:
            InputError: it is not YAML, or not a mapping. The Hub refuses a commit of such a README.
        """
        return dict(_parsed(self.front)[1])

    def with_tags(self, tags: Iterable[str]) -> "Readme":
        """The README with these tags added to its own, which keep their order, spelling and comments."""
        present = self.values().get("tags")
        known = [present] if isinstance(present, str) else (present or [])
        if not isinstance(known, list):
            return self
        added = [tag for tag in tags if tag not in known]
        if not added:
            return self
        pair = self._find("tags")
        front = self._appended(_lines("tags", added)) if pair is None else self._with(pair, added)
        return self._edited(front, "tags", [*known, *added])

    def without_tags(self, tags: Collection[str]) -> "Readme":
        """The README without these tags; the others stay as they are written, where the style allows it."""
        import yaml

        present = self.values().get("tags")
        known = [present] if isinstance(present, str) else (present or [])
        if not isinstance(known, list):
            return self
        left = [tag for tag in known if tag not in tags]
        pair = self._find("tags")
        if left == known or pair is None:
            return self
        if not left:
            return self.without("tags")
        front, value = self.front, pair[1]
        if isinstance(value, yaml.SequenceNode) and not value.flow_style:
            for item in reversed(value.value):
                if item.value in tags:
                    front = _without_lines(front, item.start_mark.index, _end(item))
        edited = self._edited(front, "tags", left)
        return self.with_value("tags", left) if edited is self else edited

    def without(self, key: str) -> "Readme":
        """The README without one entry of the front matter; as it is where that would change another."""
        pair = self._find(key)
        if pair is None:
            return self
        front = _without_lines(self.front, pair[0].start_mark.index, _end(pair[1]))
        edited = replace(self, front=front)
        left = {name: value for name, value in self.values().items() if name != key}
        try:
            return edited if edited.values() == left else self
        except InputError:  # front matter in an unusual style, such as {a: b}
            return self

    def with_value(self, key: str, value: str | list[str]) -> "Readme":
        """The README with one entry of the front matter set; comments within the old one follow it."""
        import yaml

        if self.values().get(key) == value:
            return self
        lines = yaml.safe_dump({key: value}, allow_unicode=True).splitlines()
        pair = self._find(key)
        if pair is None:
            return self._edited(self._appended(lines), key, value)
        lines += self._comments(*pair)
        start, end = pair[0].start_mark.index, _end(pair[1])
        front = self.front[:start] + self.newline.join(lines) + self.front[end:]
        return self._edited(front, key, value)

    def _edited(self, front: str, key: str, value: Any) -> "Readme":
        """The README with this front matter; as it is where that would change another entry."""
        edited, wanted = replace(self, front=front), self.values() | {key: value}
        try:
            values = edited.values()
        except InputError:  # front matter in an unusual style, such as {a: b}
            return self
        return edited if list(values) == list(wanted) and values[key] == value else self

    def _appended(self, lines: list[str]) -> str:
        return self.newline.join([*filter(None, [self.front]), *lines])

    def _with(self, pair: "tuple[yaml.Node, yaml.Node]", added: list[str]) -> str:
        """The front matter with items added to an entry, which is a list, one item, or empty."""
        import yaml

        key, value = pair
        front, start, end = self.front, value.start_mark.index, _end(value)
        if isinstance(value, yaml.SequenceNode) and value.flow_style:
            at = _end(value.value[-1]) if value.value else start + 1
            between = ", " if value.value else ""
            return front[:at] + between + ", ".join(added) + front[at:]
        column = key.start_mark.column
        if isinstance(value, yaml.SequenceNode):
            column = value.start_mark.column
        elif value.tag.endswith(":null"):
            front, end = front[:start].rstrip() + front[end:], key.end_mark.index
        else:
            item = f"{self.newline}{' ' * column}- "
            head = front[:start].rstrip()
            front, end = head + item + front[start:], len(head) + len(item) + end - start
        at = _line_end(front, end)
        lines = (f"{self.newline}{' ' * column}- {tag}" for tag in added)
        return front[:at] + "".join(lines) + front[at:]

    def _comments(self, key: "yaml.Node", value: "yaml.Node") -> list[str]:
        """The comments between the values of an entry."""
        found, at = list[str](), key.end_mark.index
        for start, end in _scalars(value):
            found += re.findall(r"(?:^|\s)(#[^\r\n]*)", self.front[at:start])
            at = end
        return found

    def _find(self, key: str) -> "tuple[yaml.Node, yaml.Node] | None":
        pairs = _parsed(self.front)[0]
        return next(((name, value) for name, value in pairs if name.value == key), None)


@lru_cache(maxsize=8)
def _parsed(front: str) -> "tuple[list[tuple[yaml.Node, yaml.Node]], dict[str, Any]]":
    """Front matter as YAML's nodes, which know their places in it, and as values.

    Raises:
        InputError: it is not YAML, not a mapping, or stands for more than a card can hold.
    """
    import yaml

    if len(front) > _LONGEST:
        raise _unreadable(f"it has {len(front):,} characters, and {_LONGEST:,} is the most")
    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # tens of times faster
    try:
        reader = loader(front)
        root = reader.get_single_node()
        if root is None:
            return [], {}
        if _size(root, {}) > _MOST_VALUES:
            raise _unreadable(f"its aliases or lists stand for more than {_MOST_VALUES:,} values")
        pairs = list(root.value) if isinstance(root, yaml.MappingNode) else []
        values = reader.construct_document(root)
    except RecursionError as error:
        raise _unreadable("it is nested too deeply") from error
    except (
        yaml.YAMLError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError
    ) as error:  # an impossible date, or a tag such as `!!int` in front of what is none  # fmt: skip
        why = getattr(error, "problem", None) or "it is not YAML"
        raise _unreadable(why, _line_of(error, front)) from error
    if values is None:
        return [], {}
    if not isinstance(values, dict):
        raise _unreadable("it is not a list of `key: value` lines")
    return pairs, values


def _size(node: "yaml.Node", known: dict[int, int]) -> int:
    """The number of values that a node stands for, with all that aliases repeat."""
    import yaml

    if id(node) not in known:
        known[id(node)] = _MOST_VALUES + 1  # of a list that has itself as an item
        size = 1
        if isinstance(node, yaml.MappingNode):
            size += sum(_size(key, known) + _size(value, known) for key, value in node.value)
        elif isinstance(node, yaml.SequenceNode):
            size += sum(_size(item, known) for item in node.value)
        elif len(node.value) > _LONGEST_NUMBER and not node.tag.endswith(":str"):
            raise _unreadable("a number in it is too long")
        known[id(node)] = size
    return known[id(node)]


def _scalars(node: "yaml.Node") -> Iterator[tuple[int, int]]:
    """Where the texts in a value begin and end."""
    import yaml

    if isinstance(node, yaml.ScalarNode):
        yield node.start_mark.index, node.end_mark.index
        return
    for one in node.value:
        for part in one if isinstance(one, tuple) else (one,):
            yield from _scalars(part)


def _lines(key: str, items: Iterable[str]) -> list[str]:
    return [f"{key}:", *(f"- {item}" for item in items)]


def _without_lines(text: str, start: int, end: int) -> str:
    """The text without the lines that ``start`` to ``end`` lie in."""
    first = max(text.rfind(mark, 0, start) for mark in "\r\n") + 1
    rest = re.sub(r"\A(?:\r\n|\r|\n)", "", text[_line_end(text, end) :])
    return text[:first] + rest if rest else text[:first].rstrip("\r\n")


def _line_end(text: str, start: int) -> int:
    """Where the line that ``start`` lies in ends."""
    match = re.compile(r"[\r\n]|$").search(text, start)
    return match.start() if match else len(text)


def readme_text(content: bytes, place: str) -> str:
    """A README as text that can be edited.

    Raises:
        InputError: the README is not UTF-8, or its front matter cannot be read.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"The README.md of {place} is not UTF-8 text: {error.reason} at byte {error.start}.",
            hint="Save it as UTF-8, then run again.",
        ) from error
    Readme.split(text).values()
    return text


def own_readme(source: Source, *, needed: bool) -> str | None:
    """The README in the folder of ``source``; None where there is none.

    Args:
        needed: whether no other README is there already. One that is not needed and cannot be read counts
            as none.

    Raises:
        InputError: it is needed, and not UTF-8 or its front matter cannot be read.
    """
    if source.readme is None:
        return None
    try:
        return readme_text(source.readme.read_bytes(), source.folder.as_posix())
    except InputError:
        if needed:
            raise
        return None


def check_kinds(readme: str, place: str) -> None:
    """Refuse front matter with entries of another kind than the Hub takes, without asking it.

    Raises:
        InputError: naming the entry.
    """
    for key, value in Readme.split(readme).values().items():
        kind = _KINDS.get(key)
        if kind == "texts":
            fits = all(_is_plain(one) for one in (value if isinstance(value, list) else [value]))
        elif kind == "text":
            fits = _is_plain(value)
        else:
            fits = kind is None or value is None or _are_mappings(value)
        if not fits:
            raise InputError(
                f"The front matter of {place} has an entry {key!r} of a kind that the Hub refuses.",
                hint=f"Write it as {_AS_WRITTEN[kind or '']}; the Hub refuses a commit of this card.",
            )


def _is_plain(value: Any) -> bool:
    return not isinstance(
        value, list | dict
    )  # the Hub's YAML takes `no` for a text, and Python's does not


def _are_mappings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, dict) for one in value)


def declared_license(readme: str | None) -> dict[str, str]:
    """The license entries of a README's front matter that are plain texts."""
    values = Readme.split(readme or "").values()
    return {key: values[key] for key in _LICENSE_KEYS if isinstance(values.get(key), str)}


def _end(node: "yaml.Node") -> int:
    """The end of a node's own text: a block collection's mark lies behind the comments after it."""
    import yaml

    if isinstance(node, yaml.CollectionNode) and node.value and not node.flow_style:
        last = node.value[-1]
        return _end(last[1] if isinstance(last, tuple) else last)
    return int(node.end_mark.index)


def _unreadable(why: str, line: int | None = None) -> InputError:
    where = "" if line is None else f" (line {line})"
    return InputError(
        f"The front matter of README.md cannot be read{where}: {why}.",
        hint="Correct the lines between its two `---` lines; the Hub refuses a commit of this card.",
    )


def _line_of(error: Exception, front: str) -> int | None:
    """The line of a README that an error in its front matter is in."""
    mark = getattr(error, "problem_mark", None)
    # The block's first line is the README's second. What lacks its end is told at the end.
    return None if mark is None else min(mark.line, front.count("\n")) + 2
