"""``smolquant check`` tests whether published variants work with the libraries that are installed now.

Each variant's files are compared with its quantization.json, then the variant is loaded as a user would
load it and predicts a token. The command changes nothing.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smolquant.checkpoint.download import fetch_some
from smolquant.checkpoint.files import is_intact
from smolquant.errors import CheckpointError, InputError
from smolquant.hub import Hub
from smolquant.record import FILE_NAME, InvalidRecord, VariantRecord
from smolquant.runtime.contents import require_place, require_variants, variants_in
from smolquant.schemes import BY_VARIANT


@dataclass(frozen=True)
class Checked:
    """The result of checking one variant."""

    variant: str
    problem: str
    """What is wrong; empty when the variant works."""
    made_with: Mapping[str, str]
    """The versions that the record names."""


def check(
    repo_or_folder: str,
    hub: Hub,
    revision: str | None = None,
    *,
    trust_remote_code: bool = False,
) -> Iterator[Checked]:
    """Check every variant of a Hub repository or a folder with the same layout, one after the other.

    Args:
        trust_remote_code: run the code that the repository brings along for its model.

    Raises:
        InputError: there is no variant, or one needs code of its own that is not trusted.
        HubError: the repository cannot be read.
    """
    require_place(repo_or_folder)
    folder = Path(repo_or_folder)
    if not folder.is_dir():
        folder = fetch_some(
            hub,
            repo_or_folder,
            revision,
            lambda path: _is_of_a_variant(path, with_code=trust_remote_code),
            doing="downloading the variants",
        )
    variants = variants_in(folder)
    require_variants(repo_or_folder, variants)
    for variant in variants:
        made_with: Mapping[str, str] = {}
        try:
            record = VariantRecord.in_folder(variant, (folder / variant / FILE_NAME).read_bytes())
            made_with = record.versions
            _check_files(folder / variant, record)
            _check_loads(folder, record, trust_remote_code)
        except (InvalidRecord, CheckpointError) as problem:
            yield Checked(variant, str(problem), made_with)
        else:
            yield Checked(variant, "", made_with)


def _is_of_a_variant(path: str, *, with_code: bool) -> bool:
    """Whether a file is one of a variant's or, if it may run, code at the root, where a model's own is."""
    return path.partition("/")[0] in BY_VARIANT or (with_code and path.endswith(".py"))


def _check_files(folder: Path, record: VariantRecord) -> None:
    for name, expected in record.files.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts or not path.is_file():
            raise CheckpointError(f"{name} is missing.")
        if not is_intact(path, expected):
            raise CheckpointError(
                f"{name} is not the file that was made: its size or sha256 differs."
            )


def _check_loads(folder: Path, record: VariantRecord, trust_remote_code: bool) -> None:
    """Load the variant and look at the logits of one prompt.

    A machine without its kernels says nothing of the variant: there it is computed with plain weights.
    Nor does code that may not run.
    """
    import torch

    from smolquant.runtime.load import NeedsOwnCode, load_for_checking

    variant, problems = record.variant, list[str]()
    try:
        model, tokenizer = load_for_checking(
            folder,
            variant,
            report=lambda info: problems.extend(_misfits(info, record)),
            trust_remote_code=trust_remote_code,
        )
        prompt = tokenizer(text="The", return_tensors="pt").to(model.device)
        with torch.no_grad():
            logits = model(**prompt).logits
    except NeedsOwnCode as error:
        raise InputError(
            f"{variant} is not checked: it needs code of its own, which its repository brings along, and "
            "running that is off.",
            hint="Read the code; if you trust it, add --trust-remote-code.",
        ) from error
    except Exception as error:  # whatever the installed libraries raise is the answer
        if problems:
            raise CheckpointError(problems[0]) from error
        raise CheckpointError(f"It does not run: {type(error).__name__}: {error}") from error
    if problems:
        raise CheckpointError(problems[0])
    if not bool(torch.isfinite(logits).all()):
        raise CheckpointError("Its logits are not finite.")


def _misfits(info: Mapping[str, Any], record: VariantRecord) -> Iterator[str]:
    """What transformers has filled with random numbers, or had no place for.

    Args:
        info: transformers' own, of missing and unexpected tensors.
        record: names those tensors that a variant carries along for other libraries.
    """
    missing = sorted(info["missing_keys"])
    if missing:
        yield (
            f"It lacks {len(missing)} of the model's weights, {missing[0]!r} among them, and the installed "
            "libraries fill them with random numbers."
        )
    unexpected = sorted(set(info["unexpected_keys"]) - record.tensors.keys())
    if unexpected:
        yield (
            f"It holds {len(unexpected)} tensors that the installed libraries have no place for, "
            f"{unexpected[0]!r} among them."
        )
