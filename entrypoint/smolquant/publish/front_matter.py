"""A README's YAML front matter, edited key by key: every other line stays as its owner wrote it."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
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
        import yaml

        try:
            values = yaml.safe_load(self.front)
        except RecursionError as error:
            raise _unreadable("it is nested too deeply") from error
        except (yaml.YAMLError, ValueError) as error:  # ValueError: an impossible date
            raise _unreadable(getattr(error, "problem", None) or "it is not YAML", error) from error
        if values is None:
            return {}
        if not isinstance(values, dict):
            raise _unreadable("it is not a list of `key: value` lines")
        return values

    def with_tags(self, tags: Iterable[str]) -> "Readme":
        """The README with these tags added to its own, which keep their order and spelling."""
        present = self.values().get("tags")
        known = [present] if isinstance(present, str) else (present or [])
        if not isinstance(known, list):
            return self
        added = [tag for tag in tags if tag not in known]
        if not added:
            return self
        items = [*self._source_of_items("tags"), *added]
        return self._with_entry("tags", ["tags:", *(f"- {item}" for item in items)])

    def with_value(self, key: str, value: str | list[str]) -> "Readme":
        """The README with one entry of the front matter set."""
        import yaml

        if self.values().get(key) == value:
            return self
        lines = yaml.safe_dump({key: value}, allow_unicode=True).splitlines()
        return self._with_entry(key, lines)

    def _with_entry(self, key: str, lines: list[str]) -> "Readme":
        """Replace or append an entry; leave the text as it is where that would change another entry."""
        entry = self.newline.join(lines)
        node = self._find(key)
        if node is None:
            front = f"{self.front}{self.newline}{entry}" if self.front else entry
        else:
            start, end = node[0].start_mark.index, _end(node[1])
            front = self.front[:start] + entry + self.front[end:]
        edited = replace(self, front=front)
        try:
            return edited if list(edited.values()) == _with_key(self.values(), key) else self
        except InputError:  # front matter in an unusual style, such as {a: b}
            return self

    def _find(self, key: str) -> "tuple[yaml.Node, yaml.Node] | None":
        import yaml

        root = yaml.compose(self.front, Loader=yaml.SafeLoader)
        pairs = root.value if isinstance(root, yaml.MappingNode) else []
        return next(((name, value) for name, value in pairs if name.value == key), None)

    def _source_of_items(self, key: str) -> list[str]:
        """The items of a list, or a single item, as they are written, since YAML reads ``on`` as True."""
        import yaml

        pair = self._find(key)
        if pair is None:
            return []
        nodes = pair[1].value if isinstance(pair[1], yaml.SequenceNode) else [pair[1]]
        texts = (self.front[node.start_mark.index : node.end_mark.index] for node in nodes)
        return [text for text in texts if text]


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


def _with_key(values: dict[str, Any], key: str) -> list[str]:
    return list(values) if key in values else [*values, key]


def _end(node: "yaml.Node") -> int:
    """The end of a node's own text: a block collection's mark lies behind the comments after it."""
    import yaml

    if isinstance(node, yaml.CollectionNode) and node.value and not node.flow_style:
        last = node.value[-1]
        return _end(last[1] if isinstance(last, tuple) else last)
    return int(node.end_mark.index)


def _unreadable(why: str, error: Any = None) -> InputError:
    mark = getattr(error, "problem_mark", None)
    # The block's first line is the README's second.
    where = f" (line {mark.line + 2})" if mark is not None else ""
    return InputError(
        f"The front matter of README.md cannot be read{where}: {why}.",
        hint="Correct the lines between its two `---` lines; the Hub refuses a commit of this card.",
    )
