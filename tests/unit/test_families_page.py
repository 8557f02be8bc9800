"""docs/families.md tells what a sweep has found, and forked tasks end as they should."""

import time
from pathlib import Path
from typing import Any

from families import page
from families.forked import run_forked

OUTCOME = {"reason": "", "quantized": 3, "relative_error": 0.0, "stock": ""}


def found(name: str, **outcome: Any) -> dict[str, Any]:
    return {
        "key": f"causal/{name}",
        "class": f"{name}ForCausalLM",
        "image": False,
        "outcomes": {"int8_weight_only": OUTCOME | outcome},
    }


RESULTS = [
    found("A", verdict="works"),
    found("B", verdict="refused", reason="No | linear layers.", stock="fails too"),
    found("C", verdict="refused", reason="Something of ours."),
    found("D", verdict="wrong", reason="other logits"),
    {"key": "causal/E", "class": "E", "cannot_build": "no config", "outcomes": {}},
]


def test_the_page_counts_and_tells_every_family() -> None:
    assert list(page.counts(RESULTS, "int8_weight_only").values()) == [1, 1, 1, 1, 1]
    text = page.text(RESULTS, ["int8_weight_only"])
    assert "| int8 | 5 | 1 | 1 | 1 | 1 | 1 |" in text
    assert "| A | AForCausalLM | works, 3 weights |  |" in text
    assert r"| B | BForCausalLM | refused | No \| linear layers (stock too) |" in text
    assert "| C | CForCausalLM | refused | Something of ours |" in text
    assert "| E | E | – | cannot be built: no config |" in text


def _task(number: int) -> dict[str, Any]:
    if number == 1:
        raise ValueError("one is wrong")
    if number == 2:
        while True:
            time.process_time()
    return {"number": number}


def test_forked_tasks_end_with_a_result_or_the_reason(tmp_path: Path) -> None:
    ended = run_forked(_task, [0, 1, 2], tmp_path, jobs=3, seconds=1, memory=1 << 30)
    told = {one.task: one.result or one.failure for one in ended}
    assert told[0] == {"number": 0}
    assert told[1] == "ValueError: one is wrong"
    assert told[2] in ("takes too long", "hangs")  # the second where the machine is busy
