"""What is accepted, what is refused, and that a refusal says what would be accepted."""

from pathlib import Path
from typing import Any

import pytest

from smolquant.errors import InputError
from smolquant.settings import Settings, make_settings


def asked(**options: Any) -> Settings:
    return make_settings(**{"model_path": "user/model", "repo_name": None, **options})


def test_one_hub_id_is_source_and_target() -> None:
    settings = asked()
    assert (settings.model, settings.repo) == ("user/model", "user/model")
    assert make_settings(model_path=None, repo_name="user/model").model == "user/model"


def test_an_existing_folder_wins_over_a_hub_id_of_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user/model").mkdir(parents=True)
    assert asked(repo_name="user/other").model_is_folder
    with pytest.raises(InputError, match="no repository to publish into"):
        asked()


def test_a_folder_alone_is_enough_where_nothing_is_published(tmp_path: Path) -> None:
    assert asked(model_path=str(tmp_path), save_only=True).repo is None
    assert asked(model_path=str(tmp_path), dry_run=True).repo is None


@pytest.mark.parametrize(
    ("text", "types"),
    [
        ("int8_dynamic", ("int8_dynamic",)),
        ("both", ("int8_weight_only", "int4_weight_only")),
        ("int4_weight_only, int8_weight_only", ("int4_weight_only", "int8_weight_only")),
        (
            "both,int8_dynamic,int8_weight_only",
            ("int8_weight_only", "int4_weight_only", "int8_dynamic"),
        ),
    ],
)
def test_quantization_types(text: str, types: tuple[str, ...]) -> None:
    assert asked(quant_type=text).quant_types == types


@pytest.mark.parametrize(
    ("text", "size"),
    [("1GB", 10**9), ("500MB", 5 * 10**8), ("1.5 gb", 15 * 10**8), ("2000000", 2 * 10**6)],
)
def test_shard_sizes_are_decimal(text: str, size: int) -> None:
    assert asked(max_shard_size=text).max_shard_size == size


@pytest.mark.fault(
    "input",
    "An option has a value that makes no sense, or two contradict each other",
    "Exit 2, before torch is imported.",
)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_path": None}, "No model was named"),
        ({"model_path": "no/such/folder"}, "neither an existing folder nor a Hub id"),
        ({"model_path": "../model"}, "neither an existing folder nor a Hub id"),
        ({"repo_name": "user/model/int8"}, "not the name of a Hub repository"),
        ({"repo_name": "model"}, "not the name of a Hub repository"),
        ({"quant_type": "int5"}, "'int5' is not a quantization type.*Known: int8_weight_only"),
        ({"quant_type": "int4"}, "Did you mean int4_weight_only"),
        ({"quant_type": "int8_weight_onyl"}, "Did you mean int8_weight_only"),
        ({"quant_type": "Both"}, r"Did you mean both\?"),
        ({"max_kl": "in4=1"}, r"Did you mean int4\?"),
        ({"allow_partial": True}, "there is none.*--max-kl"),
        ({"quant_type": " , "}, "No quantization type"),
        ({"group_size": 48}, "group size of 48 has no kernel.*32, 64, 128, 256"),
        ({"max_shard_size": "large"}, "not a shard size"),
        ({"max_shard_size": "10KB"}, "not a shard size"),
        ({"skip": ["("]}, "not a regular expression"),
        ({"tag": "-"}, None),
        ({"tag": "a b"}, "not a valid tag"),
        ({"tag": "../../x"}, "not a valid tag"),
        ({"tag": "v1", "create_pr": True}, "do not go together"),
        ({"tag": "v1", "save_only": True}, "publishes nothing"),
        ({"create_pr": True, "save_only": True}, "publishes nothing"),
        ({"replace_main": True, "save_only": True}, "publishes nothing"),
        ({"branches": True, "save_only": True}, "publishes nothing"),
        ({"branches": True, "create_pr": True}, "not yet merged"),
        ({"branches": True, "tag": "int8"}, "the name of a variant"),
        ({"branches": True, "tag": "v1"}, None),
    ],
)
def test_refusals(options: dict[str, Any], message: str | None) -> None:
    if message is None:
        asked(**options)
        return
    with pytest.raises(InputError, match=message) as refused:
        asked(**options)
    assert refused.value.exit_code == 2
    assert refused.value.hint, "a refusal says what to do next"


def test_a_folder_that_is_not_found_by_the_name_that_its_owner_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").touch()
    with pytest.raises(InputError, match=r"is a checkpoint itself: its name is `\.`"):
        asked(model_path="./checkpoint")


@pytest.mark.fault(
    "input",
    "A revision of a folder is asked for",
    "Exit 2.",
)
def test_a_folder_has_no_revisions(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no revisions"):
        asked(model_path=str(tmp_path), repo_name="user/model", revision="v1")


@pytest.mark.fault(
    "input",
    "The text to measure on is the one to calibrate on",
    "Exit 2.",
)
def test_a_variant_is_not_measured_on_the_text_that_it_was_calibrated_on(tmp_path: Path) -> None:
    one, copy, other = (tmp_path / name for name in ("one.txt", "copy.txt", "other.txt"))
    one.write_text("some text")
    copy.write_text("some text")
    other.write_text("some other text")
    calibrated = {"int4_method": "calibrated", "calibration_text": str(one)}
    with pytest.raises(InputError, match="are the same text"):
        asked(**calibrated, eval_text=str(copy))
    asked(**calibrated, eval_text=str(other))
    asked(**calibrated, eval_text=str(copy), evaluate="never")
    with pytest.raises(InputError, match="uses no text"):
        asked(calibration_text=str(one), eval_text=str(copy))
    broken = tmp_path / "broken.json"
    broken.write_text("[{")
    with pytest.raises(InputError, match="--calibration-text .* not a list of conversations"):
        asked(int4_method="calibrated", calibration_text=str(broken), eval_text=str(one))


@pytest.mark.fault(
    "secret",
    "The settings are printed",
    "The token is not in them.",
)
def test_the_token_is_never_shown() -> None:
    settings = asked(token="hf_secret")
    assert settings.token == "hf_secret"
    assert "hf_secret" not in repr(settings)
    assert asked(token="").token is None, "an empty input means unset"
    assert asked(token=" hf_secret\r\n").token == "hf_secret"


def test_only_options_that_change_a_variants_bytes_make_it_stale() -> None:
    before = asked(group_size=128).options_of("int8_weight_only")
    assert asked(group_size=64, private=True, tag="v1").options_of("int8_weight_only") == before
    assert asked(group_size=64).options_of("int4_weight_only") != asked().options_of(
        "int4_weight_only"
    )
    assert asked(int4_method="rtn").options_of("int8_dynamic") == asked().options_of("int8_dynamic")
    assert asked(int4_method="rtn").options_of("int4_weight_only")["int4_method"] == "rtn"
    assert asked().options_of("int4_weight_only")["int4_method"] == "search"
    assert asked(skip=["a", "b"]).options_of("int8_dynamic") == asked(skip=["b", "a"]).options_of(
        "int8_dynamic"
    )


@pytest.mark.fault(
    "input",
    "The checkpoint is a file and no folder",
    "Exit 2, named as what it is.",
)
@pytest.mark.parametrize(
    ("name", "said"), [("m.gguf", "a GGUF file"), ("model.safetensors", "a file")]
)
def test_a_file_is_not_a_checkpoint_and_is_called_what_it_is(
    tmp_path: Path, name: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / name).write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path)
    for path in (
        tmp_path / "models" / name,
        Path("models") / name,
    ):  # the latter looks like a Hub id
        with pytest.raises(InputError, match=said):
            asked(model_path=str(path), save_only=True)


@pytest.mark.fault(
    "input",
    "A path is misspelt",
    "Exit 2, or 5 where it looks like a Hub id, with what is there and has a name like it.",
)
def test_a_misspelt_path_is_answered_with_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs/checkpoint").mkdir(parents=True)
    (tmp_path / "text.txt").write_text("some text")
    monkeypatch.chdir(tmp_path)
    for path, meant in (
        ("./rnus/checkpoint", "runs/checkpoint"),
        (f"{tmp_path}/runs/chekpoint", f"{tmp_path}/runs/checkpoint"),
    ):
        with pytest.raises(InputError, match=rf"Did you mean {meant}\?"):
            asked(model_path=path, save_only=True)
    with pytest.raises(InputError, match=r"Did you mean text.txt\?"):
        asked(eval_text="txt.txt")
    with pytest.raises(InputError) as refusal:
        asked(model_path="./nothing/like/it", save_only=True)
    assert "Did you mean" not in refusal.value.hint
