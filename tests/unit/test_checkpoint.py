"""Reading rows, laying out shards, and refusing what is broken."""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from in_memory import InMemory
from limits import nobodys_rights
from smolquant.checkpoint import folder as folder_module
from smolquant.checkpoint import pickles
from smolquant.checkpoint.files import (
    identity,
    is_auxiliary,
    sha256_of,
    shard_names,
    weight_layout,
)
from smolquant.checkpoint.folder import FolderSource
from smolquant.checkpoint.reader import Checkpoint, LocalBytes
from smolquant.checkpoint.tensors import STORED_DTYPES, SourceTensor, StoredTensor, row_blocks
from smolquant.checkpoint.writer import ShardWriter, index_text, lay_out
from smolquant.errors import CheckpointError, MachineError


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "a.weight": torch.randn(7, 5, dtype=torch.bfloat16),
        "b.weight": torch.randn(3, 4),
        "b.bias": torch.randn(3, dtype=torch.float16),
        "steps": torch.tensor(12),
        "none": torch.empty(0, 4),
    }


def read_all(path: Path) -> dict[str, torch.Tensor]:
    with Checkpoint([path]) as checkpoint:
        return {
            name: torch.cat(
                [checkpoint.read_rows(t, *rows) for rows in row_blocks(t, 16)]
                or [torch.empty(t.shape)]
            )
            if t.shape
            else checkpoint.read_rows(t, 0, 1)
            for name, t in checkpoint.layout.tensors.items()
        }


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "legacy.bin"])
def test_rows_of_every_format_are_the_tensors_that_were_saved(
    tmp_path: Path, state: dict[str, torch.Tensor], name: str
) -> None:
    path = tmp_path / name
    if name.endswith(".safetensors"):
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=not name.startswith("legacy"))
    read = read_all(path)
    assert read.keys() == state.keys()
    for key, tensor in state.items():
        assert torch.equal(read[key], tensor), key


@pytest.mark.fault(
    "checkpoint",
    "config.json or the tokenizer asks for rows that a tensor does not have",
    "Exit 3 with both numbers; the bytes behind the tensor are not read.",
)
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "legacy.bin", "far"])
@pytest.mark.parametrize("rows", [(7, 8), (6, 8), (-1, 1), (3, 2)])
def test_rows_that_a_tensor_does_not_have_are_not_read(
    tmp_path: Path, state: dict[str, torch.Tensor], name: str, rows: tuple[int, int]
) -> None:
    path = tmp_path / name
    if name.endswith(".bin"):
        torch.save(state, path, _use_new_zipfile_serialization=not name.startswith("legacy"))
    else:
        save_file(state, path)
    with Checkpoint([LocalBytes(path) if name == "far" else path]) as checkpoint:
        tensor = checkpoint.layout.tensors["a.weight"]
        with pytest.raises(CheckpointError, match="'a.weight' has 7 rows, and rows"):
            checkpoint.read_rows(tensor, *rows)
        assert checkpoint.read_rows(tensor, 7, 7).shape == (0, 5)


def test_a_pickles_tied_weights_are_known_as_such(tmp_path: Path) -> None:
    weight = torch.randn(4, 4)
    torch.save({"embed": weight, "head": weight, "row": weight[0]}, tmp_path / "m.bin")
    with Checkpoint([tmp_path / "m.bin"]) as checkpoint:
        assert checkpoint.layout.aliases == {"head": "embed"}
        assert checkpoint.layout.size_bytes == 4 * 4 * 4 + 4 * 4


def test_legacy_pickles_are_in_memory_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / "1.bin", tmp_path / "2.bin"]
    for number, path in enumerate(paths):
        state = {f"{path.stem}.{i}": torch.full((4, 4), float(number)) for i in "ab"}
        torch.save(state, path, _use_new_zipfile_serialization=False)
    loaded = []
    load = torch.load

    def noted(path: Path, **how: Any) -> Any:
        loaded.append(path)
        return load(path, **how)

    monkeypatch.setattr(torch, "load", noted)
    with Checkpoint(paths) as checkpoint:
        loaded.clear()
        for tensor in checkpoint.layout.tensors.values():
            value = float(tensor.name.startswith("2"))
            assert torch.equal(checkpoint.read_rows(tensor, 0, 4), torch.full((4, 4), value))
    assert loaded == paths, "each once, in file order"


@pytest.mark.fault(
    "machine",
    "A pickle of the old format is larger than the memory",
    "Exit 4 with both sizes, before it is loaded.",
)
def test_a_legacy_pickle_that_does_not_fit_is_refused_with_the_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.bin"
    torch.save({"a": torch.zeros(10**6)}, path, _use_new_zipfile_serialization=False)
    monkeypatch.setattr(pickles, "available_bytes", lambda: 10**6)
    with pytest.raises(
        MachineError, match=r"m\.bin .* 4\.00 MB of memory, and 1\.00 MB is available"
    ):
        Checkpoint([path])


def test_a_mapped_pickle_leaves_no_pages_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    weight = torch.arange(32 * 2**20, dtype=torch.int32).view(1024, -1)
    torch.save({"a": weight, "turned": weight.t(), "scalar": torch.tensor(1.0)}, path)
    with Checkpoint([path]) as checkpoint:
        tensors = checkpoint.layout.tensors
        before = _file_pages()
        for rows in row_blocks(tensors["a"], 1 << 20):
            assert torch.equal(checkpoint.read_rows(tensors["a"], *rows), weight[slice(*rows)])
        turned = checkpoint.read_rows(tensors["turned"], 5, 9)
        assert torch.equal(turned, weight.t()[5:9])
        assert checkpoint.read_rows(tensors["scalar"], 0, 1) == 1.0
        assert _file_pages() - before < 16 << 20


def _file_pages() -> int:
    """Bytes of mapped files that are resident in this process."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssFile"))


@pytest.mark.fault(
    "checkpoint",
    "A pickle would run code when it is loaded",
    "Exit 3; nothing of it runs.",
)
def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "exploded",))

    torch.save({"a": Bomb()}, tmp_path / "m.bin")
    with pytest.raises(CheckpointError, match=r"m\.bin holds more than plain weights"):
        Checkpoint([tmp_path / "m.bin"])
    assert not (tmp_path / "exploded").exists()


@pytest.mark.fault(
    "checkpoint",
    "A safetensors file is truncated",
    "Exit 3 with its name.",
)
@pytest.mark.parametrize("keep", [4, 200, -1])
def test_truncated_safetensors_are_refused(
    tmp_path: Path, state: dict[str, torch.Tensor], keep: int
) -> None:
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or corrupt"):
        Checkpoint([path])


@pytest.mark.fault(
    "checkpoint",
    "A pickle is truncated",
    "Exit 3 with its name.",
)
@pytest.mark.fault(
    "checkpoint",
    "This user may not read the weights",
    "Exit 4 with the file's name.",
)
def test_weights_that_this_user_may_not_read_are_not_called_corrupt(
    tmp_path: Path, state: dict[str, torch.Tensor]
) -> None:
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    path.chmod(0o200)
    with nobodys_rights(), pytest.raises(PermissionError):
        Checkpoint([path])


def test_a_truncated_pickle_is_refused(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin cannot be read"):
        Checkpoint([path])


@pytest.mark.fault(
    "checkpoint",
    "Two shards hold the same tensor",
    "Exit 3 with the tensor and both files.",
)
def test_the_same_tensor_in_two_files_is_refused(
    tmp_path: Path, state: dict[str, torch.Tensor]
) -> None:
    for name in ("1.safetensors", "2.safetensors"):
        save_file(state, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"is in 1\.safetensors and again in 2"):
        Checkpoint([tmp_path / "1.safetensors", tmp_path / "2.safetensors"])


@pytest.mark.fault(
    "checkpoint",
    "Weights are quantized already (float8, packed)",
    "Exit 3 with the tensor and its dtype.",
)
def test_weights_of_a_quantized_dtype_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(4, 4).to(torch.float8_e4m3fn)}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="which unquantized weights never have"):
        Checkpoint([tmp_path / "m.safetensors"])


@pytest.mark.fault(
    "checkpoint",
    "A pickle holds a sparse or meta tensor, or a dtype that weights never have",
    "Exit 3 with the tensor and its kind.",
)
@pytest.mark.parametrize(
    ("tensor", "what"),
    [(torch.eye(2).to_sparse(), "sparse"), (torch.empty(2, 2, device="meta"), "meta")],
)
def test_a_pickles_tensor_without_plain_data_is_refused(
    tmp_path: Path, tensor: torch.Tensor, what: str
) -> None:
    torch.save({"weight": tensor}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=f"'weight' as .*{what}"):
        Checkpoint([tmp_path / "pytorch_model.bin"])


def test_a_pickle_of_parameters_is_read_without_their_gradients(tmp_path: Path) -> None:
    torch.save(dict(torch.nn.Linear(2, 2).named_parameters()), tmp_path / "pytorch_model.bin")
    with Checkpoint([tmp_path / "pytorch_model.bin"]) as checkpoint:
        assert not checkpoint.read_rows(checkpoint.layout.tensors["weight"], 0, 2).requires_grad


def test_float8_is_written_and_read_as_what_a_variant_stores(tmp_path: Path) -> None:
    exact = torch.linspace(-448, 448, 64).view(8, 8).to(torch.float8_e4m3fn)
    (shard,) = lay_out(stored({"a": exact}), {"format": "pt"}, 10**6)
    with ShardWriter(tmp_path, shard) as writer:
        writer.write("a", exact)
        writer.digest()
    assert torch.equal(load_file(tmp_path / shard.name)["a"].float(), exact.float())
    with Checkpoint([tmp_path / shard.name], STORED_DTYPES) as variant:
        rows = variant.read_rows(variant.layout.tensors["a"], 2, 5)
    assert rows.dtype is torch.float8_e4m3fn
    assert torch.equal(rows.float(), exact[2:5].float())


def test_blocks_cover_every_row_once() -> None:
    tensor = SourceTensor("w", torch.bfloat16, (10, 8))
    assert list(row_blocks(tensor, 64)) == [(0, 4), (4, 8), (8, 10)]
    assert next(row_blocks(SourceTensor("w", torch.bfloat16, (99, 8)), 640)) == (0, 32), "not 40"
    assert list(row_blocks(tensor, 1)) == [(i, i + 1) for i in range(10)], "at least one row"
    assert list(row_blocks(SourceTensor("w", torch.bfloat16, (0, 8)), 64)) == []


def stored(state: dict[str, torch.Tensor]) -> list[list[StoredTensor]]:
    return [[StoredTensor(name, t.dtype, tuple(t.shape))] for name, t in state.items()]


@pytest.mark.fault(
    "machine",
    "A shard was not written completely",
    "It is not taken for finished.",
)
def test_a_shard_with_a_hole_is_not_taken_for_finished(
    tmp_path: Path, state: dict[str, torch.Tensor]
) -> None:
    (shard,) = lay_out(stored(state), {"format": "pt"}, 10**6)
    with ShardWriter(tmp_path, shard) as writer:
        for name, tensor in list(state.items())[1:]:
            writer.write(name, tensor)
        with pytest.raises(RuntimeError, match="were not written as planned"):
            writer.digest()


def test_shards_written_out_of_order_read_back_through_safetensors(
    tmp_path: Path, state: dict[str, torch.Tensor]
) -> None:
    """Odd sizes included: a misaligned float would make the library refuse the file."""
    state["odd"] = torch.ones(3, dtype=torch.int8)
    (shard,) = lay_out(stored(state), {"format": "pt"}, 10**6)
    writer = ShardWriter(tmp_path, shard)
    for name, tensor in reversed(state.items()):
        half = tensor.shape[0] // 2 if tensor.ndim else 0
        if half:
            row = tensor[0].numel() * tensor.element_size()
            writer.write(name, tensor[half:], half * row)
            writer.write(name, tensor[:half], 0)
        else:
            writer.write(name, tensor)
    writer.digest()

    path = tmp_path / "model.safetensors"
    assert path.stat().st_size == shard.size_bytes
    read = load_file(path)
    for name, tensor in state.items():
        assert torch.equal(read[name], tensor), name


def test_parts_of_one_weight_never_stand_in_two_shards() -> None:
    weights = [
        [
            StoredTensor(f"{i}.qdata", torch.int8, (10, 10)),
            StoredTensor(f"{i}.scale", torch.float32, (10,)),
        ]
        for i in range(5)
    ]
    shards = lay_out(weights, {"format": "pt", "whole": "model"}, 300)
    assert [shard.name for shard in shards] == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
    ]
    homes = {t.name: shard.name for shard in shards for t in shard.tensors}
    assert all(homes[f"{i}.qdata"] == homes[f"{i}.scale"] for i in range(5))
    assert all(shard.metadata == shards[0].metadata for shard in shards)
    index = json.loads(index_text(shards) or "")
    assert index == {"metadata": {"total_size": 5 * 140}, "weight_map": homes}


def test_a_single_file_has_no_index() -> None:
    shards = lay_out([[StoredTensor("a", torch.int8, (1,))]], {}, 100)
    assert index_text(shards) is None


def test_weights_are_found_in_the_order_of_transformers() -> None:
    assert weight_layout(["pytorch_model.bin", "model.safetensors"], "model") == "model.safetensors"
    assert (
        weight_layout(["model.safetensors.index.json"], "model") == "model.safetensors.index.json"
    )
    with pytest.raises(CheckpointError, match=r"no weights.*model\.gguf"):
        weight_layout(["config.json", "model.gguf"], "model")
    variants = ["README.md", "int8/model.safetensors", "int8/quantization.json"]
    with pytest.raises(CheckpointError, match="alice/small has variants.*no main model") as refused:
        weight_layout(variants, "alice/small")
    assert "Name the model that they were made from" in refused.value.hint


@pytest.mark.fault(
    "checkpoint",
    "The index of shards is not JSON, names no shard, or names a path outside its folder",
    "Exit 3; nothing outside is opened.",
)
@pytest.mark.parametrize(
    "text",
    [
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"weight_map": 3}',
        b'{"weight_map": {}}',
        b'{"weight_map": {"a": "../b"}}',
    ],
)
def test_an_index_that_is_none_or_leaves_its_folder_is_refused(text: bytes) -> None:
    with pytest.raises(CheckpointError):
        shard_names("model.safetensors.index.json", text)


@pytest.mark.fault(
    "checkpoint",
    "The index names a shard that is not there",
    "Exit 3 with the shard.",
)
def test_an_index_that_names_a_missing_shard_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        CheckpointError, match="model-00001-of-00002.safetensors, which is not there"
    ):
        FolderSource(tmp_path)


def test_identity_changes_with_a_file_and_not_with_what_is_no_part_of_the_model(
    tmp_path: Path, state: dict[str, torch.Tensor]
) -> None:
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    before = FolderSource(tmp_path).identity
    (tmp_path / "README.md").write_text("new text")
    (tmp_path / "optimizer.pt").write_text("state")
    (tmp_path / "int8").mkdir()
    (tmp_path / "int8/config.json").write_text("{}")
    assert FolderSource(tmp_path).identity == before
    (tmp_path / "tokenizer.json").write_text("{}")
    assert FolderSource(tmp_path).identity != before
    assert identity({"a": "1", "b": "2"}) == identity({"b": "2", "a": "1"})


@pytest.mark.fault(
    "machine",
    "Hashing the source fails beside the work",
    "Whoever waits for the digest gets the same error; nobody waits for ever.",
)
def test_whatever_ends_the_hashing_reaches_those_who_wait_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")

    def hash_nothing(path: Path) -> str:
        raise MemoryError

    monkeypatch.setattr(folder_module, "sha256_of", hash_nothing)
    with pytest.raises(MemoryError):
        assert FolderSource(tmp_path).identity


def write_as_long(path: Path) -> None:
    """Other bytes, as many, with the old time of writing."""
    before = path.stat()
    path.write_bytes(b"x" * before.st_size)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace_by_its_copy(path: Path) -> None:
    """The same bytes and times in another file."""
    copy = path.with_name("copy")
    shutil.copy2(path, copy)
    copy.replace(path)


CHANGES: dict[str, Callable[[Path], None]] = {
    "written": write_as_long,
    "replaced": replace_by_its_copy,
    "touched": Path.touch,
    "removed": Path.unlink,
}


@pytest.fixture
def folder(tmp_path: Path, state: dict[str, torch.Tensor]) -> Path:
    """A checkpoint folder."""
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    time.sleep(0.02)  # two changes within one tick of the file system's clock look like one
    return tmp_path


@pytest.mark.parametrize("change", ["written", "replaced", "touched"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_folders_state_changes_with_a_file_of_the_model(
    folder: Path, change: str, name: str
) -> None:
    before = FolderSource(folder).state
    (folder / "README.md").write_text("new text")
    (folder / "model.safetensors").read_bytes()
    assert FolderSource(folder).state == before
    CHANGES[change](folder / name)
    assert FolderSource(folder).state != before


@pytest.mark.fault(
    "checkpoint",
    "A file of the checkpoint changes while it is read",
    "Exit 3 with its name.",
)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_folder_that_changed_since_it_was_found_is_refused(
    folder: Path, change: str, name: str
) -> None:
    source = FolderSource(folder)
    (folder / "README.md").write_text("new text")
    source.require_unchanged()
    CHANGES[change](folder / name)
    with pytest.raises(CheckpointError, match=f"^{name} changed while"):
        source.require_unchanged()


def test_a_folders_state_waits_for_no_hash_and_covers_all_of_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_hash = threading.Event()

    def hash_late(path: Path) -> str:
        may_hash.wait(20)
        return sha256_of(path)

    monkeypatch.setattr(folder_module, "sha256_of", hash_late)
    source = FolderSource(folder)
    assert source.state
    assert source.auxiliary_files == ["config.json"]
    assert not any(file.digest.done() for file in source.files.values())
    with ThreadPoolExecutor(1) as pool:
        checked = pool.submit(source.require_unchanged)
        with pytest.raises(TimeoutError):
            checked.result(0.2)
        (folder / "model.safetensors").touch()  # before it was hashed
        may_hash.set()
        with pytest.raises(CheckpointError):
            checked.result(20)


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "tokenizer.model",
        "chat_template.jinja",
        "merges.txt",
        "generation_config.json",
    ],
)
def test_companions_travel(name: str) -> None:
    assert is_auxiliary(name)


@pytest.mark.parametrize(
    "name", ["README.md", "optimizer.pt", "training_args.bin", "trainer_state.json"]
)
def test_what_a_trainer_leaves_behind_does_not(name: str) -> None:
    assert not is_auxiliary(name)


def file_of(header: object, data: bytes = bytes(32)) -> InMemory:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return InMemory.of(text, data)


def entry(
    begin: object, end: object, shape: object = (4, 4), dtype: object = "BF16"
) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_a_header_that_is_in_order_is_read() -> None:
    metadata = {"format": "pt"}
    with Checkpoint([file_of({"__metadata__": metadata, "a": entry(0, 32)})]) as checkpoint:
        assert checkpoint.layout.tensors["a"].shape == (4, 4)


@pytest.mark.fault(
    "checkpoint",
    "A safetensors header is not JSON or too long, or its tensors overlap, leave holes or miss their size",
    "Exit 3, before a byte of its data is read.",
)
@pytest.mark.parametrize(
    "file",
    [
        InMemory(b"\x01"),
        InMemory((1 << 60).to_bytes(8, "little") + bytes(99)),
        file_of(b"{"),
        file_of([1, 2]),
        file_of({"a": [0, 32]}),
        file_of({"a": {"dtype": "BF16", "shape": [4, 4]}}),
        file_of({"a": entry(0, 32, dtype=["BF16"])}),
        file_of({"a": entry(0, 32, shape="44")}),
        file_of({"a": entry(-32, 0)}),
        file_of({"a": entry(0, 64)}),
        file_of({"a": entry("0", "32")}),
        file_of({"a": entry(0, 32), "b": entry(0, 32)}),
        file_of({"a": entry(0, 16, (2, 4))}),
        file_of({"a": entry(0, 16, (2, 4)), "b": entry(24, 32, (1, 4))}),
        file_of({"a": entry(0, 32, (4, 5))}),
        file_of({"a": entry(0, 32, (-4, -4))}),
        file_of({"a": entry(0, 32, (4.0, 4))}),
        file_of({"a": entry(False, 32)}),
        file_of({"a": {"dtype": "BF16", "shape": [4, 4], "data_offsets": []}}),
        file_of({"\ud800": entry(0, 32)}),
    ],
)
def test_a_header_that_is_not_is_refused(file: InMemory) -> None:
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or corrupt"):
        Checkpoint([file])


@pytest.mark.fault(
    "checkpoint",
    "The folder holds an adapter or GGUF files instead of a model",
    "Exit 3, named as what it is, with the way to a model.",
)
@pytest.mark.parametrize(
    ("names", "message", "hint"),
    [
        (["adapter_config.json", "adapter_model.safetensors"], "an adapter", "merge_and_unload()"),
        (["config.json", "adapter_model.bin"], "an adapter", "AutoPeftModelForCausalLM"),
        (["model-Q4_K_M.gguf", "README.md"], r"GGUF files \(model-Q4_K_M.gguf\)", "made from"),
    ],
)
def test_what_holds_no_model_of_its_own_is_called_what_it_is(
    names: list[str], message: str, hint: str
) -> None:
    with pytest.raises(CheckpointError, match=message) as refusal:
        weight_layout(names, "model")
    assert hint in f"{refusal.value.hint}\n{refusal.value.code}"
    assert weight_layout([*names, "model.safetensors"], "model") == "model.safetensors"
