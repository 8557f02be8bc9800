"""Which class a checkpoint is, by its own word, and what is refused for it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import models
from smolquant.errors import CheckpointError
from smolquant.model.architecture import Architecture
from smolquant.model.task import auto_class, refuse_embedder, task_of


def changed_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.mark.fault(
    "model",
    "The model is for another task than generating text",
    "Exit 3 with what would be lost.",
)
@pytest.mark.parametrize(
    ("family", "says"),
    [
        (
            "reward",
            r"Qwen2ForSequenceClassification.*reward models.*1 of its tensors: 'score.weight'",
        ),
        ("masked", r"BertForMaskedLM.*masked words"),
        ("speech", r"WhisperForConditionalGeneration.*speech.*lack 37 .*'model.encoder.conv1"),
        ("translation", r"MBartForConditionalGeneration.*one text into another.*lack 4\d "),
    ],
)
def test_other_tasks_are_refused_with_what_would_be_lost(
    family: str, says: str, tmp_path: Path
) -> None:
    config = models.OTHER_TASKS[family]().config
    config.architectures = [type(models.OTHER_TASKS[family]()).__name__]
    config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=says):
        Architecture(tmp_path, trust_remote_code=False)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"architectures": ["Qwen2ForRewardModel"], "model_type": "qwen2"}, "no class that transf"),
        ({"architectures": ["Qwen3Model"], "model_type": "qwen3"}, "as embedders do"),
        ({"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}, "an encoder reads"),
        ({"architectures": ["Qwen2AudioForConditionalGeneration"]}, "which"),
    ],
)
def test_tasks_are_told_by_transformers_tables(config: dict[str, Any], says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        task_of(config)


@pytest.mark.fault(
    "model",
    "The model is an encoder",
    "Exit 3.",
)
def test_an_encoder_that_nobody_made_a_decoder_is_refused(tmp_path: Path) -> None:
    config = transformers.BertConfig(**{"hidden_size": 64, "num_attention_heads": 2})
    config.architectures = ["BertLMHeadModel"]
    config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="has no is_decoder"):
        Architecture(tmp_path, trust_remote_code=False)
    changed_config(tmp_path, is_decoder=True)
    assert Architecture(tmp_path, trust_remote_code=False).class_name == "BertLMHeadModel"


@pytest.mark.fault(
    "model",
    "config.json names no class",
    "The class is taken by the model type, and that is said.",
)
def test_a_config_that_names_no_class_is_taken_by_its_type_and_that_is_said(tmp_path: Path) -> None:
    folder = models.save(tmp_path / "m", models.FAMILIES["llama"]())
    assert Architecture(folder, trust_remote_code=False).remarks == ()
    changed_config(folder, architectures=None)
    (remark,) = Architecture(folder, trust_remote_code=False).remarks
    assert "names no class" in remark
    assert "LlamaForCausalLM by its model type, llama" in remark


@pytest.mark.fault(
    "model",
    "transformers would build another class than the config names",
    "Exit 3 with both classes.",
)
def test_another_class_than_the_config_names_is_not_built(tmp_path: Path) -> None:
    folder = models.save(tmp_path / "m", models.FAMILIES["llama"]())
    changed_config(folder, architectures=["Qwen3ForCausalLM"])
    with pytest.raises(
        CheckpointError, match="names Qwen3ForCausalLM, but transformers builds Llama"
    ):
        Architecture(folder, trust_remote_code=False)
    changed_config(folder, architectures=["LLaMAForCausalLM"])  # as its first checkpoints had it
    assert Architecture(folder, trust_remote_code=False).class_name == "LlamaForCausalLM"


@pytest.mark.fault(
    "checkpoint",
    "The model needs Python code of its repository's own",
    "Exit 3 without --trust-remote-code; none of it runs.",
)
def test_code_of_the_repositorys_own_is_taken_by_auto_map_and_that_is_said(tmp_path: Path) -> None:
    folder = models.save(tmp_path / "m", models.FAMILIES["llama"]())
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    changed_config(folder, model_type="own", architectures=["OwnModel"], auto_map=own)
    (folder / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n\n\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    (remark,) = Architecture(folder, trust_remote_code=True).remarks
    assert "own code: OwnModel, which auto_map names" in remark
    changed_config(folder, model_type="llama")  # which transformers would build without a word
    with pytest.raises(CheckpointError, match="OwnModel, which is code of the repository's own"):
        Architecture(folder, trust_remote_code=False)


@pytest.mark.fault(
    "model",
    "The model is an embedder",
    "Exit 3.",
)
@pytest.mark.parametrize("names", [["modules.json"], ["config_sentence_transformers.json", "a"]])
def test_embedders_are_refused_by_their_files(names: list[str]) -> None:
    with pytest.raises(CheckpointError, match="an embedder"):
        refuse_embedder(names)
    refuse_embedder(["config.json", "model.safetensors"])


def test_the_auto_class_follows_the_class_that_the_config_names() -> None:
    both = models.SEEING["gemma3"]().config
    both.architectures = ["Gemma3ForConditionalGeneration"]
    assert auto_class(both) is AutoModelForImageTextToText
    assert auto_class({"architectures": ["Gemma3ForCausalLM"]}) is AutoModelForCausalLM
    assert auto_class({"architectures": ["Mistral3ForConditionalGeneration"]}) is (
        AutoModelForImageTextToText
    )
    assert auto_class({"model_type": "qwen3_5"}) is AutoModelForImageTextToText
    assert auto_class({"model_type": "llama"}) is AutoModelForCausalLM
    heard = {"architectures": ["MossTranscribeDiarizeForConditionalGeneration"]}
    assert auto_class(heard) is AutoModelForCausalLM  # it stands in an encoders' table too


def test_what_computes_with_text_alone_is_the_language_model(tmp_path: Path) -> None:
    """GIT has no module for it: its layers lie beside the encoder of pictures."""
    config = transformers.GitConfig(
        hidden_size=64, num_attention_heads=2, num_hidden_layers=1, vocab_size=320
    )
    config.architectures = ["GitForCausalLM"]
    config.save_pretrained(tmp_path)
    architecture = Architecture(tmp_path, trust_remote_code=False)
    query = architecture.parameter("git.encoder.layer.0.attention.self.query.weight")
    seen = architecture.parameter("git.visual_projection.visual_projection.0.weight")
    assert query and query.kind == "linear" and not query.keep_reason
    assert seen and seen.keep_reason == "not of the language model (git.visual_projection)"


@pytest.mark.fault(
    "model",
    "The model needs a picture, and its language model cannot be told from the rest",
    "Exit 3.",
)
def test_a_model_that_needs_a_picture_and_has_no_language_model_of_its_own_is_refused(
    tmp_path: Path,
) -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = transformers.BlipConfig(text_config=sizes, vision_config=sizes)
    config.architectures = ["BlipForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="does not tell its language model from the rest"):
        Architecture(tmp_path, trust_remote_code=False)


def test_what_an_architecture_makes_in_float32_stays_so(tmp_path: Path) -> None:
    config = transformers.OlmoHybridConfig(**models.SIZES)
    config.architectures = ["OlmoHybridForCausalLM"]
    config.save_pretrained(tmp_path)
    architecture = Architecture(tmp_path, trust_remote_code=False)
    layer = "model.layers.0.linear_attn"
    assert architecture.stored_dtype(f"{layer}.A_log", torch.float16) == torch.float32
    assert architecture.stored_dtype(f"{layer}.q_proj.weight", torch.float16) == torch.float16
