"""``smolquant.load`` takes what ``from_pretrained`` takes, and says why where it cannot."""

import importlib
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    Gemma3Config,
    LlamaConfig,
    Qwen3_5Config,
)

import smolquant
from command import run_smolquant
from localhub import LocalHub
from models import FAMILIES, logits, save_with_tokenizer
from smolquant.check import check
from smolquant.errors import InputError, MachineError
from smolquant.hub import Hub
from smolquant.model.task import auto_class
from smolquant.runtime import load as loading
from smolquant.schemes import BY_VARIANT, SCHEMES

ON_A_CPU = [name for name, scheme in BY_VARIANT.items() if scheme.cuda_capability is None]
DTYPES = ["auto", torch.bfloat16, torch.float16, torch.float32, "float16"]


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("variants")
    source = save_with_tokenizer(folder / "source", FAMILIES["llama"]())
    types = ",".join(SCHEMES)
    run = run_smolquant("quantize", source, "--save-only", "--quant-type", types, folder=folder)
    assert run.exit_code == 0, run.log
    yield folder / "quantized"


@pytest.mark.parametrize("variant", ON_A_CPU)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_computes_or_is_refused_with_the_reason(
    variants: Path, variant: str, dtype: Any
) -> None:
    as_stored = dtype in ("auto", torch.bfloat16)
    if BY_VARIANT[variant].computes_as_stored and not as_stored:
        with pytest.raises(
            InputError, match=rf"{variant} cannot compute in float\d\d: .* bfloat16"
        ):
            smolquant.load(variants, variant, device="cpu", dtype=dtype)
        return
    model, _ = smolquant.load(variants, variant, device="cpu", dtype=dtype)
    expected = {"auto": torch.bfloat16, "float16": torch.float16}.get(dtype, dtype)
    assert model.dtype == expected
    with torch.no_grad():
        raw = model(torch.arange(3, 43).unsqueeze(0)).logits
    assert raw.dtype == expected
    assert torch.isfinite(raw).all()


@pytest.mark.parametrize("variant", ON_A_CPU)
def test_what_was_loaded_is_saved_as_it_was_published(
    variants: Path, variant: str, tmp_path: Path
) -> None:
    """After it has run, too. What this CPU runs with plain weights is saved, and called, plain."""
    model, tokenizer = smolquant.load(variants, variant, device="cpu")
    wanted = logits(model)
    model.save_pretrained(tmp_path / variant)
    tokenizer.save_pretrained(tmp_path / variant)
    saved = load_file(tmp_path / variant / "model.safetensors")
    published = load_file(variants / variant / "model.safetensors")
    if "quantization_config" in json.loads((tmp_path / variant / "config.json").read_text()):
        assert saved.keys() == published.keys()
        assert all(torch.equal(saved[name], published[name]) for name in saved)
    else:
        assert BY_VARIANT[variant].computes_as_stored
    assert torch.equal(logits(smolquant.load(tmp_path, variant, device="cpu")[0]), wanted)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), wanted)


@pytest.mark.parametrize("variant", [name for name in ON_A_CPU if name.startswith("int")])
def test_what_stock_transformers_loaded_is_saved_as_it_was_published(
    variants: Path, variant: str, tmp_path: Path
) -> None:
    importlib.import_module("smolquant.torchao")
    model = AutoModelForCausalLM.from_pretrained(variants, subfolder=variant)
    wanted = logits(model)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), wanted)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    published = load_file(variants / variant / "model.safetensors")
    assert saved.keys() == published.keys()
    assert all(torch.equal(saved[name], published[name]) for name in saved)


def test_each_weight_is_read_by_its_own_metadata(
    variants: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With that of all weights for each, a model of many small layers took seconds to load."""
    upstream = vars(importlib.import_module("transformers.integrations.torchao"))
    read = upstream["unflatten_tensor_state_dict"]
    given: list[set[str]] = []

    def noted(tensors: Any, metadata: Any) -> Any:
        given.append(set(metadata))
        return read(tensors, metadata)

    monkeypatch.setitem(upstream, "unflatten_tensor_state_dict", noted)
    model, _ = smolquant.load(variants, "int8", device="cpu")
    assert len(given) == len(smolquant.kernels(model))
    assert all(len(names - {"tensor_names"}) == 1 for names in given)


@pytest.mark.parametrize("variant", ON_A_CPU)
def test_a_dequantized_model_is_saved_as_a_plain_one(
    variants: Path, variant: str, tmp_path: Path
) -> None:
    model, _ = smolquant.load(variants, variant, device="cpu")
    wanted = logits(model)
    plain: Any = smolquant.dequantize(model)
    plain.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not hasattr(plain.config, "quantization_config")
    found = logits(plain)
    assert float((found - wanted).norm() / wanted.norm()) < 0.1


@pytest.mark.parametrize("variant", ON_A_CPU)
@pytest.mark.parametrize("how", ["static cache", "assistant"])
def test_it_generates_the_same_in_every_way(variants: Path, variant: str, how: str) -> None:
    """In float32, where no word is as likely as another. Both ways may warn of what they do without."""
    computes_as_stored = BY_VARIANT[variant].computes_as_stored
    options: dict[str, Any] = {} if computes_as_stored else {"dtype": torch.float32}
    model: Any = smolquant.load(variants, variant, device="cpu", **options)[0]
    ids = torch.arange(3, 23).unsqueeze(0)
    asked: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "attention_mask": ids > 0}
    wanted = model.generate(ids, **asked)
    if how == "assistant":
        asked["assistant_model"], _ = smolquant.load(variants, "int8", device="cpu", **options)
    else:
        asked |= {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(model.generate(ids, **asked), wanted)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}, torch.device("cpu")], ids=str)
@pytest.mark.parametrize("variant", ON_A_CPU)
def test_a_device_map_places_the_model_and_its_kernels(
    variants: Path, variant: str, device_map: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    by_device, _ = smolquant.load(variants, variant, device="cpu")
    options: dict[str, Any] = {"max_memory": {"cpu": "4GB"}} if device_map == "auto" else {}
    by_map, _ = smolquant.load(variants, variant, device_map=device_map, **options)
    assert torch.equal(logits(by_map), logits(by_device))


@pytest.mark.fault(
    "input",
    "A variant is tried or loaded that is not there",
    "Exit 2 with those that are, before torch is imported.",
)
def test_what_is_not_in_a_repository_is_refused_with_what_is(
    variants: Path, hub: LocalHub, tmp_path: Path
) -> None:
    hub.create_repo("alice/model")
    files = {f"int8/{path.name}": path for path in (variants / "int8").iterdir()}
    hub.commit("alice/model", files)
    program = (
        "import sys, smolquant\n"
        "from smolquant.errors import InputError\n"
        "for variant in ('int9', 'int4'):\n"
        "    try:\n"
        "        smolquant.load('alice/model', variant)\n"
        "    except InputError as error:\n"
        "        print(error, 'torch' in sys.modules)\n"
    )
    environ = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    ran = subprocess.run(
        [sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=True
    )
    unknown, missing = ran.stdout.splitlines()
    assert "'int9' is not a variant. What alice/model has: int8." in unknown
    assert unknown.endswith("False")
    assert "alice/model has no int4. What alice/model has: int8." in missing


def test_a_place_that_is_nearly_right_is_put_right(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Name alice/model, and int8 as the variant"):
        smolquant.load("alice/model/int8")
    (tmp_path / "int8").mkdir()
    (tmp_path / "int8/quantization.json").write_text("{}")
    with pytest.raises(InputError, match=f"is a variant itself. .* lies in, {tmp_path}"):
        list(check(str(tmp_path / "int8"), Hub(None)))
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved/config.json").write_text("{}")  # as `save_pretrained` leaves it
    with pytest.raises(InputError, match="`from_pretrained` after `import smolquant.torchao`"):
        smolquant.load(tmp_path / "saved", "int4")


def test_two_places_for_one_model_are_refused(variants: Path) -> None:
    with pytest.raises(InputError, match="device='cpu' and device_map='auto' both say"):
        smolquant.load(variants, "int8", device="cpu", device_map="auto")


@pytest.mark.fault(
    "machine",
    "A variant to load needs a GPU",
    "Exit 4's error, with what it needs.",
)
@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, {"a": 0, "b": "cpu"}], ids=str)
def test_what_needs_a_gpu_is_not_placed_on_a_cpu(variants: Path, device_map: Any) -> None:
    (variant,) = set(BY_VARIANT) - set(ON_A_CPU)
    with pytest.raises(MachineError, match="needs a GPU .* and cpu is not one"):
        smolquant.load(variants, variant, device_map=device_map)


def test_the_model_gets_what_is_its_own_and_both_get_what_is_about_files(
    variants: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    told: dict[str, Any] = {}
    own = AutoTokenizer.from_pretrained

    def watched(where: Any, **options: Any) -> Any:
        told.update(options)
        return own(where, **options)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", watched)
    about_files: dict[str, Any] = {
        "cache_dir": str(tmp_path),
        "token": "hf_x",
        "local_files_only": True,
    }
    model, _ = smolquant.load(
        variants, "int8", device="cpu", attn_implementation="eager", **about_files
    )
    assert model.config._attn_implementation == "eager"
    assert told == {
        **about_files,
        "subfolder": "int8",
        "revision": None,
        "trust_remote_code": False,
    }


def test_an_unknown_option_is_an_error_and_not_ignored(variants: Path) -> None:
    with pytest.raises(TypeError, match="no_such_option"):
        smolquant.load(variants, "int8", device="cpu", no_such_option=1)


@pytest.mark.fault(
    "record",
    "A variant to load has code of its own",
    "Without the caller's leave it does not run, and nobody is asked at a prompt.",
)
def test_code_that_may_not_run_is_named_and_nobody_is_asked(
    variants: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "int8").symlink_to(variants / "int8")
    config = json.loads((variants / "int8/config.json").read_text())
    own = tmp_path / "own/int4"
    own.mkdir()
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own_code.OwnConfig"}}
    (own / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("nobody sits there"))
    with pytest.raises(loading.NeedsOwnCode, match="code of its own") as refusal:
        smolquant.load(folder, "int4", device="cpu")
    assert "trust_remote_code=True" in refusal.value.hint
    smolquant.load(folder, "int8", device="cpu")


@pytest.mark.parametrize(
    ("config", "named", "expected"),
    [
        (LlamaConfig(), "LlamaForCausalLM", "AutoModelForCausalLM"),
        (Gemma3Config(), "Gemma3ForConditionalGeneration", "AutoModelForImageTextToText"),
        (Qwen3_5Config(), "Qwen3_5ForConditionalGeneration", "AutoModelForImageTextToText"),
        (LlamaConfig(), None, "AutoModelForCausalLM"),
    ],
)
def test_the_class_that_the_config_names_is_loaded(
    config: Any, named: str | None, expected: str
) -> None:
    config.architectures = [named] if named else None
    assert auto_class(config).__name__ == expected


def test_a_processor_reads_for_a_model_that_takes_images(tmp_path: Path) -> None:
    model: Any = SimpleNamespace(config=Gemma3Config())
    (tmp_path / "int8").mkdir()
    options = {"subfolder": "int8", "trust_remote_code": False, "attn_implementation": "eager"}
    of = loading._text_class
    assert of(tmp_path, model, options).__name__ == "AutoTokenizer"
    (tmp_path / "int8/preprocessor_config.json").write_text("{}")
    assert of(tmp_path, model, options) is AutoProcessor
