"""Every source tensor exactly once: quantized how, or kept and why, before a weight is read.

The plan is the quantizer run on meta tensors: torchao itself says what each weight becomes, so names,
shapes, dtypes, headers and sizes of every output file are known to the byte.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import torch

from smolquant.checkpoint.tensors import Layout, StoredTensor, prevalent_dtype
from smolquant.checkpoint.writer import lay_out
from smolquant.errors import CheckpointError
from smolquant.model.architecture import Architecture, Parameter
from smolquant.quantize.fit import refuse_mismatch, unplaced_tensors
from smolquant.quantize.planned import NormInFront, PlannedTensor, VariantPlan, name_of
from smolquant.quantize.tables import ONE_TABLE, StoredTables
from smolquant.record import TensorKind
from smolquant.schemes import TABLE_SCHEMES, Decision, Keep, Quantize, Scheme

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def make_plan(
    layout: Layout,
    architecture: Architecture,
    schemes: Sequence[Scheme],
    *,
    group_size: int,
    dtype: str,
    max_shard_size: int,
    skip: Iterable[str],
    embeddings: str = "source",
    keep: Mapping[str, Mapping[str, str]] = MappingProxyType({}),
    however_little: bool = False,
    tables: StoredTables = ONE_TABLE,
) -> dict[str, VariantPlan]:
    """Plan every variant of a checkpoint.

    Args:
        layout: what the checkpoint's headers say; no weight is read.
        dtype: ``auto``, ``bfloat16`` or ``float16``.
        max_shard_size: bytes.
        skip: regular expressions searched for in module names.
        embeddings: a key of :data:`TABLE_SCHEMES`, by which they and the output head are stored in every
            variant; ``source`` keeps them.
        keep: variant -> regular expressions of whole names of what stays unquantized in it, modules and
            stacks of experts -> why.
        however_little: also plan what would stay nearly as large as it is.
        tables: what is stored twice though config.json ties it, and whether it is the same.

    Returns:
        Variant name -> plan.

    Raises:
        CheckpointError: weights missing or of the wrong shape, tensors that the model has no place for,
            or a model that would stay nearly as large as it is.
    """
    planner = _Planner(
        layout,
        architecture,
        group_size,
        dtype,
        skip=tuple(skip),
        embeddings=embeddings,
        tables=tables,
        keep=keep,
        however_little=however_little,
    )
    return {scheme.variant: planner.plan(scheme, max_shard_size) for scheme in schemes}


class _Planner:
    """One checkpoint and what was asked for it; plans one variant at a time."""

    def __init__(
        self,
        layout: Layout,
        architecture: Architecture,
        group_size: int,
        dtype: str,
        *,
        skip: Sequence[str],
        embeddings: str,
        tables: StoredTables,
        keep: Mapping[str, Mapping[str, str]],
        however_little: bool,
    ) -> None:
        self.layout = layout
        self.architecture = architecture
        self.group_size = group_size
        self.skip = skip
        self.dtype = _base_dtype(layout, dtype)
        self.parameters = {name: architecture.parameter(name) for name in layout.tensors}
        self.sources = {
            parameter.name: layout.tensors[name]
            for name, parameter in self.parameters.items()
            if parameter
        }
        self.unplaced = unplaced_tensors(layout, architecture, self.parameters)
        refuse_mismatch(layout, architecture, self.parameters)
        self.tables = tables
        self.embeddings = embeddings
        self.table_scheme = TABLE_SCHEMES.get(embeddings)
        """What stores the tables with a row a token; None keeps them."""
        self.keep = keep
        """Variant -> patterns of modules that stay unquantized in it -> why."""
        self.however_little = however_little
        self._quantized: dict[object, torch.Tensor] = {}
        self.tied = {
            name: first
            for name, first in layout.aliases.items()
            if architecture.ties(self.parameters[name], self.parameters[first])
        } | dict(tables.equal)

    def plan(self, scheme: Scheme, max_shard_size: int) -> VariantPlan:
        schemes = {name: self._scheme(name, scheme) for name in self.layout.tensors}
        keep = self.keep.get(scheme.variant, {})
        decisions = {name: self._decide(name, schemes[name], keep) for name in self.layout.tensors}
        if not self.however_little:
            self._refuse_unquantizable(decisions, scheme.quant_type)
        tensors = tuple(
            self._plan_tensor(name, decision, schemes[name]) for name, decision in decisions.items()
        )
        kept_modules = {
            parameter.what
            for name, parameter in self.parameters.items()
            if parameter
            and (not parameter.keep_reason or (parameter.is_linear and parameter.beside_language))
            and isinstance(decisions[name], Keep)
        }
        stored = [tensor for tensor in tensors if tensor.parts]
        return VariantPlan(
            scheme=scheme,
            group_size=self.group_size,
            dtype=self.dtype,
            tensors=tensors,
            kept_modules=tuple(sorted(kept_modules | set(self.architecture.default_skips))),
            shards=lay_out(
                [list(tensor.parts.values()) for tensor in stored],
                _metadata(stored),
                max_shard_size,
            ),
            untied=self.tables.differ,
        )

    def _scheme(self, name: str, scheme: Scheme) -> Scheme:
        """What quantizes a tensor of a variant of ``scheme``, if anything does."""
        parameter = self.parameters[name]
        if parameter and parameter.is_vocabulary and self.table_scheme:
            return self.table_scheme
        return scheme

    def _decide(self, name: str, scheme: Scheme, keep: Mapping[str, str]) -> Decision:
        parameter = self.parameters[name]
        if name in self.tied:
            how = "equal" if name in self.tables.equal else "tied"
            return Keep(f"{how} to {self.tied[name]}, stored once")
        if parameter is None:
            return Keep(self.unplaced[name].reason)
        by_option = parameter.is_vocabulary and self.table_scheme is not None
        if parameter.keep_reason and not by_option:
            is_table = parameter.outside_layers and not parameter.beside_language
            asked = self.table_scheme is not None and is_table
            why_not = f", of a kind that --embeddings {self.embeddings} leaves as it is"
            return Keep(parameter.keep_reason + (why_not if asked else ""))
        by_pattern = self._kept_by_pattern(parameter, keep)
        if by_pattern is not None:
            return by_pattern
        if by_option:
            return Quantize(note=f"{parameter.keep_reason}, by --embeddings {self.embeddings}")
        return self._decide_linear(name, parameter, scheme)

    def _decide_linear(self, name: str, parameter: Parameter, scheme: Scheme) -> Decision:
        dtype = name_of(self._stored_dtype(name, parameter))
        if scheme.weight_dtypes is not None and dtype not in scheme.weight_dtypes:
            computes = " or ".join(sorted(scheme.weight_dtypes))
            return Keep(f"{dtype}, and {scheme.quant_type} computes with {computes} only")
        rows, columns = parameter.shape[-2:]
        if parameter.contracts_rows:
            if not scheme.stores_transposed:
                return Keep(
                    f"multiplied from the right, for which {scheme.quant_type} has no layout"
                )
            rows, columns = columns, rows
        return scheme.decide(rows, columns, self.group_size)

    def _stored_dtype(self, name: str, parameter: Parameter | None) -> torch.dtype:
        """What a tensor is cast to before it is quantized or stored."""
        dtype = self.layout.tensors[name].dtype
        if not dtype.is_floating_point:
            return dtype
        return self.architecture.stored_dtype(parameter.name if parameter else name, self.dtype)

    def _kept_by_pattern(self, parameter: Parameter, keep: Mapping[str, str]) -> Keep | None:
        for pattern in self.skip:
            if re.search(pattern, parameter.module):
                return Keep(f"--skip {pattern}")
        for pattern, reason in keep.items():
            if re.fullmatch(pattern, parameter.what):
                return Keep(reason)
        return None

    def _plan_tensor(self, source_name: str, decision: Decision, scheme: Scheme) -> PlannedTensor:
        """Ask torchao, on the meta device, what the tensor becomes."""
        from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

        source = self.layout.tensors[source_name]
        parameter = self.parameters[source_name]
        dropped = parameter is None and not self.unplaced[source_name].carried
        kind: TensorKind = parameter.kind if parameter else "other"
        if source_name in self.tied or dropped:
            return PlannedTensor(
                source,
                decision,
                source.dtype,
                {},
                "",
                source_name,
                tied=source_name in self.layout.aliases,
                unplaced=parameter is None,
                kind=kind,
            )
        name = parameter.name if parameter else source_name
        dtype = self._stored_dtype(source_name, parameter)
        weight = torch.empty(source.shape, dtype=dtype, device="meta")
        prefix = name
        if isinstance(decision, Quantize):
            transposed = parameter is not None and parameter.contracts_rows
            weight = self._as_quantized(scheme, weight, decision.group_size, transposed=transposed)
            module, _, attribute = name.rpartition(".")
            prefix = f"{module}._{attribute}_"
        flat, metadata = flatten_tensor_state_dict({name: weight})
        in_files = {stored: self.architecture.name_in_files(stored, source) for stored in flat}
        parts = {
            stored.removeprefix(prefix): StoredTensor(
                in_files[stored], part.dtype, tuple(part.shape)
            )
            for stored, part in flat.items()
        }
        used = scheme if isinstance(decision, Quantize) else None
        norm = self._norm_in_front(name, source.shape[-1]) if used and used.weighs_columns else None
        return PlannedTensor(
            source,
            decision,
            dtype,
            parts,
            metadata[name],
            name,
            scheme=used,
            norm=norm,
            kind=kind,
            unplaced=parameter is None,
            transposed=used is not None and parameter is not None and parameter.contracts_rows,
        )

    def _norm_in_front(self, weight: str, columns: int) -> NormInFront | None:
        norm = self.architecture.norms_in_front.get(weight)
        if norm is None or not self.sources.keys() >= set(norm.parameters.values()):
            return None
        sources = {attribute: self.sources[name] for attribute, name in norm.parameters.items()}
        return NormInFront(norm, sources, columns)

    def _as_quantized(
        self, scheme: Scheme, weight: torch.Tensor, group_size: int | None, *, transposed: bool
    ) -> torch.Tensor:
        """What a weight of this shape becomes; asked once, as layers are alike."""
        alike = (scheme, weight.shape, weight.dtype, group_size, transposed)
        if alike not in self._quantized:
            self._quantized[alike] = scheme.quantize(weight, group_size, transposed=transposed)
        return self._quantized[alike]

    def _refuse_unquantizable(self, decisions: Mapping[str, Decision], quant_type: str) -> None:
        """A variant that would stay nearly full-size is not published under its scheme's name."""
        kept, total = Counter[str](), 0
        for name, decision in decisions.items():
            parameter = self.parameters[name]
            if name in self.tied or parameter is None:
                continue
            if parameter.outside_layers or parameter.beside_language:
                continue
            size = self.layout.tensors[name].size_bytes
            total += size
            if isinstance(decision, Keep):
                kept[decision.reason] += size
        if total and sum(kept.values()) * 2 <= total:
            return
        reason, _ = kept.most_common(1)[0] if kept else ("no weights beside embeddings", 0)
        share = sum(kept.values()) / total if total else 1.0
        raise CheckpointError(
            f"{self.architecture.class_name} cannot honestly be called {quant_type}: {share:.0%} of "
            "its weight bytes beside the embeddings would stay as they are, most of them because of: "
            f"{reason}.",
            hint="Choose another scheme, another --dtype or fewer --skip patterns, or do not quantize this "
            "model.",
        )


def _metadata(tensors: Sequence[PlannedTensor]) -> dict[str, str]:
    """The safetensors metadata of the whole model, in the form of torchao's flattened state dict."""
    # torchao takes every name apart at a dot; a parameter of the model itself, which has none, is not
    # quantized, and is loaded like any tensor that torchao is not told of.
    described = [tensor for tensor in tensors if "." in tensor.name]
    names = [tensor.name for tensor in described]
    return {
        **{tensor.name: tensor.metadata for tensor in described},
        "tensor_names": json.dumps(names),
        "format": "pt",
    }


def _base_dtype(layout: Layout, dtype: str) -> torch.dtype:
    if dtype != "auto":
        return _DTYPES[dtype]
    is_float16 = prevalent_dtype(layout.tensors.values()) is torch.float16
    return torch.float16 if is_float16 else torch.bfloat16
