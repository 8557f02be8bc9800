"""Variants on a GPU: loaded, computed, compiled and measured there, beside what a CPU makes of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

import smolquant
from command import run_smolquant
from smolquant.runtime.kernels import has_kernels, kernels
from smolquant.runtime.load import load_for_checking
from smolquant.runtime.packing import pack_for_cuda
from smolquant.schemes import BY_VARIANT, SCHEMES
from stored_values import stored_values

pytestmark = pytest.mark.gpu

MOST_OFF = 0.05
"""Of logits: what kernels that round to bfloat16 elsewhere, and activations to 8 bits, may differ by."""


def predicted(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 43).unsqueeze(0).to(model.device)
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found.float().cpu()


def loaded(variants: Path, variant: str, device: str) -> Any:
    if not has_kernels(BY_VARIANT[variant], device):
        pytest.skip(f"{variant} has no kernels on this device")
    model, _ = smolquant.load(variants, variant, device=device)
    return model


def on_the_cpu(variants: Path, variant: str) -> torch.Tensor:
    """With plain weights where a CPU has no kernel."""
    if has_kernels(BY_VARIANT[variant], "cpu"):
        return predicted(loaded(variants, variant, "cpu"))
    model, _ = load_for_checking(variants, variant, report=lambda told: None)
    return predicted(model.to("cpu"))


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert torch.isfinite(found).all()
    error = float((found - wanted).norm() / wanted.norm())
    assert error < MOST_OFF, error


@pytest.mark.parametrize("variant", BY_VARIANT)
def test_a_variant_predicts_on_a_gpu_what_it_does_on_a_cpu(
    variants: Path, variant: str, device: str
) -> None:
    model = loaded(variants, variant, device)
    assert model.device.type == device
    assert_close(predicted(model), on_the_cpu(variants, variant))


@pytest.mark.parametrize("variant", BY_VARIANT)
def test_a_variant_writes_text_on_a_gpu(variants: Path, variant: str, device: str) -> None:
    model = loaded(variants, variant, device)
    prompts = torch.arange(3, 43).view(2, 20).to(device)
    written = model.generate(prompts, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert written.shape == (2, 28)
    alone = model.generate(prompts[:1], max_new_tokens=1, min_new_tokens=1, do_sample=False)
    assert torch.equal(alone[0, :20], written[0, :20])


@pytest.mark.parametrize("variant", BY_VARIANT)
def test_the_kernel_is_that_of_the_registry(variants: Path, variant: str, cuda: str) -> None:
    model = loaded(variants, variant, cuda)
    used = {told.partition(" (")[0] for told in kernels(model).values()}
    assert used, "no weight is a stored one"
    assert not any("CPU" in told or "smolquant" in told or "plain" in told for told in used), used


@pytest.mark.parametrize("group", [32, 64, 128, 256])
@pytest.mark.parametrize(("rows", "columns"), [(8, 1024), (48, 256), (33, 1280), (100, 2048)])
def test_int4_in_tiles_is_what_is_stored(cuda: str, rows: int, columns: int, group: int) -> None:
    """Sizes that the kernel's tiles divide, and those that are padded."""
    torch.manual_seed(rows)
    weight = (torch.randn(rows, columns) * 0.05 + 0.02).bfloat16()
    stored: Any = SCHEMES["int4_weight_only"].quantize(weight, group)
    inputs = torch.randn(5, columns).bfloat16()
    output = functional.linear(inputs.to(cuda), pack_for_cuda(stored.to(cuda)))
    assert_close(output.float().cpu(), inputs.float() @ stored_values(stored).t())


@pytest.mark.parametrize("variant", BY_VARIANT)
def test_a_compiled_variant_predicts_the_same(variants: Path, variant: str, cuda: str) -> None:
    model = loaded(variants, variant, cuda)
    eager = predicted(model)
    torch.compiler.reset()
    model.forward = torch.compile(model.forward)
    assert_close(predicted(model), eager)


def test_the_command_quantizes_and_measures_on_a_gpu(
    source: Path, tmp_path: Path, device: str
) -> None:
    """The same bytes as on a CPU, and numbers that agree with those measured there."""
    measured: dict[str, Any] = {}
    for where in ("cpu", device):
        folder = tmp_path / where
        folder.mkdir(exist_ok=True)
        asked = ["--device", where, "--evaluate", "always", "--eval-tokens", "512"]
        types = ["--quant-type", ",".join(SCHEMES), "--int4-method", "rtn", "--group-size", "32"]
        run = run_smolquant("quantize", source, "--save-only", *asked, *types, folder=folder)
        assert run.exit_code == 0, run.log
        measured[where] = run
    of_cpu = measured["cpu"].report["variants"]
    for variant, told in measured[device].report["variants"].items():
        weights = [
            (tmp_path / where / "quantized" / variant / "model.safetensors").read_bytes()
            for where in ("cpu", device)
        ]
        assert weights[0] == weights[1], variant
        ours, theirs = told["metrics"], of_cpu[variant]["metrics"]
        assert ours["perplexity"] == pytest.approx(theirs["perplexity"], rel=0.02), variant
        if has_kernels(BY_VARIANT[variant], device):
            assert ours["tokens_per_second"] > 0
