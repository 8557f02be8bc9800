"""Small models of every family: what is written loads with stock transformers and computes the same."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torchao.quantization import quant_api, quantize_
from transformers import AutoModelForCausalLM
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

import models
import smolquant
from command import run_smolquant
from smolquant.errors import InputError, MachineError
from smolquant.record import VariantRecord
from smolquant.schemes import BY_VARIANT, SCHEMES
from stored_values import stored_values


@pytest.fixture(scope="module", params=list(models.FAMILIES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``checkpoint/`` and all variants of it in ``quantized/``."""
    folder = tmp_path_factory.mktemp(request.param)
    models.save(folder / "checkpoint", models.FAMILIES[request.param]())
    types = ",".join(SCHEMES)
    run = run_smolquant(
        "quantize", "checkpoint", "--save-only", "--quant-type", types, folder=folder
    )
    assert run.exit_code == 0, run.log
    return folder


def in_memory(folder: Path, quant_type: str) -> nn.Module:
    """What torchao's ``quantize_`` gives, applied where transformers' own quantizer would."""
    model = AutoModelForCausalLM.from_pretrained(folder / "checkpoint")
    skips = HfQuantizer.get_modules_to_not_convert(model)
    quantize_(
        model,
        SCHEMES[quant_type].torchao_config(128),
        filter_fn=lambda module, name: (
            isinstance(module, nn.Linear) and should_convert_module(name, skips)
        ),
    )
    return model  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "quant_type", ["int8_weight_only", "int8_dynamic", "float8_weight_only", "float8_dynamic"]
)
def test_what_is_loaded_is_bit_for_bit_what_torchao_makes_in_memory(
    family: Path, quant_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # float8_dynamic's config insists on a GPU, though torch has a slow stand-in for its kernel on the CPU.
    monkeypatch.setattr(quant_api, "_check_hardware_support", lambda granularities: None)
    variant = SCHEMES[quant_type].variant
    stored = AutoModelForCausalLM.from_pretrained(family / "quantized", subfolder=variant)
    expected = in_memory(family, quant_type)

    ours, theirs = dict(stored.named_parameters()), dict(expected.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in theirs.items():
        for part in ("qdata", "scale", "zero_point"):
            if hasattr(parameter, part):
                mine, its = (getattr(weights[name], part) for weights in (ours, theirs))
                assert mine.dtype is its.dtype
                assert torch.equal(mine.view(torch.uint8), its.view(torch.uint8)), f"{name}.{part}"
        assert type(ours[name].data) is type(parameter.data), name
        if type(parameter) is nn.Parameter:
            assert torch.equal(ours[name], parameter), name
    assert torch.equal(models.logits(stored), models.logits(expected))


def test_int4_runs_on_this_cpu_and_computes_with_the_stored_weights(family: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(family / "quantized", subfolder="int4")
    reference = AutoModelForCausalLM.from_pretrained(family / "checkpoint")
    for name, parameter in loaded.named_parameters():
        if type(parameter) is not nn.Parameter:
            module = reference.get_submodule(name.rpartition(".")[0])
            exact = stored_values(parameter)
            module.weight.data = exact.to(module.weight.dtype)
    expected = models.logits(reference)

    model = AutoModelForCausalLM.from_pretrained(family / "quantized", subfolder="int4")
    from smolquant.runtime.kernels import use_kernels

    use_kernels(model)

    got = models.logits(model)
    # The source's own distance is more than ten times this.
    assert (got - expected).norm() / expected.norm() < 0.03


def test_the_record_accounts_for_every_tensor_and_file(family: Path) -> None:
    source = AutoModelForCausalLM.from_pretrained(family / "checkpoint")
    for variant in BY_VARIANT:
        folder = family / "quantized" / variant
        record = VariantRecord.from_json((folder / "quantization.json").read_text())
        assert record.counts.quantized == sum(
            isinstance(module, nn.Linear) and module is not source.get_output_embeddings()
            for module in source.modules()
        )
        for tensor in record.tensors.values():
            assert tensor.quantized == (tensor.relative_error is not None)
            assert tensor.quantized or tensor.reason
        on_disk = {path.name for path in folder.iterdir()}
        assert on_disk == {*record.files, "quantization.json", "README.md"}


@pytest.mark.fault(
    "record",
    "A variant to load is not there",
    "Exit 2's error, with what is.",
)
def test_load_refuses_what_is_not_there(family: Path) -> None:
    with pytest.raises(InputError, match="not a variant"):
        smolquant.load(family / "quantized", variant="int3")
    with pytest.raises(InputError, match="has no int4"):
        smolquant.load(family / "checkpoint", variant="int4")


@pytest.mark.parametrize(
    ("capability", "device"), [(None, None), (None, "cuda"), ((9, 0), "cpu"), ((8, 6), None)]
)
def test_load_refuses_what_the_device_has_no_kernels_for(
    family: Path,
    capability: tuple[int, int] | None,
    device: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before anything is loaded; what a GPU is asked is all that is made up here."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    with pytest.raises(MachineError, match=r"float8_dynamic needs a GPU .* 8\.9 or more, and c"):
        smolquant.load(family / "quantized", variant="float8_dynamic", device=device)
