"""The files a run leaves behind: the runner's step outputs and job summary, and report.json.

Secrets are taken out of all of them.
"""

import json
import math
import os
import platform
import secrets
import traceback
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from smolquant.places import write_whole
from smolquant.record import stack_versions
from smolquant.report.run_report import RunReport
from smolquant.schemes import BY_VARIANT
from smolquant.secrecy import redact

REPORT_NAME = "report.json"
DETAILS_NAME = "error-details.txt"
MAX_SUMMARY_BYTES = 1024 * 1024
"""Beyond this the runner drops a step's whole summary."""

_CUT_NOTE = "\n\nThe rest was left out: a job summary holds 1 MiB at most.\n"


def write_outputs(result: RunReport, environ: Mapping[str, str]) -> None:
    """Append the step outputs to the file that ``GITHUB_OUTPUT`` names, if it names one."""
    path = environ.get("GITHUB_OUTPUT")
    if not path:
        return
    # A value cannot end its own block early: nobody can guess the delimiter.
    delimiter = f"smolquant_{secrets.token_hex(16)}"
    outputs = step_outputs(result, environ).items()
    append_lines(
        Path(path),
        "".join(f"{name}<<{delimiter}\n{redact(value)}\n{delimiter}\n" for name, value in outputs),
    )


def append_lines(path: Path, lines: str, *, follow_links: bool = True) -> None:
    """Append whole lines to a file, whose last line a full disk or a careless step may have cut short.

    All of them or none: the runner fails a step whose outputs end in the middle of one.

    Args:
        follow_links: whether ``path`` may be a link; one would have a file elsewhere written to.

    Raises:
        OSError: the file cannot be written, or is a link that is not followed.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | (0 if follow_links else os.O_NOFOLLOW)
    with open(os.open(path, flags, 0o666), "ab+", buffering=0) as file:  # noqa: PTH123 - a descriptor
        content, end = lines.encode(), file.seek(0, os.SEEK_END)
        if end:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                content = b"\n" + content
        try:
            while content:
                content = content[file.write(content) :]
        except OSError:
            with suppress(OSError):  # no file that can be cut
                file.truncate(end)
            raise


def step_outputs(result: RunReport, environ: Mapping[str, str]) -> dict[str, str]:
    """The action's outputs by name; one that the run did not come to is empty."""
    urls = {name: variant.url or "" for name, variant in result.variants.items()}
    return {
        "repo-url": result.repo_url or "",
        "commit-sha": result.commit_sha or "",
        "pull-request-url": result.pull_request_url or "",
        "branches": ",".join(result.branches),
        **{scheme.output_name: urls.get(name, "") for name, scheme in BY_VARIANT.items()},
        "trackio-url": result.trackio_url or "",
        "report": _path_for_later_steps(result.output_dir / REPORT_NAME, environ),
        "changed": "true" if result.changed else "false",
    }


def write_summary(text: str, environ: Mapping[str, str]) -> None:
    """Append markdown to the file that ``GITHUB_STEP_SUMMARY`` names, if it names one."""
    path = environ.get("GITHUB_STEP_SUMMARY")
    if not path:
        return
    with Path(path).open("ab") as file:
        file.write(_fitted(redact(text), MAX_SUMMARY_BYTES - file.tell()))


def report_text(result: RunReport) -> str:
    """The content of report.json, a line end included."""
    return json.dumps(_portable(result.to_json()), indent=2, allow_nan=False) + "\n"


def write_report(result: RunReport, output_dir: Path) -> Path:
    """Write report.json, whole or not at all.

    Raises:
        OSError: when ``output_dir`` cannot be made or written to.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    path = output_dir / REPORT_NAME
    write_whole(path, report_text(result).encode())
    return path


def write_details(report: RunReport, error: BaseException) -> Path:
    """Write what a maintainer needs to know of an unexpected error: command, versions and traceback.

    Raises:
        OSError: the output folder cannot be made or written to.
    """
    report.output_dir.mkdir(parents=True, exist_ok=True)
    path = report.output_dir / DETAILS_NAME
    lines = [
        f"command: {report.command}",
        f"python: {platform.python_version()} on {platform.platform()}",
        *(f"{name}: {version}" for name, version in stack_versions().items()),
        "",
        "".join(traceback.format_exception(error)),
    ]
    write_whole(path, redact("\n".join(lines)).encode(errors="replace"))
    return path


def own_like_workspace(paths: Iterable[Path], environ: Mapping[str, str]) -> None:
    """Give what root made inside the workspace to the workspace's owner.

    The action's container runs as root; on a self-hosted runner files of root's would stop the next
    checkout from cleaning up. Links are handed over, never followed; what lies outside stays as is.
    """
    workspace = environ.get("GITHUB_WORKSPACE")
    if os.geteuid() != 0 or not workspace or not Path(workspace).is_dir():
        return
    root = Path(workspace).resolve()
    owner = root.stat()
    for path in paths:
        if (path.parent.resolve() / path.name).is_relative_to(root) and os.path.lexists(path):
            _chown_tree(path, owner.st_uid, owner.st_gid)


def _chown_tree(path: Path, uid: int, gid: int) -> None:
    os.chown(path, uid, gid, follow_symlinks=False)
    for _, folders, files, descriptor in os.fwalk(path, follow_symlinks=False):
        for name in (*folders, *files):
            with suppress(FileNotFoundError):  # another run in the same folder has moved it
                os.chown(name, uid, gid, dir_fd=descriptor, follow_symlinks=False)


def _path_for_later_steps(path: Path, environ: Mapping[str, str]) -> str:
    """``path``, relative to the workspace where it lies inside: its absolute name differs on the host."""
    workspace = environ.get("GITHUB_WORKSPACE")
    absolute = path.absolute()
    if workspace and absolute.is_relative_to(workspace):
        return str(absolute.relative_to(workspace))
    return str(path)


def _fitted(text: str, limit: int) -> bytes:
    """``text`` in UTF-8, cut to ``limit`` bytes: whole ``<details>`` go first, the last first."""
    parts = text.split("<details>")
    content = text.encode()
    while len(content) > limit and len(parts) > 1:
        parts.pop()
        content = ("<details>".join(parts).rstrip() + _CUT_NOTE).encode()
    if len(content) <= limit:
        return content
    kept = content[: max(limit - len(_CUT_NOTE), 0)].decode(errors="ignore")
    return (kept + _CUT_NOTE).encode() if kept else b""


def _portable(value: Any) -> Any:
    """``value`` without secrets, and without the NaN and infinities that JSON does not have."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _portable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_portable(item) for item in value]
    return value
