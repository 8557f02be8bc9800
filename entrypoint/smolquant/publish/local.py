"""A folder of variants on this machine: written, read back, and verified. It knows nothing of the Hub.

The layout is that of a repository, so that a folder that was saved can be loaded, checked and uploaded as
it is.
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from smolquant.checkpoint.files import README, has_size, is_code, is_intact, write_text
from smolquant.checkpoint.source import Source
from smolquant.errors import InputError
from smolquant.places import write_whole
from smolquant.publish.cards import root_card, variant_card, without_our_part
from smolquant.publish.front_matter import declared_license, own_readme, readme_text
from smolquant.publish.section import identity_told
from smolquant.publish.words import name_of
from smolquant.record import FILE_NAME, InvalidRecord, VariantRecord
from smolquant.report import overview
from smolquant.report.run_report import VariantResult
from smolquant.report.snippets import folder_location


def local_records(output_dir: Path) -> dict[str, VariantRecord]:
    """The variants in ``output_dir`` that have all their files, as far as sizes tell, by name."""
    records = {}
    for path in sorted(output_dir.glob(f"*/{FILE_NAME}")):
        try:
            found = VariantRecord.in_folder(path.parent.name, path.read_bytes())
        except InvalidRecord:
            continue
        if _is_complete(path.parent, found):
            records[found.variant] = found
    return records


def saved_records(output_dir: Path) -> dict[str, VariantRecord]:
    """Those of :func:`local_records` that a run has saved, with a card, and did not only make."""
    return {
        variant: record
        for variant, record in local_records(output_dir).items()
        if (output_dir / variant / README).is_file()
    }


def is_whole(folder: Path, made: VariantRecord) -> bool:
    """Whether ``folder`` has every file of the variant as it was made, to the byte."""
    return _is_complete(folder, made) and all(
        is_intact(folder / name, file) for name, file in made.files.items()
    )


def check_place(output_dir: Path, source: Source) -> None:
    """Make sure that completing a folder of variants replaces nothing that somebody else put there.

    Raises:
        InputError: naming the file.
    """
    _check_readme(output_dir / README)
    for name in _code(source):
        place = output_dir / name
        if not os.path.lexists(place):
            continue
        ours = place.is_file() and not place.is_symlink()
        if not ours or place.read_bytes() != (source.folder / name).read_bytes():
            raise InputError(
                f"{place} exists, and is not the code that the model brings along under that name.",
                hint="Move it away (delete it if an earlier run put it there), or choose another "
                "--output-dir.",
            )


def save(
    output_dir: Path,
    source: Source,
    results: Mapping[str, VariantResult],
    repo: str | None = None,
) -> None:
    """Complete a folder of variants that stay on this machine: cards, and the model's own code.

    Args:
        results: the variants that this run has put there, by name.
        repo: the Hub id that the owner gave; the cards are titled by it, or else by the source.

    Raises:
        InputError: the README.md that is there cannot be edited, or a file that is another's would be
            replaced.
    """
    check_place(output_dir, source)
    for name in _code(source):
        # transformers looks for a model's own code at the root, never in a subfolder.
        if not (output_dir / name).exists():
            write_whole(output_dir / name, (source.folder / name).read_bytes())
    readme = own_readme(source, needed=not (output_dir / README).is_file())
    write_cards(
        output_dir,
        {name: one.record for name, one in results.items()},
        source_identity=source.identity,
        base_model=source.repo,
        license_entries=source.license or declared_license(readme),
        name=name_of(repo or source.repo or source.folder.absolute().as_posix()),
        source_readme=readme,
        tracking_urls={name: one.tracking_url for name, one in results.items()},
    )


def write_cards(
    output_dir: Path,
    records: Mapping[str, VariantRecord],
    *,
    source_identity: str | None,
    base_model: str | None,
    license_entries: Mapping[str, str],
    tracking_urls: Mapping[str, str | None],
    name: str | None = None,
    source_readme: str | None = None,
) -> None:
    """Write the cards of variants that stay on this machine, and the root card with its picture.

    Variants that earlier runs saved in ``output_dir`` are in the root card too.

    Args:
        records: the variants whose own cards are written, by name.
        source_identity: tells which variants were made from the source as it is now, if that is known.
        base_model: the source's Hub id; None for a folder.
        license_entries: the source's, for the front matter.
        tracking_urls: the page of each variant's run in Trackio.
        name: what the model is called; None for the name of ``output_dir``.
        source_readme: the source's README, which the root card is made from where there is none yet.

    Raises:
        InputError: the README.md that is there cannot be edited, or is a link.
    """
    location = folder_location(output_dir)
    for variant, made in records.items():
        card = variant_card(
            made,
            location=location,
            base_model=base_model,
            terms=license_entries,
            name=name,
            tracking_url=tracking_urls.get(variant),
        )
        _write(output_dir / variant / README, card)
    everything = saved_records(output_dir) | dict(records)
    readme = _own_card(output_dir) or source_readme
    _write_root(output_dir, readme, everything, source_identity=source_identity, name=name)


def remove_saved(output_dir: Path, variant: str) -> None:
    """Take a variant and its part of the card out of a folder of variants; the rest stays.

    The card is first: what is left by an interruption is a folder that no card names, to be removed again.

    Raises:
        InputError: the README.md that is there cannot be edited, or it or the variant's folder is a link.
    """
    folder = output_dir / variant
    if folder.is_symlink():
        raise InputError(
            f"{folder} is a link, and what it points to is not {output_dir}'s.",
            hint="Remove the link itself.",
        )
    readme, left = _own_card(output_dir), saved_records(output_dir)
    left.pop(variant, None)
    if left:
        identity = identity_told(readme or "", left)
        _write_root(output_dir, readme, left, source_identity=identity)
    else:
        if readme is not None:
            _write(output_dir / README, without_our_part(readme, has_main_model=False))
        if _may_draw(output_dir / overview.FILE_NAME):
            (output_dir / overview.FILE_NAME).unlink(missing_ok=True)
    shutil.rmtree(folder)


def _own_card(output_dir: Path) -> str | None:
    """The root card that is there; None where there is none."""
    readme = output_dir / README
    return readme_text(readme.read_bytes(), output_dir.as_posix()) if readme.is_file() else None


def _write_root(
    output_dir: Path,
    readme: str | None,
    records: Mapping[str, VariantRecord],
    *,
    source_identity: str | None,
    name: str | None = None,
) -> None:
    """Write the root card, made from ``readme``, and the picture of all variants."""
    picture = None
    if _may_draw(output_dir / overview.FILE_NAME):
        picture = overview.overview(records, source_identity)
    if picture is not None:
        write_text(output_dir / overview.FILE_NAME, picture)
    card = root_card(
        readme,
        records,
        location=folder_location(output_dir),
        has_main_model=False,
        source_identity=source_identity,
        name=name,
        has_picture=picture is not None,
    )
    _write(output_dir / README, card)


def _is_complete(folder: Path, made: VariantRecord) -> bool:
    """Whether all files are there with the sizes that they were made with."""
    return all(has_size(folder / name, file) for name, file in made.files.items())


def _code(source: Source) -> Iterator[str]:
    """The names of the model's own code, which travels if it is trusted."""
    return filter(is_code, source.auxiliary_files)


def _may_draw(path: Path) -> bool:
    """Whether the picture of all variants may be written there: nobody else's file is."""
    if not os.path.lexists(path):
        return True
    return path.is_file() and not path.is_symlink() and overview.is_ours(path.read_bytes())


def _write(path: Path, text: str) -> None:
    _check_readme(path)
    write_text(path, text)


def _check_readme(path: Path) -> None:
    """Refuse a place for a card in which something else than a file lies."""
    if path.is_symlink():
        raise InputError(
            f"{path} is a link, and writing it would change a file elsewhere.",
            hint="Remove the link, or choose another --output-dir.",
        )
    if path.exists() and not path.is_file():
        raise InputError(
            f"{path} is not a file, and the card is written there.",
            hint="Move it away, or choose another --output-dir.",
        )
