"""The model types of transformers' two mappings, and the class that each of them names."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Mapping = Literal["causal", "image-text-to-text"]


@dataclass(frozen=True, order=True)
class Kind:
    """One model type in one of transformers' mappings."""

    mapping: Mapping
    model_type: str
    class_name: str

    @property
    def key(self) -> str:
        """A name for files and the command line, such as ``causal/llama``."""
        return f"{self.mapping}/{self.model_type}"

    @property
    def sees(self) -> bool:
        return self.mapping == "image-text-to-text"


def all_kinds() -> list[Kind]:
    """Every type of both mappings, by name."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    tables: Sequence[tuple[Mapping, dict[str, str]]] = (
        ("causal", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        ("image-text-to-text", MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
    )
    return [
        Kind(mapping, model_type, named if isinstance(named, str) else named[0])
        for mapping, table in tables
        for model_type, named in sorted(table.items())
    ]
