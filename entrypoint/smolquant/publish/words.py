"""Words that the root's card and the variants' own cards share."""

from collections.abc import Callable

from smolquant.hub import valid_repo_id
from smolquant.record import IMAGE_TEXT_TO_TEXT, Metrics, VariantRecord
from smolquant.text import Markdown, escape_markdown, link


def name_of(location: str) -> str:
    """The last part of a Hub id or of a folder's path."""
    return location.rstrip("/").rpartition("/")[2]


def repo_link(repo: str | None) -> Markdown:
    """A repository with its address; only its name where that is no valid id."""
    if repo is None or not valid_repo_id(repo):
        return escape_markdown(repo or "")
    return link(repo, f"https://huggingface.co/{repo}")


def sees(record: VariantRecord) -> bool:
    """Whether the model answers about pictures."""
    return record.task == IMAGE_TEXT_TO_TEXT


def tokens_of(
    metrics: Metrics, quoted: Callable[[str], Markdown], *, with_digest: bool = False
) -> Markdown:
    """``4,088 tokens of A Text``; its digest tells it from another text of the same name."""
    count = "" if metrics.tokens is None else f"{metrics.tokens:,} "
    name = quoted(metrics.text or "") or "a text without a name"
    digest = metrics.text_sha256 if with_digest else None
    which = f", sha256 {quoted(digest[:8])}" if digest else ""
    return Markdown(f"{count}tokens of {name}{which}")
