"""Every way in which a user can go wrong: one message with cause and next step, the right exit code."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import models
from command import Run
from conftest import WRITE
from localhub import LocalHub

RunSmolquant = Callable[..., Run]


@pytest.fixture
def failing(smolquant: RunSmolquant) -> Callable[..., str]:
    """Runs the command as a workflow's step, expects it to fail, and returns its one annotation."""

    def run(*arguments: str | Path, code: int, **options: object) -> str:
        finished = smolquant("quantize", *arguments, actions=True, **options)
        assert finished.exit_code == code, finished.log
        assert len(finished.annotations) == 1, finished.log
        assert "Traceback" not in finished.log
        annotation = finished.annotations[0]
        what, _, next_step = annotation.partition("%0A")
        assert what and next_step, "what happened, and what to do"
        assert finished.report["error"]["exit_code"] == code
        assert finished.outputs["changed"] == "false"
        assert finished.outputs["commit-sha"] == ""
        assert "failed" in finished.summary.lower() or "not" in finished.summary.lower()
        return annotation

    return run


@pytest.mark.fault(
    "input",
    "An option has a value that makes no sense, or two contradict each other",
    "Exit 2, before torch is imported.",
)
def test_inputs_are_refused_with_code_2(failing: Callable[..., str], checkpoint: Path) -> None:
    assert "no repository to publish into" in failing(checkpoint, code=2)
    assert "'int3' is not a quantization type" in failing(
        checkpoint, "--save-only", "--quant-type", "int3", code=2
    )
    assert "has no kernel" in failing(checkpoint, "--save-only", "--group-size", "48", code=2)
    assert "not a valid integer" in failing(
        checkpoint, "--save-only", "--group-size", "many", code=2
    )
    assert "--token stands on the command line" in failing(
        checkpoint, "--save-only", "--token", "hf_x", code=2
    )


@pytest.mark.fault(
    "input",
    "An input of the action is misspelt or out of range",
    "Exit 2 with one annotation that repeats it.",
)
@pytest.mark.parametrize(
    ("name", "value"), [("SAVE-ONLY", "maybe"), ("GROUP-SIZE", "x"), ("DEVICE", "tpu")]
)
def test_inputs_of_an_action_are_refused_the_same(
    smolquant: RunSmolquant, checkpoint: Path, name: str, value: str
) -> None:
    env = {"INPUT_MODEL-PATH": str(checkpoint), f"INPUT_{name}": value}
    run = smolquant(actions=True, env=env)
    assert run.exit_code == 2, run.log
    assert len(run.annotations) == 1
    assert value in run.annotations[0]


def change_weights(folder: Path, name: str, value: float | torch.Tensor) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    state[name].view(-1)[-1] = value
    save_file(state, path, metadata={"format": "pt"})


@pytest.mark.fault(
    "checkpoint",
    "A weight holds NaN or infinity",
    "Exit 3 with the weight; nothing half-made is left.",
)
def test_weights_that_are_not_finite_are_named(
    failing: Callable[..., str], checkpoint: Path, tmp_path: Path
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    change_weights(checkpoint, name, float("nan"))
    assert f"The weight {name!r} holds NaN" in failing(checkpoint, "--save-only", code=3)
    left = [path.name for path in (tmp_path / "quantized").iterdir()]
    assert not {name for name in left if "int8" in name}, "nothing half-made is left"


@pytest.mark.fault(
    "checkpoint",
    "Weights are large and finite",
    "They are quantized.",
)
def test_large_but_finite_weights_are_no_infinity(
    smolquant: RunSmolquant, checkpoint: Path
) -> None:
    state = load_file(checkpoint / "model.safetensors")
    state["model.norm.weight"].fill_(3e38)
    save_file(state, checkpoint / "model.safetensors", metadata={"format": "pt"})
    run = smolquant("quantize", checkpoint, "--save-only")
    assert run.exit_code == 0, run.log


@pytest.mark.fault(
    "checkpoint",
    "A value is too large for the variant's dtype",
    "Exit 3 with the weight.",
)
def test_values_too_large_for_float16(failing: Callable[..., str], checkpoint: Path) -> None:
    change_weights(checkpoint, "model.layers.0.mlp.up_proj.weight", 1e6)
    annotation = failing(checkpoint, "--save-only", "--dtype", "float16", code=3)
    assert "too large for torch.float16" in annotation
    assert "up_proj" in annotation
    change_weights(checkpoint, "model.layers.0.mlp.up_proj.weight", 3e38)
    assert "too large to quantize" in failing(checkpoint, "--save-only", code=3)


@pytest.mark.fault(
    "checkpoint",
    "A safetensors file is truncated",
    "Exit 3 with its name.",
)
def test_unusable_checkpoints(failing: Callable[..., str], checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-10])
    assert "truncated or corrupt" in failing(checkpoint, "--save-only", code=3)

    weights.unlink()
    assert "There are no weights" in failing(checkpoint, "--save-only", code=3)

    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "which is not there" in failing(checkpoint, "--save-only", code=3)


@pytest.mark.fault(
    "checkpoint",
    "config.json makes no model: an unknown type, impossible sizes, code of its own",
    "Exit 3 with the reason.",
)
def test_models_that_cannot_be_quantized_honestly(
    failing: Callable[..., str], tmp_path: Path
) -> None:
    gpt2 = models.save(tmp_path / "gpt2", models.GPT2())
    assert "Conv1D" in failing(gpt2, "--save-only", code=3)
    (gpt2 / "config.json").write_text('{"model_type": "hal9000"}')
    assert "hal9000" in failing(gpt2, "--save-only", code=3)
    (gpt2 / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoConfig": "own.C"}}')
    assert "--trust-remote-code" in failing(gpt2, "--save-only", code=3)


@pytest.mark.fault(
    "machine",
    "--device cuda, and no GPU is there",
    "Exit 4.",
)
def test_a_gpu_that_is_not_there(failing: Callable[..., str], checkpoint: Path) -> None:
    assert "no CUDA device" in failing(checkpoint, "--save-only", "--device", "cuda", code=4)


@pytest.mark.fault(
    "machine",
    "Something other than a variant lies in the variant's place",
    "Exit 2; it is left alone.",
)
def test_a_folder_of_the_users_is_not_overwritten(
    failing: Callable[..., str], checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "quantized/int8").mkdir(parents=True)
    (tmp_path / "quantized/int8/thesis.txt").write_text("years of work")
    assert "something other than a variant" in failing(checkpoint, "--save-only", code=2)
    assert (tmp_path / "quantized/int8/thesis.txt").read_text() == "years of work"
    (tmp_path / "quantized/int4").symlink_to(tmp_path / "quantized/int8")
    assert "something other than a variant" in failing(
        checkpoint, "--save-only", "--quant-type", "int4_weight_only", code=2
    )


@pytest.mark.fault(
    "hub",
    "The model on the Hub is missing, private, gated, empty or damaged",
    "Exit 5 or 3 with which.",
)
def test_models_of_the_hub_that_cannot_be_read(
    failing: Callable[..., str], hub: LocalHub, checkpoint: Path
) -> None:
    token = {"hub": hub, "token": WRITE.value}
    assert "does not exist" in failing("alice/missing", code=5, **token)
    hub.create_repo("bob/secret", owner="bob", private=True)
    assert "does not exist, or is private" in failing("bob/secret", "alice/x", code=5, **token)
    hub.create_repo("bob/gated", owner="bob").gated = "auto"
    hub.commit("bob/gated", {"config.json": b"{}", "model.safetensors": b"x"})
    assert "gated" in failing("bob/gated", "alice/x", code=5, **token)
    hub.create_repo("alice/empty")
    assert "There are no weights" in failing("alice/empty", code=3, **token)
    hub.create_repo("alice/broken")
    hub.commit(
        "alice/broken",
        {"config.json": checkpoint / "config.json", "model.safetensors": b"\xff" * 99},
    )
    assert "truncated or corrupt" in failing("alice/broken", code=3, **token)


@pytest.mark.fault(
    "hub",
    "Nothing answers at the Hub's address",
    "Exit 5 at once.",
)
def test_a_hub_that_is_not_there(failing: Callable[..., str]) -> None:
    annotation = failing("alice/model", code=5, token=WRITE.value)
    assert "cannot be reached" in annotation


def test_a_misspelt_path_that_looks_like_a_hub_id(
    failing: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "runs/final").mkdir(parents=True)
    assert "Did you mean runs/final?" in failing("runs/finl", "--save-only", code=5)


def test_the_last_step_of_a_training_run_is_named(
    failing: Callable[..., str], checkpoint: Path, tmp_path: Path
) -> None:
    for step in ("checkpoint-500", "checkpoint-1000"):
        (tmp_path / "run" / step).mkdir(parents=True)
        (tmp_path / "run" / step / "config.json").write_text("{}")
    annotation = failing(tmp_path / "run", "--save-only", code=3)
    assert f"Did you mean {tmp_path}/run/checkpoint-1000 or" in annotation


@pytest.mark.fault(
    "checkpoint",
    "The checkpoint is an adapter (LoRA)",
    "Exit 3 with the lines that merge it.",
)
def test_an_adapter_is_answered_with_the_lines_that_merge_it(
    smolquant: RunSmolquant, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.safetensors").write_bytes(b"x")
    run = smolquant("quantize", adapter, "--save-only")
    assert run.exit_code == 3
    lines = run.log.partition("what to do:")[2].splitlines()
    (code,) = ["\n".join(line[4:] for line in lines if line.startswith("    "))]
    compile(code, "merge.py", "exec")
    assert f'from_pretrained("{adapter}")' in code
    assert code.count("\n") == 2
    summary = smolquant("quantize", adapter, "--save-only", actions=True).summary
    assert f"```python\n{code}\n```" in summary


@pytest.mark.fault(
    "input",
    "--skip matches no module",
    "Exit 2 with the names of modules.",
)
def test_a_pattern_that_keeps_nothing_is_refused(
    failing: Callable[..., str], smolquant: RunSmolquant, checkpoint: Path
) -> None:
    annotation = failing(checkpoint, "--save-only", "--skip", "down_prj", code=2)
    assert "--skip down_prj matches the name of no module" in annotation
    assert "Did you mean down_proj" in annotation
    assert "'model.layers.*.mlp.gate_proj'" in annotation
    tied = smolquant("quantize", checkpoint, "--save-only", "--skip", "lm_head", "--dry-run")
    assert tied.exit_code == 0, "a module whose weight is the embedding's is one all the same"


@pytest.mark.fault(
    "text",
    "A text begins as a workflow command of the runner",
    "It is printed and not obeyed.",
)
def test_text_of_a_model_repository_forms_no_workflow_command(
    smolquant: RunSmolquant, checkpoint: Path
) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["model_type"] = "x\n::set-output name=a::b\n::stop-commands::t"
    (checkpoint / "config.json").write_text(json.dumps(config))
    run = smolquant("quantize", checkpoint, "--save-only", actions=True)
    assert run.exit_code == 3
    commands = {
        line.split(" ")[0].strip(":") for line in run.log.splitlines() if line.startswith("::")
    }
    assert {command.split("::")[0] for command in commands} <= {"group", "endgroup", "error"}
