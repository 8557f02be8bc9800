"""Instructions for loading a variant by its scheme: what to install, and code that runs as it stands."""

import json
from collections.abc import Iterable
from dataclasses import dataclass

from smolquant.schemes import Scheme
from smolquant.text import Markdown, code_block


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


def loading(scheme: Scheme, location: str) -> Loading:
    """Instructions for loading the variant of ``scheme`` from a Hub id or a folder of variants."""
    stock = _stock(location, scheme.variant)
    if scheme.stock_loads:
        packages = "torch torchao transformers accelerate"
        return Loading(_install(packages), (Way("", _program(stock)),))
    registered = [
        "import smolquant.torchao",
        *_stock(location, scheme.variant, device="cpu"),
    ]
    return Loading(
        _install("smolquant"),
        (
            Way(
                "Load it with smolquant, which packs the weights for this machine:",
                _program(_smolquant(location, scheme.variant)),
            ),
            Way(
                "Or load it with transformers, once smolquant has given torchao's "
                f"{scheme.variant} weights a CPU kernel:",
                _program(registered),
            ),
        ),
    )


def loading_code(scheme: Scheme, location: str) -> Markdown:
    """The lines that load the variant of ``scheme``, without a prompt."""
    lines = _stock if scheme.stock_loads else _smolquant
    return _python(lines(location, scheme.variant))


def main_model_program(location: str) -> Markdown:
    """Python that loads the unquantized model and answers a prompt."""
    return _program(_stock(location, None))


def cautions(schemes: Iterable[Scheme]) -> list[tuple[list[str], str]]:
    """What readers have to know before they load: each sentence once, after the variants that it is for."""
    variants: dict[str, list[str]] = {}
    for scheme in schemes:
        if scheme.caution:
            variants.setdefault(scheme.caution, []).append(scheme.variant)
    return [(names, sentence) for sentence, names in variants.items()]


def _install(packages: str) -> Markdown:
    return code_block(f"pip install {packages}", "sh")


def _smolquant(location: str, variant: str) -> list[str]:
    where = f"{_literal(location)}, variant={_literal(variant)}"
    return ["import smolquant", "", f"model, tokenizer = smolquant.load({where})"]


def _stock(location: str, subfolder: str | None, device: str = "auto") -> list[str]:
    where = _literal(location) + (f", subfolder={_literal(subfolder)}" if subfolder else "")
    return [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({where})",
        f"model = AutoModelForCausalLM.from_pretrained({where}, device_map={_literal(device)})",
    ]


def _program(loading: list[str]) -> Markdown:
    asking = [
        "",
        'prompt = tokenizer("The capital of France is", return_tensors="pt").to(model.device)',
        "print(tokenizer.decode(model.generate(**prompt, max_new_tokens=20)[0]))",
    ]
    return _python(loading + asking)


def _python(lines: list[str]) -> Markdown:
    return code_block("\n".join(lines), "python")


def _literal(text: str) -> str:
    return json.dumps(text)  # JSON's strings are Python's too
