"""Linear layers from stored bytes: every loop that this CPU can run, against float64."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch.nn import functional

from smolquant.runtime import cpu_linear, many_tokens
from smolquant.runtime.compiled import INT4, Stored, library
from smolquant.runtime.cpu_linear import Linears, few_tokens
from smolquant.schemes import SCHEMES
from smolquant.schemes.int4_packing import pack_int4, unpack_int4

ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-22}
"""The most that rounding an output to a dtype changes it by, as a share of it."""

WHOLE_NUMBERS = 2.0**-13
"""What whole numbers of 16 bits leave of inputs, as a share of an output that is as large as they are."""

ROUNDED_WEIGHTS = 2.0**-9
"""What rounding each weight to bfloat16 changes an output by, as a share of one that is as large as they
are: torch's products of many tokens take weights in the dtype that they multiply in."""

MOST_FEW = few_tokens(INT4)

IN_BFLOAT16 = (compiled := library()) is not None and compiled.level >= 3
"""Whether some of these tokens are multiplied in bfloat16, with int4 weights that are rounded to it."""

FEW_AND_MANY = (1, 3, 4, 6, 8, 13, 29, MOST_FEW, MOST_FEW + 1)


def int8(outputs: int, columns: int, *, dynamic: bool = False) -> Stored:
    levels = torch.randint(-128, 128, (outputs, columns), dtype=torch.int8)
    return Stored(levels, torch.rand(outputs, 1) / 100, dynamic=dynamic)


def int4(outputs: int, columns: int, group: int, dtype: torch.dtype = torch.bfloat16) -> Stored:
    levels = torch.randint(-8, 8, (outputs, columns), dtype=torch.int8)
    scale = torch.rand(outputs, columns // group) / 100
    zero_point = torch.randn(outputs, columns // group) / 30
    return Stored(pack_int4(levels), scale.to(dtype), zero_point.to(dtype))


def weight_of(stored: Stored) -> torch.Tensor:
    """The weight (N, K) that ``stored`` stands for, in float64."""
    if stored.zero_point is None:
        return stored.levels.double() * stored.scale.double()
    levels = unpack_int4(stored.levels).double().view(stored.outputs, -1, stored.group)
    weight = levels * stored.scale.double().unsqueeze(-1) + stored.zero_point.double().unsqueeze(-1)
    return weight.flatten(1)


def assert_close(found: torch.Tensor, exact: torch.Tensor, extra: float = 0.0) -> None:
    error = float((found.double() - exact).norm() / exact.norm())
    assert error < ROUNDING[found.dtype] + extra, error


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("shape", [(1, 8), (33, 40), (70, 576), (64, 8)])
def test_int8_multiplies_with_what_is_stored(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, bias = int8(*shape), torch.randn(shape[0], dtype=dtype)
    for tokens in FEW_AND_MANY:
        inputs = torch.randn(tokens, shape[1], dtype=dtype)
        exact = inputs.double() @ weight_of(weight).t() + bias.double()
        extra = WHOLE_NUMBERS
        if tokens > MOST_FEW:
            extra = ROUNDED_WEIGHTS if dtype == torch.bfloat16 else 1e-6
        assert_close(Linears([(weight, bias)])(inputs)[0], exact, extra)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("group", [32, 64, 128, 256, 512])
def test_int4_multiplies_with_what_is_stored(group: int, dtype: torch.dtype) -> None:
    """Rows of whole vectors of scales, and rows that end within one."""
    torch.manual_seed(0)
    for columns in (group, 3 * group, 1024, 1536):
        weight = int4(45, columns, group, dtype)
        for tokens in FEW_AND_MANY:
            inputs = torch.randn(tokens, columns, dtype=dtype)
            exact = inputs.double() @ weight_of(weight).t()
            rounds = dtype == torch.bfloat16 and (IN_BFLOAT16 or tokens > MOST_FEW) and tokens >= 8
            extra = ROUNDED_WEIGHTS if rounds else WHOLE_NUMBERS
            assert_close(Linears([(weight, None)])(inputs)[0], exact, extra)


def test_inputs_of_very_different_sizes_are_kept_apart() -> None:
    """As models have them: one input thousands of times as large as those of another unit, to which nothing
    of it may be lost; weights of its own unit are 0, so that it does not show in the outputs."""
    torch.manual_seed(0)
    inputs = torch.randn(2, 256)
    inputs[:, 40] = 30000
    eight, four = int8(64, 256), int4(64, 256, 32)
    eight.levels[:, :64] = 0
    four.levels[:, :32], four.scale[:, :2], four.zero_point[:, :2] = 0, 0, 0  # type: ignore[index]
    for weight in (eight, four):
        exact = inputs.double() @ weight_of(weight).t()
        assert_close(Linears([(weight, None)])(inputs)[0], exact, WHOLE_NUMBERS)


def test_dynamic_int8_gives_the_same_bits_for_few_tokens_and_for_many() -> None:
    """The next layer would quantize what one way rounds otherwise to another level. Without products of
    whole numbers, many tokens are rounded as float32 rounds."""
    torch.manual_seed(0)
    linears = Linears([(int8(64, 192, dynamic=True), torch.randn(64))])
    inputs = torch.randn(MOST_FEW + 1, 192)
    one_by_one = torch.cat([linears(inputs[i : i + 1])[0] for i in range(len(inputs))])
    tolerance = 0 if many_tokens.HAS_INT8 else 1e-4
    torch.testing.assert_close(one_by_one, linears(inputs)[0], rtol=tolerance, atol=tolerance)


def test_the_prompt_and_its_tokens_one_by_one_agree() -> None:
    """Both ways compute with the same weights, whatever each rounds."""
    torch.manual_seed(0)
    for weight in (int8(64, 256), int4(64, 256, 32)):
        linears = Linears([(weight, None)])
        inputs = torch.randn(MOST_FEW + 1, 256)
        one_by_one = torch.cat([linears(inputs[i : i + 1])[0] for i in range(len(inputs))])
        assert_close(one_by_one, linears(inputs)[0].double(), WHOLE_NUMBERS)


def test_inputs_of_another_layer_are_refused() -> None:
    """They would be read, and outputs written, beyond the end of what there is."""
    weight = int8(40, 64)
    for inputs in (torch.randn(1, 128), torch.randn(1, 32), torch.randn(MOST_FEW + 1, 128)):
        with pytest.raises(ValueError, match=r"columns .* weight has 64"):
            Linears([(weight, None)])(inputs)
        with pytest.raises(ValueError, match="weight has 64"):
            cpu_linear.linear(inputs, weight, None)


def test_what_torch_makes_by_default_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    kinds = [int8(40, 64), int8(40, 64, dynamic=True), int4(40, 64, 32)]
    inputs = [torch.randn(tokens, 64) for tokens in (2, MOST_FEW + 1)]
    wanted = [Linears([(weight, None)])(some)[0] for weight in kinds for some in inputs]
    monkeypatch.setattr(many_tokens, "_room", many_tokens._Room())
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device("meta")
    try:
        found = [Linears([(weight, None)])(some)[0] for weight in kinds for some in inputs]
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("size", [0.0, 1e-44, 1e-36])
def test_inputs_of_nothing_give_the_bias(size: float) -> None:
    bias = torch.randn(45)
    for weight in (int8(45, 64), int8(45, 64, dynamic=True), int4(45, 64, 32)):
        output = Linears([(weight, bias)])(torch.full((2, 64), size))[0]
        torch.testing.assert_close(output, bias.expand(2, -1), rtol=0, atol=1e-30)


@pytest.mark.parametrize("dtype", ROUNDING)
def test_dynamic_int8_quantizes_tokens_as_torchao_does(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = torch.randn(70, 200, dtype=dtype)
    stored: Any = SCHEMES["int8_dynamic"].quantize(plain, None)
    weight = Stored(stored.qdata, stored.scale, dynamic=True)
    for tokens in FEW_AND_MANY:
        inputs = torch.randn(tokens, 200, dtype=dtype)
        wanted = functional.linear(inputs, stored)
        assert_close(Linears([(weight, None)])(inputs)[0], wanted.double(), ROUNDING[dtype])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_without_an_end_is_not_hidden(value: float, dtype: torch.dtype) -> None:
    """One input that is infinite or none shows in all outputs of its token, and in no other's."""
    for weight in (int8(32, 64), int8(32, 64, dynamic=True), int4(32, 64, 32)):
        for tokens in (2, MOST_FEW, MOST_FEW + 1):
            inputs = torch.ones(tokens, 64, dtype=dtype)
            inputs[1, 5] = value
            output = Linears([(weight, None)])(inputs)[0]
            assert output[0].isfinite().all()
            assert not output[1].isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("part", ["int8", "int8_dynamic", "int4", "zero point"])
def test_a_damaged_scale_is_not_hidden(part: str, dtype: torch.dtype) -> None:
    if part.startswith("int8"):
        weight = int8(32, 64, dynamic=part == "int8_dynamic")
    else:
        weight = int4(32, 64, 32, torch.float32)
    damaged = weight.zero_point if part == "zero point" else weight.scale
    assert damaged is not None
    damaged.view(torch.int32)[3] = -1  # all bits set, as erased storage has them
    for tokens in (2, 17, MOST_FEW, MOST_FEW + 1):
        output = Linears([(weight, None)])(torch.ones(tokens, 64, dtype=dtype))[0]
        assert output[:, 3].isnan().all()
        assert output[:, :3].isfinite().all()


def test_layers_with_the_same_inputs_are_computed_together() -> None:
    torch.manual_seed(0)
    for quant_type in ("int8", "int4"):
        layers = [
            (int8(n, 96) if quant_type == "int8" else int4(n, 96, 32), torch.randn(n))
            for n in (70, 5, 32)
        ]
        for tokens, tolerance in ((3, 0.0), (MOST_FEW, 1e-5)):  # torch's products may differ
            inputs = torch.randn(2, tokens, 96)
            together = Linears(layers)(inputs)
            for layer, output in zip(layers, together, strict=True):
                alone = Linears([layer])(inputs)[0]
                torch.testing.assert_close(output, alone, rtol=tolerance, atol=tolerance)


def test_what_is_too_large_to_be_widened_at_once_is_widened_in_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    inputs, bias = torch.randn(MOST_FEW + 1, 96), torch.randn(70)
    for weight in (int8(70, 96), int8(70, 96, dynamic=True), int4(70, 96, 32)):
        whole = Linears([(weight, bias)])(inputs)[0]
        for rows in (1, 32):
            monkeypatch.setattr(many_tokens, "_BLOCK_BYTES", rows * 96 * 4)
            torch.testing.assert_close(Linears([(weight, bias)])(inputs)[0], whole)
        monkeypatch.undo()


def test_threads_do_not_share_their_room() -> None:
    """A server computes for several users at once, each in a thread, in and out of inference mode."""
    torch.manual_seed(0)
    weights = [int8(256, 512), int4(256, 512, 32)]
    inputs = torch.randn(MOST_FEW + 1, 512, dtype=torch.bfloat16)
    with torch.inference_mode():
        wanted = [Linears([(weight, None)])(inputs)[0] for weight in weights]

    def wrong(which: int) -> int:
        linears = Linears([(weights[which], None)])
        return sum(not torch.equal(linears(inputs)[0], wanted[which]) for _ in range(200))

    with ThreadPoolExecutor() as pool:
        assert list(pool.map(wrong, (0, 1, 0, 1))) == [0] * 4


def test_inputs_need_not_lie_in_a_row() -> None:
    weight, inputs = int8(40, 64), torch.randn(64, 3).t()
    assert not inputs.is_contiguous()
    assert torch.equal(
        Linears([(weight, None)])(inputs)[0], Linears([(weight, None)])(inputs.clone())[0]
    )


def test_one_thread_gives_the_bits_of_many() -> None:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    for weight in (int8(333, 256), int4(333, 256, 64)):
        inputs = torch.randn(5, 256)
        outputs = []
        for count in (1, 3):
            torch.set_num_threads(count)
            outputs.append(Linears([(weight, None)])(inputs)[0])
        torch.set_num_threads(threads)
        assert torch.equal(*outputs)


def test_torch_compile_calls_it_as_one_operation() -> None:
    weight, inputs = int4(40, 64, 32), torch.randn(2, 64)

    def layer(inputs: torch.Tensor) -> torch.Tensor:
        return cpu_linear.linear(inputs, weight, None) + 1

    compiled: Any = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(inputs), layer(inputs))


LEVELS = ["default", "avx2", "avx512"]
HERE = torch.backends.cpu.get_cpu_capability().lower()
LESSER = LEVELS[: LEVELS.index(HERE)] if HERE in LEVELS else []


@pytest.mark.parametrize("capability", LESSER)
def test_every_lesser_level_of_vectors_computes_the_same(capability: str) -> None:
    """This file's tests once more, as on a lesser CPU."""
    environ = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", __file__],
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
