"""Running a plan on weights that are wrong, shared between variants, or stored already."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from models import llama, save
from smolquant.checkpoint.reader import Checkpoint
from smolquant.checkpoint.tensors import STORED_DTYPES
from smolquant.checkpoint.writer import ShardWriter
from smolquant.errors import CheckpointError, GateError
from smolquant.model.architecture import Architecture
from smolquant.model.weights import VariantWeights
from smolquant.quantize.engine import quantize_checkpoint
from smolquant.quantize.output import Written
from smolquant.quantize.plan import make_plan
from smolquant.quantize.workfolder import Journal
from smolquant.schemes import SCHEMES
from smolquant.schemes.int4_packing import pack_int4
from smolquant.schemes.int4_search import search_grids
from smolquant.schemes.int8_weight_only import Int8WeightOnly
from stored_values import stored_values

LINEAR = "model.layers.0.mlp.up_proj.weight"
ZEROS = "model.layers.1.mlp.up_proj.weight"
KEPT = "model.layers.0.input_layernorm.weight"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save(tmp_path / "source", llama(2))


@pytest.fixture
def run(source: Path, tmp_path: Path) -> Callable[..., dict[str, Written]]:
    def quantized(
        *quant_types: str,
        dtype: str = "auto",
        journals: dict[str, Journal] | None = None,
        output: str = "output",
        read: list[int] | None = None,
    ) -> dict[str, Written]:
        with Checkpoint([source / "model.safetensors"]) as checkpoint:
            plans = make_plan(
                checkpoint.layout,
                Architecture(source, trust_remote_code=False),
                [SCHEMES[quant_type] for quant_type in quant_types],
                group_size=32,
                dtype=dtype,
                max_shard_size=200_000,
                skip=(),
            )
            folders = {variant: tmp_path / output / variant for variant in plans}
            for folder in folders.values():
                folder.mkdir(parents=True, exist_ok=True)
            advanced = [] if read is None else read
            return quantize_checkpoint(
                checkpoint, plans, folders, advance=advanced.append, journals=journals
            )

    return quantized


def stored(folder: Path, source: Path, name: str) -> torch.Tensor:
    """The float64 weight that is stored in a variant's folder."""
    files = sorted(folder.glob("*.safetensors"))
    architecture = Architecture(source, trust_remote_code=False)
    with Checkpoint(files, STORED_DTYPES) as checkpoint:
        weight = VariantWeights(checkpoint, architecture, files[0]).load(name)
    return stored_values(weight).double()


def change(source: Path, name: str, value: float, dtype: torch.dtype = torch.bfloat16) -> None:
    state = {
        key: tensor.to(dtype) for key, tensor in load_file(source / "model.safetensors").items()
    }
    state[name].view(-1)[7] = value
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.fault(
    "checkpoint",
    "A weight holds NaN or infinity",
    "Exit 3 with the weight; nothing half-made is left.",
)
@pytest.mark.parametrize("quant_type", SCHEMES)
@pytest.mark.parametrize("name", [LINEAR, KEPT])
@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(
    run: Callable[..., object], source: Path, quant_type: str, name: str, value: float
) -> None:
    change(source, name, value)
    kind = "infinity" if math.isinf(value) else "NaN"
    with pytest.raises(CheckpointError, match=f"{name}' holds {kind}"):
        run(quant_type)


@pytest.mark.fault(
    "checkpoint",
    "A value is too large for the variant's dtype",
    "Exit 3 with the weight.",
)
@pytest.mark.parametrize("name", [LINEAR, KEPT])
def test_values_that_the_dtype_cannot_hold_are_refused(
    run: Callable[..., object], source: Path, name: str
) -> None:
    change(source, name, 1e6, torch.float32)
    with pytest.raises(CheckpointError, match=f"{name}' has values too large for torch.float16"):
        run("int8_weight_only", dtype="float16")


@pytest.mark.fault(
    "model",
    "A weight is all zeros, or nearly",
    "It is quantized, and its error is told.",
)
@pytest.mark.parametrize("exponent", [7, 12, 30])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_dead_matrix_stops_nothing_and_its_error_is_told(
    run: Callable[..., dict[str, Written]],
    source: Path,
    tmp_path: Path,
    exponent: int,
    dtype: str,
) -> None:
    state = load_file(source / "model.safetensors")
    state[LINEAR] = (state[LINEAR].float() * 12 * 10.0**-exponent).bfloat16()
    state[ZEROS] = torch.zeros_like(state[ZEROS])
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})

    types = [name for name in SCHEMES if dtype == "bfloat16" or name != "float8_dynamic"]
    journals = {SCHEMES[quant_type].variant: Journal() for quant_type in types}
    made = run(*types, dtype=dtype, journals=journals)

    for variant, written in made.items():
        error, zeros = (written.tensors[name].relative_error for name in (LINEAR, ZEROS))
        exact = state[LINEAR].double()
        error_there = stored(tmp_path / "output" / variant, source, LINEAR) - exact
        assert error == pytest.approx(float(error_there.norm() / exact.norm()), rel=0.05), variant
        assert zeros == 0.0
    lost = made["int8"].tensors[LINEAR].relative_error
    assert lost is not None
    assert 0.3 < lost < 0.5 if exponent == 7 else lost == pytest.approx(1.0)
    best = made["int4"].tensors[LINEAR].relative_error
    assert best is not None
    assert best < (0.4 if exponent == 7 else 1.01)
    again = run(*types, dtype=dtype, journals=journals)
    assert again == made, "shards that were finished are as good when the run is taken up again"


@pytest.mark.fault(
    "checkpoint",
    "Finite values are too large to quantize",
    "Exit 3 with the weight.",
)
def test_finite_values_whose_squares_overflow_are_refused(
    run: Callable[..., object], source: Path
) -> None:
    change(source, LINEAR, 1e30)
    with pytest.raises(CheckpointError, match="too large to quantize"):
        run("int8_weight_only")


def test_types_with_the_same_arithmetic_are_computed_once(
    run: Callable[..., dict[str, Written]], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[torch.Size] = []
    quantize_rows = Int8WeightOnly.quantize_rows

    def counted(scheme: Int8WeightOnly, weight: torch.Tensor, *options: Any) -> object:
        calls.append(weight.shape)
        return quantize_rows(scheme, weight, *options)

    monkeypatch.setattr(Int8WeightOnly, "quantize_rows", counted)
    alone = run("int8_dynamic", output="alone")
    times = len(calls)
    both = run("int8_weight_only", "int8_dynamic")
    assert times == 2 * 7, "one call a linear weight, each smaller than a block"
    assert len(calls) == 2 * times
    assert both["int8_dynamic"].files == alone["int8_dynamic"].files


def test_finished_shards_are_not_touched_and_the_record_is_the_same(
    run: Callable[..., dict[str, Written]], tmp_path: Path
) -> None:
    whole = run("int8_weight_only", journals={"int8": (journal := Journal())}, output="whole")
    names = sorted(journal.shards)
    assert len(names) > 2
    kept = Journal(shards={name: journal.shards[name] for name in names[1:]})

    read: list[int] = []
    again = run("int8_weight_only", journals={"int8": kept}, read=read)

    assert {path.name for path in (tmp_path / "output/int8").iterdir()} == {names[0]}
    assert again == whole
    size = (tmp_path / "source/model.safetensors").stat().st_size
    assert size * 0.9 < sum(read) <= size, "progress counts what need not be read again"


@pytest.mark.fault(
    "quality",
    "A shard that an earlier run finished is out of its bounds",
    "Exit 6; it is not published.",
)
def test_a_finished_shard_is_held_to_the_bounds_too(
    run: Callable[..., dict[str, Written]],
) -> None:
    run("int8_weight_only", journals={"int8": (journal := Journal())}, output="whole")
    name, shard = next((name, shard) for name, shard in journal.shards.items() if shard.errors)
    wild = replace(shard, errors=dict.fromkeys(shard.errors, 1.0))
    with pytest.raises(GateError, match="further from their source"):
        run("int8_weight_only", journals={"int8": Journal(shards={name: wild})})


@pytest.mark.fault(
    "machine",
    "A worker fails while others write",
    "No file is closed under a worker; the first error is told.",
)
def test_no_file_is_closed_while_a_worker_may_still_write_to_it(
    run: Callable[..., object], source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A closed file's number may be another file's by then."""
    change(source, LINEAR, float("nan"))
    closed: set[Path] = set()
    late: list[str] = []
    write, close = ShardWriter.write, ShardWriter.close

    def slow(writer: ShardWriter, name: str, *rest: Any) -> None:
        time.sleep(0.02)
        if writer.path in closed:
            late.append(name)
        write(writer, name, *rest)

    def noted(writer: ShardWriter) -> None:
        closed.add(writer.path)
        close(writer)

    monkeypatch.setattr(ShardWriter, "write", slow)
    monkeypatch.setattr(ShardWriter, "close", noted)
    with pytest.raises(CheckpointError):
        run("int8_weight_only", "int4_weight_only")
    assert closed
    assert not late


def test_columns_are_weighted_by_the_norm_in_front(
    run: Callable[..., dict[str, Written]], source: Path, tmp_path: Path
) -> None:
    run("int4_weight_only")
    state = load_file(source / "model.safetensors")
    stored: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "output/int4").iterdir():
        stored |= load_file(file)
    layer = "model.layers.1."
    norm = state[layer + "post_attention_layernorm.weight"].double()
    for name, mean_squares in (("mlp.up_proj", norm.square()), ("mlp.down_proj", None)):
        weight = state[f"{layer}{name}.weight"]
        levels, scale, _ = search_grids(weight, 32, mean_squares)
        assert torch.equal(stored[f"{layer}{name}._weight_qdata"], pack_int4(levels)), name
        assert torch.equal(stored[f"{layer}{name}._weight_scale"], scale.t()), name
    assert not torch.equal(
        search_grids(state[layer + "mlp.up_proj.weight"], 32)[1].t(),
        stored[layer + "mlp.up_proj._weight_scale"],
    )


def test_norms_beside_their_weights_cost_no_pickle_more_than_one_reading(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pickles of the old format, which are loaded whole, cut where a layer's norms lie apart from it."""
    state = load_file(source / "model.safetensors")
    cut = {name for name in state if "layers.1" in name and "norm" in name}
    paths = [tmp_path / "1.bin", tmp_path / "2.bin"]
    for path, names in zip(paths, (state.keys() - cut, cut), strict=True):
        held = {name: state[name] for name in state if name in names}
        torch.save(held, path, _use_new_zipfile_serialization=False)
    loaded: list[Path] = []
    load = torch.load

    def noted(path: Path, **how: Any) -> Any:
        loaded.append(path)
        return load(path, **how)

    with Checkpoint(paths) as checkpoint:
        plans = make_plan(
            checkpoint.layout,
            Architecture(source, trust_remote_code=False),
            [SCHEMES["int4_weight_only"]],
            group_size=32,
            dtype="auto",
            max_shard_size=10**9,
            skip=(),
        )
        monkeypatch.setattr(torch, "load", noted)
        (tmp_path / "int4").mkdir()
        quantize_checkpoint(checkpoint, plans, {"int4": tmp_path / "int4"}, advance=lambda _: None)
    # Workers that are at the boundary together may need the first once more.
    assert len(loaded) <= 2 * len(paths) + 2
