"""What a plan says: the fate of every source tensor in a variant, and the files that will hold it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from smolquant.checkpoint.tensors import SourceTensor, StoredTensor, pieces_of
from smolquant.checkpoint.writer import Shard, index_text
from smolquant.errors import GateError
from smolquant.model.norms import Norm
from smolquant.names import pattern_in_every_layer
from smolquant.record import TensorKind, TensorRecord
from smolquant.schemes import Decision, Quantize, Scheme


@dataclass(frozen=True)
class NormInFront:
    """The norm whose output a weight is multiplied with, and where its own weights are stored."""

    norm: Norm
    sources: Mapping[str, SourceTensor]
    """Attribute of the norm -> the tensor that fills it."""
    columns: int
    """The number of columns of the weight, and so of the norm's output."""


@dataclass(frozen=True)
class PlannedTensor:
    """One source tensor's fate in one variant."""

    source: SourceTensor
    decision: Decision
    dtype: torch.dtype
    """What floating data is cast to before it is quantized or stored."""
    parts: Mapping[str, StoredTensor]
    """Part name (``qdata``, ``scale``, ...) -> stored tensor; a kept tensor has the one part ``""``.
    Empty for what is not stored: a tied weight's second name, or what the model has no place for."""
    metadata: str
    """torchao's description of it in the safetensors header."""
    name: str
    """Its parameter's name in the model."""
    scheme: Scheme | None = None
    """What quantizes it; None where it is kept."""
    tied: bool = False
    """A second name of a weight that is stored under its first."""
    unplaced: bool = False
    """The model has no place for it; it is stored all the same, or :attr:`dropped`."""
    norm: NormInFront | None = None
    """What tells how much each column counts, where there is one and the scheme asks for it."""
    kind: TensorKind = "other"
    """What the module that owns it is; ``other`` for what the model has no place for."""
    transposed: bool = False
    """Of a quantized stack: each of its matrices is (K, N), and is quantized as its transpose."""

    @property
    def is_stack(self) -> bool:
        """Whether it is quantized as a stack, one matrix for each of several experts."""
        return self.scheme is not None and len(self.source.shape) > 2

    @property
    def matrix_rows(self) -> int:
        """The number of the source's rows in one matrix of a stack; all rows of any other tensor."""
        return self.source.shape[-2] if len(self.source.shape) > 2 else self.source.rows

    @property
    def columns(self) -> int:
        """K, the number of inputs of a weight."""
        return self.source.shape[-2 if self.transposed else -1]

    @property
    def dropped(self) -> bool:
        """Whether the model has no place for it, and neither has the variant."""
        return self.unplaced and not self.parts

    @property
    def size_bytes(self) -> int:
        return sum(part.size_bytes for part in self.parts.values())

    def record(self, relative_error: float | None = None) -> TensorRecord:
        """Its entry in quantization.json."""
        quantized = isinstance(self.decision, Quantize)
        return TensorRecord(
            quantized=quantized,
            source_bytes=0 if self.tied else self.source.size_bytes,
            size_bytes=self.size_bytes,
            group_size=self.decision.group_size if isinstance(self.decision, Quantize) else None,
            relative_error=relative_error,
            reason=self.decision.note
            if isinstance(self.decision, Quantize)
            else self.decision.reason,
            columns_by=self.norm.norm.name if self.norm else None,
            kind=self.kind,
            dropped=self.dropped,
            made_of=len(pieces_of(self.source)),
            experts=self.source.shape[0] if self.is_stack else None,
            transposed=self.transposed,
        )


@dataclass(frozen=True)
class VariantPlan:
    """All tensors of one variant and the files that will hold them."""

    scheme: Scheme
    group_size: int
    dtype: torch.dtype
    tensors: tuple[PlannedTensor, ...]
    kept_modules: tuple[str, ...]
    """Linear modules that stay unquantized, for ``modules_to_not_convert``."""
    shards: tuple[Shard, ...]
    untied: bool = False
    """Whether two tables that config.json ties hold different values, so that both are stored and the
    variant's config unties them."""

    @property
    def size_bytes(self) -> int:
        """Size of all weight files, to the byte."""
        return sum(shard.size_bytes for shard in self.shards)

    @cached_property
    def error_bounds(self) -> dict[str, float]:
        """Source tensor -> the largest relative error that its scheme can cause, if quantized."""
        return {
            tensor.source.name: tensor.scheme.max_relative_error(
                tensor.columns, tensor.decision.group_size
            )
            for tensor in self.tensors
            if tensor.scheme and isinstance(tensor.decision, Quantize)
        }

    def check_error_bounds(self, errors: Mapping[str, float]) -> None:
        """Refuse weights that are further from their source than their scheme can put them.

        Args:
            errors: quantized source tensor -> its relative error.

        Raises:
            GateError: naming the worst tensor.
        """
        bounds = self.error_bounds
        wild = {name: error for name, error in errors.items() if not error <= bounds[name]}
        if not wild:
            return
        worst = max(wild, key=lambda name: math.inf if math.isnan(wild[name]) else wild[name])
        raise GateError(
            f"{len(wild)} weights of {self.scheme.variant} are further from their source than the scheme "
            f"can put them; {worst!r} has a relative error of {wild[worst]:.3g}, and its bound is "
            f"{bounds[worst]:.3g}.",
            hint="Please report this with the model's name; --skip keeps the weight as it is.",
        )

    @property
    def stacks(self) -> list[PlannedTensor]:
        """The stacks of experts that are quantized."""
        return [tensor for tensor in self.tensors if tensor.is_stack]

    def torchao_config(self) -> Any:
        """What ``config.json`` tells stock transformers: the scheme, and by name what it is for, where
        that is not linear layers alone.
        """
        if not self.stacks:
            return self.scheme.torchao_config(self.group_size)
        from torchao.quantization import FqnToConfig

        by_name = {
            f"re:{pattern_in_every_layer(tensor.name.removesuffix('.weight'))}": tensor
            for tensor in self.tensors
            if tensor.scheme is self.scheme
        }
        return FqnToConfig(
            {
                name: self.scheme.torchao_config(self.group_size, transposed=tensor.transposed)
                for name, tensor in by_name.items()
            }
        )

    @cached_property
    def index_text(self) -> str | None:
        """``model.safetensors.index.json``, or None for a single file."""
        return index_text(self.shards)

    @property
    def dtype_name(self) -> str:
        """``bfloat16`` or ``float16``."""
        return name_of(self.dtype)


def name_of(dtype: torch.dtype) -> str:
    """A dtype as configs name it: ``bfloat16``."""
    return str(dtype).removeprefix("torch.")
