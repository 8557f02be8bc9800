"""Weight files that are damaged, hostile or no plain weights are refused, and named, at once."""

import gc
import pickle
import resource
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from smolquant.checkpoint.reader import Checkpoint
from smolquant.errors import CheckpointError

BIN = "pytorch_model.bin"


def open_and_verify(path: Path) -> None:
    with Checkpoint([path]) as checkpoint:
        checkpoint.verify()


def refused(path: Path) -> str:
    """What a run says of ``path``, which it refuses in no time and with little memory."""
    gc.freeze()  # what other tests have left is not looked through again for each of its objects
    before, started = peak_bytes(), time.process_time()
    try:
        with pytest.raises(CheckpointError, match=path.name) as refusal:
            open_and_verify(path)
        assert time.process_time() - started < 5
    finally:
        gc.unfreeze()
    assert peak_bytes() - before < 500_000_000
    said = str(refusal.value)
    assert "weights_only" not in said
    assert "\n" not in said
    return said


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def saved(folder: Path, state: Any = None, **how: Any) -> Path:
    if state is None:
        state = {"a.weight": torch.arange(64.0).view(8, 8), "b": torch.ones(3)}
    torch.save(state, folder / BIN, **how)
    return folder / BIN


Records = list[tuple[str, bytes]]


def changed(
    folder: Path, change: Callable[[Records], Records], how: int = zipfile.ZIP_STORED
) -> Path:
    """A saved state dict whose zip file was written anew with other records."""
    path = saved(folder)
    with zipfile.ZipFile(path) as archive:
        records = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, content in change(records):
            archive.writestr(name, content)
    return path


def with_pickle(folder: Path, program: bytes) -> Path:
    return changed(
        folder,
        lambda records: [
            (name, program if name.endswith("data.pkl") else content) for name, content in records
        ],
    )


@pytest.mark.fault(
    "checkpoint",
    "A pickle holds a sparse or meta tensor, or a dtype that weights never have",
    "Exit 3 with the tensor and its kind.",
)
@pytest.mark.fault(
    "checkpoint",
    "A pickle's tensor is an expanded view of few values",
    "Exit 3 with the tensor and the size of its values.",
)
@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.filterwarnings("ignore:.*[Qq]uantiz")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (lambda: torch.eye(4).to_sparse(), "'odd' as torch.sparse_coo"),
        (lambda: torch.eye(4).to_sparse_csr(), "'odd' as torch.sparse_csr"),
        (lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8), "'odd' as torch.qint8"),
        (lambda: torch.empty(4, device="meta"), "'odd' as meta"),
        (lambda: torch.ones(4, dtype=torch.complex64), "'odd' as torch.complex64"),
        (lambda: torch.ones(1).expand(10**9, 4096), "'odd' as an expanded view: 4 B of values"),
    ],
    ids=["sparse", "rows", "quantized", "meta", "complex", "expanded"],
)  # fmt: skip
def test_what_is_no_plain_tensor_is_named(
    tmp_path: Path, tensor: Callable[[], torch.Tensor], said: str
) -> None:
    assert said in refused(saved(tmp_path, {"fine": torch.ones(2), "odd": tensor()}))


class Scaled(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


@pytest.mark.fault(
    "checkpoint",
    "The weight file is a program in TorchScript",
    "Exit 3, named as that.",
)
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_program_in_torchscript_is_called_one(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(Scaled()), tmp_path / BIN)
    assert "program in TorchScript" in refused(tmp_path / BIN)


@pytest.mark.fault(
    "checkpoint",
    "A pickle holds a whole module",
    "Exit 3 with its class.",
)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_whole_module_is_refused_by_its_class(tmp_path: Path, zipped: bool) -> None:
    path = saved(tmp_path, torch.nn.Linear(2, 2), _use_new_zipfile_serialization=zipped)
    assert "torch.nn.modules.linear.Linear" in refused(path)


@pytest.mark.fault(
    "checkpoint",
    "A pickle's archive has two records of one name",
    "Exit 3 with the name.",
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_second_description_of_the_tensors_is_refused(tmp_path: Path) -> None:
    path = changed(tmp_path, lambda records: [*records, records[0]])
    assert "two records 'pytorch_model/data.pkl'" in refused(path)


@pytest.mark.fault(
    "checkpoint",
    "A record of a pickle's archive has another checksum",
    "Exit 3 with the record.",
)
@pytest.mark.parametrize("record", ["data.pkl", "data/0"])
def test_a_wrong_checksum_is_noticed(tmp_path: Path, record: str) -> None:
    path = saved(tmp_path)
    with zipfile.ZipFile(path) as archive:
        (entry,) = (one for one in archive.infolist() if one.filename.endswith(record))
    content = bytearray(path.read_bytes())
    lengths = struct.unpack_from("<HH", content, entry.header_offset + 26)
    content[entry.header_offset + 30 + sum(lengths) + entry.file_size // 2] ^= 1
    path.write_bytes(content)
    assert record in refused(path)


@pytest.mark.fault(
    "checkpoint",
    "A record of a pickle's archive is compressed",
    "Exit 3, named as that.",
)
def test_a_compressed_record_is_not_unpacked(tmp_path: Path) -> None:
    zeros = bytes(30_000_000)
    path = changed(
        tmp_path, lambda records: [*records, ("pytorch_model/data/9", zeros)], zipfile.ZIP_DEFLATED
    )
    assert "is compressed" in refused(path)


@pytest.mark.fault(
    "checkpoint",
    "A small pickle would make large objects, or millions",
    "Exit 3 with the reason, within bounded time and memory.",
)
@pytest.mark.fault(
    "checkpoint",
    "A pickle is truncated",
    "Exit 3 with its name.",
)
@pytest.mark.parametrize(
    ("program", "said"),
    [
        (pickle.PROTO + b"\x02cbuiltins\nbytearray\nJ\x00\x5e\xd0\xb2\x85R.", "builtins.bytearray"),
        (pickle.PROTO + b"\x02" + b"]" * 10_000_000 + b".", "more instructions than tensors need"),
        (pickle.PROTO + b"\x02" + b"}" * 9, "damaged"),
        (pickle.PROTO + b"\x02]" * 3, "damaged"),
    ],
    ids=["bytearray", "lists", "cut off", "no end"],
)
def test_a_pickle_that_makes_much_of_little_is_not_run(
    tmp_path: Path, program: bytes, said: str
) -> None:
    assert said in refused(with_pickle(tmp_path, program))


@pytest.mark.fault(
    "checkpoint",
    "A pickle's tensor is longer than its record",
    "Exit 3; what lies behind the record is not read.",
)
def test_a_tensor_is_never_read_beyond_its_record(tmp_path: Path) -> None:
    """PyTorch maps the whole file, and would hand out whatever lies behind a record that is too short."""
    path = changed(
        tmp_path,
        lambda records: [(n, c[:-4] if n.endswith("data/1") else c) for n, c in records],
    )
    assert "not what its records hold" in refused(path)


@pytest.mark.fault(
    "checkpoint",
    "A safetensors header has a name twice, endless nesting, impossible shapes, or too great a length",
    "Exit 3 with the reason, within bounded time and memory.",
)
@pytest.mark.parametrize(
    ("header", "said"),
    [
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
         b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', "its header has 'a' twice"),
        (b'{"a":' + b"[" * 1_000_000, "header cannot be read"),
        (b'{"a":{"dtype":"F32","data_offsets":[0,4],"shape":[1' + b",1" * 500_000 + b"]}}", "has a shape"),
        (b'{"a":{"dtype":"F32","shape":[' + b"9" * 4000 + b'],"data_offsets":[0,4]}}', "'a' has a shape"),
        (b" " * 30_000_000, "header is too long"),
    ],
    ids=["twice", "deep", "axes", "axis", "long"],
)  # fmt: skip
def test_a_header_that_no_library_writes_is_refused(
    tmp_path: Path, header: bytes, said: str
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert said in refused(path)


@pytest.mark.fault(
    "checkpoint",
    "A safetensors header has a name twice, endless nesting, impossible shapes, or too great a length",
    "Exit 3 with the reason, within bounded time and memory.",
)
def test_a_header_longer_than_its_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((10**12).to_bytes(8, "little") + b"{}")
    assert "header is too long" in refused(path)


@pytest.mark.fault(
    "checkpoint",
    "A pickle asks for more bytes than the file has",
    "Exit 3; no memory is taken for them.",
)
def test_a_pickle_that_asks_for_more_than_there_is_is_refused(tmp_path: Path) -> None:
    many = (2**62).to_bytes(8, "little")
    (tmp_path / BIN).write_bytes(b"\x80\x04\x8e" + many + b"few" * 100)  # BINBYTES8, older format
    assert "its pickle is damaged" in refused(tmp_path / BIN)


@pytest.mark.parametrize("name", ["model.safetensors", BIN])
def test_a_file_that_is_refused_is_closed(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x08" + bytes(40))
    before = len(list(Path("/proc/self/fd").iterdir()))
    refused(tmp_path / name)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
