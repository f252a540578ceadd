"""The one-state problem: closed forms, gradient descent that reaches them, and updates from sampled
tokens.
"""

import pytest
import torch

from megatron_rl.objective.penalty import FORMS
from tools.study_toy import ARMS, Problem, closed_form, descend, main, sample_updates

PROBLEM = Problem(
    advantages=torch.tensor([-0.1, 0.0, 0.1, 0.05], dtype=torch.float64),
    engine=torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64),
    dual_value=2.0,
)
TWO = torch.tensor([0.25, 0.75], dtype=torch.float64)


@pytest.mark.parametrize(
    ("form", "dual_value", "expected"),
    [
        # nu = (0.3 / 0.25 - 0.1 / 0.75) / (4 + 4 / 3) = 0.2; 0.25 + 0.1 / (2 * 0.25)
        ("squared_difference", 1.0, 0.45),
        # a gain that gives token 2 up: 0.75 - 0.3 / (0.2 * 0.75) < 0
        ("squared_difference", 0.1, 1.0),
        # nu = 0.25 * 0.3 - 0.75 * 0.1 = 0; 0.25 (1 + 0.3 / 2)
        ("squared_ratio", 1.0, 0.2875),
        # moved from token 2 to token 1 a probability is worth 0.4 and costs lambda * (0.25 + 0.75)
        ("differentiable", 0.5, 0.25),
        ("differentiable", 0.39, 1.0),
    ],
)
def test_closed_forms_worked_by_hand(form, dual_value, expected):
    problem = Problem(
        advantages=torch.tensor([0.3, -0.1], dtype=torch.float64),
        engine=TWO,
        dual_value=dual_value,
    )
    policy = closed_form(problem, form)
    assert policy.tolist() == pytest.approx([expected, 1 - expected], abs=1e-12)


def test_the_closed_form_of_the_log_ratio_worked_backwards():
    """p = (0.5, 0.5) is stationary where A - nu = 2 lambda (q / p) log(p / q)."""
    policy = torch.tensor([0.5, 0.5], dtype=torch.float64)
    advantages = 2 * 1.5 * TWO / policy * (policy / TWO).log() + 0.7  # any nu
    problem = Problem(advantages=advantages, engine=TWO, dual_value=1.5)
    assert closed_form(problem, "squared_log_ratio").tolist() == pytest.approx(
        [0.5, 0.5], abs=1e-12
    )
    with pytest.raises(
        ValueError, match=r"expected a larger lambda for squared_log_ratio, got 0\.01"
    ):
        closed_form(
            Problem(advantages=advantages, engine=TWO, dual_value=0.01), "squared_log_ratio"
        )
    with pytest.raises(ValueError, match="expected a differentiable penalty, got 'shaping'"):
        closed_form(problem, "shaping")


# The step size, and its factor from update to update for the penalty with a kink.
STEPS = {
    "differentiable": (0.5, 0.99),
    "squared_difference": (4.0, 1.0),
    "squared_ratio": (0.2, 1.0),
    "squared_log_ratio": (0.2, 1.0),
}


@pytest.mark.parametrize("form", FORMS)
def test_gradient_descent_on_the_packages_penalty_reaches_the_closed_form(form):
    start = PROBLEM.engine.log() + torch.tensor([0.6, -0.5, 0.1, 0.4], dtype=torch.float64)
    step_size, decay = STEPS[form]
    policy = descend(PROBLEM, form, start, num_updates=1500, step_size=step_size, decay=decay)
    expected = closed_form(PROBLEM, form)
    assert expected.sum().item() == pytest.approx(1, abs=1e-12)
    assert (start.softmax(0) - expected).abs().max() > 0.1
    assert (policy - expected).abs().max() < 1e-4


def course_of(label: str, advantages: tuple[float, ...], engine_error: torch.Tensor | None = None):
    [arm] = [arm for arm in ARMS if arm.label == label]
    problem = Problem(
        advantages=torch.tensor(advantages, dtype=torch.float64),
        engine=torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64),
        dual_value=1.0,
    )
    start = problem.engine.log() + torch.tensor([0.5, -0.3, -0.2], dtype=torch.float64)
    course = sample_updates(
        problem,
        arm,
        start,
        num_updates=300,
        num_tokens=256,
        step_size=0.5,
        seed=3,
        engine_error=engine_error,
    )
    return problem, arm, course


def test_shaping_widens_the_gap_to_a_fixed_engine_and_the_penalty_closes_it():
    _, _, nothing = course_of("GRPO, weighted", (0, 0, 0))
    assert nothing.gaps[-1].item() == pytest.approx(nothing.gaps[0].item(), abs=1e-12)
    _, _, shaped = course_of("shaping, as published", (0, 0, 0))
    # Tokens 2 and 3 have p below q, and are lowered further, until they are gone.
    assert shaped.gaps[-1] > 2 * shaped.gaps[0]
    assert shaped.policies[-1, 1:].max() < 0.01
    _, _, penalised = course_of("(p - q)²", (0, 0, 0))
    assert penalised.gaps[-1] < 0.02 * penalised.gaps[0]


@pytest.mark.parametrize("label", ["(p - q)²", "(p / q - 1)²", "log(p / q)²"])
def test_sampled_tokens_lead_to_the_closed_form_of_a_squared_penalty(label):
    problem, arm, course = course_of(label, (-0.1, 0.0, 0.1))
    expected = closed_form(problem, arm.penalty)
    mean = course.policies[-100:].mean(0)
    assert (mean - expected).abs().max() < 0.01


def test_the_penalty_runs_after_an_engine_that_follows_with_an_error():
    error = torch.tensor([0.15, 0.0, -0.15], dtype=torch.float64)
    _, _, course = course_of("|p - q|", (-0.1, 0.0, 0.1), error)
    assert course.policies[-1, 0] > 0.95  # the token that the engine overrates, and the worst one


def test_the_picture(tmp_path, capsys):
    path = tmp_path / "toy.png"
    assert main(["-o", str(path), "--num-updates", "2"]) == 0
    assert path.stat().st_size > 20_000
    assert capsys.readouterr().out.count("closed form") == 8
