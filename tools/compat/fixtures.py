"""Makes the fixture of this version's format: a tiny random model, published into a folder.

A fixture is what a release has published, so it is made once for each format version and never again:

    PYTHONPATH=entrypoint:tools .venv/bin/python -m compat.fixtures
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from compat.logits import LOGITS
from compat.prove import FIXTURES, plain_logits
from smolquant.checkpoint.files import README
from smolquant.record import FORMAT_VERSION
from smolquant.runtime.contents import variants_in

QUANT_TYPES = ("int8_weight_only", "int4_weight_only", "int8_dynamic", "float8_weight_only")
IDS = (1, *range(40, 56))
"""The prompt whose logits are recorded."""

SPREAD = 0.4
"""Of the random weights: wide enough that one token is clearly ahead of the others."""


def save_model(folder: Path) -> None:
    """A random Llama with a token a byte, of a few tens of kB."""
    vocabulary = ["<pad>", "<s>", "</s>", *sorted(ByteLevel.alphabet())]
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape) * SPREAD)
            else:
                parameter.add_(torch.randn(parameter.shape) * SPREAD)
    model.save_pretrained(folder)
    backend = Tokenizer(BPE({token: i for i, token in enumerate(vocabulary)}, []))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)


def publish(model: Path, place: Path) -> None:
    """Quantize, measure and save as a user would."""
    arguments = [
        *("--save-only", "--evaluate", "always", "--eval-tokens", "512", "--group-size", "32"),
        *("--quant-type", ",".join(QUANT_TYPES), "--output-dir", str(place)),
    ]
    subprocess.run(
        [sys.executable, "-m", "smolquant", "quantize", str(model), *arguments], check=True
    )


def main() -> None:
    """Make the fixture, unless there is one already."""
    place = FIXTURES / f"format-{FORMAT_VERSION}"
    if place.exists():
        sys.exit(f"{place} is there already: what was published once stays as it is.")
    with tempfile.TemporaryDirectory() as scratch:
        model, made = Path(scratch) / "model", Path(scratch) / "made"
        save_model(model)
        publish(model, made)
        for variant in variants_in(made):
            shutil.copytree(made / variant, place / variant, ignore=shutil.ignore_patterns(README))
    ids = torch.tensor([IDS])
    logits = {variant: plain_logits(place, variant, ids) for variant in variants_in(place)}
    save_file({"ids": ids, **logits}, place / LOGITS)


if __name__ == "__main__":
    main()
