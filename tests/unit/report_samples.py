"""A run over a small invented model, for the tests of reports."""

from pathlib import Path
from typing import Any

from smolquant.record import FileRecord, Metrics, SourceRecord, TensorRecord, VariantRecord
from smolquant.report.run_report import RunReport, VariantResult

REPO_URL = "https://huggingface.co/you/tiny"
SHA = "0123456789abcdef0123456789abcdef01234567"
SOURCE = SourceRecord("sha256:" + "ab" * 32, 2_000_000, "them/tiny", SHA)
QUANT_TYPES = {
    "int8": "int8_weight_only",
    "int4": "int4_weight_only",
    "int8_dynamic": "int8_dynamic",
}
VERSIONS = {"smolquant": "0.1.0", "torch": "2.13.0"}
SMALLER_GROUP = "576 columns are not a multiple of 128"


def tensors(variant: str, layers: int = 3) -> dict[str, TensorRecord]:
    """A kept embedding, and per layer one projection and one kept norm."""
    smaller = variant == "int4"
    made = {
        "model.embed_tokens.weight": TensorRecord(
            False, 500_000, 500_000, reason="embedding", kind="embedding"
        )
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        made[f"{prefix}.mlp.down_proj.weight"] = TensorRecord(
            True,
            499_000,
            130_000 if smaller else 250_000,
            group_size=64 if smaller else None,
            reason=SMALLER_GROUP if smaller else "",
            kind="linear",
        )
        made[f"{prefix}.input_layernorm.weight"] = TensorRecord(
            False, 1000, 1000, reason="norm", kind="norm"
        )
    return made


def variant_record(variant: str, metrics: Metrics | None = None) -> VariantRecord:
    """A record as quantization.json holds it; the weights take 1,300,123 bytes."""
    return VariantRecord(
        variant=variant,
        quant_type=QUANT_TYPES[variant],
        source=SOURCE,
        options={},
        dtype="bfloat16",
        versions=VERSIONS,
        tensors=tensors(variant),
        files={
            "model.safetensors": FileRecord("0" * 64, 1_300_123),
            "tokenizer.json": FileRecord("1" * 64, 99),
        },
        metrics=metrics,
    )


def variant_result(
    variant: str, *, up_to_date: bool = False, metrics: Metrics | None = None
) -> VariantResult:
    """A published variant."""
    return VariantResult(
        record=variant_record(variant, metrics),
        seconds=None if up_to_date else 12.34,
        peak_memory_bytes=None if up_to_date else 1_000_000,
        url=f"{REPO_URL}/tree/main/{variant}",
        up_to_date=up_to_date,
    )


def run_result(*variants: str, **changes: Any) -> RunReport:
    """A run that published ``variants``, with ``changes`` to its fields."""
    fields: dict[str, Any] = {
        "model": "them/tiny",
        "repo_id": "you/tiny",
        "source": SOURCE,
        "variants": {variant: variant_result(variant) for variant in variants},
        "repo_url": REPO_URL,
        "commit_sha": SHA,
        "pull_request_url": None,
        "trackio_url": None,
        "changed": True,
        "error": None,
        "output_dir": Path("quantized"),
        "dry_run": False,
        "save_only": False,
        "command": "smolquant quantize them/tiny you/tiny",
        "versions": VERSIONS,
    }
    return RunReport(**(fields | changes))
