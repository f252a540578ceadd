"""The signs that the constraint has no effect, with numbers worked by hand."""

import json

import pytest

from megatron_rl.errors import ConfigError
from megatron_rl.objective.constraint import DualVariable
from megatron_rl.objective.dual_watch import DualWatch


def watched(num_steps: int = 4, **settings: float) -> DualVariable:
    fields = {"value": 0.5, "tolerance": 0.02, "maximum": 10.0} | settings
    return DualVariable(**fields, watch=DualWatch(num_steps))


def test_lambda_at_its_bound_is_told_in_the_nth_step_and_the_2nth():
    dual = watched(maximum=0.51)
    # The first step reaches the bound: 0.5 + (0.05 - 0.02) is cut to 0.51.
    lines = [(dual.update(0.05), dual.warning())[1] for _ in range(9)]
    assert [line is not None for line in lines] == [False] * 3 + [True] + [False] * 3 + [
        True,
        False,
    ]
    assert lines[3].startswith(
        "warning: lambda has been at its upper bound of 0.51 for 4 steps, and the gap is still "
        "above the tolerance of 0.02: "
    )
    assert "for 8 steps" in lines[7] and "\n" not in lines[3]
    assert "objective.constraint.maximum" in lines[3] and "constraint.tolerance above" in lines[3]
    assert dual.watch.metrics() == {
        "constraint/num_steps_at_maximum": 9.0,
        "constraint/num_steps_growing": 0.0,
        "constraint/is_ineffective": 1.0,
    }
    dual.update(0.0)  # below the tolerance: lambda leaves the bound
    assert dual.watch.metrics()["constraint/num_steps_at_maximum"] == 0
    assert not dual.watch.is_at_maximum


def test_growth_with_a_gap_that_does_not_fall():
    dual = watched()
    for gap in (0.03, 0.04, 0.035):
        dual.update(gap)
        assert dual.warning() is None and not dual.watch.is_without_effect
    dual.update(0.035)  # halves: means 0.035 and 0.035
    assert dual.watch.metrics() == {
        "constraint/num_steps_at_maximum": 0.0,
        "constraint/num_steps_growing": 4.0,
        "constraint/is_ineffective": 1.0,
    }
    # 0.5 + 0.01 + 0.02 + 0.015 + 0.015
    assert dual.warning().startswith(
        "warning: lambda has grown in each of the last 4 steps, lately from 0.5 to 0.56, and the "
        "gap has not fallen (means of 0.035 and 0.035, tolerance 0.02): "
    )
    dual.update(0.035)
    assert dual.warning() is None and dual.watch.is_without_effect
    dual.update(0.02)  # at the tolerance: lambda does not grow
    assert dual.watch.num_growing == 0 and not dual.watch.is_without_effect


@pytest.mark.parametrize(
    ("gaps", "is_without_effect"),
    [
        # Halves (0.06, 0.04) and 0.0301: a fall of 0.0199; variances 2e-4 and 0, so twice the
        # standard error is 2 * sqrt(2e-4 / 2) = 0.02.
        ((0.06, 0.04, 0.0301, 0.0301), True),
        ((0.06, 0.04, 0.0299, 0.0299), False),
        ((0.06, 0.05, 0.04, 0.03), False),  # a fall of 0.02; 2 * sqrt(1e-4 / 2) = 0.0141
        ((0.04, 0.04, 0.05, 0.05), True),  # it rises
    ],
)
def test_a_fall_of_two_standard_errors_is_an_effect(gaps, is_without_effect):
    watch = DualWatch(4)
    for number, gap in enumerate(gaps):
        watch.add(float(number), number + 1.0, gap=gap, maximum=10.0)
    assert watch.is_without_effect == is_without_effect
    assert (watch.warning(4.0, 0.02) is not None) == is_without_effect


@pytest.mark.parametrize("num_before", range(8))
@pytest.mark.parametrize("maximum", [0.53, 10.0])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(num_before, maximum):
    gaps = (0.03, 0.04, 0.035, 0.035, 0.033, 0.036, 0.04, 0.03)
    whole, first, resumed = (watched(maximum=maximum) for _ in range(3))
    expected = [(whole.update(gap), whole.warning(), whole.watch.metrics()) for gap in gaps]
    for gap in gaps[:num_before]:
        first.update(gap)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    rest = gaps[num_before:]
    got = [(resumed.update(gap), resumed.warning(), resumed.watch.metrics()) for gap in rest]
    assert got == expected[num_before:]
    assert sum(line is not None for _, line, _ in expected) >= 1


def test_a_resumed_run_with_another_number_of_steps_or_none_before():
    first = watched(num_steps=4)
    for _ in range(6):
        first.update(0.03)
    state = first.state_dict()
    longer, shorter, new = watched(num_steps=6), watched(num_steps=4), watched(num_steps=4)
    longer.load_state_dict(state)
    assert longer.watch.num_growing == 4  # the steps whose gaps are known
    shorter.load_state_dict(state)
    assert shorter.watch.num_growing == 6 and shorter.watch.is_without_effect
    new.load_state_dict({"value": 0.5})
    assert new.watch.num_growing == new.watch.num_at_maximum == 0


def test_too_few_steps_are_refused():
    with pytest.raises(ConfigError, match=r"warn_after_steps: expected 0 \(never\) or at least 4"):
        DualWatch(3)
    assert DualVariable(0.1).warning() is None
