"""The names of projects, runs and jobs in Trackio."""

import re
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from smolquant.names import is_repo_id
from smolquant.text import one_line

_LONGEST_NAME = 120
"""Characters."""


def project_name(repo: str) -> str:
    """A project's name after a repository or a folder, in characters that Trackio keeps apart.

    Trackio's own file names drop everything but letters, digits, ``-`` and ``_``, and it reserves
    the beginning ``registry-`` and some endings that begin with ``_``.
    """
    base = repo if is_repo_id(repo) else Path(repo).resolve().name
    name = re.sub(r"[^A-Za-z0-9]+", "-", base)[:_LONGEST_NAME].strip("-") or "model"
    return f"model-{name}" if name.startswith("registry-") else name


def run_name(text: str) -> str:
    """A run's name; it also becomes part of paths on the server."""
    return re.sub(r"[^\w.@ -]+", "-", one_line(text))[:_LONGEST_NAME].strip(" .-") or "run"


def job_name(environ: Mapping[str, str]) -> str:
    """What groups the runs of one job."""
    if environ.get("GITHUB_RUN_ID"):
        return f"github-{environ['GITHUB_RUN_ID']}-{environ.get('GITHUB_RUN_ATTEMPT', '1')}"
    return f"job-{datetime.now(UTC):%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:4]}"
