"""A small language model of another family than SmolLM2's, trained here: a Qwen3 that reads Python.

Its text is the standard library's source, which is wherever Python is. Its weights have never been on
a quantization grid, as those of SmolLM2's only copy on a package index have. Same seed and same Python,
same model, up to the rounding of the machine's matrix multiplication.
"""

import json
import math
import sys
import sysconfig
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

SEED = 0
VOCABULARY = 2_048
WINDOW = 256
BATCH = 8
STEPS = 1_350
PEAK_RATE, WARM_UP = 6e-3, 40
HELD_OUT_EVERY = 20
"""One file in so many is not trained on but measured on."""
HELD_OUT_FILE = "held_out.json"


def make_trained_model(folder: Path) -> Path:
    """Train the model into ``folder`` unless it is there already; return ``folder``.

    Takes nearly ten minutes on two cores of 2024.
    """
    if (folder / "model.safetensors").exists():
        return folder
    texts = _standard_library()
    held_out = texts[::HELD_OUT_EVERY]
    trained_on = [text for i, text in enumerate(texts) if i % HELD_OUT_EVERY]
    tokenizer = _train_tokenizer(trained_on)
    model = _train(_tokens(tokenizer, trained_on))
    temporary = folder.with_name(folder.name + ".partial")
    model.to(torch.bfloat16).save_pretrained(temporary)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(temporary)
    windows = _tokens(tokenizer, held_out)
    windows = windows[: len(windows) // WINDOW * WINDOW].view(-1, WINDOW)
    (temporary / HELD_OUT_FILE).write_text(json.dumps(windows.tolist()), encoding="utf-8")
    temporary.rename(folder)
    return folder


def held_out_windows(folder: Path) -> torch.Tensor:
    """(windows, 256) token ids of text that the model in ``folder`` was not trained on."""
    return torch.tensor(json.loads((folder / HELD_OUT_FILE).read_text(encoding="utf-8")))


def _standard_library() -> list[str]:
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return [file.read_text(encoding="utf-8", errors="replace") for file in files]


def _train_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _tokens(tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    return torch.tensor([token for text in texts for token in tokenizer.encode(text).ids])


def _train(tokens: torch.Tensor) -> Qwen3ForCausalLM:
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.1
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _rate)
    began = time.monotonic()
    for step in range(STEPS):
        starts = torch.randint(len(tokens) - WINDOW - 1, (BATCH,), generator=generator)
        batch = torch.stack([tokens[start : start + WINDOW + 1] for start in starts.tolist()])
        logits = model(batch[:, :-1]).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == STEPS - 1:
            seconds = time.monotonic() - began
            print(f"step {step}: perplexity {loss.exp().item():.1f}, {seconds:.0f} s", flush=True)
    return model.eval()


def _rate(step: int) -> float:
    """A linear rise, then half a cosine down to nothing, as a fraction of the peak."""
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    return (1 + math.cos(math.pi * (step - WARM_UP) / (STEPS - WARM_UP))) / 2


if __name__ == "__main__":
    print(make_trained_model(Path(sys.argv[1])))
