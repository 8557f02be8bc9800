"""The names by which a model's files are known, and whether a file is the one that was recorded.

A model's files are its config, tokenizer and weights, and their digests are the source's identity. Other
files travel with them: configs of processors, licenses, documents and the pictures in the README.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from smolquant.errors import CheckpointError
from smolquant.places import write_whole
from smolquant.record import FILE_NAME, FileRecord
from smolquant.secrecy import refuse_secret
from smolquant.text import one_of

CONFIG = "config.json"
README = "README.md"

LARGEST_EXTRA = 10_000_000
"""Bytes; a larger file that no library reads stays behind."""

_HASHED_AT_ONCE = 1 << 23
"""Bytes. Every read and every update waits for Python's lock, which takes milliseconds while libraries are
imported: with the standard library's 256 KB, hashing comes to a halt meanwhile."""

_AUXILIARY_FILES = re.compile(
    r"config\.json|generation_config\.json|tokenizer[\w.-]*|vocab[\w.-]*|merges\.txt"
    r"|special_tokens_map\.json|added_tokens\.json|chat_template[\w.-]*"
    r"|[\w.-]+\.model|[\w.-]+\.spm|[\w.-]+\.tiktoken|tekken\.json|bpe\.codes|dict\.txt"
    r"|preprocessor_config\.json"
    r"|processor_config\.json|normalizer\.json|additional_chat_templates/[\w.-]+\.jinja"
)
_CODE = re.compile(r"[\w-]+\.py")
_PROCESSOR_CONFIG = re.compile(
    r"[\w-]*(?:processor|feature_extractor|audio_tokenizer)_config\.json"
)
_LICENSE = re.compile(
    r"(?:[^/]*[ _.-])?"
    r"(?:(?:un)?licen[sc]es?|notices?|copying|copyright|patents|terms[ _-]of[ _-](?:use|service)"
    r"|us(?:e|age)[ _-]policy)"
    r"(?:[ _.-][^/]*)?",
    re.IGNORECASE,
)
_TEXT_SUFFIXES = ("", ".txt", ".md", ".rst", ".pdf", ".html", ".htm", ".doc", ".docx")
_DOCUMENT = re.compile(
    r"(?:README|MODEL_CARD|CITATION|SYSTEM_PROMPT)[\w.-]*|[\w-]+\.jinja|mergekit_config\.ya?ml"
    r"|params\.json|configuration\.json"
)
_PICTURE = re.compile(r"\.(?:png|jpe?g|gif|svg|webp)$", re.IGNORECASE)
_SHOWN = re.compile(
    # No try goes beyond where the next one begins, or a line of openings would take minutes.
    r"""!\[(?:(?!!\[)[^\]\n])*\]\(\s*<?([^)\s>]+)|<img\s[^<>]*?src\s*=\s*["']([^"'\n]+)"""
)

_WEIGHT_LAYOUTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""The files that transformers looks for, in its order."""

_MERGED = "merged"
"""The folder in an example."""

ADAPTER_CONFIG = "adapter_config.json"
"""With it in a folder, transformers loads the adapter beside it."""
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")


def is_auxiliary(name: str) -> bool:
    """Whether a file travels with the weights into every variant: config, tokenizer, template."""
    return _AUXILIARY_FILES.fullmatch(name) is not None


def is_weights(name: str) -> bool:
    """Whether a file holds weights, by its name."""
    return name.endswith((".safetensors", ".bin"))


def is_code(name: str) -> bool:
    """Whether a file is model code at the root, which only --trust-remote-code takes along."""
    return _CODE.fullmatch(name) is not None


def is_processor_config(name: str) -> bool:
    """Whether a file configures a processor and is no part of the identity, as those in `is_auxiliary` are.

    It travels into every variant all the same. Identities that records hold were made without it.
    """
    return _PROCESSOR_CONFIG.fullmatch(name) is not None and not is_auxiliary(name)


def is_read_by_libraries(name: str) -> bool:
    """Whether what loads a variant reads a file of that name by itself; vLLM reads all safetensors."""
    is_known = is_auxiliary(name) or is_processor_config(name) or is_code(name)
    is_of_weights = name.endswith((".safetensors", ".safetensors.index.json")) and "/" not in name
    return is_known or is_of_weights or name == ADAPTER_CONFIG


def is_license(name: str) -> bool:
    """Whether a file at the root states the terms of use: LICENSE, NOTICE, USE_POLICY and the like."""
    suffix = Path(name).suffix.lower()
    is_text = suffix in _TEXT_SUFFIXES or suffix[1:].isdigit()  # LICENSE-2.0 is a text
    return is_text and name.isprintable() and _LICENSE.fullmatch(name) is not None


def is_document(name: str) -> bool:
    """Whether a small file at the root belongs to the model though no library reads it."""
    return _DOCUMENT.fullmatch(name) is not None


def pictures_shown(readme: str) -> list[str]:
    """The relative paths of the pictures that a README shows, sorted; none leads out of its folder."""
    found = set()
    for match in _SHOWN.finditer(readme):
        path = PurePosixPath(unquote(match[1] or match[2]))
        inside = not path.is_absolute() and not any(part.startswith(".") for part in path.parts)
        if inside and ":" not in path.as_posix() and _PICTURE.search(path.name):
            found.add(path.as_posix())
    return sorted(found)


def weight_layout(names: Iterable[str], place: str, *, below: Sequence[str] = ()) -> str:
    """The single weight file, or the index of shards, that transformers would load.

    Args:
        place: the folder or the Hub id, for errors.
        below: folders in it that hold checkpoints.

    Raises:
        CheckpointError: there is none; the message names the weights of other formats.
    """
    present = set(names)
    for layout in _WEIGHT_LAYOUTS:
        if layout in present:
            return layout
    if {ADAPTER_CONFIG, *_ADAPTERS} & present:
        raise CheckpointError(
            "The checkpoint is an adapter (LoRA), which changes the weights of another model and holds "
            "none of its own.",
            hint="Merge it into its base model with these lines, copy the tokenizer into the folder "
            f"{_MERGED} that they make, and quantize it:",
            code="from peft import AutoPeftModelForCausalLM\n"
            f"model = AutoPeftModelForCausalLM.from_pretrained({json.dumps(place)})\n"
            f"model.merge_and_unload().save_pretrained({json.dumps(_MERGED)})",
        )
    if any(name.endswith(f"/{FILE_NAME}") for name in present):
        raise CheckpointError(
            f"{place} has variants, which are quantized already, and no main model beside them.",
            hint="Name the model that they were made from; their cards and quantization.json tell which.",
        )
    if gguf := sorted(name for name in present if name.endswith(".gguf")):
        raise CheckpointError(
            f"There are no weights for transformers, but GGUF files ({', '.join(gguf[:3])}), llama.cpp's "
            "own format, whose weights are mostly quantized already.",
            hint="Start from the checkpoint that they were made from, as `save_pretrained` wrote it.",
        )
    others = sorted(name for name in present if name.endswith((".bin", ".pt", ".safetensors")))
    instead = f" The checkpoint has {', '.join(others[:5])}." if others else ""
    raise CheckpointError(
        f"There are no weights: none of {', '.join(_WEIGHT_LAYOUTS)} is there.{instead}",
        hint=f"{one_of(below[:3])}Save the model with `save_pretrained`, or name the folder that holds "
        "its weights.",
    )


def unread_index(names: Iterable[str], layout: str) -> str | None:
    """An index of shards that is there, and not read because ``layout`` is a single file before it."""
    if layout.endswith(".json"):
        return None
    return next((one for one in _WEIGHT_LAYOUTS if one.endswith(".json") and one in names), None)


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
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
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


def write_text(path: Path, text: str) -> None:
    """Write a small file of a variant, or a card, whole or not at all.

    Raises:
        InputError: it would hold a token that this run was given.
        OSError: with the file's name.
    """
    content = text.encode()
    refuse_secret(str(path), content)
    write_whole(path, content)


def refuse_secrets(files: Mapping[str, bytes | Path]) -> None:
    """Refuse files that are about to be published, or taken along, if they hold a token of this run's.

    Weights are not looked at: they are written tensor by tensor.

    Args:
        files: name -> content, or a file on this machine.

    Raises:
        InputError: naming the file.
    """
    for name, content in files.items():
        if isinstance(content, bytes):
            refuse_secret(name, content)
        elif not is_weights(name):
            refuse_secret(name, content.read_bytes())


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
