"""The tables of docs/runtime.md and README.md that follow docs/runtime.json of `make bench-runtime`."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from smolquant.record import shows_no_difference
from smolquant.text import human_size

RESULTS = Path(__file__).resolve().parent.parent / "docs/runtime.json"
MODELS = {"small": "SmolLM2-135M", "large": "a random Llama of 1 B"}
"""Step -> the model that it measured."""


def summary(path: Path = RESULTS) -> str:
    """The README's table: how many times as fast as bf16 each variant is."""
    found = _read(path)
    steps = [step for step in MODELS if step in found]
    heads = {step: ["decoding", "prompt"] for step in steps}
    for step in steps:
        heads[step] += ["decoding, compiled"] if f"compiled_{step}" in found else []
    rows = [["", *(f"{MODELS[step]}, {what}" for step in steps for what in heads[step])]]
    for variant in (row["name"] for row in found[steps[0]]["rows"][1:]) if steps else ():
        row = [variant]
        for step in steps:
            measured = next(one for one in found[step]["rows"] if one["name"] == variant)
            row += [_ratio(measured["decode_ratio"]), _ratio(measured["prefill_ratio"])]
            if compiled := found.get(f"compiled_{step}"):
                measured = next(one for one in compiled["rows"] if one["name"] == variant)
                row.append(_ratio(measured["of_compiled_source"]))
        rows.append(row)
    return _table(rows)


def sections(path: Path = RESULTS) -> str:
    """Everything below the page's heading."""
    found = _read(path)
    parts = [text for step in MODELS if step in found for text in _of_model(step, found)]
    if "layers" in found:
        parts += _of_layers(found["layers"])
    if any(f"llama_{step}" in found for step in MODELS):
        parts += _of_llama(found)
    return "\n\n".join(parts) + "\n"


def _read(path: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return read


def _of_model(step: str, found: Mapping[str, Any]) -> Iterator[str]:
    part = found[step]
    yield f"## {MODELS[step][0].upper()}{MODELS[step][1:]}"
    yield _measured_on(part)
    rows = [
        [
            "",
            "weights read a token",
            "R",
            "decoding, ms a token",
            "of bf16",
            "of R",
            f"prompt of {part['prompt']}, tokens/s",
            "of bf16",
            "loaded in",
        ]
    ]
    for row in part["rows"]:
        ratio = row["decode_ratio"]
        decode, prefill = row["decode_per_second"], row["prefill_per_second"]
        rows.append(
            [
                row["name"],
                human_size(row["bytes_read"]),
                f"{row['R']:.2f}",
                f"{1000 / decode:.1f}" if decode else "",
                _ratio(ratio),
                f"{ratio['median'] / row['R']:.2f}" if ratio else "",
                f"{prefill:.1f}" if prefill else "",
                _ratio(row["prefill_ratio"]),
                f"{row['load_seconds']:.1f} s",
            ]
        )
    yield _table(rows).rstrip()
    if f"compiled_{step}" in found:
        yield from _of_compiled(found[f"compiled_{step}"])
    for variant, profile in part["profiles"].items():
        yield _where_time_goes(variant, profile)


def _of_compiled(part: Mapping[str, Any]) -> Iterator[str]:
    yield (
        "Decoding as `generate` does it, eagerly with a dynamic cache, and with a static cache and its "
        "forward compiled as one graph, which took a while before the first token:"
    )
    rows = [
        [
            "",
            "eager, ms a token",
            "compiled, ms a token",
            "of itself, eager",
            "of bf16, compiled",
            "of bf16, eager",
            "compiled in",
        ]
    ]
    for row in part["rows"]:
        speeds = [row["eager_per_second"], row["compiled_per_second"]]
        rows.append(
            [
                row["name"],
                *(f"{1000 / speed:.1f}" if speed else "" for speed in speeds),
                *(_ratio(row[of]) for of in ("of_eager", "of_compiled_source", "of_eager_source")),
                f"{row['compile_seconds']:.0f} s",
            ]
        )
    yield _table(rows).rstrip()
    yield _measured_on(part)


def _where_time_goes(variant: str, profile: Mapping[str, Any]) -> str:
    rows = [["operator", "ms a token"]]
    rows += [[f"`{one['operator']}`", f"{one['ms']:.2f}"] for one in profile["top"]]
    return (
        f"Decoding {variant}, {profile['ms']:.1f} ms a token without a profiler; with it, operators take "
        f"{profile['in_operators']:.1f} ms, the most expensive of them:\n\n{_table(rows).rstrip()}"
    )


def _listed(few: Mapping[str, int]) -> str:
    return ", ".join(f"{tokens} tokens ({scheme})" for scheme, tokens in few.items())


def _of_layers(part: Mapping[str, Any]) -> Iterator[str]:
    yield "## Layer by layer"
    yield (
        f"{_measured_on(part)} Milliseconds of one layer among others, so that caches do not hold it: in "
        "bf16, and in each scheme by the way of few tokens and by that of many; the faster one is bold. "
        "On such a CPU the way of few tokens is taken up to "
        f"{_listed(part['few_tokens'])}."
    )
    ways = list(part["rows"][0]["ms"])
    rows = [["rows x columns", "tokens", *ways]]
    for row in part["rows"]:
        cells = [_layer_cell(way, row["ms"]) for way in ways]
        rows.append([f"{row['outputs']} x {row['columns']}", str(row["rows"]), *cells])
    yield _table(rows).rstrip()
    yield "## Against the memory"
    yield (
        f"Summing 256 MB takes in {part['bandwidth'] / 1e9:.1f} GB/s with as many threads. A layer with "
        "one token takes in its weights at:"
    )
    yield _table(_against_memory(part)).rstrip()


def _layer_cell(way: str, times: Mapping[str, float]) -> str:
    scheme, _, how = way.partition(", ")
    text = f"{times[way]:.3g}"
    other = {"few": f"{scheme}, many", "many": f"{scheme}, few"}.get(how)
    return f"**{text}**" if other and times[way] <= times[other] else text


_BYTES_A_WEIGHT = {"bf16": 2.0, "int8": 1.0, "int8_dynamic": 1.0, "int4": 0.5 + 4 / 32}
"""What a kernel reads; of int4, a group of 32 has a scale and a zero point of 2 bytes each."""


def _against_memory(part: Mapping[str, Any]) -> list[list[str]]:
    rows = [["rows x columns", *_BYTES_A_WEIGHT]]
    for row in part["rows"]:
        if row["rows"] != 1:
            continue
        cells = [f"{row['outputs']} x {row['columns']}"]
        for scheme, size in _BYTES_A_WEIGHT.items():
            milliseconds = row["ms"]["bf16" if scheme == "bf16" else f"{scheme}, few"]
            speed = row["outputs"] * row["columns"] * size / milliseconds * 1000
            cells.append(f"{speed / 1e9:.1f} GB/s, {speed / part['bandwidth']:.0%}")
        rows.append(cells)
    return rows


def _of_llama(found: Mapping[str, Any]) -> Iterator[str]:
    yield "## Against llama.cpp"
    yield "Decoding the same weights, in two processes that take turns, with as many threads."
    for step, model in MODELS.items():
        if part := found.get(f"llama_{step}"):
            rows = [[model, "smolquant, tokens/s", "llama.cpp, tokens/s", "of llama.cpp"]]
            rows += [
                [one["name"], f"{one['ours']:.1f}", f"{one['theirs']:.1f}", _ratio(one["ratio"])]
                for one in part["rows"]
            ]
            yield f"{_measured_on(part)[:-1]}, {part['llama.cpp']}."
            yield _table(rows).rstrip()


def _measured_on(part: Mapping[str, Any]) -> str:
    return f"{part['machine']}, {part['capability']}; {part['stack']}."


def _ratio(ratio: Mapping[str, float] | None) -> str:
    """The median and the quartiles, or that there is no difference."""
    if ratio is None:
        return ""
    spread = f"({ratio['low']:.2f} to {ratio['high']:.2f})"
    same = shows_no_difference((ratio["low"], ratio["high"]))
    return f"no difference {spread}" if same else f"{ratio['median']:.2f} x {spread}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Markdown; the first row is the head, and numbers stand to the right."""
    head, *body = rows
    lines = [head, [":--", *["--:"] * (len(head) - 1)], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
