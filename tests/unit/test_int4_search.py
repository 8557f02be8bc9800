"""The search for int4 grids: better than rounding to nearest, and sane where there is nothing to find."""

import itertools
import logging
import math
import shlex
import subprocess
import sysconfig
import time
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smolquant.schemes import INT4_METHODS, SCHEMES, Scheme, int4_search, scheme_of
from smolquant.schemes.base import GROUP_SIZES
from smolquant.schemes.int4_search import search_grids
from smolquant.schemes.int4_search_in_torch import search_rows
from smolquant.schemes.int4_weight_only import Int4WeightOnly, values_of
from stored_values import stored_values

SEARCH, RTN = Int4WeightOnly("search"), Int4WeightOnly("rtn")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def gaussian(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows + columns)
    return (torch.randn(rows, columns, generator=generator) * 0.02).to(dtype)


def heavy_tailed(rows: int, columns: int) -> torch.Tensor:
    """A normal distribution with a few weights ten times as large, as trained models have them."""
    weight = gaussian(rows, columns)
    outliers = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.002
    return torch.where(outliers, weight * 10, weight)


def relative_error(scheme: Scheme, weight: torch.Tensor, group: int) -> float:
    rows = scheme.quantize_rows(weight, group)
    return float((rows.squared_error / rows.squared_norm) ** 0.5)


@pytest.mark.parametrize("group", [32, 64, 128, 256])
@pytest.mark.parametrize("make", [gaussian, heavy_tailed])
def test_the_search_leaves_less_error_than_rounding_to_nearest(make, group: int) -> None:  # type: ignore[no-untyped-def]
    weight = make(128, 1024).bfloat16()
    assert relative_error(SEARCH, weight, group) < 0.96 * relative_error(RTN, weight, group)


def test_the_result_is_near_the_best_of_a_fine_search_of_both_ends() -> None:
    """A hundred ranges, each fitted by least squares: squared error within five per cent of it."""
    weight = gaussian(64, 512)
    grouped = weight.view(-1, 64)
    low, high = grouped.amin(1, keepdim=True), grouped.amax(1, keepdim=True)
    best = torch.full((len(grouped),), torch.inf)
    for above, below in itertools.product([0.4 * i for i in range(10)], repeat=2):
        step = (high - low) / 15
        begin, scale = low + above * step, step * (15 - above - below) / 15
        levels = ((grouped - begin) / scale).round().clamp(0, 15)
        centred, values = (x - x.mean(1, keepdim=True) for x in (levels, grouped))
        slope = (centred * values).sum(1) / centred.square().sum(1)
        best = torch.minimum(best, (values - slope[:, None] * centred).square().sum(1))

    ours = SEARCH.quantize_rows(weight, 64).squared_error

    assert ours < 1.05 * float(best.sum())


def test_weights_are_not_shrunk() -> None:
    """Least squares alone would, in every layer, by the share of its error."""
    weight = gaussian(256, 1024)
    found = stored_values(SEARCH.quantize(weight, 128))
    error_share = float((found - weight).square().sum() / weight.square().sum())
    kept = float((found * weight).sum() / weight.square().sum())
    assert error_share > 0.005, "the bound below is a fraction of this"
    assert abs(kept - 1) < 0.1 * error_share


def test_groups_keep_their_means_as_far_as_a_stored_zero_point_can() -> None:
    weight = gaussian(64, 512) + 0.01
    error = (stored_values(SEARCH.quantize(weight, 64)) - weight).view(-1, 64)
    assert error.mean(1).abs().mean() < 0.15 * error.std() / 64**0.5


def test_weights_that_lie_on_a_grid_are_found_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(-8, 8, (16, 128), generator=generator).float()
    levels[:, ::32], levels[:, 1::32] = -8, 7
    weight = levels * 0.25 + 0.5
    assert torch.equal(stored_values(SEARCH.quantize(weight.bfloat16(), 32)), weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, 0.37, -1e-7, 3e4])
def test_equal_weights_are_kept_exactly(dtype: torch.dtype, value: float) -> None:
    weight = torch.full((3, 128), value).to(dtype)
    assert torch.equal(stored_values(SEARCH.quantize(weight, 64)), weight.float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [32, 64, 128, 256])
def test_no_weights_are_further_off_than_the_bound_that_a_release_is_held_to(
    dtype: torch.dtype, group: int
) -> None:
    half_steps = torch.arange(256).remainder(15).sub(7).div(15).expand(8, -1).clone()
    half_steps[:, ::32], half_steps[:, 1::32] = -0.5, 0.5
    one = torch.zeros(8, 256)
    one[:, 5] = 1
    two = one - one.roll(1, 1)
    weights = {
        "normal": gaussian(8, 256),
        "tiny": gaussian(8, 256) * 1e-5,
        "heavy": heavy_tailed(8, 256),
        "between the levels": half_steps,
        "one": one,
        "two": two,
        "two and noise": two + gaussian(8, 256),
        "far from zero": 1 + gaussian(8, 256),
        "positive": gaussian(8, 256).abs(),
        "a sign each": gaussian(8, 256).sign(),
    }
    bound = SEARCH.max_relative_error(256, group)
    for name, weight in weights.items():
        assert relative_error(SEARCH, weight.to(dtype), group) <= bound, name


def uneven(columns: int) -> torch.Tensor:
    """Energies of columns as norms give them: most alike, a few a hundred times as large, some nothing."""
    generator = torch.Generator().manual_seed(columns)
    mean_squares = torch.randn(columns, generator=generator).mul(0.3).exp().double()
    mean_squares[torch.rand(columns, generator=generator) < 0.05] *= 100
    mean_squares[torch.rand(columns, generator=generator) < 0.05] = 0
    return mean_squares


@pytest.mark.parametrize("make", [gaussian, heavy_tailed])
@pytest.mark.parametrize("group", [32, 64, 128, 256])
def test_columns_with_large_inputs_cost_the_output_less(make, group: int) -> None:  # type: ignore[no-untyped-def]
    weight, mean_squares = make(128, 1024), uneven(1024)

    def output_error(known: torch.Tensor | None) -> float:
        error = values_of(*search_grids(weight, group, known)) - weight
        return float((error.double().square() * mean_squares).sum())

    assert output_error(mean_squares) < 0.93 * output_error(None)


@pytest.mark.parametrize("group", [32, 64, 128, 256])
def test_no_energies_take_the_rest_of_a_group_beyond_the_bound(group: int) -> None:
    lone = torch.zeros(256).double()
    lone[[5, 6]] = 1
    bound = SEARCH.max_relative_error(256, group)
    for weight in (gaussian(8, 256), heavy_tailed(8, 256), gaussian(8, 256).abs() + 1):
        for mean_squares in (
            uneven(256),
            lone,
            torch.zeros(256),
            torch.full((256,), 1e300, dtype=torch.float64),
        ):
            rows = SEARCH.quantize_rows(weight, group, mean_squares)
            assert (rows.squared_error / rows.squared_norm) ** 0.5 <= bound


@pytest.mark.parametrize("value", [0.0, 1e-300, 1.0, 1e300])
def test_energies_that_are_all_alike_change_nothing(value: float) -> None:
    weight = heavy_tailed(16, 512)
    alike = search_grids(weight, 128, torch.full((512,), value, dtype=torch.float64))
    assert all(torch.equal(a, b) for a, b in zip(alike, search_grids(weight, 128), strict=True))


@pytest.mark.parametrize("group", [32, 64, 128, 256])
def test_weights_of_columns_keep_every_sum_exact(group: int) -> None:
    """Below 2^24, the sum of the highest level times the largest value, whatever the mean_squares are."""
    steps = torch.ones(group, group).tril() + 1e-6
    for mean_squares in (uneven(group), torch.rand(group) ** 8, torch.arange(float(group)), *steps):
        weights = int4_search._column_weights(group, group, mean_squares)
        assert torch.equal(weights, weights.round())
        assert 1 <= weights.min() <= weights.max() <= int4_search._MOST_WEIGHT
        assert 15 * 15 * int4_search._UNITS * weights.sum() < 2**24
    # A whole number is at most one more than what it is rounded from, or raised from.
    assert 15 * 15 * int4_search._UNITS * (int4_search._MEAN_WEIGHT + 1) * 256 < 2**24


def without_compiled(
    groups: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``int4_search._search``, where nothing was compiled."""
    levels = torch.empty_like(groups, dtype=torch.int8)
    found = torch.empty(len(groups), 3)
    candidates = int4_search._candidates()
    search_rows(groups, weights, int4_search._UNITS, candidates, levels, found)
    return levels, found


def assert_same_bytes(groups: torch.Tensor, weights: torch.Tensor) -> None:
    """That the compiled loops and those in torch choose the same levels, and find the same to the bit."""
    levels, found = int4_search._search(groups, weights)
    in_torch, found_in_torch = without_compiled(groups, weights)
    assert torch.equal(levels, in_torch)
    assert torch.equal(found.view(torch.int32), found_in_torch.view(torch.int32))


@pytest.mark.parametrize("mean_squares", [None, gaussian(1, 1024)[0].square()])
@pytest.mark.parametrize("group", [32, 64, 128, 256])
def test_torch_finds_to_the_bit_what_the_compiled_loops_find(
    group: int, mean_squares: torch.Tensor | None
) -> None:
    weight = torch.cat([gaussian(64, 1024), heavy_tailed(64, 1024), gaussian(64, 1024).abs()])
    # A row of equal weights beside others, as rows are searched together, and one row too many for it.
    groups = torch.cat([torch.full((1, 1024), 0.3), weight]).view(-1, group)
    assert_same_bytes(groups, int4_search._column_weights(1024, group, mean_squares))


@st.composite
def any_weights(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    """A few rows of weights of any dtype, of kinds that sit badly with rounding; a group size."""
    group, dtype = draw(st.sampled_from(GROUP_SIZES)), draw(st.sampled_from(DTYPES))
    rows, a_row = draw(st.integers(1, 18)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    weight = torch.randn(rows, a_row * group, generator=generator)
    weight *= 2.0 ** draw(st.integers(-148, 100))
    if draw(st.booleans()):  # ties
        weight = torch.randint(-15, 16, weight.shape, generator=generator) * 0.5
    odd = st.one_of(
        st.floats(-(2.0**126), 2.0**126, width=32), st.sampled_from([0.0, -0.0, 2.0**-149])
    )
    for row in range(rows):
        if draw(st.booleans()):
            weight[row] = draw(odd)  # all equal
        for column in draw(st.lists(st.integers(0, a_row * group - 1), max_size=3)):
            weight[row, column] = draw(odd)  # outliers
    largest = min(torch.finfo(dtype).max, 2.0**126)
    return weight.clamp(-largest, largest).to(dtype), group


@settings(max_examples=60, deadline=None)
@given(any_weights(), st.none() | st.integers(0, 2**32))
def test_any_weights_get_the_same_bytes_with_and_without_a_compiler(
    drawn: tuple[torch.Tensor, int], energies: int | None
) -> None:
    weight, group = drawn
    mean_squares = None
    if energies is not None:
        generator = torch.Generator().manual_seed(energies)
        mean_squares = torch.randn(weight.shape[1], generator=generator).mul(3).exp()
    weights = int4_search._column_weights(weight.shape[1], group, mean_squares)
    assert_same_bytes(weight.float().view(-1, group), weights)


PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def compiled(library: Path, *options: str) -> Path:
    """int4_search.c as it is built for release, but in one copy, for the CPU that ``options`` name."""
    modules = tomllib.loads(PYPROJECT.read_text())["tool"]["setuptools"]["ext-modules"]
    (module,) = (one for one in modules if one["name"].endswith("_int4_search"))
    compiler = shlex.split(sysconfig.get_config_var("CC"))
    source = Path(int4_search.__file__).with_suffix(".c")
    given = ["-DEVERY_CPU=", *options, *module["extra-compile-args"]]
    subprocess.run([*compiler, "-shared", "-fPIC", *given, source, "-o", library], check=True)
    return library


@pytest.fixture
def use_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], None]]:
    """Search with another library than the installed one."""

    def use(library: Path) -> None:
        monkeypatch.setattr(int4_search, "_LIBRARY", library)
        int4_search._compiled.cache_clear()

    yield use
    int4_search._compiled.cache_clear()


@pytest.mark.parametrize("feature", ["any", "avx2", "avx512f", "any, and CFLAGS=-ffast-math"])
def test_every_cpu_gets_the_same_bytes(
    tmp_path: Path, use_library: Callable[[Path], None], feature: str
) -> None:
    """Not the copies that the loader chooses from, which have no names, but the same made one by one."""
    if feature.startswith("avx") and feature not in Path("/proc/cpuinfo").read_text().split():
        pytest.skip("not on this CPU")
    options = {"any": (), "any, and CFLAGS=-ffast-math": ("-ffast-math",)}
    weight = torch.cat([torch.full((1, 1024), 0.3), heavy_tailed(36, 1024)])
    groups = weight.view(-1, 64)
    weights = int4_search._column_weights(1024, 64, uneven(1024))
    expected = int4_search._search(groups, weights)

    use_library(compiled(tmp_path / "copy.so", *options.get(feature, (f"-m{feature}",))))
    found = int4_search._search(groups, weights)

    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1].view(torch.int32), expected[1].view(torch.int32)), "to the bit"


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 33])
def test_groups_that_are_searched_together_do_not_touch_each_other(rows: int) -> None:
    weight = heavy_tailed(40, 256).bfloat16()
    weight[::3] = 0.3
    whole = search_grids(weight, 32, uneven(256))
    part = search_grids(weight[:rows], 32, uneven(256))
    assert all(torch.equal(a, b[:rows]) for a, b in zip(part, whole, strict=True))


@pytest.mark.fault(
    "checkpoint",
    "A weight holds NaN or infinity",
    "It spoils nothing but its own group, and is found by the norm.",
)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_a_number_shows_in_the_norms_and_stays_in_its_group(value: float) -> None:
    weight, spoiled = gaussian(4, 256), gaussian(4, 256)
    spoiled[1, 70] = value
    rows = SEARCH.quantize_rows(spoiled, 64)
    assert not math.isfinite(rows.squared_norm + rows.squared_error)
    differs = rows.parts["qdata"] != SEARCH.quantize_rows(weight, 64).parts["qdata"]
    differs[1, 32:64] = False
    assert not differs.any()


def test_that_it_was_not_compiled_is_said_once_by_all_threads(
    tmp_path: Path,
    use_library: Callable[[Path], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    use_library(tmp_path / "missing.so")
    warn = logging.getLogger("smolquant").warning

    def slowly(text: str) -> None:
        time.sleep(0.1)
        warn(text)

    monkeypatch.setattr(logging.getLogger("smolquant"), "warning", slowly)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: search_grids(gaussian(4, 64), 32), range(4)))
    assert caplog.text.count("torch searches for int4 weights") == 1


@pytest.mark.parametrize("is_compiled", [True, False])
def test_what_torch_makes_by_default_does_not_reach_the_search(
    tmp_path: Path, use_library: Callable[[Path], None], is_compiled: bool
) -> None:
    weight = gaussian(8, 256)
    expected = search_grids(weight, 64)
    if not is_compiled:
        use_library(tmp_path / "missing.so")
    default = torch.get_default_dtype()
    int4_search._candidates.cache_clear()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            found = search_grids(weight, 64)
    finally:
        torch.set_default_dtype(default)
        int4_search._candidates.cache_clear()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.fault(
    "machine",
    "The compiled part of int4 is missing, or another version's",
    "torch finds the same bytes, slower; that is said once.",
)
@pytest.mark.parametrize("what", ["missing", "another version's", "no library"])
def test_without_the_compiled_loops_the_same_is_found_and_said_once(
    tmp_path: Path,
    use_library: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
    what: str,
) -> None:
    weight = torch.cat([heavy_tailed(300, 1024), gaussian(3, 1024)]).bfloat16()
    expected = search_grids(weight, 64, uneven(1024))
    library = tmp_path / "library.so"
    if what == "another version's":
        compiled(library, "-Dsmolquant_int4_search_rows=another_name")
    elif what == "no library":
        library.write_text("of another machine")
    use_library(library)
    for _ in range(2):
        found = search_grids(weight, 64, uneven(1024))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    (told,) = caplog.messages
    assert "without its compiled code" in told
    assert "several times as slow" in told


def test_the_arithmetic_is_the_same_with_any_number_of_threads() -> None:
    weight = gaussian(512, 512, torch.bfloat16)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(search_grids(weight, 64))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_method_is_one_of_the_options_that_decide_the_bytes() -> None:
    options = [
        scheme_of("int4_weight_only", int4_method=method).options(64) for method in INT4_METHODS
    ]
    assert options[0] != options[1]
    assert SCHEMES["int4_weight_only"].options(64) == SEARCH.options(64), "search is the default"
    assert scheme_of("int8_weight_only", int4_method="rtn") is SCHEMES["int8_weight_only"]
