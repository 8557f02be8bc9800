"""events.jsonl, what Trackio is told of it, and what the child process may know."""

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest

from smolquant.errors import Cancelled, HubError
from smolquant.record import Options, TensorRecord, VariantRecord
from smolquant.report.console import Console
from smolquant.tracking.destination import Destination
from smolquant.tracking.events import Entries, Entry, EventLog, read_events
from smolquant.tracking.naming import project_name, run_name
from smolquant.tracking.process import trackio_environment
from smolquant.tracking.recorder import Recorder, layer_errors
from unit.report_samples import SHA, SOURCE, variant_record


def with_errors(variant: str) -> VariantRecord:
    """Layers 0, 2 and 10, out of order, the first with two quantized tensors."""
    errors = {"layers.10.a": 0.3, "layers.0.a": 0.1, "layers.0.b": 0.2, "layers.2.a": 0.25}
    tensors = {
        f"{name}.weight": TensorRecord(True, 8, 4, relative_error=error)
        for name, error in errors.items()
    }
    tensors["layers.5.norm.weight"] = TensorRecord(False, 8, 8)
    tensors["lm_head.weight"] = TensorRecord(True, 8, 4, relative_error=0.9)
    return dataclasses.replace(variant_record(variant), tensors=tensors)


@dataclasses.dataclass
class Told:
    """A recorder without a child process, and what it has written."""

    recorder: Recorder
    folder: Path
    output: io.StringIO

    @property
    def events(self) -> list[dict[str, Any]]:
        return [dict(event) for _, event in read_events(self.folder / "events.jsonl")]

    @property
    def entries(self) -> list[Entry]:
        entries = Entries()
        return [entry for event in self.events for entry in entries.of(event)]


@pytest.fixture
def told(tmp_path: Path) -> Told:
    return tell(tmp_path)


def tell(
    folder: Path, *variants: str, title: str | None = None, secret: str = "", local: bool = False
) -> Told:
    output = io.StringIO()
    console = Console({}, output)
    if secret:
        console.mask(secret)
    recorder = Recorder(
        folder,
        console,
        destination=None,
        project="you-tiny",
        title=title,
        revision=None,
        quant_types={variant: f"{variant}_weight_only" for variant in variants or ("int8",)},
        local=local,
    )
    return Told(recorder, folder, output)


def start(told: Told, variant: str = "int8") -> None:
    told.recorder.started(
        variant, options={"group_size": 64}, device="cpu", repo=SOURCE.repo, revision=SHA
    )


def test_a_finished_run(told: Told) -> None:
    start(told)
    told.recorder.advance(2_000_000)
    told.recorder.completed(
        with_errors("int8"), seconds={"quantize": 4.0, "save": 1.0}, peak_memory_bytes=10**9
    )
    told.recorder.pushed({"int8": "https://hub/int8"}, SHA)
    told.recorder.ended(None)
    assert [event["event"] for event in told.events] == [
        "run",
        "quantization_started",
        "progress",
        "progress",
        "quantization_completed",
        "quantized_model_pushed",
        "run_succeeded",
    ]
    metrics: dict[str, Any] = {}
    for entry in told.entries:
        metrics |= entry.metrics
    assert metrics["source/identity"] == SOURCE.identity
    assert metrics["size/source_bytes"] == 2_000_000
    assert metrics["size/bytes"] == 1_300_123
    assert metrics["size/reduction_percent"] == pytest.approx(34.99385)
    assert (metrics["tensors/quantized"], metrics["tensors/kept"]) == (5, 1)
    assert (metrics["seconds/quantize"], metrics["seconds/total"]) == (4.0, 5.0)
    assert metrics["speed/bytes_per_second"] == 500_000
    assert metrics["memory/peak_bytes"] == 10**9
    assert metrics["progress/bytes"] == 2_000_000
    assert metrics["upload/url"] == "https://hub/int8"
    assert metrics["upload/commit"] == SHA
    assert metrics["success"] == 1
    assert "quality/perplexity" not in metrics  # what was not measured is no zero


def test_the_start_describes_the_run(told: Told) -> None:
    start(told)
    config = told.entries[0].config
    assert config is not None
    assert config["quant_type"] == "int8_weight_only"
    assert config["options"] == {"group_size": 64}
    assert config["device"] == "cpu"
    assert (config["source"], config["source_revision"]) == (SOURCE.repo, SHA)


def test_the_layers_errors_are_a_series_in_the_layers_order(told: Told) -> None:
    layers, errors = zip(*layer_errors(with_errors("int8")), strict=True)
    assert layers == (0, 2, 10)
    assert errors == pytest.approx((0.15, 0.25, 0.3))
    start(told)
    told.recorder.completed(with_errors("int8"), seconds={}, peak_memory_bytes=None)
    series = [
        (entry.step, entry.key)
        for entry in told.entries
        if "layers/relative_error" in entry.metrics
    ]
    assert [step for step, _ in series] == [0, 2, 10]
    assert len({key for _, key in series}) == 3


def test_progress_is_bytes_against_seconds() -> None:
    entries = Entries()
    entries.of({"event": "job", "id": "1", "project": "p", "group": "g"})
    entries.of({"event": "run", "id": "2", "run": "r", "name": "n"})
    at = [(0.0, 0), (0.04, 0), (0.3, 10), (61.2, 1000)]
    made = [
        entries.of(
            {"event": "progress", "id": "x", "time": "", "run": "r", "seconds": s, "done_bytes": n}
        )[0]
        for s, n in at
    ]
    assert [entry.step for entry in made] == [0, 0, 1, 62]
    assert made[-1].metrics["progress/bytes_per_second"] == pytest.approx(16.3, abs=0.1)


def test_points_of_the_curve_are_a_second_apart(told: Told) -> None:
    start(told)
    for _ in range(1000):
        told.recorder.advance(1)
    assert [event["event"] for event in told.events].count("progress") == 1


@pytest.mark.fault(
    "tracking",
    "The run fails",
    "It is recorded as failed.",
)
def test_a_failure_before_any_work_is_recorded_for_every_wanted_variant(tmp_path: Path) -> None:
    told = tell(tmp_path, "int8", "int4", "int8_dynamic", secret="hf_secret")
    told.recorder.up_to_date("int4")
    told.recorder.ended(HubError("hf_secret was refused\n::error::x"))
    failed = [entry for entry in told.entries if entry.metrics["event"] == "quantization_failed"]
    assert [entry.run.name for entry in failed] == ["you-tiny-int8", "you-tiny-int8_dynamic"]
    for entry in failed:
        assert entry.metrics["success"] == 0
        assert entry.metrics["exit_code"] == 5
        assert entry.metrics["error"] == "The Hub refused: *** was refused ::error::x"
        assert entry.config is not None
        assert entry.config["quant_type"].endswith("_weight_only")
        assert entry.alert is not None
        assert entry.alert.level == "error"


@pytest.mark.fault(
    "cancelled",
    "A job is cancelled while Trackio records",
    "The run is recorded as failed.",
)
def test_cancellation_is_a_failure_too(told: Told) -> None:
    start(told)
    told.recorder.ended(Cancelled(2))
    assert told.events[-1]["event"] == "quantization_failed"
    assert told.events[-1]["exit_code"] == 130


def test_names(tmp_path: Path) -> None:
    start(told := tell(tmp_path / "a"))
    assert told.events[0]["name"] == f"you-tiny@{SHA[:8]}-int8"
    start(told := tell(tmp_path / "b", title="my run"))
    assert told.events[0]["name"] == "my run"
    start(told := tell(tmp_path / "c", "int8", "int4", title="my run"))
    assert told.events[0]["name"] == "my run-int8"


def test_a_folder_has_no_revision_to_be_named_after(told: Told) -> None:
    told.recorder.started("int8", options={}, device="cpu", repo=None, revision=None)
    assert told.events[0]["name"] == "you-tiny-int8"


@pytest.mark.parametrize(
    ("repo", "project"),
    [
        ("you/SmolLM2-1.7B", "you-SmolLM2-1-7B"),
        ("you/x_artifacts", "you-x-artifacts"),  # an ending that Trackio reserves
        ("registry/x", "model-registry-x"),  # and a beginning
        ("/some/folder/my model|<b>", "my-model-b"),
        ("…", "model"),
        ("a/" + "b" * 500, "a-" + "b" * 118),
    ],
)
def test_a_project_is_named_after_the_repository(repo: str, project: str) -> None:
    assert project_name(repo) == project


@pytest.mark.fault(
    "text",
    "A run's name holds paths or markup",
    "It is made harmless.",
)
def test_a_runs_name_is_harmless() -> None:
    assert run_name("../../x\n\x1b[31m<script>") == "x -script"
    assert run_name("\x00") == "run"


@pytest.mark.fault(
    "tracking",
    "Recording fails inside",
    "One warning; the run goes on.",
)
def test_an_exception_inside_is_one_warning_and_no_more(told: Told) -> None:
    start(told)
    broken = dataclasses.replace(variant_record("int8"), tensors=None)  # type: ignore[arg-type]
    for _ in range(2):
        told.recorder.completed(broken, seconds={}, peak_memory_bytes=None)
    told.recorder.ended(None)
    told.recorder.finish(None)
    assert told.output.getvalue().count("warning:") == 1
    assert told.events[-1]["event"] == "run_succeeded"


@pytest.mark.fault(
    "cancelled",
    "A signal arrives while an event is written",
    "The recorder does not swallow it.",
)
def test_a_cancellation_passes_through(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise Cancelled(15)

    monkeypatch.setattr(EventLog, "append", interrupted)
    with pytest.raises(Cancelled):
        start(told)


@pytest.mark.fault(
    "tracking",
    "Events cannot be written",
    "One warning; the run goes on.",
)
def test_a_folder_that_cannot_be_written_to_is_one_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    told = tell(tmp_path / "file" / "out")
    start(told)
    told.recorder.ended(None)
    assert told.output.getvalue().count("warning:") == 1
    assert "kept" not in told.output.getvalue()


@pytest.mark.fault(
    "tracking",
    "A line of events is cut short",
    "It costs no other.",
)
def test_a_line_cut_short_costs_no_other(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "out" / "events.jsonl")
    log.append(json.dumps({"event": "a", "id": "1"}))
    with log.path.open("a") as file:
        file.write('{"event": "b", "i')  # a kill in the middle of a write
    log.append(json.dumps({"event": "c", "id": "3"}))
    assert [event["event"] for _, event in read_events(log.path)] == ["a", "c"]


@pytest.mark.fault(
    "secret",
    "An event holds a token",
    "The file of events does not.",
)
def test_the_file_holds_no_secret(tmp_path: Path) -> None:
    told = tell(tmp_path, secret="hf_secret")
    options: Options = {"skip": ["hf_secret"], "x": float("nan")}
    told.recorder.started("int8", options=options, device="cpu", repo=None, revision=None)
    assert "hf_secret" not in (tmp_path / "events.jsonl").read_text()
    assert told.entries[0].config is not None
    assert told.entries[0].config["options"] == {"skip": ["***"], "x": None}


LEAKY = {
    "PATH": "/bin",
    "TRACKIO_SPACE_ID": "else/where",
    "TRACKIO_WRITE_TOKEN": "theirs",
    "TRACKIO_WEBHOOK_URL": "https://else.where",
    "INPUT_HF-TOKEN": "hf_secret",
    "HF_TOKEN": "hf_secret",
    "HF_OIDC_RESOURCE": "you/tiny",
    "ACTIONS_ID_TOKEN_REQUEST_TOKEN": "oidc",
    "DEPLOY_KEY": "deploys",
}


@pytest.mark.fault(
    "secret",
    "Trackio's process is started",
    "It knows the write token and no other.",
)
def test_a_servers_child_knows_the_write_token_alone(tmp_path: Path) -> None:
    server = Destination("http://host", write_token="ours")
    environ = trackio_environment(LEAKY, server, tmp_path, hub_token="hf_secret")
    trackio = {name: value for name, value in environ.items() if name.startswith("TRACKIO_")}
    assert trackio == {"TRACKIO_DIR": str(tmp_path), "TRACKIO_WRITE_TOKEN": "ours"}
    assert environ["HF_HUB_OFFLINE"] == "1"
    assert environ["PATH"] == "/bin"
    assert not {"hf_secret", "oidc", "theirs", "deploys"} & set(environ.values())


@pytest.mark.fault(
    "secret",
    "Trackio's process is started for a local project",
    "It knows no token and reaches nobody.",
)
def test_a_local_childs_environment_reaches_nobody(tmp_path: Path) -> None:
    environ = trackio_environment(LEAKY, None, tmp_path, hub_token="hf_secret")
    assert environ["HF_HUB_OFFLINE"] == "1"
    assert not {"hf_secret", "oidc", "theirs", "deploys", "else/where"} & set(environ.values())


def test_a_space_is_opened_by_its_own_token_or_the_given_one(tmp_path: Path) -> None:
    own = Destination("https://u-n.hf.space", space="u/n", write_token="hf_own")
    assert trackio_environment(LEAKY, own, tmp_path, "hf_given")["HF_TOKEN"] == "hf_own"
    other = Destination("https://u-n.hf.space", space="u/n")
    environ = trackio_environment(LEAKY, other, tmp_path, "hf_given")
    assert environ["HF_TOKEN"] == "hf_given"
    assert "HF_OIDC_RESOURCE" not in environ
    assert "HF_HUB_OFFLINE" not in environ


@pytest.mark.fault(
    "tracking",
    "Events' files are links elsewhere",
    "Nothing is written through them.",
)
def test_links_in_the_output_folder_are_not_written_through(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("precious")
    out = tmp_path / "out"
    out.mkdir()
    (out / "events.jsonl").symlink_to(elsewhere)
    told = tell(out)
    start(told)
    assert elsewhere.read_text() == "precious"
    assert "events.jsonl cannot be written" in told.output.getvalue()


@pytest.mark.fault(
    "tracking",
    "Events' files are links elsewhere",
    "Nothing is written through them.",
)
def test_a_local_project_is_not_kept_behind_a_link(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    out = tmp_path / "out"
    out.mkdir()
    (out / "trackio").symlink_to(elsewhere)
    told = tell(out, local=True)
    told.recorder.open({}, hub_token=None, private=False)
    start(told)
    told.recorder.finish(None)
    assert not list(elsewhere.iterdir())
    assert "trackio is a link" in told.output.getvalue()
    assert told.recorder.local_command is None


def test_no_project_is_made_that_nobody_asked_for(tmp_path: Path) -> None:
    told = tell(tmp_path)
    told.recorder.open({}, hub_token=None, private=False)
    start(told)
    told.recorder.finish(None)
    assert [path.name for path in tmp_path.iterdir()] == ["events.jsonl"]
    assert told.recorder.files == [tmp_path / "events.jsonl"]
    assert told.recorder.local_command is None
