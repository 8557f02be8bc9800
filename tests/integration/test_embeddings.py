"""``--embeddings int8``: smaller tables, in every variant, where stock transformers loads them."""

from pathlib import Path

import pytest
from torch import nn
from torchao.quantization import Int8Tensor
from transformers import AutoModelForCausalLM

import models
from command import run_smolquant
from smolquant.record import VariantRecord
from smolquant.schemes import SCHEMES

TYPES = "int8_weight_only,int4_weight_only,int8_dynamic"


def quantized(folder: Path, *options: str) -> Path:
    run = run_smolquant(
        "quantize", "checkpoint", "--save-only", "--quant-type", TYPES, *options, folder=folder
    )
    assert run.exit_code == 0, run.log
    return folder / "quantized"


@pytest.mark.parametrize("family", sorted(set(models.FAMILIES) - {"gemma3"}))
def test_stock_transformers_loads_and_runs_them(family: str, tmp_path: Path) -> None:
    source = models.save(tmp_path / "checkpoint", models.FAMILIES[family]())
    output = quantized(tmp_path, "--embeddings", "int8")

    reference = AutoModelForCausalLM.from_pretrained(source)
    expected = models.logits(reference)
    for variant in ("int8", "int8_dynamic"):
        model = AutoModelForCausalLM.from_pretrained(output, subfolder=variant)
        for module, own in (
            (model.get_input_embeddings(), reference.get_input_embeddings()),
            (model.get_output_embeddings(), reference.get_output_embeddings()),
        ):
            table = module.weight
            assert type(table) is Int8Tensor
            error = table.dequantize().float() - own.weight.float()
            assert error.norm() / own.weight.float().norm() < 0.01
        got = models.logits(model)
        assert (got - expected).norm() / expected.norm() < 0.05
    int4 = AutoModelForCausalLM.from_pretrained(output, subfolder="int4")
    assert type(int4.get_input_embeddings().weight) is Int8Tensor


def test_the_record_and_the_size_tell_of_it(checkpoint: Path, tmp_path: Path) -> None:
    def of(folder: Path) -> VariantRecord:
        return VariantRecord.from_json((folder / "int4/quantization.json").read_text())

    plain = of(quantized(tmp_path))
    changed = of(quantized(tmp_path, "--embeddings", "int8"))  # made again: not up to date
    name = "model.embed_tokens.weight"
    assert plain.tensors[name].reason == "embedding"
    table = changed.tensors[name]
    assert table.quantized
    assert table.relative_error is not None
    assert 0 < table.relative_error < 0.01
    assert table.reason == "embedding, by --embeddings int8"
    saved = plain.tensors[name].size_bytes - table.size_bytes
    assert saved > 0.45 * plain.tensors[name].size_bytes
    assert plain.size_bytes - changed.size_bytes == pytest.approx(saved, abs=2000)


def test_a_table_of_a_models_own_kind_is_kept(tmp_path: Path) -> None:
    models.save(tmp_path / "checkpoint", models.FAMILIES["gemma3"]())
    output = quantized(tmp_path, "--embeddings", "int8")
    model = AutoModelForCausalLM.from_pretrained(output, subfolder="int8")
    assert type(model.get_input_embeddings().weight) is nn.Parameter
    record = VariantRecord.from_json((output / "int8/quantization.json").read_text())
    kept = record.tensors["model.embed_tokens.weight"]
    assert kept.reason == "embedding, of a kind that --embeddings int8 leaves as it is"


def test_they_are_measured_as_stored(checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"<{i % 300}>" for i in range(200)))
    measuring = ("--evaluate", "always", "--eval-text", str(text), "--eval-tokens", "128")
    kl = {}
    for embeddings in ("source", "int8"):
        run = run_smolquant(
            *("quantize", checkpoint, "--save-only", "--embeddings", embeddings, *measuring),
            folder=tmp_path,
        )
        assert run.exit_code == 0, run.log
        assert list(run.report["variants"]) == [SCHEMES["int8_weight_only"].variant]
        kl[embeddings] = run.report["variants"]["int8"]["metrics"]["mean_kl"]
    assert 0 < kl["source"] < kl["int8"] < 0.05
