"""A real trained model through the whole command, and back into text."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import smolquant
from command import Run, run_smolquant
from smolquant.chat.conversation import Chat
from smolquant.record import VariantRecord

PROMPT = "The capital of France is the city of"

GENERATE = """
import sys, json, torch
{imports}
prompt, read, out, *exactly = sys.argv[1:]
{load}

def generate(read):
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        text = tokenizer.decode(model.generate(ids, max_new_tokens=24, do_sample=False)[0])
        read = tokenizer(read or text, return_tensors="pt").input_ids
        return text, torch.log_softmax(model(read).logits.float(), -1)

def compute_in_float32():
    for module in model.modules():
        for name, weight in list(module._parameters.items()):
            if hasattr(weight, "scale_and_zero"):  # the levels stay as they were packed
                weight.scale_and_zero = weight.scale_and_zero.float()
            elif weight is not None:
                module._parameters[name] = torch.nn.Parameter(weight.float(), requires_grad=False)

runs = [generate(read)]
if exactly:
    compute_in_float32()
    runs.append(generate(""))
torch.save([log_probabilities for _, log_probabilities in runs], out)
print("TEXT" + json.dumps([text for text, _ in runs]))
"""
OURS = (
    "import smolquant",
    "model, tokenizer = smolquant.load({where!r}, variant='int4', device='cpu')",
)
STOCK_INT4 = (
    "import smolquant.torchao\nfrom transformers import AutoModelForCausalLM, AutoTokenizer",
    "model = AutoModelForCausalLM.from_pretrained({where!r}, subfolder='int4', device_map='cpu')\n"
    "tokenizer = AutoTokenizer.from_pretrained({where!r}, subfolder='int4')",
)


@pytest.fixture(scope="module")
def quantized(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("smollm2")
    run = run_smolquant(
        "quantize", smollm2, "--save-only", "--quant-type", "both", folder=folder, actions=True
    )
    assert run.exit_code == 0, run.log
    return run


def generate(
    program: tuple[str, str],
    where: Path,
    tmp_path: Path,
    capability: str = "",
    read: str = "",
    *exactly: str,
) -> tuple[list[str], list[torch.Tensor]]:
    """Greedy text as a user has it, and with ``exactly`` in float32 too, from a process of its own.

    Each with next-token log probabilities all along it; the first along ``read``, where that is given.
    """
    imports, load = program
    code = GENERATE.format(imports=imports, load=load.format(where=str(where)))
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    if capability:
        environ["ATEN_CPU_CAPABILITY"] = capability
    out = tmp_path / "logits.pt"
    shown = subprocess.run(
        [sys.executable, "-c", code, PROMPT, read, out, *exactly],
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr
    (line,) = (line for line in shown.stdout.splitlines() if line.startswith("TEXT"))
    return json.loads(line.removeprefix("TEXT")), torch.load(out)


def test_it_answers_a_question(quantized: Run) -> None:
    """Its chat template makes a question of the prompt; without it, it would go on with it."""
    model, tokenizer = smolquant.load(quantized.folder / "quantized", "int8", device="cpu")
    pieces: list[str] = []
    reply = Chat(model, tokenizer, 24, greedy=True).ask(
        "What is the capital of France?", pieces.append
    )
    assert "Paris" in "".join(pieces)
    assert not reply.cut


def test_int4_means_the_same_on_every_cpu(quantized: Run, tmp_path: Path) -> None:
    """A weight packed for another CPU's kernel would give garbage without an error.

    In float32 every CPU writes the same. Kernels for bfloat16 round differently, so where two words are as
    likely, either may win: all along one text, every CPU prefers what the others prefer, but for such ties,
    and what it writes itself parts there at the earliest.
    """
    where = quantized.folder / "quantized"
    (text, exact_text), (reference, exact) = generate(
        OURS, where, tmp_path, "default", "", "exactly"
    )
    assert "Paris" in text
    assert "Paris" in exact_text
    best, second = reference.topk(2).values.unbind(-1)
    clear = best - second > 0.25
    assert clear.float().mean().item() > 0.75, "most words are no ties"
    for capability in ("avx2", "avx512"):
        texts, found = generate(OURS, where, tmp_path, capability, text, "exactly")
        assert texts[1] == exact_text
        assert (exact.exp() * (exact - found[1])).sum(-1).mean().item() < 1e-4
        assert torch.equal(found[0].argmax(-1)[clear], reference.argmax(-1)[clear])
        assert "Paris" in texts[0]
        if texts[0] != text:
            part = next(i for i, (a, b) in enumerate(zip(texts[0], text, strict=False)) if a != b)
            assert not clear[0, _token_at(part, text, where) - 1], "no tie"


def _token_at(character: int, text: str, where: Path) -> int:
    """The number of the token of ``text`` that ``character`` lies in."""
    offsets = AutoTokenizer.from_pretrained(where / "int4")(text, return_offsets_mapping=True)
    return next(i for i, (_, end) in enumerate(offsets["offset_mapping"]) if character < end)


def test_the_stock_snippet_runs_after_one_import(quantized: Run, tmp_path: Path) -> None:
    where = quantized.folder / "quantized"
    assert generate(STOCK_INT4, where, tmp_path)[0] == generate(OURS, where, tmp_path)[0]


def test_predicted_and_written_sizes_agree_to_the_byte(
    quantized: Run, smollm2: Path, tmp_path: Path
) -> None:
    planned = run_smolquant(
        "quantize", smollm2, "--dry-run", "--quant-type", "both", folder=tmp_path
    )
    assert not (tmp_path / "quantized").exists(), "a dry run writes nothing"
    for variant in ("int8", "int4"):
        weights = quantized.folder / "quantized" / variant / "model.safetensors"
        assert f"{weights.stat().st_size:,} bytes" in planned.log


def test_every_linear_weight_is_quantized_where_torchao_alone_would_skip_most(
    quantized: Run,
) -> None:
    """576 columns are no multiple of 128: torchao quantizes 30 of 210 layers and says nothing."""
    folder = quantized.folder / "quantized/int4"
    record = VariantRecord.from_json((folder / "quantization.json").read_text())
    groups = [tensor.group_size for tensor in record.tensors.values() if tensor.quantized]
    assert (groups.count(64), groups.count(128)) == (180, 30)


def test_the_report_says_what_lies_on_disk(quantized: Run) -> None:
    report = quantized.report
    assert report["error"] is None
    for variant, entry in report["variants"].items():
        weights = quantized.folder / "quantized" / variant / "model.safetensors"
        assert entry["size_bytes"] == weights.stat().st_size
        assert entry["quantized_tensors"] == 210
        assert entry["quantized_tensors"] + entry["kept_tensors"] == 272
        assert entry["seconds"] > 0
        assert not entry["up_to_date"]
