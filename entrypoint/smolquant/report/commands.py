"""GitHub Actions workflow commands: how to write one, and how to keep a text from being one.

The grammar is that of ``ActionCommand`` in actions/runner: a line is a command when it begins,
white space aside, with ``::name``, or when ``##[name`` stands anywhere in it.
"""

import re

MAX_ANNOTATION = 4096
"""Characters of an annotation that GitHub keeps."""

_LEADING_COLONS = re.compile(r"^(\s*:)(?=:)")


def workflow_command(name: str, data: str = "", **properties: str) -> str:
    """The line that gives the runner a command; ``data`` may have several lines."""
    pairs = ",".join(f"{key}={_escape_property(value)}" for key, value in properties.items())
    return f"::{name} {pairs}".rstrip() + f"::{_escape_data(data)}"


def defuse(line: str) -> str:
    """One line of output that the runner takes for text, whatever it holds."""
    return _LEADING_COLONS.sub(r"\1 ", line).replace("##[", "# #[")


def _escape_data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _escape_property(text: str) -> str:
    return _escape_data(text).replace(":", "%3A").replace(",", "%2C")
