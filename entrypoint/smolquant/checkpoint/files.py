"""Which files of a folder or repository are the model, and whether a file is the one that was recorded.

A model's files are its config, tokenizer and weights, and their digests are the source's identity.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from smolquant.errors import CheckpointError
from smolquant.record import FileRecord

CONFIG = "config.json"

_HASHED_AT_ONCE = 1 << 23
"""Bytes. Every read and every update waits for Python's lock, which takes milliseconds while libraries are
imported: with the standard library's 256 KB, hashing comes to a halt meanwhile."""

_AUXILIARY_FILES = re.compile(
    r"config\.json|generation_config\.json|tokenizer[\w.-]*|vocab[\w.-]*|merges\.txt"
    r"|special_tokens_map\.json|added_tokens\.json|chat_template[\w.-]*"
    r"|[\w.-]+\.model|[\w.-]+\.spm|[\w.-]+\.tiktoken|tekken\.json|bpe\.codes|dict\.txt"
    r"|preprocessor_config\.json|video_preprocessor_config\.json"
    r"|processor_config\.json|normalizer\.json|additional_chat_templates/[\w.-]+\.jinja"
)
_CODE = re.compile(r"[\w-]+\.py")

_WEIGHT_LAYOUTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""The files that transformers looks for, in its order."""


def is_auxiliary(name: str) -> bool:
    """Whether a file travels with the weights into every variant: config, tokenizer, template."""
    return _AUXILIARY_FILES.fullmatch(name) is not None


def is_code(name: str) -> bool:
    """Whether a file is model code at the root, which only --trust-remote-code takes along."""
    return _CODE.fullmatch(name) is not None


def weight_layout(names: Iterable[str]) -> str:
    """The single weight file, or the index of shards, that transformers would load.

    Raises:
        CheckpointError: there is none; the message names the weights of other formats.
    """
    present = set(names)
    for layout in _WEIGHT_LAYOUTS:
        if layout in present:
            return layout
    others = sorted(
        name for name in present if name.endswith((".gguf", ".bin", ".pt", ".safetensors"))
    )
    instead = f" The checkpoint has {', '.join(others[:5])}." if others else ""
    raise CheckpointError(
        f"There are no weights: none of {', '.join(_WEIGHT_LAYOUTS)} is there.{instead}",
        hint="Save the model with `save_pretrained`, or name the folder that holds its weights.",
    )


def shard_names(index_name: str, index: bytes) -> list[str]:
    """The shards that an index names, sorted.

    Raises:
        CheckpointError: the index cannot be read, or names something outside its folder.
    """
    try:
        weight_map = json.loads(index)["weight_map"]
        shards = sorted({str(shard) for shard in weight_map.values()})
        if not shards:
            raise ValueError("it names no shard")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index_name} is not a readable index of shards: {error!r}.",
            hint="Save the model again with `save_pretrained`.",
        ) from error
    for shard in shards:
        if not re.fullmatch(r"[\w][\w.-]*", shard):
            raise CheckpointError(
                f"{index_name} names {shard!r}, which is not a file beside it.",
                hint="Save the model again with `save_pretrained`.",
            )
    return shards


def identity(digests: Mapping[str, str]) -> str:
    """``sha256:<hex>`` over the sha256 of each file, by name."""
    lines = "".join(f"{name} {digest}\n" for name, digest in sorted(digests.items()))
    return f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"


def sha256_of(path: Path) -> str:
    """The sha256 of a file's content, hexadecimal."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_HASHED_AT_ONCE))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def file_names(folder: Path, *patterns: str) -> list[str]:
    """The files below ``folder`` that match a glob pattern: sorted paths relative to it, with slashes."""
    return sorted(
        path.relative_to(folder).as_posix()
        for pattern in patterns
        for path in folder.glob(pattern)
        if path.is_file()
    )


def has_size(path: Path, expected: FileRecord) -> bool:
    """Whether ``path`` is a file of the size that its record states."""
    return path.is_file() and path.stat().st_size == expected.size


def is_intact(path: Path, expected: FileRecord) -> bool:
    """Whether ``path`` is, to the byte, the file that its record describes."""
    return has_size(path, expected) and sha256_of(path) == expected.sha256
