"""Real runs, seen as the runner sees them: outputs, summary, annotations, files and their owner."""

import json
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypedDict

import pytest
from safetensors import safe_open
from transformers import LlamaConfig, SmolLM3Config

import models
from container.engine import Engine
from container.runner import OWNER, Finished, Runner, Step, owners
from localhub import LocalHub, Token, blobs
from snippets import DOCUMENTED_REPO, NAMES, REPO, RUN_IN_A_CONTAINER, commands_run

pytestmark = pytest.mark.container

WRITE = Token("hf_alice_writes", "alice")
BOTH_SIGNALS = pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM], ids=["int", "term"]
)
GRACE = 7.0  # seconds that the runner leaves between its first signal and the end


@pytest.fixture
def job(runner: Runner) -> Runner:
    """A runner with a checkpoint in its workspace, as the workspace's owner left it."""
    folder = models.save_with_tokenizer(runner.workspace / "model", models.FAMILIES["smollm3"]())
    for path in (folder, *folder.iterdir()):
        os.chown(path, *OWNER)
    return runner


class Reaching(TypedDict):
    """What a step's start is told besides its inputs."""

    env: dict[str, str]
    options: list[str]


def reaching(hub: LocalHub) -> Reaching:
    """How a step comes to the local Hub: over the host's network, without Xet."""
    return {
        "env": {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"},
        "options": ["--network", "host"],
    }


def saving(**more: str) -> dict[str, str]:
    """Inputs of a quick run that publishes nothing, and more of them (``_`` for ``-``)."""
    return {"model-path": "model", "save-only": "true", "evaluate": "never", **_hyphened(more)}


def publishing(**more: str) -> dict[str, str]:
    """Inputs of a quick run that publishes, and more of them."""
    named = {"repo": "alice/model", "model-path": "model", "hf-token": WRITE.value}
    return {**named, "evaluate": "never", **_hyphened(more)}


def _hyphened(inputs: dict[str, str]) -> dict[str, str]:
    return {name.replace("_", "-"): value for name, value in inputs.items()}


# Saving only.


def test_a_run_that_saves(job: Runner) -> None:
    done = job.run_as_runner(
        saving(quant_type="both", evaluate="always"),
        options=["--network", "none"],
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.outputs == {
        "repo-url": "",
        "commit-sha": "",
        "pull-request-url": "",
        "int8-url": "",
        "int4-url": "",
        "int8-dynamic-url": "",
        "float8-url": "",
        "float8-dynamic-url": "",
        "trackio-url": "",
        "branches": "",
        "report": "quantized/report.json",
        "changed": "true",
    }
    report = json.loads((job.workspace / done.outputs["report"]).read_text())
    assert report["variants"].keys() == {"int8", "int4"}
    assert report["error"] is None
    assert report["variants"]["int8"]["metrics"]["perplexity"] > 1
    assert "int8" in done.summary and "int4" in done.summary
    assert done.annotations("error") == done.annotations("warning") == []
    for variant in ("int8", "int4"):
        with safe_open(job.workspace / f"quantized/{variant}/model.safetensors", "pt") as weights:
            assert weights.metadata()
    assert "hostile" not in done.stdout + done.stderr


@pytest.mark.fault(
    "machine",
    "The container runs as root",
    "What it writes belongs to the workspace's owner.",
)
def test_what_it_writes_belongs_to_the_workspaces_owner_and_a_second_run_has_nothing_to_do(
    job: Runner,
) -> None:
    """What one version wrote, the next container takes for what it is."""
    step = saving()
    done = job.run_as_runner(step)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.outputs["changed"] == "true"
    assert (job.workspace / "quantized/int8/model.safetensors").is_file()
    assert owners(job.workspace) == {OWNER}

    again = job.run_as_runner(step)
    assert (again.returncode, again.outputs["changed"]) == (0, "false")


def test_three_billion_parameters_fit_into_a_container_of_one_gigabyte(runner: Runner) -> None:
    """In one file, and without swap: what is held does not depend on the model's size."""
    model = models.save_zeros(
        runner.workspace / "model", SmolLM3Config(**models.SMOLLM3_3B, tie_word_embeddings=True)
    )
    assert (model / "model.safetensors").stat().st_size > 6 * 10**9
    try:
        done = runner.run_as_runner(saving(), options=["--memory", "1g", "--memory-swap", "1g"])
        assert done.returncode == 0, done.stdout + done.stderr
        written = (runner.workspace / "quantized/int8").glob("*.safetensors")
        assert sum(path.stat().st_size for path in written) > 3 * 10**9
        report = json.loads((runner.workspace / "quantized/report.json").read_text())
        assert report["variants"]["int8"]["peak_memory_bytes"] < 0.6 * 10**9
    finally:
        shutil.rmtree(runner.workspace / "quantized", ignore_errors=True)


def test_a_model_larger_than_memory_is_measured(runner: Runner) -> None:
    """In one and a half of its largest layer, 231 MB, beside what the image takes for a small model."""
    changes = {"num_hidden_layers": 6, "vocab_size": 320, "bos_token_id": 1, "eos_token_id": 2}
    config = SmolLM3Config(**models.SMOLLM3_3B | changes)
    models.save_with_tokenizer(runner.workspace / "model", models.FAMILIES["smollm3"]())
    (runner.workspace / "model/model.safetensors").unlink()
    models.save_zeros(runner.workspace / "model", config)
    # What the trial on a small model imports stays in the process: 30 MB more than without it.
    memory = "780m"
    assert (runner.workspace / "model/model.safetensors").stat().st_size > 0.9 * 10**9
    (runner.workspace / "text.txt").write_text(" ".join(f"<{i % 300}>" for i in range(300)))
    inputs = saving(quant_type="both", evaluate="always", eval_text="text.txt", eval_tokens="128")
    done = runner.run_as_runner(inputs, options=["--memory", memory, "--memory-swap", memory])
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((runner.workspace / "quantized/report.json").read_text())
    for made in report["variants"].values():
        assert made["metrics"]["perplexity"] == pytest.approx(320, rel=0.01), "of weights of zero"
        assert made["metrics"]["tokens_per_second"] is None or made["metrics"]["tokens_per_second"]


# Failing.


@pytest.mark.fault(
    "checkpoint",
    "The checkpoint of an action's run has no weights, broken weights or a broken config",
    "Exit 3 with one annotation; summary and report.json say the same.",
)
@pytest.mark.parametrize(
    ("spoil", "returncode", "words"),
    [
        (lambda model: (model / "model.safetensors").unlink(), 3, "weights"),
        (lambda model: (model / "model.safetensors").write_bytes(b"\xff" * 64), 3, "safetensors"),
        (lambda model: (model / "config.json").write_text("{"), 3, "config.json"),
    ],
    ids=["no weights", "broken weights", "broken config"],
)
def test_a_failing_run_fails_with_its_one_annotation(
    job: Runner, spoil: Callable[[Path], object], returncode: int, words: str
) -> None:
    spoil(job.workspace / "model")
    done = job.run_as_runner(saving())
    assert done.returncode == returncode, done.stdout + done.stderr
    (error,) = done.annotations("error")
    assert words in error
    assert words in done.summary
    report = json.loads((job.workspace / done.outputs["report"]).read_text())
    assert words in report["error"]["message"]
    assert not (job.workspace / "quantized/int8").exists()


@pytest.mark.fault(
    "hub",
    "Nothing answers at the Hub's address",
    "Exit 5 at once.",
)
def test_a_hub_out_of_reach(job: Runner) -> None:
    done = job.run_as_runner(
        publishing(), env={"HF_ENDPOINT": "http://127.0.0.1:9"}, options=["--network", "none"]
    )
    assert done.returncode == 5
    assert len(done.annotations("error")) == 1
    assert WRITE.value not in done.stdout.replace(f"::add-mask::{WRITE.value}\n", "") + done.stderr


@pytest.mark.fault(
    "machine",
    "The machine's or the GPU's memory runs out",
    "Exit 4, and whose it was.",
)
def test_a_run_out_of_memory_is_called_that(job: Runner) -> None:
    """The kernel kills at the limit; the container's first process lives to tell."""
    done = job.run_as_runner(
        saving(),
        options=["--memory", "150m", "--memory-swap", "150m"],
    )
    assert done.returncode == 4, done.stdout + done.stderr
    (error,) = done.annotations("error")
    assert "more memory" in error and "137" in error
    assert error.split("\n")[0] in done.summary
    assert json.loads((job.workspace / "quantized/report.json").read_text())["error"]


# Publishing.


def test_a_run_that_publishes(job: Runner, hub: LocalHub) -> None:
    step = {**publishing(quant_type="both", tag="v1.0"), "private": "true"}
    done = job.run_as_runner(step, **reaching(hub))
    assert done.returncode == 0, done.stdout + done.stderr
    head = hub.repo("alice/model").head
    assert done.outputs["commit-sha"] == head
    assert done.outputs["repo-url"] == f"{hub.url}/alice/model"
    assert done.outputs["int4-url"].endswith("/int4")
    assert done.outputs["changed"] == "true"
    assert WRITE.value not in done.summary + json.dumps(done.outputs)

    again = job.run_as_runner(step, **reaching(hub))
    assert (again.returncode, again.outputs["changed"]) == (0, "false")
    assert again.outputs["commit-sha"] == head


@pytest.mark.parametrize("documented", commands_run(RUN_IN_A_CONTAINER))
def test_docker_run_by_hand(
    engine: Engine, image: str, job: Runner, hub: LocalHub, documented: str
) -> None:
    """As the pages print it, but for the names of image and model, and how it comes to the local Hub."""
    checkpoint = (job.workspace / "model").rename(job.workspace / "checkpoint")
    for path in checkpoint.glob("tokenizer*"):  # without which nothing is measured
        path.unlink()
    reach = reaching(hub)
    options = [*reach["options"], *(f"-e {name}" for name in reach["env"])]
    command = documented.replace("docker run", " ".join(["docker run", *options]))
    command = command.replace(f"{NAMES.image}:{NAMES.version}", image)
    command = command.replace(DOCUMENTED_REPO, REPO)
    environ = {"HF_TOKEN": WRITE.value, **reach["env"]}
    done = engine.shell(command, job.workspace, environ)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Published" in done.stdout
    assert "::" not in done.stdout, "commands to GitHub's runner"
    assert "int8/model.safetensors" in hub.repo(REPO).files()
    assert owners(job.workspace) == {OWNER}

    user, group = OWNER
    as_owner = command.replace("docker run", f"docker run --user {user}:{group}")
    again = engine.shell(as_owner, job.workspace, environ)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "Nothing to publish" in again.stdout


# Cancelling, with Python as the container's first process.


def cancel(step: Step, number: signal.Signals) -> Finished:
    """Cancel as the runner does; the run must end in time and tell of it."""
    step.cancel(number)
    asked = time.monotonic()
    done = step.wait(60)
    took = time.monotonic() - asked
    assert took < GRACE, f"{took:.1f} s\n{done.stdout}"
    assert done.returncode == 128 + number, done.stdout + done.stderr
    (error,) = done.annotations("error")
    assert "cancelled" in error
    assert "cancelled" in done.summary
    return done


def wait_for(step: Step, ready: Callable[[], bool]) -> None:
    """Wait until the step has come to the point where it is to be cancelled."""
    deadline = time.monotonic() + 120
    while not ready():
        assert step.client.poll() is None, step.client.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def large_job(runner: Runner) -> Runner:
    """A runner with 220 million parameters in its workspace, which take a while."""
    sizes = models.SIZES | {"hidden_size": 1024, "intermediate_size": 16384, "num_hidden_layers": 4}
    models.save_with_tokenizer(runner.workspace / "model", LlamaConfig(**sizes))
    return runner


class StuckHub(NamedTuple):
    """A Hub, and whether it is stuck yet."""

    hub: LocalHub
    stuck: threading.Event


@pytest.fixture
def stuck_hub(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> Iterator[StuckHub]:
    """A Hub that stops reading in the middle of a large upload, and answers nobody from then on."""
    stuck, released = threading.Event(), threading.Event()
    write = blobs.Incoming.write

    def write_some(incoming: blobs.Incoming, chunk: bytes) -> None:
        write(incoming, chunk)
        if incoming.size > 10_000_000:
            stuck.set()
            released.wait(90)

    monkeypatch.setattr(blobs.Incoming, "write", write_some)
    yield StuckHub(hub, stuck)
    released.set()


@pytest.mark.fault(
    "cancelled",
    "A job is cancelled while it waits for the Hub, quantizes, evaluates or uploads",
    "The run ends in time, with one message and no traceback.",
)
@BOTH_SIGNALS
def test_cancelled_while_it_waits_for_the_hub(runner: Runner, number: signal.Signals) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(60)
        step = runner.start(
            {"model-path": "octocat/model", "save-only": "true"},
            env={"HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}"},
            options=["--network", "host"],
        )
        connection, _ = silent.accept()  # the run is now waiting inside a request
        with connection:
            cancel(step, number)


@pytest.mark.fault(
    "cancelled",
    "A job is cancelled while it waits for the Hub, quantizes, evaluates or uploads",
    "The run ends in time, with one message and no traceback.",
)
@BOTH_SIGNALS
def test_cancelled_while_it_quantizes(large_job: Runner, number: signal.Signals) -> None:
    step = large_job.start(saving(quant_type="both"), options=["--cpus", "1"])
    quantized = large_job.workspace / "quantized"
    wait_for(
        step,
        lambda: any(path.stat().st_size for path in quantized.glob(".int4.*/int4/*.safetensors")),
    )
    cancel(step, number)
    assert not (quantized / "int8").exists()
    assert not (quantized / "int4").exists()


@pytest.mark.fault(
    "cancelled",
    "A job is cancelled while it waits for the Hub, quantizes, evaluates or uploads",
    "The run ends in time, with one message and no traceback.",
)
def test_cancelled_while_it_evaluates(job: Runner) -> None:
    """Measuring has processes of its own, which end with the run."""
    step = job.start(saving(evaluate="always"))
    wait_for(
        step, lambda: "::group::Evaluate" in job.engine.docker("logs", step.container, check=False)
    )
    cancel(step, signal.SIGINT)


@pytest.mark.fault(
    "cancelled",
    "A job is cancelled while it waits for the Hub, quantizes, evaluates or uploads",
    "The run ends in time, with one message and no traceback.",
)
@BOTH_SIGNALS
def test_cancelled_while_it_uploads(
    large_job: Runner, stuck_hub: StuckHub, number: signal.Signals
) -> None:
    hub, stuck = stuck_hub
    hub.create_repo("alice/model")
    head = hub.repo("alice/model").head
    step = large_job.start(publishing(), **reaching(hub))
    wait_for(step, stuck.is_set)
    cancel(step, number)
    assert hub.repo("alice/model").head == head
