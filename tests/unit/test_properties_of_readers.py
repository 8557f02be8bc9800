"""What holds for any input of the readers, looked for by hypothesis (docs/faults.md has known cases)."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save

from in_memory import InMemory
from smolquant.checkpoint.files import shard_names
from smolquant.checkpoint.reader import Checkpoint
from smolquant.checkpoint.tensors import DTYPES
from smolquant.errors import CheckpointError, InputError
from smolquant.publish.front_matter import Readme, check_kinds, declared_license, readme_text
from smolquant.record import (
    FileRecord,
    InvalidRecord,
    Metrics,
    SourceRecord,
    TensorRecord,
    VariantRecord,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4)
    ),
    max_leaves=12,
)
"""Whatever ``json.loads`` returns."""


# The header of a safetensors file

SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=9).filter(
    lambda name: name != "__metadata__" and not name.startswith(("_orig_mod.", "module."))
)


@st.composite
def states(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """One to five tensors of any dtype and shape, with arbitrary bytes."""
    state = {}
    for name in draw(st.lists(NAMES, min_size=1, max_size=5, unique=True)):
        dtype, shape = draw(st.sampled_from(sorted(DTYPES.values(), key=str))), draw(SHAPES)
        size = torch.Size(shape).numel() * dtype.itemsize
        content = torch.tensor(
            list(draw(st.binary(min_size=size, max_size=size))), dtype=torch.uint8
        )
        if dtype is torch.bool:
            content %= 2
        state[name] = content.view(dtype).reshape(shape)
    return state


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(
        one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)
    )


@given(states(), st.data())
def test_what_safetensors_writes_is_read_back_by_any_rows(
    state: dict[str, torch.Tensor], data: st.DataObject
) -> None:
    with Checkpoint([InMemory(save(state))]) as checkpoint:
        assert checkpoint.layout.tensors.keys() == state.keys()
        for name, tensor in checkpoint.layout.tensors.items():
            start = data.draw(st.integers(0, tensor.rows))
            stop = data.draw(st.integers(start, tensor.rows))
            assert same_bytes(checkpoint.read_whole(tensor), state[name])
            if tensor.shape:
                rows = checkpoint.read_rows(tensor, start, stop)
                matrix = state[name].reshape(tensor.rows, *tensor.row_shape)
                assert same_bytes(rows, matrix[start:stop])


ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F8_E5M2", "x"]) | JSON,
        "shape": st.lists(st.integers(-1, 3), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-1, 40), min_size=2, max_size=2) | JSON,
    },
)
HEADERS = st.dictionaries(st.text(max_size=9) | st.just("__metadata__"), ENTRY, max_size=3) | JSON


@pytest.mark.fault(
    "checkpoint",
    "A safetensors header is anything at all",
    "Exit 3, or it is read as safetensors itself reads it.",
)
@given(
    HEADERS.map(lambda header: json.dumps(header).encode()) | st.binary(max_size=60),
    st.binary(max_size=40),
)
@example(b'{"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}', bytes(4))
@example(b'{"a": {"dtype": "F32", "shape": [true], "data_offsets": [false, 4]}}', bytes(4))
def test_a_header_is_refused_or_read_as_its_own_library_reads_it(
    header: bytes, data: bytes
) -> None:
    file = InMemory.of(header, data)
    try:
        checkpoint = Checkpoint([file])
    except CheckpointError:
        return
    deserialize: Any = safetensors.deserialize
    expected = {name: bytes(entry["data"]) for name, entry in deserialize(file.content)}
    for name, tensor in checkpoint.layout.tensors.items():
        rows = checkpoint.read_rows(tensor, 0, tensor.rows)
        assert (
            bytes(rows.reshape(-1).view(torch.uint8)) == expected[checkpoint.layout.wrapper + name]
        )


@pytest.mark.fault(
    "checkpoint",
    "A weight file is any bytes at all",
    "Exit 3 in one line, or it is read.",
)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_checkpoint_or_an_error_of_one(content: bytes) -> None:
    try:
        Checkpoint([InMemory(content)]).close()
    except CheckpointError as error:
        assert "\n" not in str(error)


# The index of shards


@given(
    st.dictionaries(
        st.text(max_size=9), st.from_regex(r"\w[\w.-]{0,20}", fullmatch=True), min_size=1
    )
)
def test_the_shards_of_an_index_are_those_that_it_names(weight_map: dict[str, str]) -> None:
    index = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    assert shard_names("index.json", index) == sorted(set(weight_map.values()))


@pytest.mark.fault(
    "checkpoint",
    "An index of shards is anything at all",
    "Exit 3, or every shard is a file beside it.",
)
@given(
    st.binary(max_size=60)
    | JSON.map(lambda value: json.dumps(value).encode())
    | JSON.map(lambda value: json.dumps({"weight_map": value}).encode())
)
@example(b'{"weight_map": {"a": "a/b"}}')
@example(b'{"weight_map": {"a": "a\\n"}}')
@example(b'{"weight_map": {"a": ' + b"1" * 5000 + b"}}")
def test_an_index_names_files_beside_it_or_is_refused(index: bytes) -> None:
    try:
        shards = shard_names("index.json", index)
    except CheckpointError as error:
        assert "\n" not in str(error)
        return
    assert shards
    for shard in shards:
        assert "/" not in shard
        assert "\0" not in shard
        assert shard not in {".", ".."}


# Records

COUNTS = st.integers(0, 2**63 - 1)
FINITE = st.floats(-(2.0**62), 2.0**62)
TEXTS = st.text(max_size=9)
RECORDS = st.builds(
    VariantRecord,
    variant=TEXTS,
    quant_type=TEXTS,
    source=st.builds(SourceRecord, TEXTS, COUNTS, TEXTS | st.none(), TEXTS | st.none()),
    options=st.dictionaries(
        TEXTS, TEXTS | st.integers() | st.booleans() | st.none() | st.lists(TEXTS)
    ),
    dtype=TEXTS,
    versions=st.dictionaries(TEXTS, TEXTS, max_size=3),
    tensors=st.dictionaries(
        TEXTS,
        st.builds(
            TensorRecord,
            st.booleans(),
            COUNTS,
            COUNTS,
            COUNTS | st.none(),
            FINITE | st.none(),
            TEXTS,
            TEXTS | st.none(),
            TEXTS | st.none(),
            st.booleans(),
        ),
        max_size=3,
    ),
    files=st.dictionaries(TEXTS, st.builds(FileRecord, TEXTS, COUNTS), max_size=3),
    metrics=st.none()
    | st.builds(
        Metrics,
        perplexity=FINITE | st.none(),
        mean_kl=FINITE | st.none(),
        tokens=COUNTS | st.none(),
        text=TEXTS | st.none(),
        machine=TEXTS | st.none(),
    ),
    device=TEXTS | st.none(),
    task=st.sampled_from(["text-generation", "image-text-to-text"]),
)


@given(RECORDS)
def test_any_record_is_read_back_as_it_was_written(record: VariantRecord) -> None:
    assert VariantRecord.from_json(record.to_json()) == record


@pytest.mark.fault(
    "record",
    "A quantization.json is anything at all",
    "It is no record, or one that is written again to the same.",
)
@given(RECORDS, st.data())
def test_a_record_with_anything_in_one_place_is_refused_or_told_again_alike(
    record: VariantRecord, data: st.DataObject
) -> None:
    raw: Any = json.loads(record.to_json())
    place = raw
    while True:
        key = data.draw(st.sampled_from(sorted(place)))
        if not (isinstance(place[key], dict) and place[key] and data.draw(st.booleans())):
            break
        place = place[key]
    place[key] = data.draw(JSON)
    assert_refused_or_told_again(json.dumps(raw).encode())


@pytest.mark.fault(
    "record",
    "A quantization.json is anything at all",
    "It is no record, or one that is written again to the same.",
)
@given(JSON.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=60))
@example(b"1" * 5000)
def test_anything_is_a_record_or_refused_as_none(content: bytes) -> None:
    assert_refused_or_told_again(content)


def assert_refused_or_told_again(content: bytes) -> None:
    try:
        read = VariantRecord.from_json(content)
    except InvalidRecord:
        return
    assert VariantRecord.from_json(read.to_json()) == read


# Front matter

LINES = st.lists(
    st.sampled_from(
        [
            "---", "--- ", "tags:", "- a", "  - on", "tags: [x, 'y']", "license: mit", "# a comment", "",
            "a: {b: c}", "b: |", "  text", "date: 2020-13-99", "x: &a 1", "y: *a", "é: ü", "{a: b}",
            "- - c", "base_model: them/tiny", "<<: {q: 1}", "? complex", ": key", "'tags': q", "...",
            "%YAML 1.2",
        ]
    )
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
)  # fmt: skip
FRONTS = st.tuples(LINES, st.sampled_from(["\n", "\r\n"])).map(
    lambda drawn: drawn[1].join(drawn[0])
)


def readme_of(front: str, body: str, newline: str) -> str:
    return newline.join(["---", front, "---", body])


READMES = (
    st.builds(readme_of, FRONTS, FRONTS, st.sampled_from(["\n", "\r\n"]))
    | FRONTS
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
)


@given(READMES)
def test_a_readme_taken_apart_loses_nothing(text: str) -> None:
    readme = Readme.split(text)
    assert text.endswith(readme.body)
    again = Readme.split(readme.join())
    if readme.front:
        assert (again.front, again.body) == (readme.front, readme.body)


@given(READMES, st.lists(st.sampled_from(["torchao", "smolquant", "a"]), max_size=3, unique=True))
def test_tags_are_all_that_adding_tags_changes(text: str, tags: list[str]) -> None:
    readme = Readme.split(text)
    try:
        before = readme.values()
        edited = readme.with_tags(tags)
    except InputError as error:
        assert "\n" not in str(error)
        return
    after = edited.values()
    assert edited.body == readme.body
    assert {key: value for key, value in after.items() if key != "tags"} == {
        key: value for key, value in before.items() if key != "tags"
    }
    assert edited.with_tags(tags) == edited
    if edited != readme:
        assert set(tags) <= set(after["tags"])


@pytest.mark.fault(
    "text",
    "A README is any bytes at all",
    "Exit 2, or its front matter is read and edited, and nothing else is changed.",
)
@given(READMES.map(str.encode) | st.binary(max_size=60))
@example(b"---\n? [a]\n: b\n---\n")
@example(b"---\na: 1_" + b"0" * 5000 + b"\n---\n")
@example(b"---\na: !!python/object:os.system x\n---\n")
@example(b"---\n[a]: 1\n---\n")
def test_any_readme_is_text_with_front_matter_or_bad_input(content: bytes) -> None:
    try:
        text = readme_text(content, "alice/tiny")
        check_kinds(text, "alice/tiny")
        terms = declared_license(text)
    except InputError as error:
        assert "\n" not in str(error)
        return
    assert all(isinstance(value, str) for value in terms.values())
    edited = Readme.split(text).with_value("base_model", "them/tiny")
    assert edited.values().get("base_model") == "them/tiny" or edited.join() == text


@pytest.mark.fault(
    "checkpoint",
    "A header, an index, a record or front matter is nested a hundred thousand times",
    "It is refused like any other that cannot be read.",
)
@pytest.mark.parametrize(
    ("read", "refusal"),
    [
        (lambda deep: Checkpoint([InMemory.of(deep, b"")]), CheckpointError),
        (lambda deep: shard_names("index.json", deep), CheckpointError),
        (VariantRecord.from_json, InvalidRecord),
        (
            lambda deep: readme_text(b"---\na: " + deep[:1200] + b"\n---\n", "alice/tiny"),
            InputError,
        ),
    ],
    ids=["header", "index", "record", "front matter"],
)
def test_what_is_nested_without_end_is_refused(
    read: Callable[[bytes], object], refusal: type[Exception]
) -> None:
    with pytest.raises(refusal) as raised:
        read(b"[" * 100_000)
    assert len(str(raised.value)) < 500
