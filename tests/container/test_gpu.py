"""The sibling that has the GPU, on engines that have one to give and that have none.

There is no GPU here: the one engine accepts ``--gpus`` and hands out nothing. What a sibling on a GPU
would do is done by a stand-in (``sibling/``), or by the image itself where it is to find no CUDA.
"""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import models
from container.engine import Engine
from container.runner import OWNER, Finished, Runner, Step
from smolquant.gpu import GRACE_SECONDS, PARENT_LABEL

pytestmark = pytest.mark.container

CLEANUP = "/opt/smolquant/bin/smolquant-cleanup"


def build(engine: Engine, target: str) -> str:
    image = f"smolquant-{target}:test"
    folder = Path(__file__).parent / "sibling"
    engine.docker("build", "--target", target, "--tag", image, str(folder))
    return image


@pytest.fixture(scope="session")
def stand_in(gpu_engine: Engine) -> str:
    """An image in the place of the CUDA image, which does what SMOLQUANT_STAND_IN says."""
    return build(gpu_engine, "program")


@pytest.fixture(scope="session")
def believer(gpu_engine: Engine) -> str:
    """An image in the place of the CUDA image: this one, taking the CPU for CUDA."""
    return build(gpu_engine, "believer")


@pytest.fixture
def gpu_runner(gpu_engine: Engine, make_runner: Callable[[Engine], Runner]) -> Runner:
    """A self-hosted runner with a GPU."""
    return with_model(make_runner(gpu_engine))


def with_model(runner: Runner) -> Runner:
    models.save_with_tokenizer(runner.workspace / "model", models.FAMILIES["smollm3"]())
    return runner


def inputs(**more: str) -> dict[str, str]:
    """A quick run that publishes nothing, with more inputs (``_`` for ``-``)."""
    return {"model-path": "model", "save-only": "true", "evaluate": "never"} | {
        name.replace("_", "-"): value for name, value in more.items()
    }


def siblings(engine: Engine) -> list[str]:
    listing = engine.docker(
        "ps", "--all", "--quiet", "--no-trunc", "--filter", f"label={PARENT_LABEL}"
    )
    return listing.split()


def waiting_sibling(runner: Runner, step: Step) -> str:
    """The stand-in that ``step`` runs, when it is ready for a signal."""
    deadline = time.monotonic() + 60
    while not (runner.workspace / "waits").exists():
        assert step.client.poll() is None, "the step ended before its sibling was ready"
        assert time.monotonic() < deadline, "no sibling within a minute"
        time.sleep(0.1)
    (sibling,) = siblings(step.engine)
    return sibling


def inspect(engine: Engine, container: str) -> dict[str, Any]:
    found: list[dict[str, Any]] = json.loads(engine.docker("inspect", container))
    return found[0]


def assert_done(done: Finished, runner: Runner) -> None:
    assert done.returncode == 0, done.stdout + done.stderr
    assert (runner.workspace / "quantized/int8/model.safetensors").is_file()
    assert done.outputs["changed"] == "true"


# An engine without a GPU.


@pytest.mark.fault(
    "machine",
    "--device auto, and the host has no GPU",
    "The run goes on with the CPU.",
)
def test_auto_goes_on_with_the_cpu_where_the_host_has_no_gpu(
    engine: Engine, runner: Runner
) -> None:
    done = with_model(runner).run_as_runner(inputs(cuda_image="nobody/has:this"))
    assert_done(done, runner)
    assert "The host's Docker engine provides no GPU: could not select device driver" in done.stdout
    assert "Docker engine pulls" not in done.stdout
    assert siblings(engine) == []


@pytest.mark.fault(
    "machine",
    "--device cuda, and no GPU is there",
    "Exit 4.",
)
def test_cuda_fails_with_the_fix_where_the_host_has_no_gpu(engine: Engine, runner: Runner) -> None:
    done = with_model(runner).run_as_runner(inputs(device="cuda"))
    assert done.returncode == 4
    (error,) = done.annotations("error")
    assert "provides no GPU" in error
    for fix in ("NVIDIA Container Toolkit", "--set-as-default", "--gpus all"):
        assert fix in error
    assert siblings(engine) == []


def test_cpu_asks_nobody(runner: Runner) -> None:
    done = with_model(runner).run_as_runner(inputs(device="cpu"))
    assert_done(done, runner)
    assert "GPU" not in done.stdout


# An engine that has a GPU to give.


@pytest.mark.fault(
    "machine",
    "A build that was never released has no image for the GPU",
    "--device auto goes on with the CPU; cuda is exit 4.",
)
def test_an_unreleased_build_goes_on_with_the_cpu(gpu_runner: Runner) -> None:
    done = gpu_runner.run_as_runner(inputs())
    assert_done(done, gpu_runner)
    (notice,) = done.annotations("notice")
    assert "never released" in notice
    assert "cuda-image" in notice


@pytest.mark.fault(
    "machine",
    "A build that was never released has no image for the GPU",
    "--device auto goes on with the CPU; cuda is exit 4.",
)
def test_an_unreleased_build_cannot_do_cuda(gpu_runner: Runner) -> None:
    done = gpu_runner.run_as_runner(inputs(device="cuda"))
    assert done.returncode == 4
    (error,) = done.annotations("error")
    assert "never released" in error


@pytest.mark.fault(
    "machine",
    "The image for the GPU cannot be pulled",
    "Exit 4 with the reason; --device auto goes on with the CPU.",
)
@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_an_image_that_cannot_be_pulled(gpu_runner: Runner, device: str) -> None:
    missing = "127.0.0.1:1/nobody/has:this"
    done = gpu_runner.run_as_runner(inputs(device=device, cuda_image=missing))
    if device == "auto":
        assert_done(done, gpu_runner)
        (told,) = done.annotations("warning")
    else:
        assert done.returncode == 4
        (told,) = done.annotations("error")
    assert f"{missing} cannot be pulled" in told


def test_the_sibling_is_this_container_again_but_for_the_socket(
    gpu_runner: Runner, stand_in: str
) -> None:
    step = gpu_runner.start(
        inputs(cuda_image=stand_in, device="cuda"),
        env={
            "SMOLQUANT_STAND_IN": "waits",
            "TRACKIO_OWN": "two words\nand lines",
            "DEPLOY_KEY": "of another step",
        },
        args=["quantize", "model", "--save-only"],
        options=["--network", "host", "--memory", "1g", "--add-host", "hub:127.0.0.1"],
    )
    sibling = inspect(gpu_runner.engine, waiting_sibling(gpu_runner, step))
    parent = inspect(gpu_runner.engine, step.container)
    step.cancel()
    step.wait(60)
    same = ("NetworkMode", "Memory", "ExtraHosts", "ShmSize", "Privileged")
    assert {k: sibling["HostConfig"][k] for k in same} == {k: parent["HostConfig"][k] for k in same}
    assert sibling["HostConfig"]["DeviceRequests"][0]["Capabilities"] == [["gpu"]]
    assert sibling["HostConfig"]["DeviceRequests"][0]["Count"] == -1
    socket = f"{gpu_runner.engine.socket}:/var/run/docker.sock"
    assert sibling["HostConfig"]["Binds"] == [
        bind for bind in parent["HostConfig"]["Binds"] if bind != socket
    ]
    for key in ("WorkingDir", "User", "Cmd"):
        assert sibling["Config"][key] == parent["Config"][key]
    given = set(parent["Config"]["Env"])
    inputs_and_files = {text for text in given if text.startswith(("INPUT_", "GITHUB_", "HF_"))}
    assert inputs_and_files <= set(sibling["Config"]["Env"])
    assert "TRACKIO_OWN=two words\nand lines" in sibling["Config"]["Env"]
    assert "DEPLOY_KEY=of another step" in given - set(sibling["Config"]["Env"])


def test_the_sibling_tells_the_run(gpu_runner: Runner, stand_in: str) -> None:
    done = gpu_runner.run_as_runner(inputs(cuda_image=stand_in), env={"SMOLQUANT_STAND_IN": "ends"})
    assert done.returncode == 5
    assert done.annotations("notice") == ["a line that stays a command"]
    assert done.annotations("error") == []
    assert "and one of stderr\n" in done.stderr
    assert (done.outputs, done.summary) == ({}, "")  # the stand-in wrote none; nobody else may
    given = json.loads((gpu_runner.workspace / "given.json").read_text())
    assert given["arguments"] == []
    assert given["folder"] == "/github/workspace"
    assert given["environ"]["INPUT_CUDA-IMAGE"] == stand_in
    assert not given["socket"]
    assert siblings(gpu_runner.engine) == []


def test_a_whole_run_in_the_sibling(gpu_runner: Runner, believer: str) -> None:
    done = gpu_runner.run_as_runner(inputs(cuda_image=believer))
    assert f"The run goes on in {believer}" in done.stdout
    assert_done(done, gpu_runner)
    assert done.stdout.count("::group::Quantize") == 1
    assert done.summary.count("### ") == 1
    written = (gpu_runner.workspace / "quantized").rglob("*")
    assert {(path.stat().st_uid, path.stat().st_gid) for path in written} == {OWNER}


def test_a_whole_run_that_fails_in_the_sibling(gpu_runner: Runner, believer: str) -> None:
    (gpu_runner.workspace / "model/model.safetensors").unlink()
    done = gpu_runner.run_as_runner(inputs(cuda_image=believer))
    assert done.returncode == 3
    assert len(done.annotations("error")) == 1
    assert done.summary.count("Unusable checkpoint") == 1


@pytest.mark.fault(
    "cancelled",
    "A job is cancelled while the GPU's container works",
    "Its run ends, too.",
)
@pytest.mark.parametrize(
    ("number", "returncode"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["int", "term"]
)
def test_cancellation_reaches_the_sibling(
    gpu_runner: Runner, stand_in: str, number: signal.Signals, returncode: int
) -> None:
    step = gpu_runner.start(inputs(cuda_image=stand_in), env={"SMOLQUANT_STAND_IN": "waits"})
    waiting_sibling(gpu_runner, step)
    step.cancel(number)
    done = step.wait(60)
    assert f"the sibling got signal {number.value}" in done.stdout
    assert done.returncode == returncode
    assert siblings(gpu_runner.engine) == []


@pytest.mark.fault(
    "cancelled",
    "The GPU's container does not end by the signal",
    "It is removed in time.",
)
def test_a_sibling_that_does_not_end_is_removed_in_time(gpu_runner: Runner, stand_in: str) -> None:
    step = gpu_runner.start(inputs(cuda_image=stand_in), env={"SMOLQUANT_STAND_IN": "is stubborn"})
    waiting_sibling(gpu_runner, step)
    step.cancel()
    cancelled = time.monotonic()
    done = step.wait(60)
    assert GRACE_SECONDS < time.monotonic() - cancelled < 9.5
    assert done.returncode == 130
    assert "cancelled" in done.annotations("error")[0]
    assert siblings(gpu_runner.engine) == []


@pytest.mark.fault(
    "machine",
    "The GPU's container runs out of memory, or crashes",
    "Exit 4, and which.",
)
def test_a_sibling_out_of_memory_is_called_that(gpu_runner: Runner, stand_in: str) -> None:
    done = gpu_runner.run_as_runner(
        inputs(cuda_image=stand_in),
        env={"SMOLQUANT_STAND_IN": "eats"},
        options=["--memory", "300m"],
    )
    assert done.returncode == 4
    (error,) = done.annotations("error")
    assert "ran out of memory and was killed" in error
    assert json.loads((gpu_runner.workspace / "quantized/report.json").read_text())["error"]


@pytest.mark.fault(
    "machine",
    "The GPU's container runs out of memory, or crashes",
    "Exit 4, and which.",
)
def test_a_sibling_that_crashes_is_called_that(gpu_runner: Runner, stand_in: str) -> None:
    done = gpu_runner.run_as_runner(
        inputs(cuda_image=stand_in), env={"SMOLQUANT_STAND_IN": "crashes"}
    )
    assert done.returncode == 4
    (error,) = done.annotations("error")
    assert "exit code 139" in error


@pytest.mark.fault(
    "machine",
    "The GPU's container sees no CUDA",
    "--device auto goes on with the CPU; cuda is exit 4.",
)
def test_auto_goes_on_with_the_cpu_where_the_sibling_sees_no_cuda(
    gpu_runner: Runner, image: str
) -> None:
    """The image is its own CUDA image here: it would start itself for ever, could it."""
    done = gpu_runner.run_as_runner(inputs(cuda_image=image))
    assert_done(done, gpu_runner)
    (warning,) = done.annotations("warning")
    assert "sees no CUDA" in warning
    assert siblings(gpu_runner.engine) == []


@pytest.mark.fault(
    "machine",
    "The GPU's container sees no CUDA",
    "--device auto goes on with the CPU; cuda is exit 4.",
)
def test_cuda_fails_where_the_sibling_sees_none(gpu_runner: Runner, image: str) -> None:
    done = gpu_runner.run_as_runner(inputs(cuda_image=image, device="cuda"))
    assert done.returncode == 4
    (error,) = done.annotations("error")
    assert "sees no CUDA" in error


def test_a_container_that_has_the_gpu_makes_no_sibling(gpu_runner: Runner, stand_in: str) -> None:
    done = gpu_runner.run_as_runner(
        inputs(cuda_image=stand_in, device="cuda"),
        env={"SMOLQUANT_STAND_IN": "ends"},
        options=["--device", "/dev/null:/dev/nvidia0"],
    )
    assert done.returncode == 4  # this image's torch has no CUDA, and says so itself
    assert "torch sees no CUDA device here" in done.annotations("error")[0]
    assert not (gpu_runner.workspace / "given.json").exists()


@pytest.mark.fault(
    "machine",
    "--output-dir is in this container alone, where the GPU's cannot reach it",
    "A warning says so, and the run goes on.",
)
def test_a_folder_of_this_container_alone_stays_with_it(gpu_runner: Runner, stand_in: str) -> None:
    done = gpu_runner.run_as_runner(
        inputs(cuda_image=stand_in, output_dir="/only/here"), env={"SMOLQUANT_STAND_IN": "ends"}
    )
    assert done.returncode == 0
    lost, alone = done.annotations("warning")
    assert "keep what is written to /only/here" in lost
    assert "/only/here is in this container alone" in alone


def test_in_a_jobs_own_container_the_steps_variables_go_along(
    gpu_runner: Runner, stand_in: str, image: str
) -> None:
    engine, workspace = gpu_runner.engine, gpu_runner.workspace
    job = engine.docker(
        "run", "--detach", "--entrypoint", "tail",
        "-v", f"{engine.socket}:/var/run/docker.sock", "-v", f"{workspace}:/github/workspace",
        image, "-f", "/dev/null",
    ).strip()  # fmt: skip
    try:
        engine.docker(
            "exec", "-e", "SMOLQUANT_STAND_IN=ends", "-e", "TRACKIO_STEP=its own", job, "sh", "-e", "-c",
            f"smolquant quantize model --save-only --cuda-image {stand_in} || [ $? = 5 ]",
        )  # fmt: skip
    finally:
        engine.docker("rm", "--force", job)
    given = json.loads((workspace / "given.json").read_text())
    assert given["environ"]["TRACKIO_STEP"] == "its own"
    assert given["arguments"] == ["quantize", "model", "--save-only", "--cuda-image", stand_in]


@pytest.mark.fault(
    "cancelled",
    "A run is killed while the GPU's container works",
    "The post step removes the container.",
)
def test_the_post_step_removes_what_a_killed_run_left(gpu_runner: Runner, stand_in: str) -> None:
    engine = gpu_runner.engine
    step = gpu_runner.start(inputs(cuda_image=stand_in), env={"SMOLQUANT_STAND_IN": "waits"})
    waiting_sibling(gpu_runner, step)
    other = engine.docker("run", "--detach", "--label", f"{PARENT_LABEL}=another", "--entrypoint",
                          "tail", stand_in, "-f", "/dev/null").strip()  # fmt: skip
    try:
        engine.docker("kill", step.container)
        step.wait(60)
        assert len(siblings(engine)) == 2
        post = gpu_runner.run_as_runner(
            env={f"STATE_{name}": value for name, value in step.state().items()},
            options=["--entrypoint", CLEANUP],
        )
        assert post.returncode == 0
        assert "left behind" in post.stdout
        assert siblings(engine) == [other]
    finally:
        for left in siblings(engine):
            engine.docker("rm", "--force", left)


def test_the_post_step_has_nothing_to_do_after_a_run_of_its_own(runner: Runner) -> None:
    post = runner.run_as_runner(options=["--entrypoint", CLEANUP])
    assert (post.returncode, post.stdout, post.stderr) == (0, "", "")
