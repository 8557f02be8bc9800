"""How to load a variant follows from its scheme and its record, whatever the scheme is called."""

import ast
import re
import shlex
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any, ClassVar

import pytest
import torch
from torchao.quantization import Int4Tensor

from smolquant.record import IMAGE_TEXT_TO_TEXT, TensorRecord, VariantRecord
from smolquant.report.snippets import (
    WIDTH,
    Way,
    cautions,
    folder_location,
    is_folder_location,
    loading,
    loading_code,
    main_model_program,
    needs,
)
from smolquant.schemes import SCHEMES, Scheme
from smolquant.schemes.int8_weight_only import Int8WeightOnly
from unit.report_samples import variant_record


class Stock(Int8WeightOnly):
    variant: ClassVar = "toy"
    vllm_loads: ClassVar = False


class Served(Stock):
    vllm_loads: ClassVar = True


class WithKernel(Stock):
    variant: ClassVar = "other_toy"
    stock_loads: ClassVar = False
    caution: ClassVar = "Mind this."


def made(scheme: Scheme, **changes: Any) -> VariantRecord:
    return replace(variant_record("int8"), variant=scheme.variant, **changes)


def ways(scheme: Scheme, location: str = "you/tiny", **changes: Any) -> dict[str, Way]:
    return {way.library: way for way in loading(scheme, made(scheme, **changes), location)}


def code(fenced: str) -> str:
    text = fenced.removeprefix("```python\n").removesuffix("\n```")
    ast.parse(text)
    return text


def shell(fenced: str) -> list[list[str]]:
    """The words of each command."""
    text = fenced.removeprefix("```sh\n").removesuffix("\n```").replace("\\\n", " ")
    return [shlex.split(line) for line in text.split("\n")]


def test_what_stock_transformers_loads_needs_nothing_of_ours() -> None:
    shown = ways(Stock())
    assert list(shown) == ["transformers", "smolquant"]
    stock = shown["transformers"]
    assert 'repo = "you/tiny"\nvariant = "toy"\n' in code(stock.program)
    assert "subfolder=variant" in stock.program
    alone = loading_code(Stock(), made(Stock()), "you/tiny")
    assert "smolquant" not in f"{stock.install}{stock.program}{alone}"
    assert 'smolquant.load("you/tiny", variant="toy")' in code(shown["smolquant"].program)
    assert shown["smolquant"].install == "```sh\npip install smolquant\n```"


def test_what_needs_our_kernel_is_loaded_with_smolquant_first() -> None:
    shown = ways(WithKernel())
    assert list(shown) == ["smolquant", "transformers"]
    ours, registered = shown.values()
    assert 'smolquant.load("you/tiny", variant="other_toy")' in code(ours.program)
    assert code(registered.program).startswith("import smolquant.torchao\n")
    assert 'device_map="cpu"' in registered.program
    assert registered.install == ours.install == "```sh\npip install smolquant\n```"
    assert "other_toy" in registered.note
    alone = loading_code(WithKernel(), made(WithKernel()), "you/tiny")
    assert code(alone) in code(ours.program)


@pytest.mark.parametrize("scheme", [Stock(), WithKernel()])
def test_a_model_that_chats_is_asked_by_its_template_and_any_other_goes_on_with_a_text(
    scheme: Scheme,
) -> None:
    for way in ways(scheme, has_chat_template=True).values():
        assert "tokenizer.apply_chat_template(" in code(way.program)
        assert "add_generation_prompt=True" in way.program
    for way in ways(scheme, has_chat_template=False).values():
        assert "apply_chat_template" not in way.program
        assert 'tokenizer("The capital of France is"' in code(way.program)
    main = main_model_program("you/tiny", made(scheme, has_chat_template=True))
    assert "apply_chat_template" in code(main)
    assert "apply_chat_template" not in main_model_program("you/tiny", None)


@pytest.mark.parametrize("task", ["text-generation", IMAGE_TEXT_TO_TEXT])
def test_only_the_answer_is_printed(task: str) -> None:
    """What `generate` returns begins with the question."""
    for way in ways(Stock(), task=task).values():
        assert 'start = prompt["input_ids"].shape[1]\n' in way.program
        assert "decode(answer[0, start:], skip_special_tokens=True)" in way.program


def test_a_model_with_code_of_its_own_is_loaded_with_trust_in_it() -> None:
    for way in ways(Served(), runs_own_code=True).values():
        tree = ast.parse(code(way.program))
        loads = [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.Call)
            and getattr(node.func, "attr", "") in ("from_pretrained", "load")
        ]
        assert loads
        for call in loads:
            assert "trust_remote_code" in [keyword.arg for keyword in call.keywords]
        assert way.library != "vLLM", "which finds no code above a subfolder"
    own = main_model_program("you/tiny", made(Stock(), runs_own_code=True))
    assert own.count("trust_remote_code=True") == 2
    assert "trust_remote_code" not in ways(Stock())["transformers"].program


LONGEST = f"an-organization-with-a-name/{'A-Model-of-Some-Generation-' * 2}135M-Instruct"


@pytest.mark.parametrize("task", ["text-generation", IMAGE_TEXT_TO_TEXT])
@pytest.mark.parametrize("chats", [True, False])
@pytest.mark.parametrize("own_code", [True, False])
@pytest.mark.parametrize("scheme", [Served(), WithKernel()])
def test_no_line_is_wider_than_a_card(
    scheme: Scheme, own_code: bool, chats: bool, task: str
) -> None:
    changes = {"runs_own_code": own_code, "has_chat_template": chats, "task": task}
    for location in ("you/tiny", "./quantized", LONGEST):
        for way in ways(scheme, location, tensors=linear(), **changes).values():
            for line in f"{way.install}\n{way.program}".split("\n"):
                # What cannot be broken, such as the model's own name, may be longer.
                assert len(line) <= WIDTH or (location == LONGEST and LONGEST[28:] in line), line


def linear(**others: TensorRecord) -> dict[str, TensorRecord]:
    weights = {f"layers.{n}.q_proj.weight": TensorRecord(True, 8, 4, kind="linear") for n in "01"}
    kept = {"embed.weight": TensorRecord(False, 8, 8, reason="embedding", kind="embedding")}
    return weights | kept | others


def test_vllm_is_given_the_folder_since_it_knows_no_subfolders() -> None:
    vllm = ways(Served(), tensors=linear())["vLLM"]
    assert shell(vllm.program) == [
        ["hf", "download", "you/tiny", "--include", "toy/*", "--local-dir", "tiny"],
        ["vllm", "serve", "tiny/toy"],
    ]
    assert "no subfolders" in vllm.note
    assert "SGLang" in vllm.note
    here = ways(Served(), "./my variants", tensors=linear())["vLLM"]
    assert shell(here.program) == [["vllm", "serve", "./my variants/toy"]]


def test_vllm_is_given_the_branch_where_there_is_one() -> None:
    shown = loading(Served(), made(Served(), tensors=linear()), "you/tiny", has_branch=True)
    vllm = {way.library: way for way in shown}["vLLM"]
    assert shell(vllm.program) == [["vllm", "serve", "you/tiny", "--revision", "toy"]]
    assert "serve the branch toy" in vllm.note
    longest = loading(Served(), made(Served(), tensors=linear()), LONGEST, has_branch=True)
    assert longest[-1].program.endswith("--revision toy\n```")


@pytest.mark.parametrize(
    "changes",
    [
        {"task": IMAGE_TEXT_TO_TEXT},
        {"tensors": linear(lm_head=TensorRecord(True, 8, 4, kind="output head"))},
        {"tensors": linear(k_proj=TensorRecord(False, 8, 8, reason="--skip", kind="linear"))},
        {"tensors": linear(experts=TensorRecord(True, 8, 4, kind="expert", experts=4))},
        {"tensors": {"older": TensorRecord(True, 8, 4)}},
    ],
    ids=["pictures", "a quantized table", "a weight kept", "experts", "a record without kinds"],
)
def test_vllm_is_not_named_where_it_cannot_load_the_weights(changes: dict[str, Any]) -> None:
    assert "vLLM" not in ways(Served(), **changes)


def test_vllm_is_named_only_of_a_scheme_that_it_reads() -> None:
    assert "vLLM" not in ways(Stock(), tensors=linear())


@pytest.mark.parametrize(
    ("location", "folder"),
    [
        ("you/tiny", False),
        (folder_location(PurePosixPath("quantized")), True),
        (folder_location(PurePosixPath("out/quantized")), True),
        (folder_location(PurePosixPath("/data/quantized")), True),
        ('C:\\odd "folder"', True),
    ],
)
def test_a_folder_is_not_taken_for_a_repository(location: str, folder: bool) -> None:
    assert is_folder_location(location) == folder
    program = ways(Stock(), location)["transformers"].program
    assert ("\nfolder = " in program) == folder


def test_a_caution_is_said_once_for_all_that_share_it() -> None:
    assert cautions([(Stock(), {}), (WithKernel(), {}), (WithKernel(), {})]) == [
        (["other_toy", "other_toy"], "Mind this.")
    ]
    assert cautions([(Stock(), {})]) == []


def stack(*, transposed: bool = False) -> dict[str, TensorRecord]:
    record = TensorRecord(True, 8, 4, kind="expert", made_of=16, experts=8, transposed=transposed)
    return {"model.layers.0.mlp.experts.gate_up_proj": record}


def test_experts_that_torchao_has_no_kernel_for_are_loaded_with_smolquant_alone() -> None:
    (way,) = ways(Stock(), tensors=stack(transposed=True)).values()
    assert 'smolquant.load("you/tiny", variant="toy")' in code(way.program)
    record = made(Stock(), tensors=stack(transposed=True))
    assert "smolquant.load" in loading_code(Stock(), record, "you/tiny")
    assert ways(Stock(), tensors=stack()) == ways(Stock())
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
    shown = ways(scheme, task=IMAGE_TEXT_TO_TEXT)
    for way in shown.values():
        assert "processor.apply_chat_template(" in code(way.program)
        assert '"type": "image"' in way.program
        assert "tokenizer" not in way.program.replace("tokenize=True", "")
    assert "AutoModelForImageTextToText, AutoProcessor" in shown["transformers"].program
    assert "pillow torchvision" in shown["transformers"].install
    record = made(scheme, task=IMAGE_TEXT_TO_TEXT)
    first = next(iter(shown.values()))
    assert code(loading_code(scheme, record, "you/tiny")) in code(first.program)
    assert "AutoModelForImageTextToText" in main_model_program("you/tiny", record)
    picture = re.search(r"picture = (\(.*?\n\))", first.program, re.DOTALL)
    assert picture
    assert ast.literal_eval(picture[1]).endswith("/resolve/main/pipeline-cat-chonk.jpeg")
