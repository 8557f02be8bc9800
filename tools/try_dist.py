"""Whether a wheel works where nothing of this checkout is: installs it, quantizes a small model, loads it.

``python3 tools/try_dist.py FOLDER [pure] [OPTION...]`` takes the wheel of FOLDER that suits this machine,
or the one for any platform, and installs it into an environment of its own; the options are pip's. The int4
weights are found by C code or by torch: their bytes are the recorded ones either way, on every platform.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

EXPECTED = "cfc454859c72856ef7cef1a74fa52894ef84cd6f48a666300f425684a4997552"
"""sha256 of the int4 variant's tensors, which only another search than this one changes."""


def install(folder: Path, environment: Path, *, pure: bool, options: list[str]) -> Path:
    """Make an environment with the suiting wheel of ``folder`` and its requirements; its Python."""
    venv.EnvBuilder(with_pip=True).create(environment)
    python = environment / "bin/python"
    (wheel,) = folder.glob("*-none-any.whl") if pure else [None]
    # No other version, which the index might have.
    version = next(folder.glob("smolquant-*.whl")).name.split("-")[1]
    which = (
        f"smolquant[action] @ {wheel.resolve().as_uri()}"
        if wheel
        else f"smolquant[action]=={version}"
    )
    only = ["--only-binary", "smolquant", "--find-links", str(folder)]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *only, *options, which], check=True)
    return python


def small_checkpoint(folder: Path) -> Path:
    """A Llama whose weights follow from whole numbers alone, the same on every machine."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=96,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    count = 0
    for weight in model.parameters():
        numbers = torch.arange(count, count + weight.numel(), dtype=torch.int64)
        count += weight.numel()
        scattered = (numbers * 2654435761 % 2**32).double() / 2**31 - 1
        values = scattered.pow(3).mul(0.2) if weight.ndim == 2 else torch.ones(weight.numel())
        weight.data.copy_(values.view(weight.shape))
    model.save_pretrained(folder)
    words = Tokenizer(WordLevel({f"w{number}": number for number in range(96)}, "w0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return folder


def digest(folder: Path) -> str:
    """sha256 of the tensors in a variant's files, by name."""
    import torch
    from safetensors import safe_open

    sha256 = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in sorted(file.keys()):
                tensor = file.get_tensor(name).contiguous().view(-1).view(torch.uint8)
                sha256.update(name.encode() + b"\0" + bytes(tensor.numpy()))
    return sha256.hexdigest()


def try_here() -> str:
    """Quantize the small model and load both variants, with what is installed.

    Returns:
        :func:`digest` of the int4 variant.
    """
    import torch
    from transformers import AutoModelForCausalLM

    import smolquant

    with tempfile.TemporaryDirectory(prefix="smolquant-try-") as work:
        checkpoint, output = small_checkpoint(Path(work, "checkpoint")), Path(work, "output")
        command: list[str | Path] = [sys.executable, "-m", "smolquant", "quantize", checkpoint]
        options: list[str | Path] = ["--quant-type", "both", "--output-dir", output]
        subprocess.run([*command, *options, "--save-only", "--evaluate", "never"], check=True)
        tokens = torch.arange(16).view(1, 16)
        for variant in ("int8", "int4"):
            model, _ = smolquant.load(output, variant)
            plain = AutoModelForCausalLM.from_pretrained(output / variant)
            with torch.inference_mode():
                found = model(tokens).logits.float()
                wanted = smolquant.dequantize(plain)(tokens).logits.float()
            error = float((found - wanted).norm() / wanted.norm())
            assert error < 0.05, f"{variant}: its logits are {error:.1%} off those of plain weights"
        return digest(output / "int4")


def main(folder: str, *arguments: str) -> None:
    pure, options = "pure" in arguments, [one for one in arguments if one != "pure"]
    with tempfile.TemporaryDirectory(prefix="smolquant-venv-") as environment:
        python = install(Path(folder), Path(environment), pure=pure, options=options)
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        alone = kept | {"HF_HUB_OFFLINE": "1"}
        script = Path(__file__).resolve()
        subprocess.run([python, "-I", script, "here"], check=True, env=alone, cwd=environment)


if __name__ == "__main__":
    if sys.argv[1:] == ["here"]:
        of_int4 = try_here()
        assert of_int4 == EXPECTED, f"int4 has other bytes than those recorded: {of_int4}"
        print(f"int4 and int8 were made and loaded; int4 is {of_int4}")
    else:
        main(*sys.argv[1:])
