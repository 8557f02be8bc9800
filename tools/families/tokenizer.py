"""A tokenizer of one token a word, for models whose words mean nothing."""

from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast


def save_tokenizer(folder: Path, *, rows: int) -> None:
    """Add one for a model whose table has ``rows`` rows to its folder."""
    backend = Tokenizer(WordLevel({f"<{i}>": i for i in range(rows)}, unk_token="<0>"))
    backend.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<1>", eos_token="<2>", pad_token="<0>"
    ).save_pretrained(folder)
