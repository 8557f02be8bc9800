"""What the GPU module makes of what it is told; tests/container/test_gpu.py has the engines."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from smolquant import gpu
from smolquant.errors import MachineError
from smolquant.report.console import Console
from smolquant.settings import Settings, make_settings

ID = "0123456789abcdef" * 4
OTHER = "f" * 64
LINE = "1 2 254:0 {root} {target} rw,relatime - ext4 /dev/vda rw"
PARENT: dict[str, Any] = {
    "Id": ID,
    "Config": {"User": "1001:127", "Labels": {}},
    "Mounts": [{"Destination": "/github/workspace"}],
    "HostConfig": {
        "Binds": [
            "/var/run/docker.sock:/var/run/docker.sock",
            "/home/runner/work:/github/workspace",
            "/data:/data:ro",
        ],
        "Mounts": [
            {"Type": "bind", "Source": "/run/docker.sock", "Target": "/var/run/docker.sock"},
            {"Type": "volume", "Source": "cache", "Target": "/cache"},
        ],
        "NetworkMode": "github_network",
        "Memory": 1 << 30,
        "AutoRemove": True,
        "PortBindings": {"80/tcp": [{"HostPort": "80"}]},
    },
}


@pytest.fixture(autouse=True)
def no_gpu_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the machine under the tests has."""
    monkeypatch.setattr(gpu, "_gpu_is_here", lambda: False)


def settings(**options: Any) -> Settings:
    return make_settings(**{"model_path": "user/model", "repo_name": None, **options})


def console(stream: io.StringIO) -> Console:
    return Console({"GITHUB_ACTIONS": "true"}, stream)


def mountinfo(*lines: tuple[str, str]) -> str:
    return "\n".join(LINE.format(root=root, target=target) for root, target in lines)


def test_the_own_id_is_in_what_the_engine_mounts() -> None:
    text = mountinfo(
        ("/", "/"),
        (f"/var/lib/docker/containers/{ID}/resolv.conf", "/etc/resolv.conf"),
        (f"/var/lib/docker/containers/{ID}/hostname", "/etc/hostname"),
    )
    assert gpu.container_id(text, {}) == ID


def test_another_containers_files_are_not_ours() -> None:
    text = mountinfo((f"/var/lib/docker/containers/{OTHER}/hostname", "/elsewhere/hostname"))
    assert gpu.container_id(text, {"HOSTNAME": "laptop"}) is None


def test_outside_of_a_container_nothing_is_asked_of_docker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "container_id", lambda *_: None)
    monkeypatch.setattr(gpu, "_connect", lambda: pytest.fail("Docker was asked"))
    assert gpu.run_in_sibling(settings(), [], console(io.StringIO()), {}) is None


@pytest.mark.fault(
    "machine",
    "--device cuda, and neither a GPU nor a Docker socket is there",
    "Exit 4 with what to do.",
)
def test_a_container_without_a_socket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As on a laptop, or under Kubernetes: silence for auto, the fix for cuda."""
    monkeypatch.setattr(gpu, "container_id", lambda *_: ID)
    monkeypatch.setattr(gpu, "SOCKET", tmp_path / "docker.sock")
    out = io.StringIO()
    assert gpu.run_in_sibling(settings(), [], console(out), {}) is None
    assert out.getvalue() == ""
    with pytest.raises(MachineError, match="neither a GPU nor a Docker socket") as refusal:
        gpu.run_in_sibling(settings(device="cuda"), [], console(out), {})
    assert "--gpus all" in refusal.value.hint


@pytest.mark.fault(
    "machine",
    "The Docker engine does not answer",
    "--device auto goes on with the CPU; cuda is exit 4.",
)
def test_an_engine_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu, "container_id", lambda *_: ID)
    monkeypatch.setattr(gpu, "SOCKET", tmp_path / "docker.sock")
    gpu.SOCKET.touch()
    out = io.StringIO()
    assert gpu.run_in_sibling(settings(), [], console(out), {}) is None
    assert out.getvalue().startswith(
        "::warning title=No GPU used::The Docker engine does not answer"
    )


@pytest.mark.parametrize(("works", "expected"), [(True, None), (False, 64)])
def test_a_sibling_makes_no_sibling(
    monkeypatch: pytest.MonkeyPatch, works: bool, expected: int | None
) -> None:
    """It runs, or says by a code of its own that it has no CUDA, before it does anything."""
    monkeypatch.setattr(gpu, "_cuda_works", lambda: works)
    monkeypatch.setattr(gpu, "_connect", lambda: pytest.fail("Docker was asked"))
    environ = {"SMOLQUANT_SIBLING_OF": ID}
    assert gpu.run_in_sibling(settings(), [], console(io.StringIO()), environ) == expected


@pytest.mark.fault(
    "secret",
    "The GPU's container is started",
    "No token is among its arguments, and no other secret of the job in its environment.",
)
@pytest.mark.parametrize("given", [["--token", "hf_a"], ["--token=hf_a"]])
def test_no_token_is_among_the_siblings_arguments(given: list[str]) -> None:
    url = "https://host/?write_token=b"
    words = ["quantize", "a=b", *given, "--trackio-url", url, "--private"]
    shown, hidden = gpu._split_secrets(words)
    assert shown == ["quantize", "a=b", "--private"]
    assert hidden == {"INPUT_HF-TOKEN": "hf_a", "INPUT_TRACKIO-URL": url}


@pytest.mark.fault(
    "secret",
    "The GPU's container is started",
    "No token is among its arguments, and no other secret of the job in its environment.",
)
def test_the_sibling_gets_what_a_run_needs_and_no_other_secret_of_the_job() -> None:
    needed = {
        "GITHUB_OUTPUT": "/o",
        "HF_HOME": "/cache",
        "HF_OIDC_RESOURCE": "you/tiny",
        "HF_TOKEN": "hf_a",
        "INPUT_SKIP": "a\nb",
        "TRACKIO_WRITE_TOKEN": "w",
        "http_proxy": "http://proxy",
    }
    others = {"GITHUB_TOKEN": "ghs_x", "DEPLOY_KEY": "k", "AWS_SECRET_ACCESS_KEY": "s"}
    config = gpu.sibling_config(PARENT, "image:cuda", [], needed | others)
    given = {*config["Env"]} - {f"SMOLQUANT_SIBLING_OF={ID}"}
    assert given == {f"{name}={value}" for name, value in needed.items()}


def test_the_sibling_is_the_parent_again() -> None:
    environ = {"INPUT_QUANT-TYPE": "both", "HOSTNAME": ID[:12], "PATH": "/usr/bin"}
    config = gpu.sibling_config(PARENT, "image:cuda", ["quantize", "a b"], environ)
    assert config["Image"] == "image:cuda"
    assert config["Cmd"] == ["quantize", "a b"]
    assert config["Env"] == ["INPUT_QUANT-TYPE=both", "PATH=/usr/bin", f"SMOLQUANT_SIBLING_OF={ID}"]
    assert config["User"] == "1001:127"
    assert config["WorkingDir"] == str(Path.cwd())
    assert config["Labels"] == {gpu.PARENT_LABEL: ID}
    assert "Entrypoint" not in config
    host = config["HostConfig"]
    assert host["Binds"] == ["/home/runner/work:/github/workspace", "/data:/data:ro"]
    assert [mount["Target"] for mount in host["Mounts"]] == ["/cache"]
    assert host["DeviceRequests"] == [{"Count": -1, "Capabilities": [["gpu"]]}]
    assert (host["NetworkMode"], host["Memory"]) == ("github_network", 1 << 30)
    assert (host["AutoRemove"], host["PortBindings"]) == (False, {})
    json.dumps(config)


def test_bytes_are_passed_on_as_they_are() -> None:
    out, err = io.BytesIO(), io.BytesIO()
    chunks = [(b"::notice::\xff", None), (None, b"\r50%"), (b"\x00\r\nno end", b"\xfe")]
    gpu._pass_on(chunks, (out, err))
    assert out.getvalue() == b"::notice::\xff\x00\r\nno end"
    assert err.getvalue() == b"\r50%\xfe"


@pytest.mark.parametrize("code", [0, 1, 2, 3, 4, 5, 6, 130, 143])
def test_the_siblings_own_end_is_ours(code: int) -> None:
    assert gpu._exit_code(gpu._End(code, out_of_memory=True)) == code


@pytest.mark.fault(
    "machine",
    "The GPU's container ends without a word",
    "Exit 4 with its end.",
)
@pytest.mark.parametrize(
    ("code", "out_of_memory", "words"),
    [(137, True, "out of memory"), (137, False, "exit code 137"), (139, False, "exit code 139")],
)
def test_an_end_that_nobody_told_is_told(code: int, out_of_memory: bool, words: str) -> None:
    with pytest.raises(MachineError, match=words):
        gpu._exit_code(gpu._End(code, out_of_memory))
