"""``smolquant.load``: a published variant, ready to generate on the machine at hand."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolquant.errors import InputError
from smolquant.schemes import BY_VARIANT

if TYPE_CHECKING:
    from collections.abc import Callable

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
        variant: ``int4``, ``int8`` or ``int8_dynamic``.
        device: ``cpu``, ``cuda`` or any device that transformers' ``device_map`` takes; by default
            CUDA where there is one, else the CPU.
        revision: branch, tag or sha on the Hub.

    Raises:
        InputError: no such variant is known, or the folder has none.
    """
    import torch
    from transformers import AutoTokenizer

    if variant not in BY_VARIANT:
        raise InputError(
            f"{variant!r} is not a variant.", hint=f"Choose one of {', '.join(BY_VARIANT)}."
        )
    if Path(repo_or_folder).is_dir() and not (Path(repo_or_folder) / variant).is_dir():
        raise InputError(
            f"{repo_or_folder} has no {variant}/ in it.",
            hint="Name the folder that holds the variants, not the variant itself.",
        )
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    where: dict[str, Any] = {"subfolder": variant, "revision": revision}
    model = load_model(repo_or_folder, variant, device_map=device, **where)
    tokenizer = AutoTokenizer.from_pretrained(repo_or_folder, **where)
    return model, tokenizer


def load_model(
    repo_or_folder: str | Path,
    variant: str,
    *,
    prepare: "Callable[[PreTrainedModel], None]" = lambda model: None,
    **options: Any,
) -> "PreTrainedModel":
    """Load a variant as stock transformers does, with this machine's kernel for it.

    Args:
        repo_or_folder: what ``from_pretrained`` takes.
        variant: what it holds, which decides the kernel.
        prepare: given the model when its weights are as they are stored, before they are packed.
        options: what ``from_pretrained`` takes.
    """
    from transformers import AutoModelForCausalLM

    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(repo_or_folder, **options)
    prepare(model)
    if variant == "int4":
        from smolquant.runtime.kernels import pack_model

        pack_model(model)
    return model
