from collections import Counter

import pytest

from megatron_rl.data.mixture import Mixture, derive_seed


def test_derive_seed_depends_on_every_part_and_their_order():
    seeds = {
        derive_seed(*parts)
        for parts in [(0,), (1,), (0, 0), (0, 1), (1, 0), (-1,), (2**70,), (0, 0, 0), (5, 7)]
    }
    assert len(seeds) == 9 - 1  # 2**70 is 0 in 64 bits
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert derive_seed(5, 7) == derive_seed(5, 7)
    assert len({derive_seed(3, n) for n in range(10_000)}) > 9_990


def test_a_pinned_value_so_that_old_runs_resume_with_the_same_prompts():
    tasks = [Mixture([2.0, 1.0], 7).task(index) for index in range(12)]
    assert tasks == [
        0,
        0,
        1,
        0,
        0,
        1,
        1,
        0,
        1,
        1,
        1,
        0,
    ]
    assert derive_seed(1, 2, 3) == 1748607912


@pytest.mark.parametrize("weights", [[1.0], [3.0, 1.0], [0.2, 5.0, 1.3], [1.0] * 10])
def test_shares_follow_the_weights(weights):
    mixture = Mixture(weights, 3)
    num = 20_000
    counts = Counter(mixture.task(index) for index in range(num))
    for task, weight in enumerate(weights):
        share = weight / sum(weights)
        assert abs(counts[task] / num - share) < 5 * (share * (1 - share) / num) ** 0.5 + 1e-12


def test_rank_counts_what_came_before_in_any_order_of_asking():
    weights = [3.0, 1.0, 1.0]
    mixture = Mixture(weights, 0)
    num = 10_000  # more than two blocks
    tasks = [mixture.task(index) for index in range(num)]
    seen = Counter()
    expected = []
    for task in tasks:
        expected.append(seen[task])
        seen[task] += 1
    assert [mixture.rank(index) for index in range(num)] == expected
    late = Mixture(weights, 0)
    assert late.rank(num - 1) == expected[-1]
    assert (late.task(17), late.rank(17)) == (tasks[17], expected[17])


def test_seeds_give_other_draws():
    first, second = (
        [Mixture([1.0, 1.0], seed).task(index) for index in range(64)] for seed in (0, 1)
    )
    assert first != second
