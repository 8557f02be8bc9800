"""What is published is the whole model: its eyes, its layers that do not run, its two tables."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torchao.quantization import Int8Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import models
from command import Run, run_smolquant
from conftest import WRITE
from localhub import LocalHub
from smolquant.record import VariantRecord
from smolquant.runtime.kernels import use_kernels

TYPES = "int8_weight_only,int4_weight_only"


def quantized(folder: Path, *options: str) -> Run:
    run = run_smolquant(
        "quantize", "checkpoint", "--save-only", "--quant-type", TYPES, *options,
        folder=folder, actions=True, timed="--evaluate" in options,
    )  # fmt: skip
    assert run.exit_code == 0, run.log
    return run


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.float() - expected.float()).norm() / expected.float().norm())


def answers(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(**inputs).logits
    return logits


@pytest.fixture(scope="module", params=list(models.SEEING))
def seeing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder named like its family: ``checkpoint/`` of a model that sees, and its variants, measured."""
    folder: Path = tmp_path_factory.mktemp("seeing") / request.param
    source = folder / "checkpoint"
    models.trained(models.SEEING[request.param]().to(torch.bfloat16)).save_pretrained(source)
    models.save_byte_tokenizer(source)
    (source / "preprocessor_config.json").write_text('{"size": {"height": 28, "width": 28}}')
    quantized(folder, "--evaluate", "always", "--eval-tokens", "128")
    return folder


def test_a_model_that_sees_answers_about_pictures_as_its_source_does(seeing: Path) -> None:
    source = AutoModelForImageTextToText.from_pretrained(seeing / "checkpoint")
    picture, other = (models.image_inputs(seeing.name, seed) for seed in (0, 1))
    expected = answers(source, picture)
    bounds = {"int8": 0.05, "int4": 0.5}
    assert distance(answers(source, other), expected) > 2 * bounds["int8"], "it looks at it"
    for variant, bound in bounds.items():
        folder = seeing / "quantized" / variant
        named = json.loads((folder / "config.json").read_text())["architectures"]
        model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
        assert [type(model).__name__] == named == [type(source).__name__]
        assert not any(info.values()), info
        use_kernels(model)
        assert distance(answers(model, picture), expected) < bound
        assert (folder / "preprocessor_config.json").is_file()


def test_only_the_language_model_is_quantized_and_the_rest_is_the_sources(seeing: Path) -> None:
    source = AutoModelForImageTextToText.from_pretrained(seeing / "checkpoint")
    model = AutoModelForImageTextToText.from_pretrained(seeing / "quantized/int8")
    language = {id(module) for module in model.get_decoder().modules()}
    for name, module in model.named_modules():
        for attribute, weight in module.named_parameters(recurse=False):
            is_linear = isinstance(module, nn.Linear) and attribute == "weight"
            assert (type(weight.data) is Int8Tensor) == (is_linear and id(module) in language), name
            if type(weight.data) is not Int8Tensor:
                assert torch.equal(weight, source.get_parameter(f"{name}.{attribute}"))
    record = VariantRecord.from_json((seeing / "quantized/int8/quantization.json").read_text())
    reasons = {tensor.reason for tensor in record.tensors.values()}
    assert any("not of the language model (model.v" in reason for reason in reasons)


def test_its_card_says_what_it_is_and_that_only_text_was_measured(seeing: Path) -> None:
    record = VariantRecord.from_json((seeing / "quantized/int8/quantization.json").read_text())
    assert record.task == "image-text-to-text"
    assert record.metrics is not None
    assert record.metrics.perplexity is not None
    assert record.metrics.tokens_per_second is not None
    card = (seeing / "quantized/int8/README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in card
    assert "AutoModelForImageTextToText" in card
    assert "processor.apply_chat_template(" in card
    for text in (card, (seeing / "quantized/README.md").read_text()):
        assert "Only text was measured, not what the model says about pictures" in text


@pytest.mark.parametrize("embeddings", ["source", "int8"])
@pytest.mark.parametrize("equal", [True, False], ids=["equal", "different"])
def test_two_tables_are_what_stock_transformers_makes_of_them(
    equal: bool, embeddings: str, tmp_path: Path
) -> None:
    source = models.save(tmp_path / "checkpoint", models.FAMILIES["smollm3"]())

    def add_head(state: dict[str, torch.Tensor]) -> None:
        table = state["model.embed_tokens.weight"]
        state["lm_head.weight"] = table.clone() if equal else table.flip(0).contiguous()

    change_weights(source, add_head)
    run = quantized(tmp_path, "--embeddings", embeddings)
    assert ("their tensors differ" in run.log) != equal
    reference = AutoModelForCausalLM.from_pretrained(source)
    for variant, bound in {"int8": 0.05, "int4": 0.5}.items():
        folder = tmp_path / "quantized" / variant
        model = AutoModelForCausalLM.from_pretrained(folder)
        use_kernels(model)
        table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        assert (table is head) == equal == model.config.tie_word_embeddings
        assert (type(table) is Int8Tensor) == (embeddings == "int8")
        assert distance(models.logits(model), models.logits(reference)) < bound
        record = VariantRecord.from_json((folder / "quantization.json").read_text())
        second = record.tensors["lm_head.weight"]
        assert (second.size_bytes == 0) == equal
        assert (second.reason == "equal to model.embed_tokens.weight, stored once") == equal


def test_two_tables_on_the_hub_are_compared_by_ranges(
    hub: LocalHub, smolquant: Callable[..., Run], tmp_path: Path
) -> None:
    source = models.save(tmp_path / "checkpoint", models.FAMILIES["smollm3"]())
    change_weights(
        source, lambda s: s.update({"lm_head.weight": s["model.embed_tokens.weight"].clone()})
    )
    hub.create_repo("alice/two")
    hub.commit("alice/two", {path.name: path for path in source.iterdir()})
    run = smolquant("quantize", "alice/two", "--low-disk", "always", hub=hub, token=WRITE.value)
    assert run.exit_code == 0, run.log
    record = VariantRecord.from_json(hub.read("alice/two", "int8/quantization.json").decode())
    assert record.tensors["lm_head.weight"].reason.startswith("equal to")


@pytest.mark.parametrize("old", ["model.layers.1.", "mtp.layers.0."])
def test_layers_that_transformers_does_not_load_travel_along(old: str, tmp_path: Path) -> None:
    """Layers beyond num_hidden_layers, and those that predict several tokens ahead."""
    source = models.save(tmp_path / "checkpoint", models.FAMILIES["qwen3"]())
    change_weights(
        source,
        lambda state: state.update(
            {
                name.replace("model.layers.1.", old): state.pop(name)
                for name in list(state)
                if name.startswith("model.layers.1.")
            }
        ),
    )
    config = json.loads((source / "config.json").read_text())
    config |= {"num_hidden_layers": 1, "layer_types": ["full_attention"], "max_window_layers": 1}
    (source / "config.json").write_text(json.dumps(config))
    run = quantized(tmp_path)
    state = load_file(source / "model.safetensors")
    extra = {name: weight for name, weight in state.items() if name.startswith(old)}
    assert len(extra) == 11
    assert "11 tensors are carried along unquantized" in run.log
    assert "which transformers does not load" in run.summary
    reference = AutoModelForCausalLM.from_pretrained(source)
    for variant, bound in {"int8": 0.05, "int4": 0.5}.items():
        folder = tmp_path / "quantized" / variant
        stored = load_file(folder / "model.safetensors")
        assert all(torch.equal(stored[name], weight) for name, weight in extra.items())
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert info["unexpected_keys"] == set(extra)
        assert not info["missing_keys"]
        use_kernels(model)
        assert distance(models.logits(model), models.logits(reference)) < bound
        assert "which transformers does not load" in (folder / "README.md").read_text()


def test_what_is_left_out_is_counted_as_that_everywhere(tmp_path: Path) -> None:
    source = models.save(tmp_path / "checkpoint", models.FAMILIES["llama"]())
    name = "model.layers.{}.self_attn.rotary_emb.inv_freq"
    change_weights(source, lambda s: s.update({name.format(i): torch.ones(16) for i in range(2)}))
    run = quantized(tmp_path)
    assert "2 tensors are left out, such as model.layers.0.self_attn.rotary_emb" in run.log
    int8 = run.report["variants"]["int8"]
    stored = load_file(source / "model.safetensors")
    assert int8["dropped_tensors"] == 2
    assert int8["quantized_tensors"] + int8["kept_tensors"] == len(stored) - 2
    told = f"14 / {len(stored) - 16} (2 left out)"
    assert told in run.summary.replace("\u00a0", " ")
    assert told in (tmp_path / "quantized/README.md").read_text()
    card = (tmp_path / "quantized/int8/README.md").read_text()
    assert "and 2 left out" in card
    assert "## What is left out" in card
    dry = run_smolquant(
        "quantize", "checkpoint", "--save-only", "--dry-run", "--force", folder=tmp_path
    )
    assert f"14 quantized, {len(stored) - 16} kept, 2 left out" in dry.log


@pytest.mark.fault(
    "model",
    "The model is for another task than generating text",
    "Exit 3 with what would be lost.",
)
def test_a_model_for_another_task_is_refused_before_any_work(tmp_path: Path) -> None:
    models.trained(models.OTHER_TASKS["reward"]()).save_pretrained(tmp_path / "checkpoint")
    run = run_smolquant("quantize", "checkpoint", "--save-only", folder=tmp_path)
    assert run.exit_code == 3
    assert "smolquant quantizes models that generate text" in run.log
    assert "== Quantize" not in run.log
    assert not list((tmp_path / "quantized").glob("int8"))


@pytest.mark.fault(
    "model",
    "The model is an embedder",
    "Exit 3.",
)
def test_an_embedder_on_the_hub_is_refused(
    hub: LocalHub, smolquant: Callable[..., Run], tmp_path: Path
) -> None:
    source = models.save(tmp_path / "checkpoint", models.FAMILIES["qwen3"]())
    (source / "modules.json").write_text("[]")
    hub.create_repo("alice/embedder")
    hub.commit("alice/embedder", {path.name: path for path in source.iterdir()})
    run = smolquant("quantize", "alice/embedder", "--save-only", hub=hub, token=WRITE.value)
    assert run.exit_code == 3
    assert "embedder of sentence-transformers (modules.json says so)" in run.log
