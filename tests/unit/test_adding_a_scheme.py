"""What a scheme is worth: one class, registered, and the whole product knows it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torchao.quantization import Int8Tensor, Int8WeightOnlyConfig, PerRow

import models
import smolquant
from smolquant.checkpoint.folder import FolderSource
from smolquant.checkpoint.reader import Checkpoint
from smolquant.evaluate.gate import parse_limits
from smolquant.model.architecture import Architecture
from smolquant.publish.cards import root_card, variant_card
from smolquant.quantize.engine import quantize_checkpoint
from smolquant.quantize.plan import make_plan
from smolquant.quantize.variant import finish_variant, write_record
from smolquant.record import VariantRecord
from smolquant.report.files import step_outputs
from smolquant.report.run_report import RunReport, VariantResult
from smolquant.report.summary import render_summary
from smolquant.schemes import BY_VARIANT, SCHEMES, scheme_of
from smolquant.schemes.base import Decision, Keep, Quantize, QuantizedRows, Scheme, squared_norm
from smolquant.settings import make_settings


class Signs(Scheme):
    """Each weight is its row's mean size, up or down; stored as int8, so that torchao can load it."""

    quant_type: ClassVar = "signs_only"
    variant: ClassVar = "signs"
    title: ClassVar = "signs, one size per row"
    best_for: ClassVar = "tests"
    loading: ClassVar = "anything"
    stock_loads: ClassVar = False
    caution: ClassVar = "Toys are for playing."
    row_axes: ClassVar = {"qdata": 0, "scale": 0, "zero_point": 0}
    arithmetic = "signs"

    def options(self, group_size: int) -> dict[str, int | str]:
        return {"toy": 1}

    def decide(self, rows: int, columns: int, group_size: int) -> Decision:
        return Keep("too tall for a toy") if rows > 256 else Quantize()

    def torchao_config(self, group_size: int, *, transposed: bool = False) -> Any:
        return Int8WeightOnlyConfig()

    def quantize(
        self, weight: torch.Tensor, group_size: int | None, *, transposed: bool = False
    ) -> torch.Tensor:
        tensor: torch.Tensor = Int8Tensor.from_hp(weight, granularity=PerRow())
        return tensor

    def quantize_rows(
        self,
        weight: torch.Tensor,
        group_size: int | None,
        input_mean_squares: torch.Tensor | None = None,
    ) -> QuantizedRows:
        exact = weight.float()
        size = exact.abs().mean(1, keepdim=True)
        parts = {
            "qdata": exact.sign().to(torch.int8),
            "scale": size,
            "zero_point": torch.zeros_like(size, dtype=torch.int8),
        }
        error = exact.sign().mul_(size).sub_(exact)
        return QuantizedRows(parts, squared_norm(error), squared_norm(exact))

    def max_relative_error(self, columns: int, group_size: int | None) -> float:
        return 1.0


@pytest.fixture(autouse=True)
def registered() -> Iterator[Scheme]:
    scheme = Signs()
    SCHEMES[scheme.quant_type] = BY_VARIANT[scheme.variant] = scheme
    yield scheme
    del SCHEMES[scheme.quant_type], BY_VARIANT[scheme.variant]


@pytest.fixture
def quantized(tmp_path: Path) -> tuple[Path, VariantRecord]:
    """A folder of variants, and the toy's record as read back from it."""
    origin = FolderSource(models.save_with_tokenizer(tmp_path / "source", models.llama(2)))
    architecture = Architecture(origin.folder, trust_remote_code=False)
    plans = make_plan(
        origin.layout(),
        architecture,
        [scheme_of("signs_only")],
        group_size=64,
        dtype="auto",
        max_shard_size=10**9,
        skip=(),
    )
    assert list(plans) == ["signs"]
    folder = tmp_path / "quantized/signs"
    folder.mkdir(parents=True)
    with Checkpoint(origin.fetch_weights()) as checkpoint:
        written = quantize_checkpoint(
            checkpoint, plans, {"signs": folder}, advance=lambda n_bytes: None
        )
    record = finish_variant(
        folder,
        plans["signs"],
        written["signs"],
        source=origin,
        config=architecture.config_dict,
        options=scheme_of("signs_only").options(64),
        source_bytes=origin.layout().size_bytes,
    )
    write_record(folder, record)
    return tmp_path / "quantized", VariantRecord.from_json(
        (folder / "quantization.json").read_text()
    )


def test_it_is_made_as_it_says_and_loads(quantized: tuple[Path, VariantRecord]) -> None:
    folder, record = quantized
    assert record.quant_type == "signs_only"
    assert record.options == {"toy": 1}
    assert record.counts.quantized
    model, _ = smolquant.load(folder, variant="signs", device="cpu")
    weight: Any = model.model.layers[0].self_attn.q_proj.weight
    assert set(weight.qdata.unique().tolist()) <= {-1, 0, 1}
    assert models.logits(model).isfinite().all()


def test_it_can_be_asked_for_and_limited() -> None:
    settings = make_settings(model_path=None, repo_name="them/tiny", quant_type="signs_only")
    assert settings.quant_types == ("signs_only",)
    assert settings.options_of("signs_only")["toy"] == 1
    assert parse_limits("signs=3", "--max-kl") == {"signs": 3.0}


def test_cards_summary_and_outputs_say_what_it_says(quantized: tuple[Path, VariantRecord]) -> None:
    _, record = quantized
    card = variant_card(record, location="you/tiny", base_model="them/tiny", terms={})
    for sentence in (Signs.title, Signs.loading, Signs.best_for, Signs.caution):
        assert sentence in card
    root = root_card(
        None,
        {"signs": record},
        location="you/tiny",
        has_main_model=False,
        source_identity=record.source.identity,
    )
    assert Signs.title in root
    result = RunReport(
        model="them/tiny",
        repo_id="you/tiny",
        source=record.source,
        variants={"signs": VariantResult(record, url="https://hub/signs")},
        repo_url="https://hub",
        commit_sha="0" * 40,
        pull_request_url=None,
        trackio_url=None,
        changed=True,
        error=None,
        output_dir=Path("quantized"),
        dry_run=False,
        save_only=False,
        command="smolquant quantize them/tiny you/tiny",
        versions={},
    )
    summary = render_summary(result)
    assert "signs" in summary
    assert Signs.caution in summary
    assert step_outputs(result, {})["signs-url"] == "https://hub/signs"
