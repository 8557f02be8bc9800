"""Packing for the CPU at hand, in blocks of rows."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torchao.quantization import Int4Tensor

from resident import leave_cache, resident_bytes_of
from smolquant.runtime.kernels import use_kernels
from smolquant.schemes import SCHEMES
from stored_values import stored_values

PROGRAM = """
import torch
from torch import nn
from torch.nn import functional
from smolquant.runtime.packing import pack_for_this_cpu
from smolquant.schemes import SCHEMES
from smolquant.schemes.int4_packing import unpack_int4

print(torch.backends.cpu.get_cpu_capability().lower())
for rows in (1, 255, 256, 272, 600):
    weight = SCHEMES["int4_weight_only"].quantize(torch.randn(rows, 64).bfloat16(), 32)
    levels = unpack_int4(weight.qdata).to(torch.int32) + 8
    levels = functional.pad(levels, (0, 0, 0, -rows % 16))
    whole = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels, 1)
    assert torch.equal(pack_for_this_cpu(weight).qdata, whole), rows
"""


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_blocks_of_packed_rows_join_to_the_packed_whole(capability: str) -> None:
    """On every layout: each interleaves another number of rows."""
    strongest = torch.backends.cpu.get_cpu_capability().lower()
    environ = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "ATEN_CPU_CAPABILITY": capability,
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in {capability, strongest}


def test_every_class_on_a_cpu_computes_what_is_stored() -> None:
    """Packed for the CPU or left as it is, a layer multiplies with the weights that its file stands for."""
    torch.manual_seed(0)
    for scheme in SCHEMES.values():
        if scheme.cuda_capability is not None:
            continue
        layer = nn.Linear(64, 48, bias=False, dtype=torch.bfloat16)
        group_size = 32 if "group_size" in scheme.options(32) else None
        stored = scheme.quantize(layer.weight.detach(), group_size)
        layer.weight = nn.Parameter(stored, requires_grad=False)
        exact = stored_values(stored)
        use_kernels(layer)
        inputs = torch.randn(5, 64, dtype=torch.bfloat16)
        wanted = inputs.float() @ exact.t()
        error = (layer(inputs).float() - wanted).norm() / wanted.norm()
        assert error < 0.02, (scheme.variant, float(error))


@pytest.mark.parametrize("quant_type", ["int8_weight_only", "float8_weight_only"])
def test_weights_that_are_tied_stay_one(quant_type: str) -> None:
    table, head = nn.Embedding(64, 32), nn.Linear(32, 64, bias=False)
    stored = SCHEMES[quant_type].quantize(torch.randn(64, 32).bfloat16(), None)
    table.weight = head.weight = nn.Parameter(stored, requires_grad=False)
    use_kernels(nn.ModuleList([table, head]))
    assert table.weight is head.weight


def test_float8_on_a_cpu_is_made_plain_once() -> None:
    layer = nn.Linear(64, 48, bias=False, dtype=torch.bfloat16)
    stored = SCHEMES["float8_weight_only"].quantize(layer.weight.detach(), None)
    layer.weight = nn.Parameter(stored, requires_grad=False)
    use_kernels(layer)
    assert type(layer.weight.data) is torch.Tensor
    assert layer.weight.dtype == torch.bfloat16


def test_loading_int4_keeps_its_scales_once(tmp_path: Path) -> None:
    """They are turned around in memory of their own; those of the mapped file are not needed any more."""
    torch.manual_seed(0)
    file, shape = tmp_path / "model.safetensors", (2048, 4096)
    made: Any = SCHEMES["int4_weight_only"].quantize(torch.randn(shape).bfloat16(), 32)
    parts = {name: getattr(made, name) for name in ("qdata", "scale", "zero_point")}
    save_file(parts, file)
    leave_cache(file)
    mapped = load_file(file)
    stored = Int4Tensor(**mapped, block_size=[1, 32], shape=torch.Size(shape))
    layer = nn.Linear(shape[1], shape[0], bias=False, dtype=torch.bfloat16)
    layer.weight = nn.Parameter(stored, requires_grad=False)
    use_kernels(layer)
    scales = parts["scale"].nbytes + parts["zero_point"].nbytes
    assert resident_bytes_of(file) < scales / 10
    for name, wanted in parts.items():
        assert torch.equal(getattr(layer.weight, name), wanted)
