"""Sparing: costly ones are found among many and left out, whatever stands beside them."""

import pytest
import torch

from sparc3.spare import affordable


def run(costs, count, budget=1.0, order=None):
    costs, asked = torch.tensor(costs), []

    def cost(removed):
        asked.append(len(removed))
        assert len(set(removed.tolist())) == len(removed)
        return costs[removed].sum().item()

    order = torch.arange(len(costs)) if order is None else order
    return affordable(order, count, cost, budget).tolist(), len(asked)


def test_what_costs_nothing_goes_in_the_order_that_is_given():
    assert run([0.0] * 40, 8, order=torch.arange(39, -1, -1))[0] == list(range(39, 31, -1))


@pytest.mark.parametrize("costly", [{0}, {3, 4}, {0, 7, 8, 20}, {15}])
def test_costly_ones_are_spared_and_others_take_their_place(costly):
    costs = [5.0 if index in costly else 0.01 for index in range(64)]
    found, asked = run(costs, 16)
    assert found == [index for index in range(64) if index not in costly][:16]
    # One run for each quarter, and twice log2 of a quarter for each that is spared.
    assert asked <= 5 + len(costly) * 5 + 4


def test_where_nothing_can_be_afforded_nothing_goes():
    assert run([9.0] * 30, 4) == ([], 4 * 4)
    assert run([float("nan")] * 30, 4)[0] == []


def test_groups_of_many_are_not_halved_down_to_one():
    costs = [0.0] * 4000
    costs[70] = 9.0
    found, asked = run(costs, 640)
    assert len(found) == 640
    # 640 / 64 = 10: the costly one goes with at most 9 others.
    assert 70 not in found
    assert len({*range(650)} - {*found}) <= 20
    assert asked < 24


def test_what_helps_pays_for_nothing_else():
    found, _ = run([-3.0, 2.0, 0.0, 0.0], 4)
    assert found == [0, 2, 3]
