"""Models are timed in turns, for a bounded time, and too few rounds make no number."""

import time

import pytest

import models
from smolquant.evaluate import rounds
from smolquant.evaluate.bytes_read import bytes_read
from smolquant.evaluate.rounds import Clock, Ratio, Runner, Turn, choose_turn, in_turns
from smolquant.evaluate.timing import SOURCE, Trial, forked, plan_sessions


class Machine:
    """Time that passes only where a model computes."""

    def __init__(self) -> None:
        self.now = 0.0
        self.done: list[str] = []


class Slow(Runner):
    """A model of given slowness; no tensor is needed to see what it is asked to do."""

    def __init__(self, machine: Machine, name: str, token: float, at_once: float) -> None:
        self.machine, self.name, self.token, self.at_once = machine, name, token, at_once
        self.longest = 2048

    def decode(self, tokens: int) -> float:
        self.machine.done.append(self.name)
        return self._takes(tokens * self.token)

    def prefill(self, tokens: int) -> float:
        return self._takes(tokens * self.at_once)

    def _takes(self, seconds: float) -> float:
        self.machine.now += seconds
        return seconds


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    one = Machine()
    monkeypatch.setattr(time, "monotonic", lambda: one.now)
    return one


def pair(machine: Machine, token: float, at_once: float) -> dict[str, Runner]:
    return {
        "source": Slow(machine, "source", token, at_once),
        "int8": Slow(machine, "int8", token / 2, at_once),
    }


def timed(machine: Machine, token: float, at_once: float) -> tuple[Turn, int, float]:
    """What a round held, how many there were, and how long all of it took."""
    runners = pair(machine, token, at_once)
    clock = Clock(8, 50)
    turn = choose_turn(list(runners.values()), clock)
    times = in_turns(runners, turn, clock)
    assert len(times["source"].decode) == len(times["int8"].decode)
    return turn, len(times["source"].decode), machine.now


def test_a_fast_machine_does_as_much_as_is_worth_its_time(machine: Machine) -> None:
    turn, count, seconds = timed(machine, 0.001, 0.0001)
    assert turn == Turn(rounds.MOST_DECODED, rounds.PROMPTS[-1])
    assert count == rounds.MOST_ROUNDS and seconds < 8


def test_a_slower_one_does_less_in_a_round_and_takes_as_long(machine: Machine) -> None:
    turn, count, seconds = timed(machine, 0.04, 0.004)
    assert 1 <= turn.decoded < rounds.MOST_DECODED
    assert rounds.PROMPTS[0] <= turn.prompt < rounds.PROMPTS[-1]
    assert rounds.LEAST_ROUNDS <= count <= rounds.MOST_ROUNDS and seconds < 12


def test_a_slow_one_takes_the_fewest_rounds_of_single_tokens_and_no_prompt(
    machine: Machine,
) -> None:
    turn, count, seconds = timed(machine, 3.0, 1.0)
    assert turn == Turn(1, 0)
    assert count == rounds.LEAST_ROUNDS and 8 < seconds < 50


def test_one_that_hits_the_bound_has_too_few_rounds_for_a_number(machine: Machine) -> None:
    _, count, seconds = timed(machine, 9.0, 5.0)
    assert count < rounds.LEAST_ROUNDS
    assert seconds < 50 + 9
    assert rounds.speed_of([9.0] * count) is None
    assert rounds.ratio_of([9.0] * count, [4.5] * count) is None


def test_models_take_turns_and_none_is_always_the_first(machine: Machine) -> None:
    in_turns(pair(machine, 0.01, 0.01), Turn(1, 0), Clock(8, 50))
    assert machine.done[:8] == ["source", "int8", "int8", "source"] * 2


@pytest.mark.parametrize("token", [0.01, 0.1, 2.0])
def test_the_seconds_left_are_those_that_it_then_takes(machine: Machine, token: float) -> None:
    """Whether the time, the most rounds or the least ones end it; of a first round nobody knows."""
    told: list[tuple[float, float]] = []
    turn = Turn(4, 0)
    in_turns(
        pair(machine, token, 0.01),
        turn,
        Clock(8, 500),
        lambda _, left: told.append((machine.now, left)),
    )
    for at, left in told[1:]:
        assert left == pytest.approx(machine.now - at, abs=turn.decoded * token * 1.5 + 0.01)


def test_a_ratio_is_of_the_same_rounds_so_that_a_disturbance_of_both_is_none() -> None:
    quiet, disturbed = [1.0, 1.0, 1.0, 1.0, 1.0], [1.0, 9.0, 1.0, 5.0, 2.0]
    source = [2 * one for one in disturbed]
    assert rounds.ratio_of(source, disturbed) == Ratio(2.0, 2.0, 2.0)
    assert rounds.ratio_of([1.0, 1.1, 1.2, 1.3, 1.4], quiet) == Ratio(1.2, 1.1, 1.3)
    assert rounds.speed_of(disturbed) == 0.5


def test_a_model_that_sees_few_tokens_is_given_no_more(machine: Machine) -> None:
    runner = Slow(machine, "source", 0.001, 0.0001)
    runner.longest = 36
    assert choose_turn([runner], Clock(8, 50)) == Turn(36 - rounds.SHORT_PROMPT, 32)


def test_a_model_decodes_and_takes_a_prompt_in_some_time() -> None:
    runner = Runner(models.build(models.llama(1)))
    assert runner.decode(3) > 0 and runner.prefill(32) > 0
    assert runner.predict(32).shape == (1, 320)


def test_the_weights_read_are_the_layers_and_the_head_and_no_table_of_rows() -> None:
    model = models.build(models.llama(1))
    head, table = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    everything = sum(one.nbytes for one in model.parameters())
    expected = everything if head is table else everything - table.nbytes
    assert bytes_read(model) == expected


def trial(cost: int, room: int = 100) -> Trial:
    return Trial(peak=cost + 5, cost=cost, room=room)


def test_what_fits_together_is_timed_together() -> None:
    trials = {SOURCE: trial(40), "int8": trial(20), "int4": trial(10)}
    assert plan_sessions(trials) == [[SOURCE, "int8", "int4"]]
    assert plan_sessions({}) == []


def test_else_each_variant_beside_the_source_and_what_does_not_fit_there_alone() -> None:
    trials = {SOURCE: trial(60), "int8": trial(40), "int4": trial(20)}
    assert plan_sessions(trials) == [[SOURCE, "int4"], ["int8"]]
    assert plan_sessions({SOURCE: trial(90), "int8": trial(40)}) == [[SOURCE], ["int8"]]
    assert plan_sessions({"int8": trial(60), "int4": trial(50)}) == [["int8"], ["int4"]]


def test_a_fork_that_fails_or_is_late_takes_nothing_down() -> None:
    def fail() -> int:
        raise MemoryError

    def sleep() -> int:
        time.sleep(60)
        return 1

    assert forked(lambda: 7, 10) == 7
    assert forked(fail, 10) is None
    started = time.monotonic()
    assert forked(sleep, 0.1) is None
    assert time.monotonic() - started < 10
