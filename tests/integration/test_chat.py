"""``smolquant chat`` with a variant on the Hub, as a user has it."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from command import Run
from conftest import WRITE
from localhub import LocalHub

RunSmolquant = Callable[..., Run]


def test_a_variant_on_the_hub_answers(
    smolquant: RunSmolquant, hub: LocalHub, checkpoint: Path
) -> None:
    options = {"hub": hub, "token": WRITE.value}
    made = smolquant("quantize", checkpoint, "alice/model", "--quant-type", "both", **options)
    assert made.exit_code == 0, made.log

    run = smolquant("chat", "alice/model", "<10> <11>", "--max-tokens", "5", **options)

    assert run.exit_code == 0, run.log
    assert "Trying int4, the smallest, fast on a CPU; --variant chooses another: int8" in run.log
    assert "Fetching int4 of alice/model" in run.log
    assert "[5 tokens in " in run.log
    assert "tokens a second" in run.log
    cached = run.folder / "hf_home/hub/models--alice--model/snapshots"
    fetched = {path.parent.name for path in cached.rglob("model.safetensors")}
    assert fetched == {"int4"}, "nothing else is downloaded"

    missing = smolquant("chat", "alice/model", "hi", "--variant", "float8", **options)
    assert missing.exit_code == 2
    assert "What alice/model has: int8 and int4." in missing.log


def test_the_answer_alone_goes_to_stdout_and_a_conversation_ends_with_the_input(
    smolquant: RunSmolquant, checkpoint: Path
) -> None:
    made = smolquant("quantize", checkpoint, "--save-only")
    assert made.exit_code == 0, made.log
    chat = subprocess.run(
        [sys.executable, "-m", "smolquant", "chat", "quantized", "--max-tokens", "4", "--greedy"],
        cwd=made.folder,
        env={"PYTHONPATH": str(Path(__file__).parents[2] / "entrypoint")},
        input="<10>\n\n<11>\n",
        capture_output=True,
        text=True,
        check=False,
    )
    assert chat.returncode == 0, chat.stderr
    answers = chat.stdout.splitlines()
    assert len(answers) == 2
    assert all(word.startswith("<") for answer in answers for word in answer.split())
    remarks = chat.stderr.splitlines()
    assert [line for line in remarks if line.startswith("[4 tokens")] == remarks[1:]
    assert remarks[0] == "Loading int8 of quantized"
