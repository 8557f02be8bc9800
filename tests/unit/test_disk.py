"""Files written past the page cache hold what was written, wherever they lie."""

import errno
import hashlib
import itertools
import os
import random
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from limits import files_of_at_most
from smolquant.checkpoint.disk import DiskFile
from smolquant.checkpoint.files import write_text
from smolquant.errors import InputError
from smolquant.places import naming
from smolquant.secrecy import remember


@pytest.fixture(params=["disk", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """One on a disk, and one in memory, where older kernels have no direct transfers to offer."""
    if request.param == "disk":
        return tmp_path
    return Path(request.getfixturevalue("in_memory"))


@pytest.fixture
def in_memory() -> Iterator[str]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield folder


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 3_333_333])
def test_pieces_of_any_size_in_any_order_from_many_threads_make_the_file(
    folder: Path, size: int
) -> None:
    content = random.Random(size).randbytes(size)
    cuts = sorted({0, size, *(random.Random(1).randrange(size + 1) for _ in range(40))})
    pieces = list(itertools.pairwise(cuts))
    random.Random(2).shuffle(pieces)
    file = DiskFile(folder / "file", size)
    try:
        with ThreadPoolExecutor(4) as pool:
            for start, stop in pieces:
                pool.submit(file.write, memoryview(content)[start:stop], start)
        assert (folder / "file").read_bytes() == content
        assert file.sha256() == hashlib.sha256(content).hexdigest()
    finally:
        file.close()


def test_whole_pages_do_not_stay_in_the_page_cache(tmp_path: Path) -> None:
    size = 8 << 20
    file = DiskFile(tmp_path / "file", size)
    file.write(memoryview(os.urandom(size)), 0)
    file.sha256()
    file.close()
    try:
        os.close(os.open(tmp_path / "file", os.O_RDONLY | os.O_DIRECT))
    except OSError:
        cached = size  # a temporary folder in memory
    else:
        cached = 0
    assert abs(_cached_bytes(tmp_path / "file") - cached) < size // 10


@pytest.mark.fault(
    "machine",
    "The file system takes no direct writes",
    "It gets ordinary ones.",
)
def test_a_file_system_that_refuses_only_the_transfer_gets_ordinary_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: int, data: object, offset: int) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", refuse)
        file = DiskFile(tmp_path / "file", 10_000)
    file.write(memoryview(b"x" * 10_000), 0)
    assert file.sha256() == hashlib.sha256(b"x" * 10_000).hexdigest()
    file.close()


@pytest.mark.fault(
    "machine",
    "The disk is too small for a shard",
    "That is found out before its first byte.",
)
def test_a_disk_that_is_too_small_is_found_out_at_once(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="file") as caught:
        DiskFile(tmp_path / "file", 1 << 55)
    assert caught.value.errno in {errno.ENOSPC, errno.EFBIG}
    assert caught.value.filename == str(tmp_path / "file")


def _cached_bytes(path: Path) -> int:
    """How much of a file the page cache holds, by fincore(1)."""
    found = subprocess.run(
        ["fincore", "--bytes", "--noheadings", "--output", "RES", path],
        check=True,
        capture_output=True,
        text=True,
    )
    return int(found.stdout)


@pytest.mark.fault(
    "machine",
    "A README cannot be written whole",
    "The old one stays whole.",
)
def test_a_card_that_does_not_fit_leaves_the_one_that_was_there(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text("the owner's")
    with files_of_at_most(100), pytest.raises(OSError, match=f"File too large: '{card}'"):
        write_text(card, "x" * 200)
    assert card.read_text() == "the owner's"
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


@pytest.mark.fault(
    "machine",
    "A link lies in a README's place",
    "The link is replaced; what it leads to stays.",
)
def test_a_card_replaces_a_link_and_not_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("precious")
    (tmp_path / "README.md").symlink_to("elsewhere")
    write_text(tmp_path / "README.md", "a card")
    assert (tmp_path / "elsewhere").read_text() == "precious"
    assert (tmp_path / "README.md").read_text() == "a card"


@pytest.mark.fault(
    "machine",
    "An open file cannot be written",
    "The error names it.",
)
def test_an_error_of_an_open_file_names_it() -> None:
    with pytest.raises(OSError, match=r"No space left on device: 'b'"), naming(Path("b")):
        raise OSError(28, "No space left on device")
    with pytest.raises(OSError, match=r"No space left on device: 'a'"), naming(Path("b")):
        raise OSError(28, "No space left on device", "a")


@pytest.mark.fault(
    "secret",
    "A small file that a run writes would hold a token",
    "Exit 2 with its name; it is not written.",
)
def test_a_small_file_with_a_token_is_not_written(tmp_path: Path) -> None:
    remember("hf_of_this_run")
    with pytest.raises(InputError, match=r"quantization.json holds a token"):
        write_text(tmp_path / "quantization.json", '{"token": "hf_of_this_run"}')
    assert not (tmp_path / "quantization.json").exists()
