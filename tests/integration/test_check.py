"""``smolquant check`` on variants that work, that were changed, and that are not there."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from command import Run
from compat.prove import fixtures
from conftest import WRITE
from localhub import LocalHub

RunSmolquant = Callable[..., Run]


@pytest.fixture
def quantized(smolquant: RunSmolquant, checkpoint: Path, tmp_path: Path) -> Path:
    run = smolquant("quantize", checkpoint, "--save-only", "--quant-type", "both")
    assert run.exit_code == 0, run.log
    return tmp_path / "quantized"


@pytest.mark.fault(
    "record",
    "A published variant is spoiled",
    "`check` exits 3 and names it; the good ones pass.",
)
def test_good_and_spoiled_variants(smolquant: RunSmolquant, quantized: Path) -> None:
    good = smolquant("check", quantized)
    assert good.exit_code == 0, good.log
    assert "int8: works" in good.log
    assert "int4: works" in good.log

    weights = quantized / "int4/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    (quantized / "int8/config.json").unlink()
    bad = smolquant("check", quantized, actions=True)
    assert bad.exit_code == 3
    assert "int4: model.safetensors is not the file that was made" in bad.log
    assert "int8: config.json is missing" in bad.log
    assert len(bad.annotations) == 1


@pytest.mark.fault(
    "record",
    "The installed libraries cannot run a published variant",
    "`check` exits 3 and names it.",
)
def test_a_variant_that_the_installed_libraries_cannot_run(
    smolquant: RunSmolquant, quantized: Path
) -> None:
    config = (quantized / "int8/config.json").read_bytes()
    rewritten(quantized, "int8", "config.json", config.replace(b'"smollm3"', b'"hal9000"'))
    run = smolquant("check", quantized)
    assert run.exit_code == 3
    assert "int8: It does not run" in run.log
    assert "hal9000" in run.log


def test_a_job_summary_tells_what_differs(smolquant: RunSmolquant, tmp_path: Path) -> None:
    """A published set whose int8 predicts other tokens than were recorded; int4 is as it was made."""
    for variant in ("int8", "int4"):
        shutil.copytree(fixtures()[-1] / variant, tmp_path / "model" / variant)
    path = tmp_path / "model/int8/quantization.json"
    record = json.loads(path.read_text())
    record["behaviour"]["next_tokens"][3] += 1
    path.write_text(json.dumps(record))
    run = smolquant("check", "model", actions=True)
    assert run.exit_code == 3, run.log
    assert "int4: works, and predicts what was recorded (made with" in run.log
    (annotation,) = run.annotations
    assert "int8 does not work as when made. int8: After 'W a t e' it predicts" in annotation
    assert "| `int8` | ❌ | After 'W a t e' it predicts" in run.summary
    assert "| `int4` | ✅ | works, and predicts what was recorded | smolquant " in run.summary
    assert run.summary.count("Checked with ") == 1


def rewritten(quantized: Path, variant: str, name: str, content: bytes) -> None:
    """Replace a file of a variant, and what the record says of it, as somebody's own tool might."""
    path, record_path = quantized / variant / name, quantized / variant / "quantization.json"
    path.write_bytes(content)
    record = json.loads(record_path.read_text())
    record["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    record_path.write_text(json.dumps(record))


@pytest.mark.fault(
    "record",
    "A published variant lost its weights",
    "`check` exits 3 and names it.",
)
def test_weights_that_are_gone_are_no_working_variant(
    smolquant: RunSmolquant, quantized: Path
) -> None:
    """transformers fills them with random numbers, and computes something finite."""
    import json

    from safetensors import safe_open
    from safetensors.torch import save

    weights = quantized / "int8/model.safetensors"
    gone = "model.layers.0.input_layernorm.weight"
    with safe_open(weights, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys() if name != gone}  # noqa: SIM118
    del metadata[gone]
    names = [name for name in json.loads(metadata["tensor_names"]) if name != gone]
    metadata["tensor_names"] = json.dumps(names)
    rewritten(quantized, "int8", "model.safetensors", save(tensors, metadata))
    config = json.loads((quantized / "int4/config.json").read_text())
    del config["quantization_config"]
    rewritten(quantized, "int4", "config.json", json.dumps(config).encode())

    run = smolquant("check", quantized)
    assert run.exit_code == 3, run.log
    assert f"int8: It lacks 1 of the model's weights, {gone!r}" in run.log
    assert "int4: It lacks" in run.log


@pytest.mark.fault(
    "machine",
    "This machine has no kernels for a variant to check",
    "`check` does not call it broken.",
)
def test_what_this_machine_has_no_kernels_for_is_not_broken(
    smolquant: RunSmolquant, checkpoint: Path, tmp_path: Path
) -> None:
    types = "float8_weight_only,float8_dynamic"
    run = smolquant("quantize", checkpoint, "--save-only", "--quant-type", types)
    assert run.exit_code == 0, run.log
    checked = smolquant("check", tmp_path / "quantized")
    assert checked.exit_code == 0, checked.log
    assert "float8: works" in checked.log
    assert "float8_dynamic: works" in checked.log


def test_a_repository_of_the_hub(smolquant: RunSmolquant, hub: LocalHub, checkpoint: Path) -> None:
    published = smolquant("quantize", checkpoint, "alice/model", hub=hub, token=WRITE.value)
    assert published.exit_code == 0, published.log
    run = smolquant("check", "alice/model", hub=hub, token=WRITE.value)
    assert run.exit_code == 0, run.log
    assert "int8: works; what it predicts was not recorded when it was made (made with" in run.log


@pytest.mark.fault(
    "input",
    "`check` is given a folder without variants",
    "It says so.",
)
@pytest.mark.fault(
    "hub",
    "`check` is given a repository that does not exist",
    "Exit 5.",
)
def test_nothing_to_check(smolquant: RunSmolquant, hub: LocalHub, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "has no variants" in smolquant("check", "empty").log
    missing = smolquant("check", "alice/missing", hub=hub, token=WRITE.value)
    assert missing.exit_code == 5
    assert "does not exist" in missing.log
