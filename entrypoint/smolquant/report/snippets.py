"""Instructions for loading a variant by its scheme: what to install, and code that runs as it stands."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from smolquant.record import IMAGE_TEXT_TO_TEXT, TEXT_GENERATION, TensorRecord
from smolquant.schemes import Scheme
from smolquant.text import Markdown, code_block

_PICTURE = (
    "https://huggingface.co/datasets/huggingface/documentation-images/resolve/main/"
    "pipeline-cat-chonk.jpeg"
)


@dataclass(frozen=True)
class _Kind:
    """What code for a model depends on beside its scheme: transformers' classes, and how it is asked."""

    auto_class: str
    reader_class: str
    reader: str
    """The variable that holds what turns a question into the model's input."""
    packages: str
    """What the reader needs beside transformers, each with a space in front."""
    asking: tuple[str, ...]


_TEXT = _Kind(
    "AutoModelForCausalLM",
    "AutoTokenizer",
    "tokenizer",
    "",
    (
        'prompt = tokenizer("The capital of France is", return_tensors="pt").to(model.device)',
        "print(tokenizer.decode(model.generate(**prompt, max_new_tokens=20)[0]))",
    ),
)
_IMAGES = _Kind(
    "AutoModelForImageTextToText",
    "AutoProcessor",
    "processor",
    " pillow torchvision",
    (
        "content = [",
        f'    {{"type": "image", "url": "{_PICTURE}"}},',
        '    {"type": "text", "text": "What is in this picture?"},',
        "]",
        "prompt = processor.apply_chat_template(",
        '    [{"role": "user", "content": content}],',
        "    add_generation_prompt=True,",
        "    tokenize=True,",
        "    return_dict=True,",
        '    return_tensors="pt",',
        ").to(model.device, model.dtype)",
        "print(processor.decode(model.generate(**prompt, max_new_tokens=20)[0]))",
    ),
)


def _kind(task: str) -> _Kind:
    return _IMAGES if task == IMAGE_TEXT_TO_TEXT else _TEXT


@dataclass(frozen=True)
class Way:
    """One way to load a variant."""

    lead: str
    """The sentence that introduces it; empty where there is no other way."""
    program: Markdown
    """Python that loads the variant and answers a prompt."""


@dataclass(frozen=True)
class Loading:
    """All that a card says about loading a variant."""

    install: Markdown
    """The command that installs what it takes."""
    ways: tuple[Way, ...]


Tensors = Mapping[str, TensorRecord]
"""A variant's tensors, as its record lists them."""

_FROM_THE_RIGHT = (
    "Its experts are multiplied from the right, for which torchao has no kernel: load it with smolquant, "
    "which brings one."
)
_ONE_BY_ONE = (
    "Its experts run one after another, as config.json asks for (experts_implementation is eager), since "
    "torchao has no kernels for a whole stack of them. Only experts that a token chooses are computed, and "
    "speeds are measured that way."
)


def loading(
    scheme: Scheme,
    location: str,
    task: str = TEXT_GENERATION,
    tensors: Tensors = MappingProxyType({}),
) -> Loading:
    """How to load the variant of ``scheme`` from ``location``, a Hub id or a folder of variants.

    Args:
        task: what the model is for, see :data:`smolquant.record.Task`.
        tensors: the variant's; where none is given, all are of linear layers.
    """
    kind = _kind(task)
    stock = _stock(kind, location, scheme.variant)
    with_smolquant = Way(
        "Load it with smolquant, which packs the weights for this machine:",
        _program(kind, _smolquant(kind, location, scheme.variant)),
    )
    if _only_smolquant_loads(tensors):
        return Loading(_install("smolquant" + kind.packages), (with_smolquant,))
    if scheme.stock_loads:
        packages = "torch torchao transformers accelerate"
        return Loading(_install(packages + kind.packages), (Way("", _program(kind, stock)),))
    registered = [
        "import smolquant.torchao",
        *_stock(kind, location, scheme.variant, device="cpu"),
    ]
    return Loading(
        _install("smolquant" + kind.packages),
        (
            with_smolquant,
            Way(
                "Or load it with transformers, once smolquant has given torchao's "
                f"{scheme.variant} weights a CPU kernel:",
                _program(kind, registered),
            ),
        ),
    )


def loading_code(
    scheme: Scheme,
    location: str,
    task: str = TEXT_GENERATION,
    tensors: Tensors = MappingProxyType({}),
) -> Markdown:
    """The lines that load the variant of ``scheme``, without a prompt."""
    by_stock = scheme.stock_loads and not _only_smolquant_loads(tensors)
    lines = _stock if by_stock else _smolquant
    return _python(lines(_kind(task), location, scheme.variant))


def main_model_program(location: str, task: str = TEXT_GENERATION) -> Markdown:
    """Python that loads the unquantized model and answers a prompt."""
    return _program(_kind(task), _stock(_kind(task), location, None))


def cautions(variants: Iterable[tuple[Scheme, Tensors]]) -> list[tuple[list[str], str]]:
    """What readers have to know before they load: each sentence once, after the variants that it is for."""
    names: dict[str, list[str]] = {}
    for scheme, tensors in variants:
        for caution in cautions_of(scheme, tensors):
            names.setdefault(caution, []).append(scheme.variant)
    return [(variants_of, sentence) for sentence, variants_of in names.items()]


def cautions_of(scheme: Scheme, tensors: Tensors) -> list[str]:
    """What readers have to know before they load one variant, in sentences."""
    sentences = [scheme.caution] if scheme.caution else []
    if _only_smolquant_loads(tensors):
        sentences.append(_FROM_THE_RIGHT)
    if any(tensor.experts is not None for tensor in tensors.values()):
        sentences.append(_ONE_BY_ONE)
    return sentences


def needs(scheme: Scheme, tensors: Tensors) -> str:
    """What it takes to load and run one variant, for the end of a sentence."""
    return "smolquant" if _only_smolquant_loads(tensors) else scheme.loading


def _only_smolquant_loads(tensors: Tensors) -> bool:
    return any(tensor.transposed for tensor in tensors.values())


def _install(packages: str) -> Markdown:
    return code_block(f"pip install {packages}", "sh")


def _smolquant(kind: _Kind, location: str, variant: str) -> list[str]:
    where = f"{_literal(location)}, variant={_literal(variant)}"
    return ["import smolquant", "", f"model, {kind.reader} = smolquant.load({where})"]


def _stock(kind: _Kind, location: str, subfolder: str | None, device: str = "auto") -> list[str]:
    where = _literal(location) + (f", subfolder={_literal(subfolder)}" if subfolder else "")
    return [
        f"from transformers import {kind.auto_class}, {kind.reader_class}",
        "",
        f"{kind.reader} = {kind.reader_class}.from_pretrained({where})",
        f"model = {kind.auto_class}.from_pretrained({where}, device_map={_literal(device)})",
    ]


def _program(kind: _Kind, loading: list[str]) -> Markdown:
    return _python([*loading, "", *kind.asking])


def _python(lines: list[str]) -> Markdown:
    return code_block("\n".join(lines), "python")


def _literal(text: str) -> str:
    return json.dumps(text)  # JSON's strings are Python's too
