"""The whole command with a real Trackio server: links everywhere, the write token nowhere."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from command import Run
from conftest import WRITE
from localhub import LocalHub
from trackio_server import TOKEN, Server

REPO = "alice/model"
PROJECT = "alice-model"
RunSmolquant = Callable[..., Run]


@pytest.fixture
def trackio(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path / "trackio-server")
    yield server
    server.stop()


@pytest.mark.fault(
    "secret",
    "The address of Trackio holds a token",
    "It is in no link, log or file.",
)
def test_a_published_run_is_linked_from_everywhere_without_the_token(
    smolquant: RunSmolquant, hub: LocalHub, checkpoint: Path, trackio: Server, tmp_path: Path
) -> None:
    pasted = f"{trackio.url}/?write_token={TOKEN.replace('+', '%2B')}"
    run = smolquant(
        "quantize",
        *(checkpoint, REPO, "--quant-type", "both", "--trackio-url", pasted),
        hub=hub,
        token=WRITE.value,
        actions=True,
    )

    assert run.exit_code == 0, run.log
    url = run.outputs["trackio-url"]
    assert url.startswith(f"{trackio.url}/?project={PROJECT}&run_ids=")
    assert run.report["trackio_url"] == url
    assert url.replace("&", "&amp;") in run.summary or url in run.summary
    runs = {found["name"]: found for found in trackio.runs(PROJECT)}
    assert len(runs) == 2
    for variant in ("int8", "int4"):
        (name,) = (name for name in runs if name.endswith(variant))
        card = hub.read(REPO, f"{variant}/README.md").decode()
        assert f"selected_run_id={runs[name]['id']}" in card.replace("\\", "")
        alerts = str(runs[name]["alerts"])
        assert "quantized_model_pushed" in alerts
        assert hub.repo(REPO).head in str(runs[name])

    for secret in (TOKEN, "%2Btoken"):
        unmasked = "\n".join(
            line for line in run.log.splitlines() if not line.startswith("::add-mask::")
        )
        assert secret not in unmasked
        for path in [*(tmp_path / "quantized").rglob("*"), tmp_path / "github_summary"]:
            if path.is_file() and path.suffix in {".json", ".jsonl", ".md", ""}:
                assert secret not in path.read_text(errors="replace"), path


@pytest.mark.fault(
    "tracking",
    "The server refuses the connection",
    "One warning; the run goes on, and the events are kept.",
)
def test_a_refused_connection_costs_a_warning_and_the_events_are_sent_later(
    smolquant: RunSmolquant, checkpoint: Path, trackio: Server
) -> None:
    trackio.stop()
    environ = {"TRACKIO_WRITE_TOKEN": TOKEN}
    options = ("--save-only", "--trackio-url", trackio.url)
    run = smolquant("quantize", checkpoint, *options, actions=True, env=environ)

    assert run.exit_code == 0, run.log
    warnings = [line for line in run.log.splitlines() if line.startswith("::warning")]
    assert len(warnings) == 1
    command = f"sync-trackio quantized --trackio-url {trackio.url}"
    assert f"`smolquant {command}` sends them later" in warnings[0]
    assert run.outputs["trackio-url"] == ""
    assert run.report["trackio_url"] is None

    trackio.start()
    sent = smolquant(*command.split(), env=environ)
    assert sent.exit_code == 0, sent.log
    assert f"Sent: {trackio.url}/" in sent.log
    (found,) = trackio.runs("checkpoint")
    assert "quantization_completed" in str(found["alerts"])


@pytest.mark.fault(
    "tracking",
    "The run fails",
    "It is recorded as failed.",
)
def test_a_failed_run_is_recorded_as_failed(
    smolquant: RunSmolquant, checkpoint: Path, trackio: Server
) -> None:
    (checkpoint / "model.safetensors").write_bytes(b"broken")
    run = smolquant(
        "quantize",
        *(checkpoint, "--save-only", "--trackio-url", trackio.url),
        env={"TRACKIO_WRITE_TOKEN": TOKEN},
    )
    assert run.exit_code == 3
    (found,) = trackio.runs("checkpoint")
    assert "quantization_failed" in str(found["alerts"])
    assert "truncated or corrupt" in str(found)


def test_the_summary_says_how_to_open_a_local_project_that_was_asked_for(
    smolquant: RunSmolquant, checkpoint: Path
) -> None:
    run = smolquant("quantize", checkpoint, "--save-only", "--trackio-url", "local", actions=True)
    assert run.exit_code == 0, run.log
    assert "TRACKIO_DIR=quantized/trackio trackio show --project checkpoint" in run.summary
    assert (run.folder / "quantized/events.jsonl").stat().st_size > 0
    assert "quantized/report.json, quantized/events.jsonl, quantized/trackio" in run.log


@pytest.mark.fault(
    "input",
    "--trackio-url is no address",
    "Exit 2.",
)
def test_addresses_that_are_none_are_refused(smolquant: RunSmolquant, checkpoint: Path) -> None:
    run = smolquant("quantize", checkpoint, "--save-only", "--trackio-url", "nowhere", actions=True)
    assert run.exit_code == 2
    assert "--trackio-url" in run.annotations[0]
    folder = smolquant("sync-trackio", "missing")
    assert folder.exit_code == 2
    assert "events.jsonl" in folder.log
