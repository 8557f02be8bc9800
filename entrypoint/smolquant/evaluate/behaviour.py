"""What a variant predicts on a short text: noted when it is measured, compared by ``smolquant check``.

All of it comes from one pass over the text in float32 (:mod:`smolquant.runtime.plainly`), which depends on
the stored bytes and on the libraries that load and run them, and hardly on the machine.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from smolquant.memory import available_bytes
from smolquant.model.context import known_tokens, longest_context
from smolquant.record import PLAIN_FLOAT32, Behaviour
from smolquant.text import one_line

TEXT = (
    "Water boils at 100 degrees at the sea, and sooner on a mountain, where the air is thinner. "
    "Whoever cooks rice up there waits 20 minutes instead of 15."
)
"""What is predicted: short, so that it costs little, with words and numbers whose next token is clear."""

_MOST_TOKENS = 48
_LONGEST_TEXT = 10_000
"""Characters of a text that a record may ask to be tokenized."""

CLEAR_MARGIN = 0.002
"""Nats by which a token has to be ahead of the next one to be compared."""
TOLERANCE = 5e-5
"""The relative difference of perplexities that says nothing.

Between torch's code for CPUs without vectors, with AVX2 and with AVX512, margins of a model with 30 layers
differ by up to 3e-5 nats, and its perplexity by 8e-7. Both limits are about seventy times that, which
leaves room for deeper models and for GPUs.
"""

_DIGITS = 9
"""Significant digits of what is recorded."""
_MOST_NATS = 38.0
"""As for :mod:`smolquant.evaluate.measure`: the perplexity of more is no number that a record can hold."""


def tokens_of(text: str, reader: Any) -> list[int]:
    """The token ids of a text.

    Args:
        reader: a tokenizer, or a processor that has one.
    """
    tokenizer = getattr(reader, "tokenizer", reader)
    return list(tokenizer(text, verbose=False)["input_ids"])


def observe(model: Any, reader: Any) -> Behaviour | None:
    """What ``model`` predicts on :data:`TEXT`.

    Args:
        model: a variant with its weights as they were loaded.
        reader: its tokenizer, or its processor.

    Returns:
        None where the tokenizer makes fewer than two tokens of the text, or some that the model lacks, and
        where there is no memory for it.
    """
    ids = tokens_of(TEXT, reader)[: min(_MOST_TOKENS, longest_context(model.config))]
    if len(ids) < 2 or max(ids) >= known_tokens(model) or not fits(model):
        return None
    return predict(model, TEXT, ids)


def is_comparable(recorded: Behaviour) -> bool:
    """Whether this version knows how it was computed, and that takes no more than for one of its own.

    Records are foreign: one of a million tokens would take all memory.
    """
    is_short = len(recorded.token_ids) <= _MOST_TOKENS and len(recorded.text) <= _LONGEST_TEXT
    return recorded.computed == PLAIN_FLOAT32 and is_short


def fits(model: Any) -> bool:
    """Whether this machine has the memory to compute a loaded model's largest layer in float32."""
    from smolquant.runtime.plainly import plain_bytes

    return model.device.type != "cpu" or plain_bytes(model) <= available_bytes()


def predict(model: Any, text: str, ids: Sequence[int]) -> Behaviour:
    """What ``model``, whose weights are as they were loaded, predicts after each of ``ids``.

    Raises:
        Exception: the model does not run.
    """
    import torch

    from smolquant.runtime.plainly import computing_plainly

    tokens = torch.tensor([ids], device=model.device)
    with torch.inference_mode(), computing_plainly(model):
        logits = model(input_ids=tokens, use_cache=False).logits[0].double()
    best = logits.topk(2, dim=-1)
    targets = tokens[0, 1:].unsqueeze(-1)
    nats = -logits[:-1].log_softmax(dim=-1).gather(-1, targets).mean().item()
    margins = (best.values[:, 0] - best.values[:, 1]).tolist()
    return Behaviour(
        text=text,
        token_ids=tuple(ids),
        next_tokens=tuple(best.indices[:, 0].tolist()),
        margins=tuple(map(_rounded, margins)),
        perplexity=_rounded(math.exp(min(nats, _MOST_NATS))),
    )


def differences(recorded: Behaviour, now: Behaviour, reader: Any) -> Iterator[str]:
    """What is not as it was recorded, a sentence each, the cause before its consequence.

    Args:
        now: what is predicted after the recorded tokens.
        reader: the tokenizer as it is loaded now, or a processor that has one.
    """
    ids = tokens_of(recorded.text, reader)[: len(recorded.token_ids)]
    if tuple(ids) != recorded.token_ids:
        at = _first_difference(ids, recorded.token_ids)
        yield (
            f"Its tokenizer makes other tokens of a text than when it was made: token {at + 1} is "
            f"{ids[at] if at < len(ids) else 'missing'}, and was {recorded.token_ids[at]}."
        )
    triples = zip(recorded.next_tokens, now.next_tokens, recorded.margins, strict=True)
    for place, (was, is_now, margin) in enumerate(triples):
        if was != is_now and margin > CLEAR_MARGIN:
            before = recorded.token_ids[: place + 1]
            yield (
                f"After {_shown(before, reader)} it predicts {_shown([is_now], reader)}, and predicted "
                f"{_shown([was], reader)} when it was made."
            )
            break
    if not math.isclose(recorded.perplexity, now.perplexity, rel_tol=TOLERANCE):
        yield (
            f"Its perplexity on a short text is {now.perplexity:.7g}, and was {recorded.perplexity:.7g} "
            "when it was made."
        )


def _first_difference(ids: Sequence[int], recorded: Sequence[int]) -> int:
    pairs = enumerate(zip(ids, recorded, strict=False))
    return next((place for place, (one, other) in pairs if one != other), len(ids))


def _shown(ids: Sequence[int], reader: Any) -> str:
    """The text of tokens, the last few of many."""
    tokenizer = getattr(reader, "tokenizer", reader)
    return repr(one_line(tokenizer.decode(list(ids)[-6:])))


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
