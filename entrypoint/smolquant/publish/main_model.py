"""The rule for the main model, at the repository's root, when a local checkpoint is published.

Weights that the repository lacks are pushed, with everything that belongs to them. Equal weights stay as
they are; only a license that the repository lacks is added to them. Different weights are an error unless
the owner allows their replacement, because the variants would not belong to the weights beside them.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from smolquant.checkpoint.download import RemoteFile
from smolquant.checkpoint.files import is_license
from smolquant.checkpoint.folder import LocalFile
from smolquant.errors import InputError

_WEIGHTS = re.compile(r"(?:pytorch_)?model(?:-\d+-of-\d+)?\.(?:safetensors|bin)")
_INDEX = re.compile(r"(?:pytorch_)?model\.(?:safetensors|bin)\.index\.json")


@dataclass(frozen=True)
class MainModel:
    """A local checkpoint as the main model of the repository."""

    files: Mapping[str, LocalFile]
    """Config, tokenizer and weights by name; a name may contain a subfolder, which is kept."""
    replace: bool = False
    """Whether this model may replace different weights."""
    extras: Mapping[str, Path] = field(default_factory=dict)
    """Licenses, documents and other files that go to the root with it, by name."""
    readme: str | None = None
    """The owner's README, which becomes the root card of a repository that has none."""


@dataclass(frozen=True)
class MainModelChange:
    """The changes of the commit at the root of the repository."""

    add: Mapping[str, Path] = field(default_factory=dict)
    delete: tuple[str, ...] = ()


def main_model_change(main: MainModel, root_files: Mapping[str, RemoteFile]) -> MainModelChange:
    """What has to change at the root so that ``main`` is the main model; nothing if it is already.

    The extra files replace none that is there, unless the whole model is replaced.

    Raises:
        InputError: the root has different weights, and ``main`` may not replace them.
    """
    remote = main_weights(root_files)
    local = main_weights(main.files)
    push = {name: file.path for name, file in main.files.items()}
    missing = {name: path for name, path in main.extras.items() if name not in root_files}
    if not remote:
        return MainModelChange(add=push | missing)
    # A repository may hold the same model in a second format; that one is not compared.
    formats = {Path(name).suffix for name in local}
    compared = {name for name in remote if Path(name).suffix in formats}
    if compared == set(local) and all(_equal(main.files[n], root_files[n]) for n in local):
        return MainModelChange(add={n: path for n, path in missing.items() if is_license(n)})
    if not main.replace:
        different = sorted(compared ^ set(local)) or sorted(
            name for name in local if not _equal(main.files[name], root_files[name])
        )
        raise InputError(
            f"The repository has a main model with other weights ({', '.join(different[:3])}).",
            hint="Add --replace-main if this checkpoint is its successor, or name another "
            "repository.",
        )
    push |= main.extras
    old = [name for name in root_files if _WEIGHTS.fullmatch(name) or _INDEX.fullmatch(name)]
    return MainModelChange(add=push, delete=tuple(sorted(set(old) - set(push))))


def check_same_weights(
    source_weights: Mapping[str, str], root_files: Mapping[str, RemoteFile]
) -> None:
    """Make sure that variants of a repository's own model belong to the weights that are at its root now.

    Args:
        source_weights: name -> sha256 for the weights that the variants are made from.

    Raises:
        InputError: the weights at the root have changed.
    """
    for name, digest in source_weights.items():
        there = root_files.get(name)
        if there is None or (there.sha256 is not None and there.sha256 != digest):
            raise InputError(
                f"The repository's main model is not the one that was read: {name} differs.",
                hint="Run again on the weights that are there now, or publish the variants of another "
                "revision into another repository.",
            )


def main_weights(names: Iterable[str]) -> list[str]:
    """The files at a root that are weights which transformers loads, without indexes, sorted."""
    return sorted(name for name in names if _WEIGHTS.fullmatch(name))


def _equal(local: LocalFile, remote: RemoteFile) -> bool:
    if local.size != remote.size:
        return False
    if remote.sha256 is not None:
        return local.sha256 == remote.sha256
    from huggingface_hub.utils.sha import git_hash

    return (
        git_hash(local.path.read_bytes()) == remote.git_sha1
    )  # git itself stores only small files
