"""From the Hub to the Hub through a disk that holds neither the source nor the variants."""

import hashlib
import json
import os
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import CommitOperationAdd, HfApi
from safetensors.torch import load_file
from transformers import LlamaConfig

from command import Run, run_killed, run_smolquant
from conftest import WRITE
from localhub import LocalHub, Repo
from models import SIZES, save_with_tokenizer
from smolquant.checkpoint import remote
from smolquant.errors import HubError
from smolquant.hub import Hub
from smolquant.publish import commit
from smolquant.publish.operations import Publication
from smolquant.publish.target import Target, inspect_target

SOURCE, TARGET = "alice/source", "alice/target"
SHARD = 1_000_000
SOURCE_BYTES = 10_000_000
"""The source is a little more."""

Published = Callable[..., Run]


@pytest.fixture
def source(hub: LocalHub, tmp_path: Path) -> Path:
    """A checkpoint in one file, as a folder and in alice's repository."""
    sizes = SIZES | {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 5}
    folder = save_with_tokenizer(tmp_path / "source", LlamaConfig(**sizes))
    assert (folder / "model.safetensors").stat().st_size > SOURCE_BYTES
    api = HfApi(endpoint=hub.url, token=WRITE.value)
    api.create_repo(SOURCE)
    api.upload_folder(repo_id=SOURCE, folder_path=folder)
    return folder


@pytest.fixture
def publish(hub: LocalHub, source: Path, tmp_path: Path) -> Published:
    def run(
        *options: str, model: str | Path = SOURCE, repo: str = TARGET, timed: bool = False
    ) -> Run:
        arguments = ("--quant-type", "both", "--max-shard-size", "1MB", *options)
        return run_smolquant(
            *("quantize", model, repo, *arguments),
            folder=tmp_path,
            hub=hub,
            token=WRITE.value,
            timed=timed,
        )

    return run


@contextmanager
def peak_of(*folders: Path) -> Iterator[list[int]]:
    """The most bytes that weight files below ``folders`` took on disk at once, in a list of one."""
    peak, stopped = [0], threading.Event()

    def weights() -> Iterator[int]:
        for folder in folders:
            for parent, _, names in os.walk(folder):
                for name in names:
                    with suppress(FileNotFoundError):
                        found = (Path(parent) / name).lstat()
                        if found.st_size > SHARD // 10:
                            yield found.st_blocks * 512

    def watch() -> None:
        while not stopped.wait(0.002):
            peak[0] = max(peak[0], sum(weights()))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        stopped.set()
        thread.join()


def published(hub: LocalHub, repo: str) -> dict[str, str]:
    """sha256 of the weight files in the variants' folders."""
    return {
        f"{variant}/{name}": file["sha256"]
        for variant in ("int8", "int4")
        for name, file in json.loads(hub.read(repo, f"{variant}/quantization.json"))[
            "files"
        ].items()
        if name.endswith(".safetensors")
    }


def test_neither_source_nor_variants_are_ever_on_disk_and_the_bytes_are_the_same(
    publish: Published, hub: LocalHub, tmp_path: Path
) -> None:
    with peak_of(tmp_path / "quantized", tmp_path / "hf_home") as plain_peak:
        plain = publish("--low-disk", "never", repo="alice/plain")
    assert plain.exit_code == 0, plain.log
    (tmp_path / "quantized").rename(tmp_path / "plain")
    (tmp_path / "hf_home").rename(tmp_path / "plain_home")

    with peak_of(tmp_path / "quantized", tmp_path / "hf_home") as peak:
        run = publish("--low-disk", "always")

    assert run.exit_code == 0, run.log
    assert "Streaming 1 weight file(s)" in run.log
    assert plain_peak[0] > SOURCE_BYTES
    assert 0 < peak[0] < 2.5 * SHARD, "one shard of each variant, and some slack"
    assert published(hub, TARGET) == published(hub, "alice/plain")
    assert len(published(hub, TARGET)) > 8
    assert [commit.title for commit in hub.repo(TARGET).commits][:-1] == [
        "Publish quantized variants"
    ]
    for name, sha256 in published(hub, TARGET).items():
        entry = hub.repo(TARGET).files("main")[name]
        assert entry.sha256 == sha256
    assert not list((tmp_path / "quantized").rglob("*.safetensors"))


def test_a_folder_is_quantized_through_a_small_disk_too(
    publish: Published, source: Path, hub: LocalHub, tmp_path: Path
) -> None:
    with peak_of(tmp_path / "quantized") as peak:
        run = publish("--low-disk", "always", model=source)
    assert run.exit_code == 0, run.log
    assert 0 < peak[0] < 2.5 * SHARD
    assert len(published(hub, TARGET)) > 8
    assert "model.safetensors" in hub.repo(TARGET).files("main")


def test_what_is_measured_stays_and_the_source_is_read_again(
    publish: Published, hub: LocalHub, tmp_path: Path
) -> None:
    measuring = ("--evaluate", "always", "--eval-tokens", "64")
    plain = publish(*measuring, "--low-disk", "never", repo="alice/plain")
    assert plain.exit_code == 0, plain.log
    (tmp_path / "hf_home").rename(tmp_path / "plain_home")
    (tmp_path / "quantized").rename(tmp_path / "plain")

    with peak_of(tmp_path / "hf_home") as peak:
        run = publish(*measuring, "--low-disk", "always", timed=True)

    assert run.exit_code == 0, run.log
    assert peak[0] == 0, "the source is not stored"
    for variant, expected in plain.report["variants"].items():
        found = run.report["variants"][variant]["metrics"]
        assert found["mean_kl"] == expected["metrics"]["mean_kl"]
        assert found["source_tokens_per_second"] is None, "it cannot be loaded here"
    assert (tmp_path / "quantized/int8").is_dir()


@pytest.mark.fault(
    "hub",
    "The Hub fails for a while, as the weights are streamed",
    "The run waits and goes on.",
)
def test_an_outage_while_streaming_is_waited_out(publish: Published, hub: LocalHub) -> None:
    reading_headers = 2
    hub.fail_next("GET", r"/resolve/.*model\.safetensors", 503, times=2, skip=reading_headers)
    run = publish("--low-disk", "always")
    assert run.exit_code == 0, run.log
    statuses = [request.status for request in hub.requests if "model.safetensors" in request.path]
    assert statuses.count(503) == 2


@pytest.mark.fault(
    "hub",
    "Streamed weights arrive damaged",
    "Exit 5; nothing is published.",
)
def test_a_source_that_arrives_damaged_is_not_published(
    publish: Published, hub: LocalHub, source: Path, tmp_path: Path
) -> None:
    content = (source / "model.safetensors").read_bytes()
    (blob,) = [
        path
        for path in (tmp_path / "hub").rglob("*")
        if path.is_file() and path.stat().st_size == len(content)
    ]
    blob.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    run = publish("--low-disk", "always")

    assert run.exit_code == 5, run.log
    assert "model.safetensors did not arrive as it is on the Hub" in run.log
    assert len(hub.repo(TARGET).commits) == 1, "nothing but the creation of the repository"


@pytest.mark.fault(
    "hub",
    "The Hub refuses the commit of a run with --low-disk beside a variant of an earlier run",
    "The next run publishes; the earlier variant stays, and nothing else is left.",
)
def test_a_local_variant_of_an_earlier_run_stays(
    publish: Published, hub: LocalHub, source: Path, tmp_path: Path
) -> None:
    saved = run_smolquant("quantize", source, "--save-only", folder=tmp_path)
    assert saved.exit_code == 0, saved.log
    before = (tmp_path / "quantized/int8/model.safetensors").read_bytes()

    hub.fail_next("POST", r"/commit/", 403)
    failed = publish("--low-disk", "always", model=source)
    assert failed.exit_code == 5, failed.log
    run = publish("--low-disk", "always", "--create-pr", model=source)

    assert run.exit_code == 0, run.log
    assert hub.repo(TARGET).files("refs/pr/1")
    assert (tmp_path / "quantized/int8/model.safetensors").read_bytes() == before
    assert not list((tmp_path / "quantized").glob(".*")), "nothing is left behind"


def test_what_is_here_already_is_not_streamed(
    publish: Published, hub: LocalHub, tmp_path: Path
) -> None:
    HfApi(endpoint=hub.url, token=WRITE.value).snapshot_download(
        SOURCE, cache_dir=tmp_path / "hf_home/hub"
    )
    run = publish("--low-disk", "always")
    assert run.exit_code == 0, run.log
    assert "Streaming" not in run.log


@pytest.mark.fault(
    "input",
    "--low-disk always, and nothing is published",
    "The run goes on, and says that the disk is not spared.",
)
def test_that_nothing_can_be_spared_is_said(source: Path, tmp_path: Path) -> None:
    run = run_smolquant("quantize", source, "--save-only", "--low-disk", "always", folder=tmp_path)
    assert run.exit_code == 0, run.log
    assert "The disk is not spared" in run.log


FULL_DISK = """
import runpy, shutil
from types import SimpleNamespace

shutil.disk_usage = lambda folder: SimpleNamespace(free=1_000_000)
runpy.run_module("smolquant", run_name="__main__")
"""
"""The command, where a megabyte is left."""


@pytest.mark.fault(
    "machine",
    "The disk does not hold a pickle of the Hub",
    "Exit 4; it is not fetched.",
)
@pytest.mark.parametrize("options", [["--save-only"], ["--dry-run"]])
def test_a_pickle_that_the_disk_would_not_hold_is_not_fetched(
    hub: LocalHub, source: Path, tmp_path: Path, options: list[str]
) -> None:
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    api = HfApi(endpoint=hub.url, token=WRITE.value)
    api.upload_folder(
        repo_id=SOURCE,
        folder_path=source,
        allow_patterns="*.bin",
        delete_patterns="*.safetensors",
    )
    hub.requests.clear()

    arguments = ("quantize", SOURCE, *options)
    run = run_smolquant(*arguments, folder=tmp_path, hub=hub, script=FULL_DISK)

    assert run.exit_code == 4, run.log
    assert "Fetching the model takes 10." in run.log
    assert not any(r.method == "GET" and r.path.endswith(".bin") for r in hub.requests)


@pytest.mark.fault(
    "meanwhile",
    "Others change a variant after its shards were sent",
    "Exit 5; theirs stays.",
)
def test_others_who_change_a_sent_variant_meanwhile_are_not_overruled(
    publish: Published, hub: LocalHub
) -> None:
    assert publish("--low-disk", "always").exit_code == 0
    now = inspect_target(Hub(WRITE.value, endpoint=hub.url), TARGET)
    gone = Target(TARGET, exists=True, records={"int4": now.records["int4"]})
    operation = CommitOperationAdd("int8/model.safetensors", b"weights")
    release = Publication(
        variants={}, records=now.records, source_identity="", preuploaded={"int8/x": operation}
    )
    commit._refuse_changed_variants(now, now, release)
    with pytest.raises(HubError, match="Others have changed int8 of alice/target"):
        commit._refuse_changed_variants(now, gone, release)
    commit._refuse_changed_variants(now, gone, replace(release, preuploaded={}))


@pytest.mark.fault(
    "meanwhile",
    "Others push between the decision and the commit",
    "The target is read again, and the commit follows theirs.",
)
def test_a_push_in_between_is_followed_with_what_is_sent_already(
    publish: Published, hub: LocalHub
) -> None:
    def push(repo: Repo) -> None:
        hub.commit(TARGET, {"notes.txt": b"of others"})

    hub.before_commit = push
    run = publish("--low-disk", "always")
    assert run.exit_code == 0, run.log
    assert "Others have pushed" in run.log
    assert len(published(hub, TARGET)) > 8


@pytest.mark.fault(
    "cancelled",
    "A run that sends its shards early is killed",
    "The next run makes them again.",
)
def test_a_killed_run_makes_again_what_it_has_sent(
    publish: Published, hub: LocalHub, tmp_path: Path
) -> None:
    plain = publish("--low-disk", "never", repo="alice/plain")
    assert plain.exit_code == 0, plain.log
    (tmp_path / "quantized").rename(tmp_path / "plain")
    options = ["--quant-type", "both", "--max-shard-size", "1MB", "--low-disk", "always"]
    arguments = ["quantize", SOURCE, TARGET, *options]
    run_killed(arguments, tmp_path, after=6, hub=hub, token=WRITE.value)
    assert len(hub.repo(TARGET).commits) == 1, "nothing half-published"

    run = publish("--low-disk", "always")

    assert run.exit_code == 0, run.log
    assert published(hub, TARGET) == published(hub, "alice/plain")


@pytest.mark.fault(
    "hub",
    "A shard cannot be sent early",
    "Exit 5; nothing is published.",
)
def test_a_shard_that_cannot_be_sent_ends_the_run_and_leaves_nothing_published(
    publish: Published, hub: LocalHub
) -> None:
    hub.fail_next("POST", r"/preupload/", 403, times=50)
    run = publish("--low-disk", "always")
    assert run.exit_code == 5, run.log
    assert "Sending int" in run.log
    assert len(hub.repo(TARGET).commits) == 1


@pytest.mark.fault(
    "hub",
    "Streamed weights arrive damaged",
    "Exit 5; nothing is published.",
)
@pytest.mark.parametrize("order", ["in order", "shuffled"])
def test_any_range_can_be_read_again_when_its_chunk_is_gone(
    hub: LocalHub, source: Path, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    monkeypatch.setattr(remote, "CHUNK_BYTES", 50_000)
    content = (source / "model.safetensors").read_bytes()
    cuts = range(0, len(content), 170_001)
    ranges = [(start, min(start + 170_001, len(content))) for start in cuts]
    if order == "shuffled":
        random.Random(0).shuffle(ranges)
    client = Hub(WRITE.value, endpoint=hub.url)
    revision = hub.repo(SOURCE).head
    with closing(remote.RemoteFiles(client, SOURCE, revision)) as files:
        sha256 = hashlib.sha256(content).hexdigest()
        file = files.open("model.safetensors", len(content), sha256)
        with ThreadPoolExecutor(4) as pool:

            def read(start: int, stop: int) -> bytes:
                block = bytearray(stop - start)
                assert file.read_into(memoryview(block), start) == stop - start
                return bytes(block)

            read_blocks = list(pool.map(read, *zip(*ranges[::2], strict=True)))
        for (start, stop), block in zip(ranges[::2], read_blocks, strict=True):
            assert block == content[start:stop]
        assert len(files._chunks) <= remote._KEPT, "what is in memory is bounded"
        file.verify()
        assert file.read_into(memoryview(bytearray(10)), len(content) - 3) == 3
        file.close()
        other = files.open("model.safetensors", len(content), "0" * 64)
        with pytest.raises(HubError, match="its sha256 differs"):
            other.verify()
        other.close()


def test_what_is_read_out_of_turn_fetches_nothing_else(hub: LocalHub, source: Path) -> None:
    content = (source / "model.safetensors").read_bytes()
    far = len(content) - 10
    client = Hub(WRITE.value, endpoint=hub.url)
    with closing(remote.RemoteFiles(client, SOURCE, hub.repo(SOURCE).head)) as files:
        file = files.open("model.safetensors", len(content), hashlib.sha256(content).hexdigest())
        block = bytearray(10)
        assert file.read_into(memoryview(block), far, sequential=False) == 10
        assert bytes(block) == content[far:]
        file._hasher.submit(int).result()  # whatever would have been hashed is
        assert not files._chunks
        file.verify()
        file.close()


@pytest.mark.fault(
    "hub",
    "A range of a file is answered short",
    "Exit 5 with both numbers.",
)
def test_a_range_that_is_cut_short_is_refused(hub: LocalHub, source: Path) -> None:
    size = (source / "model.safetensors").stat().st_size
    client = Hub(WRITE.value, endpoint=hub.url)
    with closing(remote.RemoteFiles(client, SOURCE, hub.repo(SOURCE).head)) as files:
        longer = files.open("model.safetensors", size + 9, "0" * 64)
        with pytest.raises(HubError, match=r"answered with \d+ bytes"):
            longer.read_into(memoryview(bytearray(20)), size - 3)
        longer.close()
