"""A real trained model through the whole command, and back into text."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from command import Run, run_smolquant
from smolquant.record import VariantRecord

PROMPT = "The capital of France is"

GENERATE = """
import sys, json, torch
{imports}
prompt, read, out = sys.argv[1:]
{load}
ids = tokenizer(prompt, return_tensors="pt").input_ids
with torch.no_grad():
    text = tokenizer.decode(model.generate(ids, max_new_tokens=24, do_sample=False)[0])
    read = tokenizer(read or text, return_tensors="pt").input_ids
    # In float32, because logits in bfloat16 are multiples of an eighth.
    hidden = model.model(read).last_hidden_state.float()
    logits = hidden @ model.get_output_embeddings().weight.float().t()
    torch.save(torch.log_softmax(logits, -1), out)
print("TEXT" + json.dumps(text))
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
    program: tuple[str, str], where: Path, tmp_path: Path, capability: str = "", read: str = ""
) -> tuple[str, torch.Tensor]:
    """Greedy text, and next-token log probabilities all along ``read`` (that text, if it is empty).

    In a process of its own.
    """
    imports, load = program
    code = GENERATE.format(imports=imports, load=load.format(where=str(where)))
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    if capability:
        environ["ATEN_CPU_CAPABILITY"] = capability
    out = tmp_path / "logits.pt"
    shown = subprocess.run(
        [sys.executable, "-c", code, PROMPT, read, out],
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr
    (line,) = (line for line in shown.stdout.splitlines() if line.startswith("TEXT"))
    return json.loads(line.removeprefix("TEXT")), torch.load(out)


def test_int4_means_the_same_on_every_cpu(quantized: Run, tmp_path: Path) -> None:
    """A weight packed for another CPU's kernel would give garbage without an error.

    Kernels round differently, so where two words are as likely, either may win: all along one text, every
    CPU prefers what the others prefer, but for such ties, and what it writes itself parts there at the
    earliest.
    """
    where = quantized.folder / "quantized"
    text, reference = generate(OURS, where, tmp_path, "default")
    assert "Paris" in text
    best, second = reference.topk(2).values.unbind(-1)
    clear = best - second > 0.25
    assert clear.float().mean().item() > 0.75, "most words are no ties"
    for capability in ("avx2", "avx512"):
        also, log_probabilities = generate(OURS, where, tmp_path, capability, read=text)
        assert "Paris" in also
        if also != text:
            part = next(i for i, (a, b) in enumerate(zip(also, text, strict=False)) if a != b)
            assert not clear[0, _token_at(part, text, where) - 1], "no tie"
        assert torch.equal(log_probabilities.argmax(-1)[clear], reference.argmax(-1)[clear])
        kl = (reference.exp() * (reference - log_probabilities)).sum(-1)
        assert kl.mean().item() < 2e-3, "bfloat16 in another order costs half of that"


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
