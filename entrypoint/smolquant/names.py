"""Names with a grammar that several modules read."""

import re

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)


def is_repo_id(text: str) -> bool:
    """Whether ``text`` can be the id of something on the Hub: ``user/name``."""
    return _REPO_ID.fullmatch(text) is not None
