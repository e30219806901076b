"""The choice under a budget is the best there is, by comparison with trying everything."""

from __future__ import annotations

import itertools
import random
import time

import pytest

from lowbit.checkpoint.budget import assign, hull
from lowbit.errors import PlanError


def random_items(seed: int) -> list[list[tuple[float, float]]]:
    """Up to 6 items of up to 5 options, with equal costs and equal losses among them."""
    dice = random.Random(seed)
    return [
        [
            (float(dice.randint(1, 30)), dice.choice([10 * dice.random(), float(dice.randint(0, 5))]))
            for _ in range(dice.randint(1, 5))
        ]
        for _ in range(dice.randint(1, 6))
    ]


def model_like(seed: int, blocks: int = 60) -> list[list[tuple[float, float]]]:
    """Blocks of 5 layers in few sizes, in 5 formats, some layers a hundred times as sensitive as others."""
    dice = random.Random(seed)
    items = []
    for weights in (3072 * 3072, 3072 * 12288, 3072 * 12288, 3072 * 9216, 3072 * 256) * blocks:
        worth = 10 ** dice.gauss(0, 0.5)
        formats = ((8.01, 1e-4), (8.03, 7e-4), (4.5, 8e-3), (4.25, 1e-2))
        lossy = [(weights * bits / 8, worth * error * dice.uniform(0.8, 1.2)) for bits, error in formats]
        items.append([(2.0 * weights, 0.0), *lossy])
    return items


def limits(items: list[list[tuple[float, float]]]) -> tuple[float, float]:
    """The least and the greatest cost of any choice."""
    return sum(min(c for c, _ in options) for options in items), sum(max(c for c, _ in options) for options in items)


@pytest.mark.parametrize("seed", range(150))
def test_it_is_the_best_of_all_choices(seed):
    """The loss is that of the best choice found by trying all, within the budget, and the bound is not above it."""
    items = random_items(seed)
    least, most = limits(items)
    budget = random.Random(-seed).uniform(least, most)

    found = assign(items, budget)

    choices = [choice for choice in itertools.product(*items) if sum(cost for cost, _ in choice) <= budget]
    best = min(sum(loss for _, loss in choice) for choice in choices)
    picked = [options[index] for options, index in zip(items, found.chosen, strict=True)]
    assert found.loss == pytest.approx(best, abs=1e-9)
    assert (found.cost, found.loss) == pytest.approx((sum(c for c, _ in picked), sum(e for _, e in picked)))
    assert found.cost <= budget * (1 + 1e-9)
    assert found.bound <= best + 1e-9


def test_loss_falls_as_the_budget_grows():
    """More budget never gives more loss: from the least possible cost to the greatest, over 200 budgets."""
    items = model_like(0, blocks=6)
    least, most = limits(items)

    losses = [assign(items, least + (most - least) * i / 200).loss for i in range(201)]

    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == 0


@pytest.mark.parametrize("share", [0.28, 0.35, 0.6])
def test_a_large_model_is_near_the_bound_in_no_time(share):
    """300 layers: within one step of the bound (here a thousandth of the loss), the budget used up, in under 2 s."""
    items = model_like(1)
    budget = share * limits(items)[1]

    began = time.perf_counter()
    found = assign(items, budget)

    assert time.perf_counter() - began < 2
    assert found.bound <= found.loss <= found.bound * 1.002
    assert budget * 0.999 < found.cost <= budget * (1 + 1e-9)


def test_what_does_not_fit_does_not_stop_the_rest():
    """A step too large for what is left is passed over, and smaller ones after it are taken."""
    items = [[(1.0, 100.0), (60.0, 0.0)], [(1.0, 1.0), (5.0, 0.0)], [(1.0, 1.0), (6.0, 0.0)]]

    assert assign(items, 20).chosen == (0, 1, 1)
    assert assign(items, 62).chosen == (1, 0, 0)
    assert assign(items, 66).chosen == (1, 1, 0)


def test_an_option_off_the_hull_is_taken_where_it_alone_fits():
    """What the hull's corners leave of the budget is spent on the option between them."""
    items = [[(0.0, 10.0), (6.0, 4.5), (10.0, 0.0)]]

    assert hull(items[0]) == [0, 2]
    assert assign(items, 8).chosen == (1,)


def test_the_hull_has_falling_gains():
    """Corners come by rising cost and falling loss, and each step saves less for its cost than the one before."""
    options = [(4.0, 1.0), (1.0, 8.0), (2.0, 3.0), (3.0, 2.9), (2.0, 5.0), (9.0, 2.0)]

    assert hull(options) == [1, 2, 0]


def test_a_budget_below_the_least_cost_is_refused():
    """There is no choice, which is said with both numbers."""
    with pytest.raises(PlanError, match="the cheapest choice costs 5, more than 4"):
        assign([[(2.0, 1.0)], [(3.0, 1.0), (4.0, 0.0)]], 4)


def test_costs_may_be_errors():
    """The roles can be exchanged: the fewest bytes among all choices with little enough error."""
    items = [[(0.5, 1.0), (0.1, 2.0), (0.0, 9.0)], [(0.4, 1.0), (0.2, 2.0), (0.0, 9.0)]]

    found = assign(items, 0.5)

    assert found.chosen == (1, 0)
    assert found.loss == 3
