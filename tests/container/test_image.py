"""The image itself: what is in it, what is not, and that it starts whatever the workflow set."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from container.engine import REPOSITORY, Engine
from container.runner import Runner
from locks import read_lock

pytestmark = pytest.mark.container

PYTHON = "/opt/smolquant/bin/python"
BASE_IMAGE = "debian:bookworm-slim"
SIZE_BUDGET = 1_200_000_000  # bytes above the base image
HELP_BUDGET = 5.0  # seconds from `docker run` to the end of `--help`


def inspect(engine: Engine, image: str) -> dict[str, Any]:
    """What the engine says of an image."""
    found: list[dict[str, Any]] = json.loads(engine.docker("image", "inspect", image))
    return found[0]


def python_in(engine: Engine, image: str, code: str) -> str:
    """Run ``code`` with the image's Python and return what it prints."""
    return engine.docker("run", "--rm", "--entrypoint", PYTHON, image, "-I", "-c", code)


def test_it_stays_within_its_size(engine: Engine, image: str) -> None:
    above_base = inspect(engine, image)["Size"] - inspect(engine, BASE_IMAGE)["Size"]
    assert above_base <= SIZE_BUDGET, f"{above_base / 1e6:.0f} MB above the base image"


def test_the_product_is_a_small_layer_of_its_own(engine: Engine, image: str) -> None:
    sizes = engine.docker(
        "history", "--human=false", "--format", "{{.Size}} {{.CreatedBy}}", image
    ).splitlines()
    copies = [int(line.split()[0]) for line in sizes if "COPY" in line]
    product, dependencies = copies[:2]
    assert product < 20_000_000 < dependencies


def test_its_entrypoint_needs_no_shell_and_no_path(engine: Engine, image: str) -> None:
    config = inspect(engine, image)["Config"]
    assert config["Entrypoint"] == [PYTHON, "-I", "-u", "-m", "smolquant"]
    assert not config.get("Cmd")
    assert config["WorkingDir"] == "/github/workspace"


def test_it_says_what_it_is(engine: Engine, image: str) -> None:
    labels = inspect(engine, image)["Config"]["Labels"]
    for name in ("title", "description", "source", "licenses", "version", "revision", "base.name"):
        assert labels[f"org.opencontainers.image.{name}"], name


def test_it_carries_neither_compiler_nor_installer_nor_cache(engine: Engine, image: str) -> None:
    code = """
import pathlib, shutil
for program in ("cc", "gcc", "g++", "c++", "ld", "make", "pip", "pip3"):
    print(shutil.which(program) or "", end="")
for pattern in (
    "opt/smolquant/**/site-packages/pip", "opt/smolquant/**/torch/include",
    "usr/lib/python3/dist-packages/pip", "root/.cache/*", "tmp/*",
    "var/lib/apt/lists/*", "var/cache/apt/*",
):
    print(*pathlib.Path("/").glob(pattern), end="")
"""
    assert python_in(engine, image, code) == ""


def test_it_holds_the_lock_and_nothing_else(engine: Engine, image: str) -> None:
    listing = python_in(
        engine,
        image,
        "import importlib.metadata as m, json;"
        "print(json.dumps({d.name: d.version for d in m.distributions()}))",
    )
    installed = {name.lower().replace("_", "-"): v for name, v in json.loads(listing).items()}
    installed.pop("smolquant")
    assert installed == read_lock(REPOSITORY / "requirements" / "cpu.txt").versions


def test_trimming_left_the_stack_working(engine: Engine, image: str) -> None:
    code = """
import torch, torch.multiprocessing, trackio, docker, accelerate
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import LlamaConfig, LlamaForCausalLM

config = LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                     num_attention_heads=2, num_key_value_heads=2)
model = LlamaForCausalLM(config).eval()
tokens = torch.arange(8)[None]
before = model(tokens).logits
quantize_(model, Int8WeightOnlyConfig())
print(bool((model(tokens).logits - before).abs().max() < 0.05))
torch.multiprocessing.set_sharing_strategy("file_system")
print(bool(torch.ones(3).share_memory_().is_shared()))
"""
    assert python_in(engine, image, code).split() == ["True", "True"]


def test_its_byte_code_is_used_as_it_is(engine: Engine, image: str) -> None:
    """Without byte code every run would compile torch and transformers again, for seconds."""
    code = """
import importlib.util, pathlib, smolquant, torch, transformers
for module in (smolquant, torch, transformers):
    flags = pathlib.Path(importlib.util.cache_from_source(module.__file__)).read_bytes()[4:8]
    print(int.from_bytes(flags, "little"))
"""
    # PEP 552: 1 is hash-based and unchecked, good whatever a build makes of the files' times.
    assert set(python_in(engine, image, code).split()) == {"1"}


def test_help_answers_at_once(engine: Engine, image: str) -> None:
    engine.docker("run", "--rm", image, "--help")  # the files into memory
    started = time.monotonic()
    text = engine.docker("run", "--rm", image, "--help")
    assert time.monotonic() - started < HELP_BUDGET
    assert "quantize" in text


@pytest.mark.fault(
    "input",
    "`docker run` did not mount the checkpoint's folder",
    "Exit 2, with the option that mounts it.",
)
def test_a_folder_that_was_not_mounted(engine: Engine, image: str, tmp_path: Path) -> None:
    done = engine.shell(f"docker run --rm {image} quantize ./checkpoint you/model", tmp_path, {})
    assert done.returncode == 2
    assert 'docker run -v "$PWD:/github/workspace"' in done.stdout + done.stderr


@pytest.mark.fault(
    "checkpoint",
    "The workspace holds Python files and settings that would be imported",
    "None of them is imported or run.",
)
def test_nothing_in_the_workspace_or_environment_is_imported_or_run(runner: Runner) -> None:
    for module in ("click", "smolquant", "torch", "json"):
        (runner.workspace / f"{module}.py").write_text("raise SystemExit('hostile module')")
    hostile = {
        "PYTHONPATH": "/github/workspace",
        "PYTHONSTARTUP": "/github/workspace/json.py",
        "PYTHONHOME": "/github/workspace",
        "LD_LIBRARY_PATH": "/github/workspace",
    }
    done = runner.run_as_runner(env=hostile, args=["--help"], timeout=60)
    assert done.returncode == 0, done.stderr
    assert "hostile" not in done.stdout + done.stderr


def test_an_input_with_a_hyphen_arrives(runner: Runner) -> None:
    done = runner.run_as_runner(
        {"model-path": "octocat/model", "repo": "octocat/model", "quant-type": "int7"}, timeout=60
    )
    assert done.returncode == 2
    assert any("int7" in text for text in done.annotations("error"))


def test_unset_inputs_are_unset(runner: Runner) -> None:
    """The runner passes every input of action.yml; the only complaint is about the model."""
    names = ("quant-type", "device", "group-size", "dtype", "max-shard-size", "eval-tokens")
    done = runner.run_as_runner(dict.fromkeys((*names, "model-path", "repo"), ""), timeout=60)
    assert done.returncode == 2
    (error,) = done.annotations("error")
    assert "model" in error.lower()
