"""llama.cpp beside smolquant, on the same weights: two processes that take turns, with as many threads.

It takes cyllama, of the dependency group ``bench``, which brings llama.cpp along as a wheel, with its loops
for AVX2; llama-cpp-python would have to be compiled.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from smolquant.evaluate.rounds import SHORT_PROMPT, Times, ratio_of, speed_of

ROUNDS = 9
LEAST = 3
PAIRS: Mapping[str, tuple[str, str]] = {
    "int8, int8 embeddings": ("Q8_0", "Q8_0"),
    "int4": ("Q4_1", "BF16"),
}
"""Variant -> the type of its layers in llama.cpp's terms, and that of its table."""


def compare(place: Path, threads: int, decoded: int, seconds: float) -> list[dict[str, Any]]:
    """Decoding of each variant in ``place`` beside llama.cpp."""
    rows = []
    for variant, types in PAIRS.items():
        file = place / f"{types[0]}.gguf"
        if not file.exists():
            write_gguf(place / "source", file, *types)
        with ExitStack() as both:
            ours = both.enter_context(_worker("ours", str(place), variant, str(threads)))
            theirs = both.enter_context(_worker("theirs", str(file), str(threads)))
            workers = {"ours": ours, "theirs": theirs}
            times = _take_turns(workers, decoded, seconds)
        ratio = ratio_of(times["theirs"].decode, times["ours"].decode, LEAST)
        rows.append(
            {
                "name": f"{variant}; {types[0]}, table {types[1]}",
                "ours": speed_of(times["ours"].decode, LEAST),
                "theirs": speed_of(times["theirs"].decode, LEAST),
                "ratio": asdict(ratio) if ratio else None,
            }
        )
        print(rows[-1], flush=True)
    return rows


def _take_turns(
    workers: Mapping[str, "subprocess.Popen[str]"], decoded: int, seconds: float
) -> dict[str, Times]:
    times = {name: Times() for name in workers}
    for worker in workers.values():
        _ask(worker, 2)
    order, started = list(workers), time.monotonic()
    while len(times["ours"].decode) < LEAST or (
        len(times["ours"].decode) < ROUNDS and time.monotonic() < started + seconds
    ):
        for name in order:
            times[name].decode.append(_ask(workers[name], decoded) / decoded)
        order.reverse()
    return times


def _ask(worker: "subprocess.Popen[str]", tokens: int) -> float:
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdin.write(f"{tokens}\n")
    worker.stdin.flush()
    line = worker.stdout.readline()
    if not line:
        raise SystemExit("A process that was to be measured has ended.")
    return float(json.loads(line))


@contextmanager
def _worker(*arguments: str) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, __file__, *arguments]
    pipe = subprocess.PIPE
    nowhere = subprocess.DEVNULL  # llama.cpp tells all it knows of a model
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=nowhere, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def write_gguf(source: Path, file: Path, layers: str, table: str) -> None:
    """A Llama checkpoint as llama.cpp reads it, with the same weights and a vocabulary of no meaning.

    Args:
        layers: ggml's name of what the linear layers are stored as.
        table: the same of the embedding, which is the head too.
    """
    import gguf
    import torch
    from gguf.quants import quantize
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    config = model.config
    partial = file.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{number}>" for number in range(config.vocab_size)])
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_types([1] * config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in model.named_parameters():
        values = weight.detach().float().numpy()
        kind = name.split(".")[-2]
        if kind in heads:  # llama.cpp turns neighbours, transformers halves
            pairs = values.reshape(heads[kind], 2, -1, values.shape[1])
            values = pairs.swapaxes(1, 2).reshape(values.shape)
        stored = {1: "F32"}.get(values.ndim, table if "embed_tokens" in name else layers)
        as_type = gguf.GGMLQuantizationType[stored]
        new_name = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(new_name, quantize(values, as_type), raw_dtype=as_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(file)


def _ours(place: str, variant: str, threads: str) -> Callable[[int], float]:
    import torch

    import runtime
    from smolquant.evaluate.rounds import Runner

    torch.set_num_threads(int(threads))
    return Runner(runtime.load(Path(place), variant)).decode


def _theirs(file: str, threads: str) -> Callable[[int], float]:
    from cyllama.llama import llama_cpp

    llama_cpp.ggml_backend_load_all()
    params = llama_cpp.LlamaContextParams()
    params.n_ctx = 256
    params.n_threads = params.n_threads_batch = int(threads)
    context = llama_cpp.LlamaContext(
        llama_cpp.LlamaModel(file, llama_cpp.LlamaModelParams()), params
    )

    def run(tokens: list[int], position: int) -> None:
        context.decode(llama_cpp.llama_batch_get_one(tokens, position))

    def decode(tokens: int) -> float:
        context.kv_cache_clear()
        run(list(range(10, 10 + SHORT_PROMPT)), 0)
        started = time.perf_counter()
        for number in range(tokens):
            run([100 + number], SHORT_PROMPT + number)
        return time.perf_counter() - started

    return decode


def _serve(arguments: Sequence[str]) -> None:
    """Load a model; then, for each number that comes, decode so many tokens and tell the seconds."""
    kind, *words = arguments
    load: Callable[..., Callable[[int], float]] = _ours if kind == "ours" else _theirs
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # and so does whatever else prints
    decode = load(*words)
    for line in sys.stdin:
        print(json.dumps(decode(int(line))), file=answers, flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1:])
