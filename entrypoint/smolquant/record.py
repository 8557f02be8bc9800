"""``quantization.json``, a variant's birth certificate: what was made, from what, how, and what it cost.

Cards, summaries and reruns are functions of these records. This module knows neither torch nor the Hub;
a record read back from a repository is untrusted and is validated field by field.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from smolquant import __version__

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

FORMAT_VERSION = 1
FILE_NAME = "quantization.json"
_TEMPLATE_FILE = "chat_template.jinja"

T = TypeVar("T", bound="DataclassInstance")

Options = Mapping[str, str | int | float | bool | list[str] | None]

TensorKind = Literal["embedding", "output head", "norm", "linear", "expert", "other"]
"""What the module that holds a tensor is, as this version tells it."""

Task = Literal["text-generation", "image-text-to-text"]
"""What a model is for, as the Hub calls it."""

TEXT_GENERATION: Task = "text-generation"
IMAGE_TEXT_TO_TEXT: Task = "image-text-to-text"
"""The model answers about pictures, too."""


def stack_versions() -> dict[str, str]:
    """Versions of what decides the stored bytes, by distribution."""
    return {
        "smolquant": __version__,
        **{name: version(name) for name in ("torch", "torchao", "transformers")},
    }


class InvalidRecord(ValueError):
    """A quantization.json that this version cannot read."""


@dataclass(frozen=True)
class SourceRecord:
    """The checkpoint that a variant was made from."""

    identity: str
    """``sha256:<hex>`` over the config, tokenizer and weight files; what "the same source" means."""
    size_bytes: int
    """Bytes of the source's tensors."""
    repo: str | None = None
    """Hub id, or None for a folder."""
    revision: str | None = None
    """Commit sha on the Hub; information only, since our own commit moves it."""


@dataclass(frozen=True)
class TensorRecord:
    """What became of one source tensor. ``reason`` says why it was kept, or why its group is smaller."""

    quantized: bool
    source_bytes: int
    size_bytes: int
    group_size: int | None = None
    relative_error: float | None = None
    """Frobenius norm of (dequantized - source) over that of the source, cast to the variant's dtype unless
    that loses it: what is too small for float16 counts as an error."""
    reason: str = ""
    columns_by: str | None = None
    """The norm that its columns were weighted by, where the method weighs them and one is in front."""
    kind: TensorKind | str | None = None
    """What holds it: a :data:`TensorKind`, or one that a later version added; None in older records."""
    dropped: bool = False
    """Whether the variant has nothing of it, as the model has no use for it; ``reason`` says why."""
    made_of: int = 1
    """The number of the source's tensors that it is made of; a stack of experts may be of one each."""
    experts: int | None = None
    """Of a stack that is quantized: the number of experts in it."""
    transposed: bool = False
    """Of such a stack: it is multiplied from the right, which torchao's tensors by themselves are not."""


@dataclass(frozen=True)
class Counts:
    """How many source tensors met which fate."""

    quantized: int
    kept: int
    dropped: int

    @classmethod
    def of(cls, tensors: Mapping[str, TensorRecord]) -> "Counts":
        """Count them."""
        quantized = sum(tensor.made_of for tensor in tensors.values() if tensor.quantized)
        dropped = sum(tensor.made_of for tensor in tensors.values() if tensor.dropped)
        total = sum(tensor.made_of for tensor in tensors.values())
        return cls(quantized, total - quantized - dropped, dropped)


@dataclass(frozen=True)
class FileRecord:
    """A file of the variant's folder, the card and this record excepted."""

    sha256: str
    size: int


@dataclass(frozen=True)
class Metrics:
    """Source and variant on the same text; a field is None when it was not measured."""

    perplexity: float | None = None
    source_perplexity: float | None = None
    perplexity_increase_percent: float | None = None
    mean_kl: float | None = None
    top1_agreement: float | None = None
    tokens_per_second: float | None = None
    source_tokens_per_second: float | None = None
    """Decoding, one sequence at a time."""
    prefill_tokens_per_second: float | None = None
    source_prefill_tokens_per_second: float | None = None
    speed_ratio: float | None = None
    """How many times as fast as its source it decodes: the median of rounds that both took part in."""
    speed_ratio_spread: tuple[float, float] | None = None
    """The quartiles of that, the lower one first."""
    prefill_ratio: float | None = None
    prefill_ratio_spread: tuple[float, float] | None = None
    """The same of a prompt."""
    peak_memory_bytes: int | None = None
    source_peak_memory_bytes: int | None = None
    """The most memory that a process takes which loads the model and generates."""
    tokens: int | None = None
    """The number of tokens that were predicted."""
    text: str | None = None
    """The name of the text that they were taken from."""
    text_sha256: str | None = None
    """The digest of that text, whatever it is called."""
    tokens_asked: int | None = None
    """The number that the owner asked for; None where it follows from the model's size."""
    machine: str | None = None
    """The name of the machine that speeds were measured on."""
    compute_capability: float | None = None
    """The capability, such as 8.9, of the GPU that measured this; None on a CPU, and in older records."""


PLAIN_FLOAT32 = "float32, with the plain weights that are stored, and eager attention"
"""The one way so far in which what a :class:`Behaviour` holds was computed, alike on every machine."""


@dataclass(frozen=True)
class Behaviour:
    """What a variant predicts on a short text, for telling later whether it still does."""

    text: str
    token_ids: tuple[int, ...]
    """The text, or its beginning, as the variant's tokenizer makes tokens of it."""
    next_tokens: tuple[int, ...]
    """The likeliest next token after each of them."""
    margins: tuple[float, ...]
    """The distance of each from the second likeliest, in nats; a small one may turn over."""
    perplexity: float
    """Of the tokens but the first."""
    computed: str = PLAIN_FLOAT32


def shows_no_difference(spread: tuple[float, float] | None) -> bool:
    """Whether two speeds were measured, and the quartiles of their ratio lie on both sides of 1."""
    return spread is not None and spread[0] <= 1.0 <= spread[1]


@dataclass(frozen=True)
class VariantRecord:
    """Everything that is known of one variant, as written to and read from ``quantization.json``."""

    variant: str
    quant_type: str
    source: SourceRecord
    options: Options
    """The options that decide the stored bytes; an equal mapping means an equal variant."""
    dtype: str
    """The dtype of what stays unquantized: ``bfloat16`` or ``float16``."""
    versions: Mapping[str, str]
    tensors: Mapping[str, TensorRecord]
    files: Mapping[str, FileRecord]
    metrics: Metrics | None = None
    device: str | None = None
    """Only where the stored bytes depend on it."""
    task: str = TEXT_GENERATION
    """A :data:`Task`; older records are all of models that generate text from text."""
    has_chat_template: bool = False
    """Whether its tokenizer renders conversations; older records tell that of a template in a file only."""
    runs_own_code: bool = False
    """Whether the model is built by code of its own, which transformers runs only where it is trusted."""
    behaviour: Behaviour | None = None
    """What it predicted when it was measured; nothing decides by it whether a variant is up to date."""
    format_version: int = field(default=FORMAT_VERSION)

    @property
    def size_bytes(self) -> int:
        """Bytes of the variant's weight files, headers included."""
        return sum(file.size for name, file in self.files.items() if name.endswith(".safetensors"))

    @property
    def ratio(self) -> float:
        """Size of the variant as a fraction of its source."""
        return self.size_bytes / self.source.size_bytes if self.source.size_bytes else math.nan

    @property
    def counts(self) -> Counts:
        """How many source tensors met which fate."""
        return Counts.of(self.tensors)

    def is_made_by(self, *, quant_type: str, options: Options) -> bool:
        """Whether making this variant again, from the same source with those options, is needless."""
        return (
            self.format_version == FORMAT_VERSION
            and self.quant_type == quant_type
            and dict(self.options) == dict(options)
        )

    def to_json(self) -> str:
        """The text of ``quantization.json``: sorted, indented, ending in a newline."""
        return json.dumps(asdict(self), indent=2, sort_keys=True, allow_nan=False) + "\n"

    @classmethod
    def in_folder(cls, folder: str, content: bytes) -> "VariantRecord":
        """Parse and validate the record that lies in a variant's folder.

        Raises:
            InvalidRecord: it cannot be read, or is another variant's.
        """
        record = cls.from_json(content)
        if record.variant != folder:
            raise InvalidRecord(f"the {FILE_NAME} in {folder}/ is that of {record.variant!r}")
        return record

    @classmethod
    def from_json(cls, text: str | bytes) -> "VariantRecord":
        """Parse and validate a published record.

        Raises:
            InvalidRecord: when the text is not JSON, or a field is missing or of the wrong type.
        """
        try:
            raw = json.loads(text)
            if not isinstance(raw, dict):
                raise TypeError("not a JSON object")
            metrics = raw.get("metrics")
            behaviour = _typed(raw, "behaviour", dict, optional=True)
            return cls(
                variant=_typed(raw, "variant", str),
                quant_type=_typed(raw, "quant_type", str),
                source=_build(SourceRecord, _typed(raw, "source", dict)),
                options=_finite(_typed(raw, "options", dict)),
                dtype=_typed(raw, "dtype", str),
                versions=_strings(_typed(raw, "versions", dict)),
                tensors=_each(TensorRecord, _typed(raw, "tensors", dict)),
                files=_each(FileRecord, _typed(raw, "files", dict)),
                metrics=None if metrics is None else _build(Metrics, metrics),
                device=_typed(raw, "device", str, optional=True),
                task=_typed(raw, "task", str, optional=True) or TEXT_GENERATION,
                has_chat_template=_has_chat_template(raw),
                runs_own_code=_typed(raw, "runs_own_code", bool, optional=True) or False,
                behaviour=None if behaviour is None else read_behaviour(behaviour),
                format_version=_typed(raw, "format_version", int),
            )
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise InvalidRecord(f"not a readable {FILE_NAME}: {error}") from error


_FIELD_TYPES: dict[str, tuple[type, ...]] = {
    "identity": (str,),
    "size_bytes": (int,),
    "repo": (str, type(None)),
    "revision": (str, type(None)),
    "quantized": (bool,),
    "dropped": (bool,),
    "made_of": (int,),
    "experts": (int, type(None)),
    "transposed": (bool,),
    "source_bytes": (int,),
    "group_size": (int, type(None)),
    "relative_error": (int, float, type(None)),
    "reason": (str,),
    "columns_by": (str, type(None)),
    "kind": (str, type(None)),
    "sha256": (str,),
    "text": (str, type(None)),
    "text_sha256": (str, type(None)),
    "machine": (str, type(None)),
    "speed_ratio_spread": (list, type(None)),
    "prefill_ratio_spread": (list, type(None)),
    "size": (int,),
}
_LARGEST = 2**63
_METRIC_TYPES: tuple[type, ...] = (int, float, type(None))


def _typed(raw: Mapping[str, Any], key: str, kind: type, *, optional: bool = False) -> Any:
    value = raw.get(key) if optional else raw[key]
    if value is None and optional:
        return None
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise TypeError(f"{key!r} is not {kind.__name__}")
    return value


def _has_chat_template(raw: Mapping[str, Any]) -> bool:
    told = _typed(raw, "has_chat_template", bool, optional=True)
    return _TEMPLATE_FILE in raw["files"] if told is None else bool(told)


def _build(cls: type[T], raw: Any) -> T:
    if not isinstance(raw, dict):
        raise TypeError(f"{cls.__name__} is not an object")
    known = {field.name for field in fields(cls)}
    raw = {key: value for key, value in raw.items() if key in known}  # a later version tells more
    for key, value in raw.items():
        allowed = _FIELD_TYPES.get(key, _METRIC_TYPES)
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            raise TypeError(f"{key!r} has a value of the wrong type")
        if isinstance(value, int) and not 0 <= value < _LARGEST and allowed is not _METRIC_TYPES:
            raise ValueError(f"{key!r} is out of range")
        if isinstance(value, int | float) and not abs(value) <= _LARGEST:  # nor a NaN
            raise ValueError(f"{key!r} is out of range")
        if isinstance(value, list):
            raw[key] = _pair(key, value)
    return cls(**raw)


def _pair(key: str, values: list[Any]) -> tuple[float, float]:
    """Two numbers, which JSON has as a list."""
    low, high = values
    return _number(key, low), _number(key, high)


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{key!r} has a value of the wrong type")
    if not abs(value) <= _LARGEST:  # nor a NaN
        raise ValueError(f"{key!r} is out of range")
    return float(value)


def read_behaviour(raw: Mapping[str, Any]) -> Behaviour:
    """Read a :class:`Behaviour` back from what JSON has of it.

    Raises:
        ValueError, TypeError, KeyError: it is none.
    """
    ids, best = (_ids(key, _typed(raw, key, list)) for key in ("token_ids", "next_tokens"))
    margins = tuple(_number("margins", value) for value in _typed(raw, "margins", list))
    if not 2 <= len(ids) == len(best) == len(margins):
        raise ValueError("'behaviour' has not as many predictions as tokens")
    return Behaviour(
        text=_typed(raw, "text", str),
        token_ids=ids,
        next_tokens=best,
        margins=margins,
        perplexity=_number("perplexity", raw["perplexity"]),
        computed=_typed(raw, "computed", str),
    )


def _ids(key: str, values: list[Any]) -> tuple[int, ...]:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{key!r} has a value of the wrong type")
        if not 0 <= value < _LARGEST:
            raise ValueError(f"{key!r} is out of range")
    return tuple(values)


def _each(cls: type[T], raw: Mapping[str, Any]) -> dict[str, T]:
    return {name: _build(cls, value) for name, value in raw.items()}


def _finite(raw: dict[str, Any]) -> dict[str, Any]:
    """``raw``, which a record can hold; Python reads numbers that JSON does not have, too."""
    json.dumps(raw, allow_nan=False)
    return raw


def _strings(raw: Mapping[str, Any]) -> dict[str, str]:
    if not all(isinstance(value, str) for value in raw.values()):
        raise TypeError("a version is not a string")
    return dict(raw)
