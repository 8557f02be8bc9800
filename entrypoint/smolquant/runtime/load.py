"""``smolquant.load``: a published variant, ready to generate on the machine at hand."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolquant.errors import InputError, MachineError
from smolquant.schemes import BY_VARIANT, Scheme

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load(
    repo_or_folder: str | Path,
    variant: str = "int4",
    device: str | None = None,
    revision: str | None = None,
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load a variant and its tokenizer, with this machine's kernel for it.

    Args:
        repo_or_folder: a Hub id, or a folder with the same layout (``FOLDER/int4/``).
        variant: the subfolder's name, such as ``int4`` or ``int8``.
        device: ``cpu``, ``cuda`` or any device that transformers' ``device_map`` takes; by default
            CUDA where there is one, else the CPU.
        revision: branch, tag or sha on the Hub.

    Raises:
        InputError: no such variant is known, or the folder has none.
        MachineError: the device has no kernels for it.
    """
    from smolquant.runtime.kernels import has_kernels

    scheme = _scheme_of(repo_or_folder, variant)
    device = device or default_device()
    if not has_kernels(scheme, device):
        assert scheme.cuda_capability is not None
        raise MachineError(
            f"{variant} needs a GPU of compute capability "
            f"{'.'.join(map(str, scheme.cuda_capability))} or more, and {device} is not one here.",
            hint="Load it on a machine with such a GPU, or load another variant of the model.",
        )
    return _loaded(repo_or_folder, scheme, device, revision)


def load_for_checking(
    folder: Path, variant: str
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load as :func:`load` does, but with plain weights where this machine lacks the variant's kernels."""
    return _loaded(folder, _scheme_of(folder, variant), default_device(), None)


def default_device() -> str:
    """CUDA where there is one, else the CPU."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _scheme_of(repo_or_folder: str | Path, variant: str) -> Scheme:
    if variant not in BY_VARIANT:
        raise InputError(
            f"{variant!r} is not a variant.", hint=f"Choose one of {', '.join(BY_VARIANT)}."
        )
    if Path(repo_or_folder).is_dir() and not (Path(repo_or_folder) / variant).is_dir():
        raise InputError(
            f"{repo_or_folder} has no {variant}/ in it.",
            hint="Name the folder that holds the variants, not the variant itself.",
        )
    return BY_VARIANT[variant]


def _loaded(
    repo_or_folder: str | Path, scheme: Scheme, device: str, revision: str | None
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from smolquant.runtime.kernels import preparation

    where: dict[str, Any] = {"subfolder": scheme.variant, "revision": revision}
    model = AutoModelForCausalLM.from_pretrained(repo_or_folder, device_map=device, **where)
    tokenizer = AutoTokenizer.from_pretrained(repo_or_folder, **where)
    preparation(scheme, device)(model)
    return model, tokenizer
