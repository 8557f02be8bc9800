"""What there is to try: the variants of a folder or a repository, and which of them to begin with."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolquant.checkpoint.download import fetch, list_files
from smolquant.checkpoint.files import is_code
from smolquant.errors import InputError
from smolquant.hub import Hub, hub_errors, naming_folders_like
from smolquant.record import FILE_NAME, InvalidRecord, VariantRecord
from smolquant.runtime.contents import (
    missing_variant,
    require_place,
    require_variants,
    variants_among,
    variants_in,
)
from smolquant.text import human_size
from smolquant.threads import use_allowed_threads

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LITTLE_LOSS = 10.0
"""Percent of perplexity; of variants that lost no more, the smallest is the best to try on a CPU."""

Write = Callable[[str], None]


@dataclass(frozen=True)
class Asked:
    """What a user asked to try."""

    repo_or_folder: str
    variant: str | None
    device: str
    """``auto``, ``cpu`` or ``cuda``."""
    revision: str | None
    trust_remote_code: bool


def opened(
    asked: Asked, hub: Hub, threads: int | None, notify: Write
) -> "tuple[PreTrainedModel, Any]":
    """The model to try, and its tokenizer or processor.

    Args:
        threads: the CPU's threads to compute with; by default as many as this process may use.
        notify: is told what is done meanwhile, in lines for people.

    Raises:
        InputError: there is no such place or variant, or it needs code of its own that is not trusted.
        HubError: the repository cannot be read.
        MachineError: there is no such device here, or it has no kernels for the variant.
    """
    place = find(
        asked.repo_or_folder, hub, asked.revision, notify, with_code=asked.trust_remote_code
    )
    if asked.variant is not None:
        require(place, asked.variant)  # a refusal waits for no library
    import torch

    from smolquant.machine import computing_device, require_cuda
    from smolquant.runtime.load import NeedsOwnCode, load

    if asked.device == "cuda":
        require_cuda()
    device = computing_device(asked.device)
    if threads is not None:
        torch.set_num_threads(threads)
    else:
        use_allowed_threads()
    variant = asked.variant or choose(place, device, notify)
    folder = place.folder(variant)
    notify(f"Loading {variant} of {place.name}")
    try:
        return load(folder, variant, device, trust_remote_code=asked.trust_remote_code)
    except NeedsOwnCode as error:
        raise InputError(
            error.message, hint="Read the code; if you trust it, add --trust-remote-code."
        ) from error


@dataclass(frozen=True)
class Place:
    """A folder of variants on this machine, or a repository at one commit."""

    name: str
    """As the user named it, and without the variant where that was named with it."""
    variants: list[str]
    folder: Callable[[str], Path]
    """Gives the folder in which a variant, and code of the model's own, are on this machine."""
    record: Callable[[str], VariantRecord | None]
    """Gives a variant's record; None where it cannot be read."""
    named: str | None = None
    """The variant whose own folder the user named."""


def find(
    repo_or_folder: str, hub: Hub, revision: str | None, notify: Write, *, with_code: bool
) -> Place:
    """The variants of a folder or a repository.

    Args:
        with_code: also fetch the code of the model's own.
        notify: is told a line for people when something is fetched.

    Raises:
        InputError: it is neither of the two, has no variants, or is a folder with a revision.
        HubError: the repository cannot be read.
    """
    require_place(repo_or_folder)
    folder = Path(repo_or_folder)
    if folder.is_dir() and revision is not None:
        raise InputError(
            f"--revision {revision} was given, but {repo_or_folder} is a folder and has no revisions.",
            hint="Leave --revision out, or name the repository.",
        )
    if folder.is_dir():
        place = _local(folder)
    else:
        place = _remote(repo_or_folder, hub, revision, notify, with_code=with_code)
    require_variants(repo_or_folder, place.variants)
    return place


def _local(folder: Path) -> Place:
    variants, named = variants_in(folder), None
    if not variants and (folder / FILE_NAME).is_file():  # the variant itself was named
        whole = folder.resolve()
        folder = folder.parent if folder.name == whole.name else whole.parent
        named = whole.name if whole.name in variants_in(folder) else None
        variants = variants_in(folder) if named else []

    def record(variant: str) -> VariantRecord | None:
        return _read(variant, folder / variant / FILE_NAME)

    return Place(str(folder), variants, lambda _: folder, record, named)


def _remote(repo: str, hub: Hub, revision: str | None, notify: Write, *, with_code: bool) -> Place:
    from huggingface_hub.constants import is_offline_mode

    doing = "reading the variants"
    with naming_folders_like(repo), hub_errors(repo, doing):
        if is_offline_mode():  # what was fetched before
            folder_here = Path(hub.api.snapshot_download(repo, revision=revision))
            return replace(_local(folder_here), name=repo)
        listing = list_files(hub, repo, revision)

    def fetched(wanted: Callable[[str], bool]) -> Path:
        files = {path: file for path, file in listing.files.items() if wanted(path)}
        return fetch(hub, repo, listing.commit, files, doing=doing)

    def record(variant: str) -> VariantRecord | None:
        path = f"{variant}/{FILE_NAME}"
        return _read(variant, fetched(lambda name: name == path) / path)

    def folder(variant: str) -> Path:
        size = sum(
            file.size for path, file in listing.files.items() if path.startswith(f"{variant}/")
        )
        notify(f"Fetching {variant} of {repo}, {human_size(size)}, unless it is here already")
        return fetched(lambda path: path.startswith(f"{variant}/") or (with_code and is_code(path)))

    return Place(repo, variants_among(listing.files), folder, record)


def _read(variant: str, path: Path) -> VariantRecord | None:
    try:
        return VariantRecord.in_folder(variant, path.read_bytes())
    except InvalidRecord:
        return None


def require(place: Place, variant: str) -> None:
    """Refuse a variant that is not there.

    Raises:
        InputError: telling which are.
    """
    if variant not in place.variants:
        raise missing_variant(place.name, variant, place.variants)


def choose(place: Place, device: str, notify: Write) -> str:
    """The best variant to begin with; ``notify`` is told why, where there are several."""
    if place.named is not None or len(place.variants) == 1:
        return place.named or place.variants[0]
    records = {name: record for name in place.variants if (record := place.record(name))}
    best, why = best_of(records, device) if records else (place.variants[0], "the first")
    others = ", ".join(name for name in place.variants if name != best)
    notify(f"Trying {best}, {why}; --variant chooses another: {others}")
    return best


def best_of(records: Mapping[str, VariantRecord], device: str) -> tuple[str, str]:
    """The variant to try first, and why.

    A CPU reads every weight for every token, so that the smallest is the fastest there, as long as it has
    lost little; a GPU has room for the one that is closest to its source.

    Args:
        records: at least one, by variant, in the order of the schemes.
        device: ``cpu``, or a GPU's name.
    """
    lost = {
        name: record.metrics.perplexity_increase_percent
        for name, record in records.items()
        if record.metrics and record.metrics.perplexity_increase_percent is not None
    }
    if device == "cpu":
        good = [name for name in records if lost.get(name, 0.0) <= LITTLE_LOSS]
        if good:
            return min(
                good, key=lambda name: records[name].size_bytes
            ), "the smallest, fast on a CPU"
    if lost:
        return min(lost, key=lambda name: lost[name]), "the closest to its source"
    return next(iter(records)), "which loses little by construction"
