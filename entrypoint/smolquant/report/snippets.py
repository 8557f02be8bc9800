"""Instructions for loading a variant by its scheme: what to install, and code that runs as it stands."""

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from smolquant.record import IMAGE_TEXT_TO_TEXT, TEXT_GENERATION, TensorRecord, VariantRecord
from smolquant.schemes import Scheme
from smolquant.text import Markdown, code_block

WIDTH = 80
"""Characters of a line that a card shows without a scroll bar."""
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
    """Code that makes ``prompt``, the model's input."""


_COMPLETION = _Kind(
    "AutoModelForCausalLM",
    "AutoTokenizer",
    "tokenizer",
    "",
    ('prompt = tokenizer("The capital of France is", return_tensors="pt")',),
)
_CHAT = _Kind(
    "AutoModelForCausalLM",
    "AutoTokenizer",
    "tokenizer",
    "",
    (
        'messages = [{"role": "user", "content": "What is the capital of France?"}]',
        "prompt = tokenizer.apply_chat_template(",
        '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
        ")",
    ),
)
_IMAGES = _Kind(
    "AutoModelForImageTextToText",
    "AutoProcessor",
    "processor",
    " pillow torchvision",
    (
        "picture = (",
        *(f'    "{part}"' for part in _PICTURE.replace("/resolve", "\n/resolve").split("\n")),
        ")",
        "content = [",
        '    {"type": "image", "url": picture},',
        '    {"type": "text", "text": "What is in this picture?"},',
        "]",
        "prompt = processor.apply_chat_template(",
        '    [{"role": "user", "content": content}],',
        "    add_generation_prompt=True,",
        "    tokenize=True,",
        "    return_dict=True,",
        '    return_tensors="pt",',
        ")",
    ),
)


def _kind(record: VariantRecord) -> _Kind:
    if record.task == IMAGE_TEXT_TO_TEXT:
        return _IMAGES
    return _CHAT if record.has_chat_template else _COMPLETION


@dataclass(frozen=True)
class Way:
    """One way to load a variant."""

    library: str
    """What loads it, as people write it."""
    note: str
    """The sentence that introduces it; empty where nothing has to be said."""
    install: Markdown
    """The command that installs what it takes."""
    program: Markdown
    """Python, or for a server a shell's commands."""


_FROM_THE_RIGHT = (
    "Its experts are multiplied from the right, for which torchao has no kernel: load it with smolquant, "
    "which brings one."
)
_ONE_BY_ONE = (
    "Its experts run one after another, as config.json asks for (experts_implementation is eager), since "
    "torchao has no kernels for a whole stack of them. Only experts that a token chooses are computed, and "
    "speeds are measured that way."
)
_KERNELS = "smolquant computes with this machine's kernels."
_NO_SUBFOLDERS = (
    "vLLM knows no subfolders, so {instead}; vLLM must know the model's architecture. SGLang cannot load "
    "it: up to 0.5.23, it reads no files of torchao's."
)
_TABLES = ("embedding", "output head")


def loading(
    scheme: Scheme, record: VariantRecord, location: str, *, has_branch: bool = False
) -> tuple[Way, ...]:
    """How to load the variant of ``scheme``, the best way first.

    Args:
        location: what it is loaded from, a Hub id or a folder of variants.
        has_branch: whether the repository has a branch of its name with the variant at its root.
    """
    kind = _kind(record)
    with_smolquant = Way(
        "smolquant",
        _KERNELS,
        _install("smolquant" + kind.packages),
        _program(kind, _smolquant(kind, record, location)),
    )
    if _only_smolquant_loads(record.tensors):
        return (with_smolquant,)
    if not scheme.stock_loads:
        registered = ["import smolquant.torchao", *_stock(kind, record, location, device="cpu")]
        by_stock = Way(
            "transformers",
            f"smolquant first gives torchao's {scheme.variant} weights a CPU kernel.",
            with_smolquant.install,
            _program(kind, registered),
        )
        return with_smolquant, by_stock
    by_stock = Way(
        "transformers",
        "",
        _install("torch torchao transformers accelerate" + kind.packages),
        _program(kind, _stock(kind, record, location)),
    )
    served = (
        (_with_vllm(record, location, has_branch=has_branch),)
        if _vllm_serves(scheme, record)
        else ()
    )
    return by_stock, with_smolquant, *served


def loading_code(scheme: Scheme, record: VariantRecord, location: str) -> Markdown:
    """The lines that load the variant of ``scheme``, without a prompt."""
    by_stock = scheme.stock_loads and not _only_smolquant_loads(record.tensors)
    lines = _stock if by_stock else _smolquant
    return _python(lines(_kind(record), record, location))


def main_model_program(location: str, record: VariantRecord | None) -> Markdown:
    """Python that loads the unquantized model and answers a prompt.

    Args:
        record: of a variant that was made from it; None where there is none.
    """
    kind = _COMPLETION if record is None else _kind(record)
    own_code = record is not None and record.runs_own_code
    return _program(kind, _from_pretrained(kind, location, None, own_code=own_code))


def cautions(variants: Iterable[tuple[Scheme, "Tensors"]]) -> list[tuple[list[str], str]]:
    """What readers have to know before they load: each sentence once, after the variants that it is for."""
    names: dict[str, list[str]] = {}
    for scheme, tensors in variants:
        for caution in cautions_of(scheme, tensors):
            names.setdefault(caution, []).append(scheme.variant)
    return [(variants_of, sentence) for sentence, variants_of in names.items()]


Tensors = Mapping[str, TensorRecord]
"""A variant's tensors, as its record lists them."""


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


def _vllm_serves(scheme: Scheme, record: VariantRecord) -> bool:
    """Whether vLLM can read the weights as they are stored.

    It joins projections such as q, k and v, whose weights must therefore all be quantized, and gives
    torchao the linear layers alone. Code that a repository brings along it does not find in a subfolder.
    """
    quantized_kinds = {tensor.kind for tensor in record.tensors.values() if tensor.quantized}
    kept_kinds = {tensor.kind for tensor in record.tensors.values() if not tensor.quantized}
    return (
        scheme.vllm_loads
        and record.task == TEXT_GENERATION
        and not record.runs_own_code
        and quantized_kinds == {"linear"}
        and "linear" not in kept_kinds
    )


def _with_vllm(record: VariantRecord, location: str, *, has_branch: bool) -> Way:
    folder = location.rstrip("/").rpartition("/")[2]
    instead = "download this one and serve the folder"
    if has_branch:
        instead = f"serve the branch {record.variant}, which has this variant at its root"
        commands = _broken(
            f"vllm serve {shlex.quote(location)}", [f"--revision {shlex.quote(record.variant)}"]
        )
    elif is_folder_location(location):
        commands = [f"vllm serve {shlex.quote(f'{location}/{record.variant}')}"]
    else:
        commands = [
            *_broken(
                f"hf download {shlex.quote(location)}",
                [
                    f"--include {shlex.quote(f'{record.variant}/*')}",
                    f"--local-dir {shlex.quote(folder)}",
                ],
            ),
            f"vllm serve {shlex.quote(f'{folder}/{record.variant}')}",
        ]
    return Way(
        "vLLM",
        _NO_SUBFOLDERS.format(instead=instead),
        _install("vllm torchao"),
        code_block("\n".join(commands), "sh"),
    )


def folder_location(folder: PurePath) -> str:
    """A folder of variants as a card's location, which is never taken for a Hub id."""
    shown = folder.as_posix()
    return shown if folder.is_absolute() else f"./{shown}"


def is_folder_location(location: str) -> bool:
    """Whether a card's location is a folder on a machine; otherwise it is a Hub id."""
    return location.startswith((".", "/", "~")) or location.count("/") != 1 or "\\" in location


def _broken(command: str, options: Sequence[str]) -> list[str]:
    """A shell's command on one line, or, where that is too long, with each option on its own."""
    line = " ".join((command, *options))
    if len(line) <= WIDTH:
        return [line]
    parts = [command, *(f"    {option}" for option in options)]
    return [*(f"{part} \\" for part in parts[:-1]), parts[-1]]


def _install(packages: str) -> Markdown:
    return code_block(f"pip install {packages}", "sh")


def _smolquant(kind: _Kind, record: VariantRecord, location: str) -> list[str]:
    arguments = [_literal(location), f"variant={_literal(record.variant)}", *_trusting(record)]
    return [
        "import smolquant",
        "",
        *_call(f"model, {kind.reader} = smolquant.load", arguments),
    ]


def _stock(kind: _Kind, record: VariantRecord, location: str, device: str = "auto") -> list[str]:
    own_code = record.runs_own_code
    return _from_pretrained(kind, location, record.variant, own_code=own_code, device=device)


def _from_pretrained(
    kind: _Kind, location: str, subfolder: str | None, *, own_code: bool, device: str = "auto"
) -> list[str]:
    name = "folder" if is_folder_location(location) else "repo"
    named = [f"{name} = {_literal(location)}"]
    where = [name]
    if subfolder is not None:
        named.append(f"variant = {_literal(subfolder)}")
        where.append("subfolder=variant")
    if own_code:
        where.append(_TRUST)
    return [
        f"from transformers import {kind.auto_class}, {kind.reader_class}",
        "",
        *named,
        *_call(f"{kind.reader} = {kind.reader_class}.from_pretrained", where),
        *_call(
            f"model = {kind.auto_class}.from_pretrained",
            [*where, f"device_map={_literal(device)}"],
        ),
    ]


_TRUST = "trust_remote_code=True"


def _trusting(record: VariantRecord) -> list[str]:
    return [_TRUST] if record.runs_own_code else []


def _call(function: str, arguments: Sequence[str]) -> list[str]:
    """A call on one line, or, where that is too long, with its arguments on the next, or on one each."""
    inside = ", ".join(arguments)
    if len(line := f"{function}({inside})") <= WIDTH:
        return [line]
    if len(inside) + 4 <= WIDTH:
        return [f"{function}(", f"    {inside}", ")"]
    return [f"{function}(", *(f"    {argument}," for argument in arguments), ")"]


def _program(kind: _Kind, loading: list[str]) -> Markdown:
    """Code that loads, asks, and prints the answer without the question."""
    to_device = "model.device, model.dtype" if kind is _IMAGES else "model.device"
    return _python(
        [
            *loading,
            "",
            *kind.asking,
            f"prompt = prompt.to({to_device})",
            "answer = model.generate(**prompt, max_new_tokens=100)",
            'start = prompt["input_ids"].shape[1]',
            f"print({kind.reader}.decode(answer[0, start:], skip_special_tokens=True))",
        ]
    )


def _python(lines: list[str]) -> Markdown:
    return code_block("\n".join(lines), "python")


def _literal(text: str) -> str:
    return json.dumps(text)  # JSON's strings are Python's too
