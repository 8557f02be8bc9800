"""Trackio for real: its own server, real sockets that refuse, hang or lie, and a browser.

Whatever Trackio does, a job pays at most twenty seconds and one warning, and keeps its events.
"""

import dataclasses
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from smolquant.errors import Cancelled, InputError
from smolquant.record import VariantRecord
from smolquant.report.console import Console
from smolquant.tracking import (
    Destination,
    Tracker,
    TrackioError,
    make_destination,
    start,
    sync,
)
from smolquant.tracking.events import read_events
from trackio_server import TOKEN, TRACKIO, Server
from unit.report_samples import SHA, SOURCE, variant_record

MOST_SECONDS = 20.0
PROJECT = "you-tiny-1-5"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    trackio = Server(tmp_path / "server")
    yield trackio
    trackio.stop()


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of something that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        kept: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    kept.append(listener.accept()[0])
                except OSError:
                    return

        accepting = threading.Thread(target=accept, daemon=True)
        accepting.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        accepting.join()
        for connection in kept:
            connection.close()


class SleepingSpace(ThreadingHTTPServer):
    """The way to a Trackio server that believes to be a Space, which first has to wake up.

    The client finds it as the HTTP proxy through which every host is reached.
    """

    def __init__(self, server: Server) -> None:
        self.server = server
        self.refused = 0
        super().__init__(("127.0.0.1", 0), _Relay)
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Relay(BaseHTTPRequestHandler):
    server: SleepingSpace

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.server.refused < 3:
            self.server.refused += 1
            self.send_error(503, "waking up")
            return
        path = self.path.removeprefix("http://you-dash.hf.space")
        kept = ("content-type", "authorization")
        headers = {name: self.headers[name] for name in kept if name in self.headers}
        answer = httpx.request(
            self.command, self.server.server.url + path, headers=headers, content=content
        )
        self.send_response(answer.status_code)
        self.send_header("content-length", str(len(answer.content)))
        self.end_headers()
        self.wfile.write(answer.content)

    def do_GET(self) -> None:
        self.do_POST()

    def log_message(self, *_: object) -> None:
        """Quiet."""


@dataclasses.dataclass
class Job:
    """A job of two variants, told step by step, and what it showed."""

    folder: Path
    destination: Destination | None
    environ: Mapping[str, str] = dataclasses.field(default_factory=lambda: dict(os.environ))
    output: io.StringIO = dataclasses.field(default_factory=io.StringIO)
    local: bool = False
    tracker: Tracker = dataclasses.field(init=False)
    url: str | None = None
    run_url: str | None = None
    seconds: float = 0.0

    def __post_init__(self) -> None:
        started = time.monotonic()
        self.tracker = start(
            self.destination,
            output_dir=self.folder,
            console=Console({"GITHUB_ACTIONS": "true"}, self.output),
            environ=self.environ,
            repo="you/tiny-1.5",
            revision=None,
            quant_types={"int8": "int8_weight_only", "int4": "int4_weight_only"},
            local=self.local,
        )
        self.seconds += time.monotonic() - started

    def begin(self) -> None:
        """Until the links are asked for, as the cards do."""
        started = time.monotonic()
        for variant in ("int8", "int4"):
            self.tracker.started(
                variant, options={"group_size": 64}, device="cpu", repo=SOURCE.repo, revision=SHA
            )
        self.tracker.advance(2_000_000)
        for variant in ("int8", "int4"):
            self.tracker.completed(
                with_errors(variant), seconds={"quantize": 2.0}, peak_memory_bytes=10**9
            )
        self.run_url = self.tracker.run_url("int8")
        self.url = self.tracker.url
        self.seconds += time.monotonic() - started

    def end(self, error: BaseException | None = None) -> None:
        started = time.monotonic()
        if error is None:
            self.tracker.pushed({"int8": "https://hub/int8", "int4": "https://hub/int4"}, SHA)
        self.tracker.ended(error)
        report = self.folder / "report.json"
        report.write_text(json.dumps({"trackio_url": self.tracker.url}))
        self.tracker.finish(report)
        self.seconds += time.monotonic() - started

    @property
    def warnings(self) -> list[str]:
        return [line for line in self.output.getvalue().splitlines() if "::warning" in line]

    @property
    def events(self) -> list[str]:
        return [event["event"] for _, event in read_events(self.folder / "events.jsonl")]


def with_errors(variant: str) -> VariantRecord:
    record = variant_record(variant)
    tensors = {
        name: dataclasses.replace(tensor, relative_error=0.01) if tensor.quantized else tensor
        for name, tensor in record.tensors.items()
    }
    return dataclasses.replace(record, tensors=tensors)


def assert_job_unharmed(job: Job) -> str:
    """It paid its twenty seconds at most, lost no event, and got one warning: the result."""
    assert job.seconds < MOST_SECONDS
    assert len(job.warnings) == 1
    assert "sync-trackio" in job.warnings[0]
    assert job.events[0] == "job"
    for event in ("quantization_started", "quantization_completed", "quantized_model_pushed"):
        assert job.events.count(event) == 2
    return job.warnings[0]


def test_a_run_is_recorded_and_read_back(
    server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    job = Job(tmp_path / "out", make_destination(f"{server.url}/?write_token=write%2Btoken"))
    job.begin()
    assert server.runs(PROJECT), "the links are handed out only when they open on something"
    job.end()
    assert job.warnings == []
    assert job.seconds < 10

    int8, int4 = server.runs(PROJECT)
    assert int8["name"] == f"{PROJECT}@{SHA[:8]}-int8"
    assert int4["name"] == f"{PROJECT}@{SHA[:8]}-int4"
    assert job.run_url == f"{server.url}/run?project={PROJECT}&selected_run_id={int8['id']}"
    assert job.url is not None
    assert f"run_ids={int8['id']},{int4['id']}" in job.url
    config = int8["summary"]["config"]
    assert config["quant_type"] == "int8_weight_only"
    assert config["_Group"] == int4["summary"]["config"]["_Group"]
    metrics: dict[str, Any] = {}
    for log in int8["logs"]:
        metrics |= log
    assert metrics["source/identity"] == SOURCE.identity
    assert metrics["size/source_bytes"] == 2_000_000
    assert metrics["upload/commit"] == SHA
    assert metrics["success"] == 1
    assert metrics["progress/bytes"] == 2_000_000
    layers = [log["step"] for log in int8["logs"] if "layers/relative_error" in log]
    assert layers == [0, 1, 2]
    assert {alert["title"] for alert in int8["alerts"]} == {
        "quantization_started",
        "quantization_completed",
        "quantized_model_pushed",
    }
    assert [artifact["name"] for artifact in int8["artifacts"]] == ["report.json"]

    listed = subprocess.run(
        [TRACKIO, "--space", server.url, "list", "runs", "--project", PROJECT, "--json"],
        capture_output=True,
        check=True,
    )
    assert json.loads(listed.stdout)["runs"] == [int8["name"], int4["name"]]

    written = "".join(file.read_text() for file in (tmp_path / "out").iterdir())
    for spelling in ("write+token", "write%2Btoken", "write_token"):
        assert spelling not in written + str(job.url) + str(job.run_url)
    assert capfd.readouterr() == ("", "")  # Trackio is talkative; the runner reads our stdout


def test_sending_again_changes_nothing(server: Server, tmp_path: Path) -> None:
    job = Job(tmp_path / "out", make_destination(server.url, write_token=TOKEN))
    job.begin()
    job.end()
    before = server.runs(PROJECT)
    there = make_destination(server.url, write_token=TOKEN)
    for _ in range(2):
        url = sync(job.folder, there, console=Console({}, job.output), environ=os.environ)
    assert url == job.url
    assert server.runs(PROJECT) == before


@pytest.mark.fault(
    "tracking",
    "The server refuses the connection",
    "One warning; the run goes on, and the events are kept.",
)
def test_a_server_that_refuses_the_connection(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        job = Job(tmp_path / "out", make_destination(url, write_token=TOKEN))
        job.begin()
        job.end()
    assert (job.url, job.run_url) == (None, None)
    assert "refused" in assert_job_unharmed(job)


@pytest.mark.fault(
    "tracking",
    "The token is wrong or missing",
    "One warning; the run goes on, and the events are kept.",
)
def test_a_wrong_token(server: Server, tmp_path: Path) -> None:
    job = Job(tmp_path / "out", make_destination(server.url, write_token="wrong-token"))
    job.begin()
    job.end()
    assert (job.url, job.run_url) == (None, None)
    assert "A write_token is required" in assert_job_unharmed(job)
    assert "wrong-token" not in job.output.getvalue().replace("::add-mask::wrong-token", "")


@pytest.mark.fault(
    "tracking",
    "The token is wrong or missing",
    "One warning; the run goes on, and the events are kept.",
)
def test_no_token(server: Server, tmp_path: Path) -> None:
    job = Job(tmp_path / "out", make_destination(server.url))
    job.begin()
    job.end()
    assert "set TRACKIO_WRITE_TOKEN" in assert_job_unharmed(job)


@pytest.mark.fault(
    "tracking",
    "The server or the Hub never answers",
    "One warning after ten seconds at most; the events are kept.",
)
def test_a_server_that_never_answers(silent: str, tmp_path: Path) -> None:
    job = Job(tmp_path / "out", make_destination(silent, write_token=TOKEN))
    job.begin()
    job.end()
    assert (job.url, job.run_url) == (None, None)
    assert "did not start within 10 s" in assert_job_unharmed(job)


@pytest.mark.fault(
    "tracking",
    "The server or the Hub never answers",
    "One warning after ten seconds at most; the events are kept.",
)
def test_a_hub_that_never_answers(silent: str, tmp_path: Path) -> None:
    job = Job(
        tmp_path / "out",
        make_destination("you/dashboard", write_token="hf_space"),
        {**os.environ, "HF_ENDPOINT": silent},
    )
    job.begin()
    job.end()
    assert (job.url, job.run_url) == (None, None)
    assert "did not start within 10 s" in assert_job_unharmed(job)


def test_a_space_that_has_to_wake_up(tmp_path: Path) -> None:
    server = Server(tmp_path / "server", SYSTEM="spaces", HF_TOKEN="hf_space")
    try:
        with SleepingSpace(server) as space:
            job = Job(
                tmp_path / "out",
                # make_destination would insist on https
                Destination("http://you-dash.hf.space", write_token="hf_space"),
                {**os.environ, "http_proxy": space.url, "no_proxy": ""},
            )
            job.begin()
            assert space.refused == 3
            job.end()
            space.shutdown()
    finally:
        server.stop()
    assert job.warnings == []
    reader = Server(tmp_path / "server")  # what a Space shows comes from the Hub, in part
    try:
        runs = reader.runs(PROJECT)
    finally:
        reader.stop()
    assert [str(job.run_url).endswith(run["id"]) for run in runs] == [True, False]
    for run in runs:
        assert run["logs"][-1]["success"] == 1
        assert len(run["artifacts"]) == 1


def test_keyless_login_does_not_open_a_space(silent: str, tmp_path: Path) -> None:
    job = Job(
        tmp_path / "out",
        make_destination("you/dashboard"),
        {**os.environ, "HF_ENDPOINT": silent, "HF_OIDC_RESOURCE": "you/tiny"},
    )
    job.begin()
    job.end()
    warning = assert_job_unharmed(job)
    assert "keyless login works for the published repository only" in warning
    assert "TRACKIO_WRITE_TOKEN" in warning


@pytest.mark.fault(
    "tracking",
    "Trackio breaks inside",
    "One warning; the run goes on, and the events are kept.",
)
@pytest.mark.parametrize(
    ("trackio", "why"),
    [
        ("raise RuntimeError('broken install')", "broken install"),
        ("import os; os._exit(3)", "ended early"),
        ("import time; print('::error::x', flush=True); time.sleep(1); 1 / 0", "division by zero"),
    ],
)
def test_a_trackio_that_breaks_inside(
    trackio: str, why: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "trackio.py").write_text(trackio)
    job = Job(
        tmp_path / "out",
        make_destination("http://127.0.0.1:9", write_token=TOKEN),
        {**os.environ, "PYTHONPATH": str(broken)},
    )
    job.begin()
    job.end()
    assert why in assert_job_unharmed(job)
    assert capfd.readouterr() == ("", "")


@pytest.mark.fault(
    "tracking",
    "The server hangs or dies once the run is going",
    "The run waits no longer than ten seconds; `sync-trackio` sends the events later.",
)
def test_a_server_that_hangs_once_the_run_is_going(server: Server, tmp_path: Path) -> None:
    job = Job(tmp_path / "out", make_destination(server.url, write_token=TOKEN))
    job.begin()
    assert job.url is not None
    server.process.send_signal(signal.SIGSTOP)
    job.end()
    assert "did not finish within 10 s" in assert_job_unharmed(job)


@pytest.mark.fault(
    "tracking",
    "The server hangs or dies once the run is going",
    "The run waits no longer than ten seconds; `sync-trackio` sends the events later.",
)
def test_a_server_that_dies_gets_the_events_later(server: Server, tmp_path: Path) -> None:
    job = Job(tmp_path / "out", make_destination(server.url, write_token=TOKEN))
    job.begin()
    server.stop()
    job.end()
    assert_job_unharmed(job)
    there = make_destination(server.url, write_token=TOKEN)
    console = Console({}, job.output)
    with pytest.raises(TrackioError, match="refused") as refusal:
        sync(job.folder, there, console=console, environ=os.environ)
    assert refusal.value.exit_code == 5

    server.start()
    sync(job.folder, there, console=console, environ=os.environ)
    for run in server.runs(PROJECT):
        events = [log["event"] for log in run["logs"] if "event" in log]
        assert events == [
            "quantization_started",
            "quantization_completed",
            "quantized_model_pushed",
            "run_succeeded",
        ]
        assert len(run["artifacts"]) == 1


@pytest.mark.fault(
    "cancelled",
    "A job is cancelled while Trackio records",
    "The run is recorded as failed.",
)
def test_a_cancelled_job_is_recorded_as_failed(server: Server, tmp_path: Path) -> None:
    job = Job(tmp_path / "out", make_destination(server.url, write_token=TOKEN))
    job.begin()
    job.end(Cancelled(signal.SIGINT))
    for run in server.runs(PROJECT):
        assert run["logs"][-1]["event"] == "quantization_failed"
        assert run["logs"][-1]["exit_code"] == 130
        assert [alert["level"] for alert in run["alerts"]].count("error") == 1


@pytest.mark.fault(
    "cancelled",
    "A job is cancelled while Trackio's server is silent",
    "It does not wait for it.",
)
def test_a_cancelled_job_has_no_time_for_a_silent_server(silent: str, tmp_path: Path) -> None:
    job = Job(tmp_path / "out", make_destination(silent, write_token=TOKEN))
    job.tracker.started("int8", options={}, device="cpu", repo=None, revision=None)
    job.end(Cancelled(signal.SIGINT))
    assert job.seconds < 7.5  # the runner's second signal
    assert job.events[-1] == "quantization_failed"


def test_a_local_project_is_kept_where_it_is_asked_for_and_nobody_contacted(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        job = Job(
            tmp_path / "out",
            None,
            {
                **os.environ,
                "HF_ENDPOINT": url,
                "HF_TOKEN": "hf_x",
                "TRACKIO_SERVER_URL": f"{url}/?write_token=x",
                "TRACKIO_WEBHOOK_URL": url,
            },
            local=True,
        )
        job.begin()
        job.end()
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert (job.url, job.run_url, job.warnings) == (None, None, [])
    assert job.events[-1] == "run_succeeded"
    folder = tmp_path / "out" / "trackio"
    assert job.tracker.local_command == f"TRACKIO_DIR={folder} trackio show --project {PROJECT}"
    listed = subprocess.run(
        [TRACKIO, "list", "runs", "--project", PROJECT, "--json"],
        env={**os.environ, "TRACKIO_DIR": str(folder)},
        capture_output=True,
        check=True,
    )
    assert len(json.loads(listed.stdout)["runs"]) == 2


def test_a_local_run_is_sent_to_a_server_that_is_named_later(
    server: Server, tmp_path: Path
) -> None:
    job = Job(tmp_path / "out", None)
    job.begin()
    job.end()
    console = Console({}, job.output)
    with pytest.raises(InputError, match="--trackio-url"):
        sync(job.folder, None, console=console, environ=os.environ)
    there = make_destination(server.url, write_token=TOKEN)
    url = sync(job.folder, there, console=console, environ=os.environ)
    assert url is not None
    assert all(run["id"] in url for run in server.runs(PROJECT))
    assert len(server.runs(PROJECT)) == 2


@pytest.mark.fault(
    "input",
    "`sync-trackio` is given a folder without events",
    "Exit 2.",
)
def test_a_folder_without_events_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"events\.jsonl cannot be read"):
        sync(tmp_path, None, console=Console({}, io.StringIO()), environ=os.environ)
    (tmp_path / "events.jsonl").write_text("no event\n")
    with pytest.raises(InputError, match="holds no events"):
        sync(tmp_path, None, console=Console({}, io.StringIO()), environ=os.environ)


KILLED = """
import os, signal, sys
from pathlib import Path
from integration.test_tracking import Job, make_destination
job = Job(Path(sys.argv[1]), make_destination(sys.argv[2], write_token="write+token"))
job.begin()
print(job.tracker._process._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.fault(
    "cancelled",
    "The run is killed while Trackio records",
    "No event is lost, and no process is left.",
)
def test_a_kill_loses_no_event_and_leaves_no_process(server: Server, tmp_path: Path) -> None:
    tests = Path(__file__).parent.parent
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path / "out", server.url],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    lines = (tmp_path / "out" / "events.jsonl").read_text().splitlines()
    events = [json.loads(line)["event"] for line in lines]
    assert events.count("quantization_completed") == 2
    child = Path("/proc") / killed.stdout.strip()
    for _ in range(50):
        if not child.exists():
            break
        time.sleep(0.1)
    assert not child.exists()
    for run in server.runs(PROJECT):  # it delivered what it had been given
        assert "size/bytes" in run["summary"]["metrics"]


CHROMIUM = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--virtual-time-budget=8000",
    "--dump-dom",
]


def test_the_links_open_on_the_run_in_a_browser(server: Server, tmp_path: Path) -> None:
    browser = shutil.which("chromium")
    assert browser, "this test looks at the dashboard: install Debian's package chromium"
    job = Job(tmp_path / "out", make_destination(server.url, write_token=TOKEN))
    job.begin()
    job.end()

    def page(url: str | None) -> str:
        assert url
        profile = f"--user-data-dir={tmp_path / 'profile'}"
        shown = subprocess.run(
            [browser, *CHROMIUM, profile, url],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        return shown.stdout

    run_page = page(job.run_url)
    assert re.search(rf"<h2[^>]*>{PROJECT}@{SHA[:8]}-int8</h2>", run_page)
    assert "int8_weight_only" in run_page  # its configuration
    assert "report.json" in run_page  # its artifact
    charts = page(job.url)
    for title in ("relative_error", "bytes_per_second", "reduction_percent"):
        assert title in charts
    assert f"{PROJECT}@{SHA[:8]}-int4" in charts
