"""How to load a variant follows from its scheme, whatever the scheme is called."""

import ast
from typing import ClassVar

import pytest
import torch
from torchao.quantization import Int4Tensor

from smolquant.record import TensorRecord
from smolquant.report.snippets import (
    cautions,
    loading,
    loading_code,
    main_model_program,
    needs,
)
from smolquant.schemes import SCHEMES, Scheme
from smolquant.schemes.int8_weight_only import Int8WeightOnly


class Stock(Int8WeightOnly):
    variant: ClassVar = "toy"


class WithKernel(Stock):
    variant: ClassVar = "other_toy"
    stock_loads: ClassVar = False
    caution: ClassVar = "Mind this."


def code(fenced: str) -> str:
    text = fenced.removeprefix("```python\n").removesuffix("\n```")
    ast.parse(text)
    return text


def test_what_stock_transformers_loads_needs_nothing_of_ours() -> None:
    shown = loading(Stock(), "you/tiny")
    (way,) = shown.ways
    assert way.lead == ""
    assert 'from_pretrained("you/tiny", subfolder="toy", device_map="auto")' in code(way.program)
    assert "smolquant" not in f"{shown.install}{way.program}{loading_code(Stock(), 'you/tiny')}"


def test_what_needs_our_kernel_is_loaded_with_smolquant_first() -> None:
    shown = loading(WithKernel(), "you/tiny")
    ours, registered = shown.ways
    assert shown.install == "```sh\npip install smolquant\n```"
    assert 'smolquant.load("you/tiny", variant="other_toy")' in code(ours.program)
    assert code(registered.program).startswith("import smolquant.torchao\n")
    assert 'subfolder="other_toy", device_map="cpu"' in registered.program
    assert "other_toy" in registered.lead
    assert code(loading_code(WithKernel(), "you/tiny")) in code(ours.program)


def test_a_caution_is_said_once_for_all_that_share_it() -> None:
    assert cautions([(Stock(), {}), (WithKernel(), {}), (WithKernel(), {})]) == [
        (["other_toy", "other_toy"], "Mind this.")
    ]
    assert cautions([(Stock(), {})]) == []


def stack(*, transposed: bool = False) -> dict[str, TensorRecord]:
    record = TensorRecord(True, 8, 4, kind="expert", made_of=16, experts=8, transposed=transposed)
    return {"model.layers.0.mlp.experts.gate_up_proj": record}


def test_experts_that_torchao_has_no_kernel_for_are_loaded_with_smolquant_alone() -> None:
    shown = loading(Stock(), "you/tiny", tensors=stack(transposed=True))
    (way,) = shown.ways
    assert 'smolquant.load("you/tiny", variant="toy")' in code(way.program)
    assert "smolquant.load" in loading_code(Stock(), "you/tiny", tensors=stack(transposed=True))
    assert loading(Stock(), "you/tiny", tensors=stack()) == loading(Stock(), "you/tiny")
    assert needs(Stock(), stack(transposed=True)) == "smolquant"
    assert needs(Stock(), stack()) == needs(Stock(), {}) == Stock.loading


def test_a_card_says_how_experts_run() -> None:
    one_by_one = cautions([(Stock(), stack())])
    assert [names for names, _ in one_by_one] == [["toy"]]
    assert "eager" in one_by_one[0][1]
    assert len(cautions([(Stock(), stack(transposed=True))])) == 2


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=list(SCHEMES))
def test_only_what_smolquant_has_a_kernel_for_is_said_to_need_it(scheme: Scheme) -> None:
    """`import smolquant.torchao` gives `Int4Tensor` a linear for the CPU, and nothing else."""
    weight = torch.empty(64, 128, dtype=torch.bfloat16, device="meta")
    needs_it = isinstance(scheme.quantize(weight, 128), Int4Tensor)
    assert scheme.stock_loads != needs_it


@pytest.mark.parametrize("scheme", [Stock(), WithKernel()])
def test_a_model_that_sees_is_loaded_with_its_processor_and_asked_about_a_picture(
    scheme: Scheme,
) -> None:
    shown = loading(scheme, "you/tiny", "image-text-to-text")
    for way in shown.ways:
        assert "processor.apply_chat_template(" in code(way.program)
        assert '"type": "image"' in way.program
        assert "tokenizer" not in way.program.replace("tokenize=True", "")
    stock = shown.ways[-1].program
    assert "AutoModelForImageTextToText, AutoProcessor" in stock
    assert "pillow torchvision" in shown.install
    assert code(loading_code(scheme, "you/tiny", "image-text-to-text")) in code(
        shown.ways[0].program
    )
    assert "AutoModelForImageTextToText" in main_model_program("you/tiny", "image-text-to-text")
