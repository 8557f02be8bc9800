"""Names of tensors: their layer, and many of them in one line."""

import pytest

from smolquant.names import fold_names, layer_number, split_at_layer, without_numbers


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("model.layers.3.mlp.up_proj.weight", ("model.layers", 3, "mlp.up_proj.weight")),
        ("h.12.experts.7.up", ("h", 12, "experts.7.up")),
        ("lm_head.weight", ("lm_head.weight", None, "")),
        ("conv1d.weight", ("conv1d.weight", None, "")),
        ("layers.0", ("layers", 0, "")),
    ],
)
def test_a_name_is_split_at_its_first_number(name: str, parts: tuple[str, int | None, str]) -> None:
    assert split_at_layer(name) == parts
    assert layer_number(name) == parts[1]


def test_only_whole_parts_are_numbers() -> None:
    assert without_numbers("h.12.conv2.experts.7") == "h.*.conv2.experts.*"


def test_names_fold_where_their_numbers_vary_and_only_there() -> None:
    names = [
        "lm_head.weight",
        *(f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(30)),
        *(f"model.layers.3.mlp.experts.{expert}.up_proj.weight" for expert in range(8)),
        "model.layers.7.only.weight",
    ]
    assert fold_names(names) == [
        ("lm_head.weight", 1),
        ("model.layers.*.mlp.down_proj.weight", 30),
        ("model.layers.3.mlp.experts.*.up_proj.weight", 8),
        ("model.layers.7.only.weight", 1),
    ]
