"""int4 weights that suit a text: better outputs, the same bytes always, sane where a text says little."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import RwkvConfig

import models
from smolquant import machine
from smolquant.checkpoint.reader import Checkpoint
from smolquant.checkpoint.tensors import SourceTensor
from smolquant.errors import CannotMeasure, CheckpointError, InputError, MachineError
from smolquant.evaluate.documents import EvalText, bundled_calibration_text, bundled_text
from smolquant.evaluate.text import load_tokenizer
from smolquant.model.architecture import Architecture
from smolquant.quantize import calibrate_experts
from smolquant.quantize.calibrate import (
    TOKENS,
    Calibration,
    calibrated_weights,
    calibration_windows,
)
from smolquant.quantize.calibrate_experts import RoutedInputs
from smolquant.quantize.engine import quantize_checkpoint
from smolquant.quantize.output import Written
from smolquant.quantize.plan import make_plan
from smolquant.quantize.planned import PlannedTensor, VariantPlan
from smolquant.schemes import Int4Method, Quantize, scheme_of
from smolquant.schemes.int4_gptq import ErrorFeedback, gptq_grids
from smolquant.schemes.int4_packing import pack_int4
from smolquant.schemes.int4_search import search_grids
from smolquant.schemes.int4_weight_only import Int4WeightOnly, values_of

CALIBRATED = Int4WeightOnly("calibrated")
WINDOWS = torch.randint(3, 320, (8, 64), generator=torch.Generator().manual_seed(1))


def correlated_inputs(tokens: int, columns: int) -> torch.Tensor:
    """Inputs that lie near a subspace, some columns far larger than others, as activations are."""
    generator = torch.Generator().manual_seed(columns)
    mixed = torch.randn(columns // 4, columns, generator=generator)
    inputs = torch.randn(tokens, columns // 4, generator=generator) @ mixed
    inputs += 0.3 * torch.randn(tokens, columns, generator=generator)
    return inputs * torch.exp(torch.randn(columns, generator=generator))


def gaussian(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).bfloat16()


def output_error(weight: torch.Tensor, grid: Any, inputs: torch.Tensor) -> float:
    """Squared error of the outputs, relative to them."""
    difference = values_of(*grid) - weight.float()
    exact = inputs @ weight.float().t()
    return float((inputs @ difference.t()).square().sum() / exact.square().sum())


@pytest.mark.parametrize("group", [32, 64, 128, 256])
def test_outputs_are_far_closer_than_by_search_and_on_other_inputs_too(group: int) -> None:
    weight, inputs = gaussian(96, 512), correlated_inputs(4096, 512)
    seen, other = inputs[:2048], inputs[2048:]
    feedback = ErrorFeedback.of(seen.t() @ seen)
    searched = output_error(weight, search_grids(weight, group), other)
    calibrated = output_error(weight, gptq_grids(weight, feedback, group), other)
    assert calibrated < 0.4 * searched


def test_the_factor_is_that_of_the_inverse_moments() -> None:
    inputs = correlated_inputs(2048, 96)
    moments = inputs.t() @ inputs
    feedback = ErrorFeedback.of(moments)
    order = feedback.order
    assert torch.equal(order.sort().values, torch.arange(96))
    diagonal = moments.diagonal()[order]
    assert torch.equal(diagonal, diagonal.sort(descending=True).values)
    assert torch.equal(feedback.factor, feedback.factor.triu())
    damped = (moments + 0.01 * moments.diagonal().mean() * torch.eye(96))[order][:, order].double()
    inverse = feedback.factor.double().t() @ feedback.factor.double()
    torch.testing.assert_close(inverse @ damped, torch.eye(96).double(), rtol=0, atol=1e-3)


def test_columns_are_rounded_as_in_the_plain_algorithm() -> None:
    """Against the paper's three lines, a column at a time over the whole matrix, in float64."""
    weight, inputs = gaussian(16, 256), correlated_inputs(2048, 256)
    feedback = ErrorFeedback.of(inputs.t() @ inputs)
    levels, scale, zero = gptq_grids(weight, feedback, 64)
    wanted, factor = weight.double(), feedback.factor.double()
    expected = torch.empty_like(wanted)
    for place, column in enumerate(feedback.order.tolist()):
        step, middle = (part[:, column // 64].double() for part in (scale, zero))
        expected[:, column] = ((wanted[:, column] - middle) / step).round().clamp(-8, 7)
        error = wanted[:, column] - (expected[:, column] * step + middle)
        later = feedback.order[place + 1 :]
        wanted[:, later] -= torch.outer(error / factor[place, place], factor[place, place + 1 :])
    # Sums in another order round a few values the other way, each of which others then make good.
    assert (levels.double() == expected).double().mean() > 0.98


def test_grids_are_the_search_s_for_the_inputs_that_were_seen() -> None:
    weight, inputs = gaussian(16, 256), correlated_inputs(2048, 256)
    moments = inputs.t() @ inputs
    found = gptq_grids(weight, ErrorFeedback.of(moments), 64)
    searched, without = search_grids(weight, 64, moments.diagonal()), search_grids(weight, 64)
    for part in (1, 2):
        assert torch.equal(found[part], searched[part])
        assert not torch.equal(found[part], without[part])


def test_inputs_that_tell_columns_apart_in_nothing_leave_the_search_as_it_is() -> None:
    weight = gaussian(16, 128)
    feedback = ErrorFeedback.of(torch.eye(128))
    for found, searched in zip(
        gptq_grids(weight, feedback, 64), search_grids(weight, 64), strict=True
    ):
        assert (found == searched).float().mean() > 0.99


@pytest.mark.parametrize(
    "inputs",
    [
        torch.zeros(16, 128),
        torch.ones(16, 128),
        torch.eye(128)[:3] * 1e4,
        correlated_inputs(16, 128) * torch.eye(128)[5].mul(1e6).add(1),
        correlated_inputs(16, 128) * 1e-18,
    ],
    ids=["none", "equal", "three columns", "one far larger", "tiny"],
)
def test_a_text_that_says_little_leaves_weights_within_the_bound(inputs: torch.Tensor) -> None:
    weight = gaussian(32, 128)
    grid = gptq_grids(weight, ErrorFeedback.of(inputs.t() @ inputs), 64)
    error = (values_of(*grid) - weight.float()).norm() / weight.float().norm()
    assert error <= CALIBRATED.max_relative_error(128, 64)


def test_moments_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        ErrorFeedback.of(torch.full((32, 32), torch.inf))


def test_the_levels_do_not_depend_on_the_number_of_threads() -> None:
    weight, inputs = gaussian(1100, 256), correlated_inputs(512, 256)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(gptq_grids(weight, ErrorFeedback.of(inputs.t() @ inputs), 64))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


class Parts:
    """A small checkpoint, its plan, and both ways to quantize it."""

    def __init__(self, folder: Path, output: Path) -> None:
        self.folder, self.output = folder, output
        self.architecture = Architecture(folder, trust_remote_code=False)
        self.checkpoint = Checkpoint(sorted(folder.glob("*.safetensors")))

    def plan(self, method: Int4Method, skip: Sequence[str] = ()) -> VariantPlan:
        return make_plan(
            self.architecture.converted(self.checkpoint.layout),
            self.architecture,
            [scheme_of("int4_weight_only", int4_method=method)],
            group_size=64,
            dtype="auto",
            max_shard_size=10**9,
            skip=skip,
        )["int4"]

    def calibration(self, plan: VariantPlan, windows: torch.Tensor = WINDOWS) -> Calibration:
        return Calibration(self.architecture, self.checkpoint, plan, windows)

    def write(
        self, name: str, plan: VariantPlan, calibration: Calibration | None = None
    ) -> tuple[Written, dict[str, torch.Tensor]]:
        folder = self.output / name
        folder.mkdir()
        plans, folders = {"int4": plan}, {"int4": folder}

        def quantized(calibrated: Any) -> Written:
            return quantize_checkpoint(
                self.checkpoint, plans, folders, advance=lambda _: None, calibrated=calibrated
            )["int4"]

        if calibration is None:
            written = quantized(None)
        else:
            spool = self.output / "spool"
            with calibrated_weights(calibration, spool, lambda _: None) as weights:
                written = quantized({"int4": weights})
            assert not spool.exists()
        return written, load_file(folder / "model.safetensors")


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[Parts]:
    folder = models.save_with_tokenizer(tmp_path / "source", models.FAMILIES["qwen3"]())
    made = Parts(folder, tmp_path)
    with made.checkpoint:
        yield made


def test_what_is_stored_has_the_planned_layout_and_other_levels(parts: Parts) -> None:
    plan = parts.plan("calibrated")
    searched, by_search = parts.write("search", parts.plan("search"))
    written, tensors = parts.write("calibrated", plan, parts.calibration(plan))

    assert (parts.output / "calibrated/model.safetensors").stat().st_size == plan.size_bytes
    layout = {name: (tensor.dtype, tensor.shape) for name, tensor in by_search.items()}
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()} == layout
    changed = {name for name in tensors if not torch.equal(tensors[name], by_search[name])}
    quantized = {name for name in tensors if name.endswith(("_qdata", "_scale", "_zero_point"))}
    assert {name for name in tensors if name.endswith("_qdata")} < changed <= quantized
    bounds = plan.error_bounds
    for name, record in written.tensors.items():
        if record.relative_error is not None:
            assert searched.tensors[name].relative_error < record.relative_error < bounds[name]  # type: ignore[operator]


def test_the_same_text_gives_the_same_bytes_and_another_text_others(parts: Parts) -> None:
    plan = parts.plan("calibrated")
    first, _ = parts.write("first", plan, parts.calibration(plan))
    second, _ = parts.write("second", plan, parts.calibration(plan))
    third, _ = parts.write("third", plan, parts.calibration(plan, WINDOWS.flip(1)))
    assert first.files == second.files
    assert first.files != third.files


def test_what_is_skipped_or_never_reached_is_stored_as_without_calibration(parts: Parts) -> None:
    skip = [r"layers\.1\.mlp"]
    plan = parts.plan("calibrated", skip=skip)
    _, by_search = parts.write("search", parts.plan("search", skip=skip))
    _, tensors = parts.write("calibrated", plan, parts.calibration(plan))
    inside = {name for name in tensors if ".layers.1.mlp." in name}
    assert inside and not any(name.endswith("qdata") for name in inside)
    assert all(torch.equal(tensors[name], by_search[name]) for name in inside)

    class Nothing:
        def quantize_rows(self, name: str, weight: torch.Tensor, start: int) -> None:
            return None

    folder = parts.output / "unreached"
    folder.mkdir()
    quantize_checkpoint(
        parts.checkpoint,
        {"int4": plan},
        {"int4": folder},
        advance=lambda _: None,
        calibrated={"int4": Nothing()},  # type: ignore[dict-item]
    )
    unreached = load_file(folder / "model.safetensors")
    assert unreached.keys() == by_search.keys()
    for tensor in plan.tensors:
        if isinstance(tensor.decision, Quantize) and tensor.decision.group_size:
            weight = parts.checkpoint.read_rows(tensor.source, 0, tensor.source.rows)
            levels, scale, zero_point = search_grids(weight, tensor.decision.group_size)
            expected = {
                "qdata": pack_int4(levels),
                "scale": scale.t(),
                "zero_point": zero_point.t(),
            }
        else:
            expected = {"": by_search[tensor.name]} if tensor.parts else {}
        for part, values in expected.items():
            assert torch.equal(unreached[tensor.parts[part].name], values)


@pytest.mark.parametrize("family", ["phi3", "gpt_neox", "gemma3", "llama"])
def test_other_families_are_calibrated_whole(family: str, tmp_path: Path) -> None:
    """Fused projections, two inputs a layer that are the same tensor, biases, norms between them."""
    made = Parts(models.save(tmp_path / "source", models.FAMILIES[family]()), tmp_path)
    with made.checkpoint:
        plan = made.plan("calibrated")
        _, by_search = made.write("search", made.plan("search"))
        _, tensors = made.write("calibrated", plan, made.calibration(plan))
    levels = {name for name in tensors if name.endswith("_qdata")}
    assert levels
    assert not any(torch.equal(tensors[name], by_search[name]) for name in levels)


def test_each_expert_is_calibrated_on_its_own_tokens_or_searched_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = models.MIXTURES["qwen3_moe"]()
    config.num_experts = 8
    made = Parts(models.save(tmp_path / "source", config), tmp_path)
    routed: dict[str, set[int]] = {}
    moments = RoutedInputs.moments

    def noted(self: RoutedInputs, name: str, number: int) -> torch.Tensor | None:
        found = moments(self, name, number)
        routed.setdefault(name, set())
        if found is not None:
            assert found.shape == (found.shape[0],) * 2
            routed[name].add(number)
        return found

    monkeypatch.setattr(RoutedInputs, "moments", noted)
    monkeypatch.setattr(calibrate_experts, "LEAST_TOKENS", 128)  # of 512, in two of eight each
    with made.checkpoint:
        plan = made.plan("calibrated")
        searched, by_search = made.write("search", made.plan("search"))
        calibration = made.calibration(plan)
        written, tensors = made.write("calibrated", plan, calibration)
    assert (made.output / "calibrated/model.safetensors").stat().st_size == plan.size_bytes
    assert {name.rpartition(".")[2] for name in routed} == {"gate_up_proj", "down_proj"}
    for name, reached in routed.items():
        levels = name.replace("experts.", "experts._") + "_qdata"
        for number in range(8):
            same = torch.equal(tensors[levels][number], by_search[levels][number])
            assert same == (number not in reached), (name, number)
        error = written.tensors[name].relative_error
        assert error is not None
        assert searched.tensors[name].relative_error < error < plan.error_bounds[name]  # type: ignore[operator]
    n_searched = sum(8 - len(reached) for reached in routed.values())
    assert 0 < n_searched < 8 * len(routed), "some of both"
    assert calibration.searched_experts == n_searched


def test_experts_outputs_are_closer_on_their_inputs_than_by_search() -> None:
    """The loop of transformers, as it takes matrices out of a stack and multiplies with them."""
    generator = torch.Generator().manual_seed(0)
    stack = torch.nn.Parameter(torch.randn(3, 96, 128, generator=generator).bfloat16(), False)
    inputs = correlated_inputs(1024, 128).bfloat16()
    with RoutedInputs({"experts": stack}) as routed:
        for number, tokens in ((0, inputs), (2, inputs[:8])):
            torch.nn.functional.linear(tokens, stack[torch.tensor(number)])
    source = stack.detach().clone()
    decision = Quantize(64)
    planned = PlannedTensor(
        SourceTensor("experts", torch.bfloat16, tuple(stack.shape)),
        *(decision, torch.bfloat16, {}, "", "experts"),
        scheme=CALIBRATED,
    )
    with torch.no_grad():
        _, searched = calibrate_experts.calibrate_stack(CALIBRATED, stack, planned, routed)
    assert searched == 2, "one that nothing reached, and one that eight tokens did"
    assert torch.equal(stack[1:], source[1:])
    by_search = values_of(*search_grids(source[0], 64))
    exact, seen = source[0].float(), inputs.float()

    def off(found: torch.Tensor) -> float:
        return float((seen @ (found.float() - exact).t()).norm())

    assert off(stack[0]) < 0.7 * off(by_search)


def test_modules_with_one_input_share_its_moments(parts: Parts, monkeypatch: Any) -> None:
    factorized: list[torch.Size] = []
    of = ErrorFeedback.of

    def counted(moments: torch.Tensor) -> ErrorFeedback:
        factorized.append(moments.shape)
        return of(moments)

    monkeypatch.setattr(ErrorFeedback, "of", counted)
    plan = parts.plan("calibrated")
    parts.write("calibrated", plan, parts.calibration(plan))
    assert len(factorized) == 2 * 4, "queries, keys and values; outputs; gate and up; down"


@pytest.mark.fault(
    "model",
    "The source computes NaN or infinity on the calibration text",
    "Exit 3 with the layer.",
)
def test_a_source_that_computes_infinity_is_refused(parts: Parts, tmp_path: Path) -> None:
    path = parts.folder / "model.safetensors"
    state = load_file(path)
    state["model.layers.0.input_layernorm.weight"][:] = torch.inf
    save_file(state, path, metadata={"format": "pt"})
    (tmp_path / "again").mkdir()
    broken = Parts(parts.folder, tmp_path / "again")
    with broken.checkpoint, pytest.raises(CheckpointError, match=r"layers\.0 computes NaN"):
        plan = broken.plan("calibrated")
        broken.write("calibrated", plan, broken.calibration(plan))


@pytest.mark.fault(
    "machine",
    "Calibrating takes more memory than there is",
    "Exit 4 with both sizes.",
)
def test_too_little_memory_is_refused_with_the_numbers(parts: Parts, monkeypatch: Any) -> None:
    calibration = parts.calibration(parts.plan("calibrated"))
    calibration.require_memory()
    monkeypatch.setattr(machine, "available_bytes", lambda: 1_000_000)
    with pytest.raises(MachineError, match=r"needs .* of memory, and .* is available"):
        calibration.require_memory()


def test_the_bundled_calibration_text_shares_nothing_with_the_one_that_is_measured_on() -> None:
    measured, calibrated = (
        {
            sentence.strip()
            for document in text.documents
            for sentence in str(document).replace("\n", " ").split(". ")
            if len(sentence) > 40
        }
        for text in (bundled_text(), bundled_calibration_text())
    )
    assert len(calibrated) > 500
    assert not measured & calibrated


@pytest.mark.fault(
    "input",
    "The calibration text is too short",
    "Exit 2 with both numbers.",
)
def test_windows_are_the_texts_beginning_and_a_short_text_is_refused(parts: Parts) -> None:
    tokenizer = load_tokenizer(parts.folder, trust_remote_code=False)
    words = " ".join(f"<{i % 300}>" for i in range(TOKENS + 5_000))
    windows = calibration_windows(EvalText("long", [words]), tokenizer, parts.architecture)
    assert windows.numel() == TOKENS
    assert windows.shape[1] == models.SIZES["max_position_embeddings"]
    with pytest.raises(InputError, match=r"short\.txt has .* at least 2048"):
        short = EvalText("short.txt", [words[:4_000]])
        calibration_windows(short, tokenizer, parts.architecture)


@pytest.mark.fault(
    "checkpoint",
    "There is no tokenizer to calibrate with",
    "Exit 3.",
)
def test_without_a_tokenizer_there_is_no_calibrating(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="tokenizer cannot be loaded"):
        load_tokenizer(tmp_path, trust_remote_code=False)


def test_the_text_is_one_of_the_options_that_decide_the_bytes() -> None:
    one = scheme_of("int4_weight_only", int4_method="calibrated", calibration="a").options(64)
    other = scheme_of("int4_weight_only", int4_method="calibrated", calibration="b").options(64)
    assert one != other
    assert bundled_calibration_text().digest != bundled_text().digest
    assert EvalText("a name", ["text"]).digest == EvalText("another", ["text"]).digest


@pytest.mark.fault(
    "model",
    "The model to calibrate changes its weights while it runs",
    "Exit 3 with the method that runs no model.",
)
def test_a_model_that_changes_its_weights_while_it_runs_is_pointed_to_what_runs_no_model(
    tmp_path: Path,
) -> None:
    config = RwkvConfig(
        vocab_size=320, hidden_size=128, num_hidden_layers=2, attention_hidden_size=128
    )
    source = models.save(tmp_path / "source", config)
    (tmp_path / "found").mkdir()
    parts = Parts(source, tmp_path)
    with parts.checkpoint:
        calibration = parts.calibration(parts.plan("calibrated"))
        with pytest.raises(CannotMeasure, match="RwkvModel changes weights") as refusal:
            calibration.run(tmp_path / "found", lambda n_bytes: None)
    assert refusal.value.hint.startswith("Use --int4-method search")
