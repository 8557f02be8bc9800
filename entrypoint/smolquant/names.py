"""Names that several modules read: the ids of repositories on the Hub."""

import re

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)


def is_repo_id(text: str) -> bool:
    """Whether ``text`` has the form of a Hub id, ``user/name``: of a model, a Space or a bucket.

    A path such as ``./model`` has another form. Whether the Hub has something of this id is not asked.
    """
    return _REPO_ID.fullmatch(text) is not None
