"""Taking turns: who is visited when, how often, and what the ratios are of."""

import pytest

from benchmarks.cpu_timing import Contender, alternate, expected, quartiles, ratio


class Clock:
    """Seconds that pass only when a contender says so."""

    def __init__(self):
        self.now = 0.0
        self.calls = []

    def __call__(self):
        """The time."""
        return self.now

    def contender(self, name, seconds, **options):
        """Something whose calls take so long each."""

        def call(index):
            self.calls.append((name, index))
            self.now += seconds

        return Contender(name, call, **options)


def test_all_take_part_in_every_round_in_another_order():
    """A round visits each contender once; the next round begins with another one."""
    clock = Clock()
    contenders = [clock.contender(name, 1.0) for name in "abc"]

    alternate(contenders, rounds=3, budget=1e9, clock=clock)

    visits = [name for name, _ in clock.calls[3:]]  # after one call each, which is not counted
    assert visits == [*"abc", *"bca", *"cab"]
    assert [one.seconds for one in contenders] == [[1.0] * 3] * 3


def test_copies_are_used_one_after_the_other():
    """No two calls that follow each other use the same copy, warm-up and visits alike."""
    clock = Clock()
    contender = clock.contender("a", 0.004)

    alternate([contender], rounds=2, budget=1e9, clock=clock)

    assert [index for _, index in clock.calls] == list(range(len(clock.calls)))
    assert len(clock.calls) == 3 + 2 * (1 + 5)  # 20 ms are five calls, after one that is not counted
    assert contender.median == pytest.approx(0.004)


def test_a_slow_one_stops_when_it_has_its_least_rounds():
    """Beyond its share of the time it takes part no longer; the others go on, and its rounds hold None."""
    clock = Clock()
    slow, quick = clock.contender("slow", 5.0, least=2), clock.contender("quick", 0.5, least=2)

    alternate([slow, quick], rounds=6, budget=10.0, clock=clock)

    assert slow.seconds == [5.0, 5.0, None, None, None, None]
    assert quick.seconds == [0.5] * 6
    assert ratio(quick, slow) == {"ratio": 10.0, "quartiles": [10.0, 10.0], "rounds": 2}


def test_a_known_first_call_is_not_repeated():
    """An estimate that is there, of a slow call, saves the warm-up."""
    clock = Clock()
    contender = clock.contender("a", 3.0, estimate=3.0)

    alternate([contender], rounds=1, budget=1e9, clock=clock)

    assert clock.calls == [("a", 0)]


def test_the_ratio_is_of_medians_and_its_spread_of_rounds():
    """One round that was disturbed for both moves neither; the quartiles are those of the ratios of each round."""
    one, other = Contender("a", print), Contender("b", print)
    one.seconds, other.seconds = [1.0, 1.0, 10.0, 2.0, None], [2.0, 3.0, 20.0, 4.0, 9.0]

    found = ratio(one, other)

    assert found == {"ratio": 3.5 / 1.5, "quartiles": [2.0, 2.25], "rounds": 4}
    assert quartiles([4.0]) == [4.0, 4.0]


def test_the_next_size_is_foreseen_from_the_last_two():
    """On a line through the last two; one known size says the same for every other; nothing known, nothing."""
    assert expected([(1, 0.5), (8, 1.0), (64, 8.0)], 512) == 64.0
    assert (expected([(1, 0.5)], 64), expected([], 8)) == (0.5, 0.0)
