"""The files of a checkpoint folder that are neither weights nor read with them, and travel all the same.

Only what is known to belong to a model travels: a folder may hold much that its owner never meant to
publish. A link that leads out of the folder is not followed.
"""

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from smolquant.checkpoint.files import (
    LARGEST_EXTRA,
    README,
    is_document,
    is_license,
    is_processor_config,
    pictures_shown,
)
from smolquant.checkpoint.links import leads_out


@dataclass(frozen=True)
class Extras:
    """What lies in a checkpoint folder beside config, tokenizer and weights."""

    readme: Path | None = None
    """The owner's README.md."""
    processor_configs: tuple[str, ...] = ()
    licenses: tuple[str, ...] = ()
    documents: tuple[str, ...] = ()
    """Other small files that belong to the model, and the pictures that its README shows."""
    refused: tuple[str, ...] = ()
    """Files that would travel if they were not links out of the folder, or too large."""
    left_behind: tuple[str, ...] = ()
    """Everything else at the top of the folder; the name of a folder ends with a slash."""

    @property
    def names(self) -> tuple[str, ...]:
        """The files that go to the root beside the main model; the README is not one of them."""
        return (*self.processor_configs, *self.licenses, *self.documents)


def find_extras(folder: Path, others: Collection[str]) -> Extras:
    """Sort what lies in ``folder``.

    Args:
        others: names of the files that are taken along for other reasons; they are in no group.
    """
    entries = {path.name: path for path in sorted(folder.iterdir()) if path.name not in others}
    files = [name for name, path in entries.items() if path.is_file()]
    refused: list[str] = []

    def allowed(names: Collection[str]) -> tuple[str, ...]:
        fit = {name for name in names if _may_travel(folder, folder / name)}
        refused.extend(name for name in names if name not in fit)
        return tuple(name for name in names if name in fit)

    readme = folder / README if allowed([name for name in files if name == README]) else None
    shown = pictures_shown(readme.read_text("utf-8", errors="replace")) if readme else []
    processor_configs = allowed([name for name in files if is_processor_config(name)])
    licenses = allowed([name for name in files if is_license(name)])
    documents = allowed(
        [
            *(n for n in files if is_document(n) and n not in (README, *licenses)),
            # os.path, since pathlib raises where a name is too long for any file.
            *(n for n in shown if n not in others and os.path.isfile(folder / n)),  # noqa: PTH113
        ]
    )
    travelling = {README, *processor_configs, *licenses, *refused}
    travelling |= {name.partition("/")[0] for name in (*documents, *others)}
    left_behind = tuple(
        f"{name}/" if path.is_dir() else name
        for name, path in entries.items()
        if name not in travelling
    )
    return Extras(readme, processor_configs, licenses, documents, tuple(refused), left_behind)


def _may_travel(folder: Path, path: Path) -> bool:
    """Whether a file is small, and lies where the folder's files may."""
    return not leads_out(folder, path) and path.stat().st_size <= LARGEST_EXTRA
