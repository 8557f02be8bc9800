"""The whole command against the local Hub: what a release workflow would see."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import models
from command import Run
from conftest import OTHER, READ, WRITE
from localhub import LocalHub, Repo

REPO = "alice/model"
RunSmolquant = Callable[..., Run]


@pytest.fixture
def publish(smolquant: RunSmolquant, hub: LocalHub, checkpoint: Path) -> RunSmolquant:
    """Publishes ``checkpoint`` into alice's repo, as a step of a workflow."""

    def run(*options: str, model: str | Path = checkpoint, token: str = WRITE.value) -> Run:
        return smolquant("quantize", model, REPO, *options, hub=hub, token=token, actions=True)

    return run


def files(hub: LocalHub, folder: str = "") -> set[str]:
    prefix = f"{folder}/" if folder else ""
    return {path for path in hub.repo(REPO).files("main") if path.startswith(prefix)}


def titles(hub: LocalHub) -> list[str]:
    """Titles of the commits, the one that creates the repository left out, newest first."""
    return [commit.title for commit in hub.repo(REPO).commits][:-1]


STOCK = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
repo, variant, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(repo, subfolder=variant)
tokenizer = AutoTokenizer.from_pretrained(repo, subfolder=variant)
assert "smolquant" not in sys.modules
with torch.no_grad():
    logits = model(torch.arange(3, 43).unsqueeze(0)).logits.float()
torch.save({"logits": logits, "chat_template": tokenizer.chat_template}, out)
"""


def with_stock_transformers(
    hub: LocalHub, folder: Path, where: str | Path, variant: str
) -> dict[str, Any]:
    """Logits and template of a variant in a repo or folder, loaded by stock transformers alone.

    In a process of its own: this one may have our kernels in it, which round otherwise.
    """
    environ = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": WRITE.value,
        "HF_HOME": str(folder / "stock_home"),
    }
    out = folder / "stock.pt"
    subprocess.run([sys.executable, "-c", STOCK, where, variant, out], env=environ, check=True)
    loaded: dict[str, Any] = torch.load(out)
    return loaded


def test_one_commit_holds_main_model_variants_and_cards(
    publish: RunSmolquant, hub: LocalHub, checkpoint: Path
) -> None:
    run = publish("--quant-type", "both")

    assert run.exit_code == 0, run.log
    assert len(titles(hub)) == 1
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= files(hub)
    for variant in ("int8", "int4"):
        assert {
            f"{variant}/{name}"
            for name in (
                "README.md",
                "config.json",
                "generation_config.json",
                "model.safetensors",
                "quantization.json",
                "relative_error.svg",
                "tokenizer.json",
                "tokenizer_config.json",
                "chat_template.jinja",
            )
        } == files(hub, variant)
    assert hub.read(REPO, "model.safetensors") == (checkpoint / "model.safetensors").read_bytes()


def test_outputs_summary_and_report_tell_the_same(publish: RunSmolquant, hub: LocalHub) -> None:
    run = publish("--quant-type", "both")

    head = hub.repo(REPO).head
    assert run.outputs["commit-sha"] == run.report["commit_sha"] == head
    assert run.outputs["changed"] == "true"
    assert run.outputs["repo-url"] == f"{hub.url}/{REPO}"
    assert run.outputs["int8-url"] == f"{hub.url}/{REPO}/tree/main/int8"
    assert run.outputs["int8-dynamic-url"] == ""
    assert run.outputs["report"] == "quantized/report.json"
    assert run.report["variants"]["int4"]["url"] == run.outputs["int4-url"]
    assert f"[int4]({hub.url}/{REPO}/tree/main/int4)" in run.summary.replace("`", "")
    assert "smolquant quantize" in run.summary


def test_a_second_run_changes_nothing(publish: RunSmolquant, hub: LocalHub) -> None:
    publish("--quant-type", "both")
    head = hub.repo(REPO).head

    run = publish("--quant-type", "both")

    assert run.exit_code == 0, run.log
    assert run.outputs["changed"] == "false"
    assert hub.repo(REPO).head == head
    assert run.report["variants"]["int8"]["up_to_date"]
    assert "up to date" in run.log
    assert "up to date" in run.summary.lower()


def test_the_published_model_itself_is_the_normal_source(
    publish: RunSmolquant, smolquant: RunSmolquant, hub: LocalHub
) -> None:
    """Our own commit moves the repository's head, which must not make its variants stale."""
    publish("--quant-type", "int8_weight_only")
    first = hub.read(REPO, "int8/model.safetensors")

    again = smolquant("quantize", REPO, hub=hub, token=WRITE.value, actions=True)
    assert again.exit_code == 0, again.log
    assert again.outputs["changed"] == "false"

    more = smolquant(
        "quantize", REPO, "--quant-type", "both", hub=hub, token=WRITE.value, actions=True
    )
    assert more.exit_code == 0, more.log
    assert len(titles(hub)) == 2
    assert files(hub, "int4")
    assert hub.read(REPO, "int8/model.safetensors") == first
    assert more.report["variants"]["int8"]["up_to_date"]
    assert not more.report["variants"]["int4"]["up_to_date"]


def test_a_changed_option_makes_only_what_it_changes(publish: RunSmolquant, hub: LocalHub) -> None:
    publish("--quant-type", "both", "--group-size", "128")
    run = publish("--quant-type", "both", "--group-size", "32")
    assert run.exit_code == 0, run.log
    assert run.report["variants"]["int8"]["up_to_date"]
    record = json.loads(hub.read(REPO, "int4/quantization.json"))
    assert record["options"]["group_size"] == 32


def test_force_makes_it_again_with_the_same_bytes(publish: RunSmolquant, hub: LocalHub) -> None:
    publish("--quant-type", "both")
    before = {path: hub.read(REPO, path) for path in files(hub)}
    run = publish("--quant-type", "both", "--force")
    assert run.exit_code == 0, run.log
    assert not run.report["variants"]["int4"]["up_to_date"]
    assert {path: hub.read(REPO, path) for path in files(hub)} == before


def test_stale_files_go_and_other_variants_stay(publish: RunSmolquant, hub: LocalHub) -> None:
    publish("--quant-type", "both")
    hub.commit(REPO, {"int4/old.bin": b"x", "int8/keep.txt": b"y"})
    run = publish("--quant-type", "int4_weight_only", "--group-size", "32")
    assert run.exit_code == 0, run.log
    assert "int4/old.bin" not in files(hub)
    assert "int8/keep.txt" in files(hub)
    card = hub.read(REPO, "README.md").decode()
    assert "int8" in card and "int4" in card


def test_sharded_variants_load_from_the_hub_with_stock_transformers(
    publish: RunSmolquant, hub: LocalHub, checkpoint: Path, tmp_path: Path
) -> None:
    models.save_with_tokenizer(checkpoint, models.llama(layers=8))
    run = publish("--max-shard-size", "1MB")
    assert run.exit_code == 0, run.log
    shards = {path for path in files(hub, "int8") if path.endswith(".safetensors")}
    assert len(shards) == 2

    loaded = with_stock_transformers(hub, tmp_path, REPO, "int8")
    local = with_stock_transformers(hub, tmp_path, tmp_path / "quantized", "int8")
    assert loaded["chat_template"]
    assert torch.equal(loaded["logits"], local["logits"])


@pytest.mark.fault(
    "hub",
    "The repository holds something else in a variant's folder",
    "Exit 2 without --force; it stays.",
)
def test_what_the_owner_keeps_in_a_variants_folder_is_not_deleted(
    publish: RunSmolquant, hub: LocalHub
) -> None:
    hub.create_repo(REPO)
    hub.commit(REPO, {"int8/thesis.txt": b"years of work"})
    refused = publish()
    assert refused.exit_code == 2
    assert "int8/ in alice/model holds something other" in refused.annotations[0]
    assert "int8/thesis.txt" in files(hub)
    assert publish("--force").exit_code == 0
    assert "int8/thesis.txt" not in files(hub)


@pytest.mark.fault(
    "record",
    "A published variant lost a file",
    "It is made again.",
)
def test_a_variant_that_lost_a_file_is_made_again(publish: RunSmolquant, hub: LocalHub) -> None:
    publish()
    hub.commit(REPO, {}, delete=["int8/model.safetensors"])
    run = publish()
    assert run.exit_code == 0, run.log
    assert run.outputs["changed"] == "true"
    assert "int8/model.safetensors" in files(hub)
    assert "int8/ is left out of the card" in run.log, "said, before it was mended"


@pytest.mark.fault(
    "meanwhile",
    "Others push different main weights between the decision and the commit",
    "Exit 2; theirs stay.",
)
def test_main_weights_that_change_while_variants_are_made_stop_the_publication(
    publish: RunSmolquant, smolquant: RunSmolquant, hub: LocalHub
) -> None:
    publish()

    def push_other_weights(repo: Repo) -> None:
        hub.commit(REPO, {"model.safetensors": b"retrained"})

    hub.before_commit = push_other_weights
    run = smolquant(
        *("quantize", REPO, "--quant-type", "int4_weight_only"),
        hub=hub,
        token=WRITE.value,
        actions=True,
    )
    assert run.exit_code == 2
    assert "not the one that was read" in run.annotations[0]
    assert "int4/model.safetensors" not in files(hub)


@pytest.mark.fault(
    "hub",
    "The answer to the commit, or to the pull request, is lost or garbage",
    "What was made is found and reported; it is not made twice.",
)
def test_a_tag_names_the_published_commit_though_its_answer_is_lost(
    publish: RunSmolquant, hub: LocalHub
) -> None:
    hub.alter_next("POST", "/commit/main$", lambda body: b"<html>Bad gateway", status=502)
    run = publish("--tag", "v1.0")
    assert run.exit_code == 0, run.log
    assert "its answer was lost" in run.log
    assert run.outputs["changed"] == "true"
    assert hub.repo(REPO).tags["v1.0"] == hub.repo(REPO).head == run.outputs["commit-sha"]
    assert len(hub.repo(REPO).commits) == 2

    hub.commit(REPO, {"notes.txt": b"moved on"})
    refused = publish("--tag", "v1.0", "--force")
    assert refused.exit_code == 2
    assert "The tag v1.0 already exists" in refused.annotations[0]


def test_the_same_release_again_finds_its_tag_where_it_belongs(
    publish: RunSmolquant, hub: LocalHub
) -> None:
    assert publish("--tag", "v1.0").exit_code == 0
    again = publish("--tag", "v1.0")
    assert again.exit_code == 0, again.log
    assert again.outputs["changed"] == "false"


def test_a_pull_request_leaves_main_alone(publish: RunSmolquant, hub: LocalHub) -> None:
    hub.create_repo(REPO)
    head = hub.repo(REPO).head
    run = publish("--create-pr")
    assert run.exit_code == 0, run.log
    assert hub.repo(REPO).head == head
    assert "/discussions/1" in run.outputs["pull-request-url"]


def test_private_repositories(publish: RunSmolquant, hub: LocalHub) -> None:
    assert publish("--private").exit_code == 0
    assert hub.repo(REPO).private


@pytest.mark.fault(
    "hub",
    "The repository holds other main weights",
    "Exit 2 without --replace-main; they stay.",
)
def test_different_main_weights_are_refused_before_the_work(
    publish: RunSmolquant, hub: LocalHub, checkpoint: Path
) -> None:
    publish()
    head = hub.repo(REPO).head
    models.save_with_tokenizer(checkpoint, models.llama(layers=1))

    refused = publish()
    assert refused.exit_code == 2
    assert "--replace-main" in refused.annotations[0]
    assert hub.repo(REPO).head == head

    replaced = publish("--replace-main")
    assert replaced.exit_code == 0, replaced.log
    assert hub.read(REPO, "model.safetensors") == (checkpoint / "model.safetensors").read_bytes()


@pytest.mark.fault(
    "meanwhile",
    "Others push between the decision and the commit",
    "The target is read again, and the commit follows theirs.",
)
def test_a_concurrent_push_is_followed(publish: RunSmolquant, hub: LocalHub) -> None:
    hub.create_repo(REPO)

    def push_theirs(repo: Repo) -> None:
        hub.commit(REPO, {"theirs.txt": b"pushed meanwhile"})

    hub.before_commit = push_theirs
    run = publish()
    assert run.exit_code == 0, run.log
    assert {"theirs.txt", "int8/model.safetensors"} <= files(hub)


@pytest.mark.fault(
    "hub",
    "The Hub refuses the commit",
    "Exit 5; the repository is as before, and the same command only publishes.",
)
def test_a_failing_commit_leaves_the_repository_untouched(
    publish: RunSmolquant, hub: LocalHub
) -> None:
    hub.create_repo(REPO)
    head = hub.repo(REPO).head
    hub.fail_next("POST", r"/commit/", 403, times=9)
    run = publish()
    assert run.exit_code == 5
    assert hub.repo(REPO).head == head
    assert run.report["error"]["exit_code"] == 5
    assert run.outputs["commit-sha"] == ""
    assert len(run.annotations) == 1


@pytest.mark.fault(
    "hub",
    "The Hub refuses the commit",
    "Exit 5; the repository is as before, and the same command only publishes.",
)
def test_after_a_failing_commit_the_same_command_only_publishes(
    publish: RunSmolquant, hub: LocalHub, tmp_path: Path
) -> None:
    hub.fail_next("POST", r"/commit/", 403)
    assert publish("--quant-type", "both").exit_code == 5
    made = {path: path.stat().st_mtime_ns for path in tmp_path.glob("quantized/int*/*.safetensors")}

    run = publish("--quant-type", "both")

    assert run.exit_code == 0, run.log
    assert "int4: quantized/int4 has what an earlier run made of this source" in run.log
    assert "== Quantize" not in run.log and "::group::Quantize" not in run.log
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert {"int4/model.safetensors", "int8/model.safetensors", "int8/README.md"} <= files(hub)
    assert run.outputs["changed"] == "true"
    assert not run.report["variants"]["int8"]["up_to_date"]
    assert run.report["source"]["identity"].startswith("sha256:")


@pytest.mark.fault(
    "record",
    "A variant that an earlier run left is spoiled",
    "It is made again.",
)
def test_what_an_earlier_run_left_is_made_again_where_it_is_spoiled(
    publish: RunSmolquant, hub: LocalHub, tmp_path: Path
) -> None:
    hub.fail_next("POST", r"/commit/", 403)
    assert publish().exit_code == 5
    weights = tmp_path / "quantized/int8/model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    run = publish()

    assert run.exit_code == 0, run.log
    assert "an earlier run made" not in run.log
    assert weights.read_bytes() == content


def test_what_an_earlier_run_left_stays_where_the_disk_is_spared(
    publish: RunSmolquant, hub: LocalHub, tmp_path: Path
) -> None:
    hub.fail_next("POST", r"/commit/", 403)
    assert publish().exit_code == 5

    run = publish("--quant-type", "both", "--low-disk", "always")

    assert run.exit_code == 0, run.log
    assert "int8: quantized/int8 has what an earlier run made" in run.log
    assert {"int4/model.safetensors", "int8/model.safetensors"} <= files(hub)
    assert (tmp_path / "quantized/int8/model.safetensors").is_file()
    assert not (tmp_path / "quantized/int4/model.safetensors").exists()


@pytest.mark.fault(
    "quality",
    "What an earlier run left is worse than the limit",
    "Exit 6, before the rest is made.",
)
def test_what_an_earlier_run_left_meets_the_gate_before_the_rest_is_made(
    publish: RunSmolquant, hub: LocalHub
) -> None:
    hub.fail_next("POST", r"/commit/", 403)
    assert publish("--evaluate", "always").exit_code == 5

    run = publish("--quant-type", "both", "--evaluate", "always", "--max-kl", "0.00000001")

    assert run.exit_code == 6, run.log
    assert "::group::Quantize" not in run.log
    assert not files(hub, "int8")
    assert len(run.annotations) == 1


@pytest.mark.fault(
    "hub",
    "The token may not write",
    "Exit 5, before any work.",
)
@pytest.mark.parametrize(
    ("token", "said"),
    [
        (READ.value, "read"),
        (OTHER.value, "alice"),
        ("hf_wrong", "does not accept the token"),
        ("", "needs a Hugging Face token"),
    ],
)
def test_without_write_access_nothing_is_worked(
    publish: RunSmolquant, hub: LocalHub, token: str, said: str
) -> None:
    run = publish(token=token)
    assert run.exit_code == 5
    assert len(run.annotations) == 1
    assert said in run.annotations[0]
    assert "Quantize" not in run.log
    assert not token or token not in run.log.replace(f"::add-mask::{token}", "")


@pytest.mark.fault(
    "secret",
    "A whole run with a token",
    "The token is in no log, file, card or commit.",
)
def test_the_token_appears_nowhere(publish: RunSmolquant, hub: LocalHub, tmp_path: Path) -> None:
    run = publish()
    assert run.log.startswith(f"::add-mask::{WRITE.value}\n")
    assert run.log.count(WRITE.value) == 1
    written = [tmp_path / "github_output", tmp_path / "github_summary"]
    written += [path for path in (tmp_path / "quantized").rglob("*") if path.is_file()]
    for path in written:
        assert WRITE.value.encode() not in path.read_bytes(), path


@pytest.mark.parametrize("revision", ["v1", "main"])
def test_a_revision_is_pinned(
    smolquant: RunSmolquant, hub: LocalHub, checkpoint: Path, revision: str
) -> None:
    hub.create_repo("alice/source")
    names = [path for path in checkpoint.iterdir() if path.is_file()]
    sha = hub.commit("alice/source", {path.name: path for path in names})
    if revision == "v1":
        from huggingface_hub import HfApi

        HfApi(endpoint=hub.url, token=WRITE.value).create_tag("alice/source", tag="v1")
        hub.commit("alice/source", {"model.safetensors": b"broken later"})
    run = smolquant(
        "quantize",
        "alice/source",
        REPO,
        "--revision",
        revision,
        hub=hub,
        token=WRITE.value,
        actions=True,
    )
    assert run.exit_code == 0, run.log
    assert run.report["source"]["revision"] == sha
    assert not {"model.safetensors", "config.json"} & files(hub), "subfolders only"
    card = hub.read(REPO, "README.md").decode()
    assert "base_model: alice/source" in card or "base_model:\n- alice/source" in card


@pytest.mark.fault(
    "hub",
    "The revision does not exist",
    "Exit 5.",
)
def test_an_unknown_revision(smolquant: RunSmolquant, hub: LocalHub) -> None:
    hub.create_repo(REPO)
    run = smolquant("quantize", REPO, "--revision", "v9", hub=hub, token=WRITE.value, actions=True)
    assert run.exit_code == 5
    assert "no such revision" in run.annotations[0]


def test_a_dry_run_of_a_hub_model_fetches_no_weights(
    publish: RunSmolquant, smolquant: RunSmolquant, hub: LocalHub
) -> None:
    publish()
    hub.requests.clear()
    run = smolquant("quantize", REPO, "--dry-run", "--quant-type", "both", hub=hub)
    assert run.exit_code == 0, run.log
    assert "int4 (int4_weight_only)" in run.log
    assert "int8 is up to date" in run.log
    sent = [r for r in hub.requests if r.method == "GET" and r.path.endswith("model.safetensors")]
    assert sent, "the header is read"
    assert not list((run.folder / "hf_home").rglob("*.safetensors"))


@pytest.mark.fault(
    "input",
    "The token ends in a newline",
    "It is used without it.",
)
def test_a_token_that_ends_in_a_newline_publishes(publish: RunSmolquant, hub: LocalHub) -> None:
    run = publish("--evaluate", "never", token=f" {WRITE.value}\n")
    assert run.exit_code == 0, run.log
    assert f"{REPO}/tree/main/int8" in run.outputs["int8-url"]
    assert run.log.count(WRITE.value) == 1, "in the runner's mask alone"


@pytest.mark.fault(
    "text",
    "The Hub refuses the card's front matter",
    "Exit 2 with the entry.",
)
@pytest.mark.parametrize(
    ("of_folder", "entry", "reason"),
    [
        (False, "base_model: [not an id]", "invalid repo ids"),
        (True, "license: {name: mine}", "'license'"),
    ],
)
def test_front_matter_that_the_hub_refuses_is_found_out_before_the_work(
    publish: RunSmolquant,
    hub: LocalHub,
    checkpoint: Path,
    of_folder: bool,
    entry: str,
    reason: str,
) -> None:
    readme = f"---\n{entry}\n---\n\n# Mine\n"
    hub.create_repo(REPO)
    if of_folder:
        (checkpoint / "README.md").write_text(readme)
    else:
        hub.commit(REPO, {"README.md": readme.encode()})
    head = hub.repo(REPO).head
    run = publish("--evaluate", "never")
    assert run.exit_code == 2, run.log
    assert reason in run.annotations[0]
    assert "Quantize" not in run.log
    assert hub.repo(REPO).head == head
