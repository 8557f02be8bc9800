"""Finished variants to publish, whose weights may be any bytes, since publishing reads none."""

import hashlib
from pathlib import Path
from typing import Any

from smolquant.publish.operations import Publication
from smolquant.record import FileRecord, SourceRecord, TensorRecord, VariantRecord
from smolquant.schemes import BY_VARIANT

IDENTITY = "sha256:" + "a" * 64


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def make_variant(
    folder: Path, variant: str = "int8", *, content: bytes = b"weights" * 1000, **source: Any
) -> VariantRecord:
    """A finished variant's folder."""
    files = {"model.safetensors": content, "config.json": b'{"model_type": "llama"}\n'}
    made = VariantRecord(
        variant=variant,
        quant_type=BY_VARIANT[variant].quant_type,
        source=SourceRecord(**{"identity": IDENTITY, "size_bytes": 20_000, **source}),
        options={"dtype": "auto"},
        dtype="bfloat16",
        versions={"torch": "2.13.0"},
        tensors={"model.layers.0.mlp.up_proj.weight": TensorRecord(True, 20_000, len(content))},
        files={name: FileRecord(sha256(data), len(data)) for name, data in files.items()},
    )
    target = folder / variant
    target.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (target / name).write_bytes(data)
    (target / "quantization.json").write_text(made.to_json())
    return made


def publication(folder: Path, *variants: str, **changes: Any) -> Publication:
    content = changes.pop("content", b"weights" * 1000)
    records = {name: make_variant(folder, name, content=content) for name in variants or ("int8",)}
    return Publication(
        variants={name: folder / name for name in records},
        records=records,
        source_identity=IDENTITY,
        **changes,
    )
