"""The picture of the relative errors: what it shows of the records, and that it is a sound SVG."""

import re
from xml.etree.ElementTree import Element, fromstring

import pytest

from smolquant.checkpoint.files import is_auxiliary
from smolquant.record import TensorRecord
from smolquant.report.plot import FILE_NAME, largest_error, relative_error_plot

SVG = "{http://www.w3.org/2000/svg}"


def quantized(error: float | None) -> TensorRecord:
    return TensorRecord(True, 8, 4, relative_error=error)


def model(layers: int = 3) -> dict[str, TensorRecord]:
    """Two kinds of projection, the worst one in layer 1; norms and embedding kept."""
    tensors = {"model.embed_tokens.weight": TensorRecord(False, 8, 8, reason="embedding")}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        tensors[f"{at}.self_attn.q_proj.weight"] = quantized(0.02)
        tensors[f"{at}.mlp.down_proj.weight"] = quantized(0.05 if layer == 1 else 0.03)
        tensors[f"{at}.norm.weight"] = TensorRecord(False, 1, 1, reason="norm")
    return tensors


def drawn(tensors: dict[str, TensorRecord], variant: str = "int4") -> Element:
    text = relative_error_plot(variant, tensors)
    assert text is not None
    return fromstring(text)


def texts(svg: Element) -> list[str]:
    return [element.text or "" for element in svg.iter(f"{SVG}text")]


def legend(svg: Element) -> dict[str, str]:
    """Label -> mean."""
    after = texts(svg)[texts(svg).index("mean") + 1 :]
    return dict(zip(after[::2], after[1::2], strict=False))


def places(svg: Element, pattern: str) -> list[list[tuple[float, float]]]:
    """The pixels of each path of one sort."""
    paths = [path.get("d", "") for path in svg.iter(f"{SVG}path")]
    return [
        [(float(x), float(y)) for x, y in re.findall(r"([\d.]+) ([\d.]+)", path)]
        for path in paths
        if re.fullmatch(pattern, path)
    ]


LINE, DOTS = r"M[^M]*L[^M]*", r"(M[\d. ]+h0)+"


def test_each_kind_of_projection_is_a_line_along_the_layers() -> None:
    svg = drawn(model())
    assert len(places(svg, LINE)) == 2
    q_proj, down_proj = places(svg, DOTS)
    assert [x for x, _ in q_proj] == [x for x, _ in down_proj] == sorted({x for x, _ in q_proj})
    assert len({y for _, y in q_proj}) == 1
    heights = [y for _, y in down_proj]
    assert heights[0] == heights[2] > heights[1]  # up is a larger error
    # From 3% to 5% it is twice as far as from 2% to 3%.
    assert heights[0] - heights[1] == pytest.approx(2 * (q_proj[0][1] - heights[0]), abs=0.2)


def test_it_says_what_it_shows() -> None:
    svg = drawn(model())
    shown = texts(svg)
    assert shown[:2] == [
        "Relative error of int4, layer by layer",
        "Largest: model.layers.1.mlp.down_proj.weight, 5.00%",
    ]
    assert svg.findtext(f"{SVG}title") == shown[0]
    assert svg.findtext(f"{SVG}desc") == shown[1]
    assert {"Layer", "‖dequantized − source‖ / ‖source‖", "2.0%", "5.0%", "0", "1", "2"} <= set(
        shown
    )
    assert legend(svg) == {"down_proj": "3.67%", "q_proj": "2.00%"}


def test_the_worst_tensor_is_ringed() -> None:
    svg = drawn(model())
    rings = [(float(c.get("cx", "")), float(c.get("cy", ""))) for c in svg.iter(f"{SVG}circle")]
    worst = min((point for points in places(svg, DOTS) for point in points), key=lambda p: p[1])
    assert rings[1:] == [worst]  # the other one stands before the subtitle


def test_a_kind_has_one_colour_whatever_its_rank() -> None:
    def colours(svg: Element) -> dict[str, str]:
        lines = [line.get("stroke", "") for line in svg.iter(f"{SVG}line")]
        labels = legend(svg)
        return dict(zip(labels, lines[-len(labels) :], strict=True))

    other = model() | {
        f"model.layers.{layer}.self_attn.q_proj.weight": quantized(0.2) for layer in range(3)
    }
    assert list(legend(drawn(model()))) == ["down_proj", "q_proj"]
    assert list(legend(drawn(other))) == ["q_proj", "down_proj"]
    assert colours(drawn(model())) == colours(drawn(other))
    assert len(set(colours(drawn(model())).values())) == 2


def test_what_lies_outside_the_layers_is_a_level_line_without_dots() -> None:
    svg = drawn(model() | {"lm_head.weight": quantized(0.01)})
    assert legend(svg)["lm_head"] == "1.00%"
    assert len(places(svg, LINE)) == 3
    assert len(places(svg, DOTS)) == 2
    (level,) = [line for line in places(svg, LINE) if len(line) == 2]
    assert level[0][1] == level[1][1]


def test_kinds_of_one_name_are_told_apart() -> None:
    tensors = {
        f"h.{layer}.{kind}.weight": quantized(0.01)
        for layer in range(2)
        for kind in ("attn.c_proj", "mlp.c_proj", "mlp.c_fc")
    }
    assert set(legend(drawn(tensors))) == {"attn.c_proj", "mlp.c_proj", "c_fc"}


def test_of_several_tensors_of_a_kind_in_a_layer_the_worst_counts() -> None:
    tensors = {
        f"layers.{layer}.experts.{expert}.up.weight": quantized(0.01 * (expert + 1))
        for layer in range(2)
        for expert in range(3)
    }
    assert legend(drawn(tensors)) == {"up": "3.00%"}


def test_more_kinds_than_can_be_told_apart_are_counted_and_the_worst_stays() -> None:
    tensors = {
        f"layers.{layer}.k{kind:02}.weight": quantized(0.01 + 0.001 * kind)
        for layer in range(2)
        for kind in range(30)
    }
    svg = drawn(tensors)
    assert len(places(svg, LINE)) == 16
    assert next(iter(legend(svg))) == "k29"
    assert texts(svg)[-1] == "and 14 with less"


def test_a_long_name_keeps_both_its_ends() -> None:
    start, end = "a" * 100, "z" * 100
    tensors = {f"{start}.{layer}.{end}.weight": quantized(0.01) for layer in range(2)}
    shown = texts(drawn(tensors))
    assert max(map(len, shown)) < 110
    assert re.search(r"Largest: a+…z+\.weight, 1\.00%", shown[1])
    assert re.fullmatch(r"z+…z+", shown[-2])


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"lm_head.weight": quantized(0.1), "proj.weight": quantized(0.2)},
        {"layers.0.up.weight": quantized(0.1)},
        {"layers.0.up.weight": quantized(None), "layers.1.up.weight": quantized(None)},
    ],
    ids=["nothing", "no layers", "one layer", "nothing measured"],
)
def test_without_two_layers_there_is_nothing_to_draw(tensors: dict[str, TensorRecord]) -> None:
    assert relative_error_plot("int8", tensors) is None


@pytest.mark.parametrize("error", [0.0, 0.01, 1e-9, 3.0])
def test_equal_errors_are_drawn_on_a_scale_with_two_ends(error: float) -> None:
    svg = drawn({f"layers.{layer}.up.weight": quantized(error) for layer in range(2)})
    assert len(set(legend(svg).values())) == 1
    assert len({text for text in texts(svg) if text.endswith("%")}) >= 3  # two ticks, the mean


@pytest.mark.parametrize("error", [float("nan"), float("inf")])
def test_a_number_that_is_none_is_left_out(error: float) -> None:
    """The gate refuses such a variant; the picture must not be what breaks first."""
    tensors = model() | {"model.layers.2.mlp.down_proj.weight": quantized(error)}
    assert largest_error(tensors) == ("model.layers.1.mlp.down_proj.weight", 0.05)
    assert "nan" not in str(relative_error_plot("int4", tensors)).lower()
    assert [len(points) for points in places(drawn(tensors), DOTS)] == [3, 2]


def test_there_may_be_no_largest_error() -> None:
    assert largest_error({"a": TensorRecord(False, 1, 1, reason="norm")}) is None


@pytest.mark.fault(
    "text",
    "Names from a model hold markup",
    "In the picture they are text.",
)
def test_names_from_a_model_are_text_and_nothing_else() -> None:
    evil = '</text><script>alert(1)</script>&"\x00\x1b[31m\ud800'
    tensors = {f"{evil}.{layer}.{evil}.weight": quantized(0.01) for layer in range(2)}
    text = relative_error_plot(evil, tensors)
    assert text is not None
    assert "<script" not in text
    assert not re.search("[\x00-\x09\x0b-\x1f\ud800]", text)
    svg = fromstring(text)
    assert {element.tag.removeprefix(SVG) for element in svg.iter()} == {
        "svg", "title", "desc", "style", "rect", "text", "circle", "line", "path",
    }  # fmt: skip
    assert '<script>alert(1)</script>&"' in texts(svg)[0]


def test_it_brings_its_own_background() -> None:
    background = drawn(model()).find(f"{SVG}rect")
    assert background is not None
    assert background.get("fill") == "#ffffff"


def test_the_same_records_give_the_same_bytes_in_whatever_order() -> None:
    tensors = model(30)
    text = relative_error_plot("int4", tensors)
    assert text == relative_error_plot("int4", dict(reversed(tensors.items())))


def test_a_large_model_makes_a_small_file() -> None:
    tensors = {
        f"model.layers.{layer}.k{kind}.weight": quantized(0.01 + 0.0001 * layer * kind)
        for layer in range(126)
        for kind in range(7)
    }
    text = relative_error_plot("int4", tensors)
    assert text is not None
    assert len(text) < 50_000


def test_it_does_not_travel_into_what_is_made_of_a_variants_folder() -> None:
    assert not is_auxiliary(FILE_NAME)
