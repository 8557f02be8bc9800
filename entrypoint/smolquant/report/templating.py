"""The Jinja environment of cards and summaries: what a template prints is escaped markdown."""

import json
from functools import cache
from typing import TYPE_CHECKING, Any

from smolquant.text import Markdown, code_span, escape_markdown, human_size, link, percent

if TYPE_CHECKING:
    from jinja2 import Environment


@cache
def environment(package: str) -> "Environment":
    """The templates in ``package``'s folder ``templates``; what is missing there raises an error.

    Text is escaped when it is printed, unless it is :class:`~smolquant.text.Markdown`. Filters: ``code``,
    ``link`` and ``md`` (markdown as it stands); ``percent``, ``size`` and ``json`` for values.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(
        loader=PackageLoader(package),
        autoescape=False,  # noqa: S701  # this is markdown: _finalize escapes
        finalize=_finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters["code"] = code_span
    made.filters["json"] = json.dumps
    made.filters["link"] = link
    made.filters["md"] = Markdown
    made.filters["percent"] = percent
    made.filters["size"] = human_size
    return made


def _finalize(value: Any) -> Any:
    return escape_markdown(value) if type(value) is str else value
