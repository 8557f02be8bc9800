"""Which variants a folder or a repository has, for whoever asks for one that is not there."""

from collections.abc import Collection, Sequence
from pathlib import Path

from smolquant.errors import InputError
from smolquant.names import is_repo_id
from smolquant.places import is_folder, nearby_folders
from smolquant.record import FILE_NAME
from smolquant.schemes import BY_VARIANT
from smolquant.text import Markdown, did_you_mean, listed, one_of

MAKE_THEM = "Make variants with `smolquant quantize`."
_HOW_TO_LOAD_A_MODEL = (
    "The model in it, if `save_pretrained` wrote a variant there, is loaded by `from_pretrained` after "
    "`import smolquant.torchao`. "
)


def variants_in(folder: Path) -> list[str]:
    """The variants in a folder, in the order of the schemes."""
    return [name for name in BY_VARIANT if (folder / name / FILE_NAME).is_file()]


def variants_among(paths: Collection[str]) -> list[str]:
    """The variants of a repository that has files at these paths, in the order of the schemes."""
    return [name for name in BY_VARIANT if f"{name}/{FILE_NAME}" in paths]


def require_place(place: str) -> None:
    """Refuse what is neither a folder nor the id of a repository.

    Raises:
        InputError: naming folders with names like it.
    """
    if is_folder(place) or is_repo_id(place):
        return
    repo, _, last = place.rpartition("/")
    if is_repo_id(repo) and last in BY_VARIANT:
        raise InputError(
            f"{place} is neither a folder that is there nor a Hub id, which has no part for a variant.",
            hint=f"Name {repo}, and {last} as the variant.",
        )
    raise InputError(
        f"{place} is neither a folder that is there nor a Hub id.",
        hint=f"{one_of(nearby_folders(place))}Give a folder of variants, or a Hub id such as "
        "`user/model`.",
    )


def require_variants(place: str, there: Sequence[str]) -> None:
    """Refuse a folder or a repository without any variant.

    Args:
        there: the variants that it has.

    Raises:
        InputError: telling what was looked for.
    """
    if not there and (Path(place) / FILE_NAME).is_file():
        raise InputError(f"{place} is a variant itself.", hint=_where_it_lies(place))
    if not there:
        folders = "/, ".join(BY_VARIANT)
        raise InputError(
            f"{place} has no variants: no {folders}/ with a {FILE_NAME}.", hint=MAKE_THEM
        )


def missing_variant(place: str, variant: str, there: Sequence[str]) -> InputError:
    """The error for a variant that ``place`` has not.

    Args:
        there: the variants that it has.
    """
    if (Path(place) / FILE_NAME).is_file():
        return InputError(
            f"{place} is a variant itself, and has no {variant} in it.",
            hint=f"{_where_it_lies(place)[:-1]}, and {Path(place).name} as the variant.",
        )
    is_known = variant in BY_VARIANT
    what = f"{place} has no {variant}." if is_known else f"{variant!r} is not a variant."
    if not there:
        hint = _HOW_TO_LOAD_A_MODEL if (Path(place) / "config.json").is_file() else ""
        return InputError(
            f"{what} There is no variant at all in {place}.", hint=f"{hint}{MAKE_THEM}"
        )
    has = listed([Markdown(name) for name in there])
    meant = "" if is_known else did_you_mean(variant, there)
    return InputError(
        f"{what} What {place} has: {has}.",
        hint=f"{meant}Choose one of these, or make more with `smolquant quantize`.",
    )


def _where_it_lies(place: str) -> str:
    return f"Name the folder that it lies in, {Path(place).absolute().parent}."
