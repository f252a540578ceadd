"""Solves the one-state problem of DCMDP's theory, and draws where shaping and the penalties go.

    python -m tools.study_toy [-o docs/toy.png]

The problem (arXiv 2606.08779, App. B): one token of V, with advantages A, an engine's distribution
q and a learner's p. The maximum over p of `<p, A> - lambda * Omega(p, q)` has these solutions, in
which nu makes the sum 1, and negative values are 0:

    Omega_diff  = sum_a q (p - q)^2:     p = q + (A - nu) / (2 lambda q)
    Omega_ratio = sum_a (p - q)^2 / q:   p = q (1 + (A - nu) / (2 lambda))
    Omega_log   = sum_a q log(p / q)^2:  p = q exp(-W((nu - A) / (2 lambda))), W Lambert's function
    sum_a q |p - q| (ours):              p = q, less the tokens that are worth being given up

The picture has updates from sampled tokens, with the package's own loss and penalties. The engine
is fixed (old rollouts), without and with differences of advantage; or it follows: its logits are
the learner's plus a fixed error (rounding). Printed are the policies and gaps at the end.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import mpmath
import torch

matplotlib.use("Agg")  # no display is needed
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from megatron_rl.objective.constraint import shape_advantages
from megatron_rl.objective.discrepancy import discrepancy
from megatron_rl.objective.importance import importance_weights
from megatron_rl.objective.inputs import LossInputs
from megatron_rl.objective.penalty import differentiable_penalty
from megatron_rl.objective.policy.ppo_clip import surrogate


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Example: two tokens: `Problem(advantages=[0.1, -0.1], engine=[0.4, 0.6], dual_value=1.0)`."""

    advantages: torch.Tensor  # [V] float64
    engine: torch.Tensor  # [V] float64, q, each above 0
    dual_value: float  # lambda, above 0


def closed_form(problem: Problem, form: str) -> torch.Tensor:
    """The policy with the largest `<p, A> - lambda * Omega`.

    Args:
        form: a differentiable penalty (objective/penalty.py).

    Returns:
        [V] float64.

    Raises:
        ValueError: lambda is too small for squared_log_ratio, whose solution is a stationary point
            only up to p = e q; or the form is unknown.
    """
    advantages, engine, scale = problem.advantages, problem.engine, 2 * problem.dual_value
    lowest, highest = float(advantages.min()), float(advantages.max())
    if form == "differentiable":
        # A token gains A - lambda q for what is moved to it, and costs A + lambda q if it is given.
        worth = advantages - problem.dual_value * engine
        is_kept = advantages + problem.dual_value * engine >= worth.max()
        policy = torch.where(is_kept, engine, 0.0)
        policy[worth.argmax()] += 1 - policy.sum()
        return policy
    if form == "squared_difference":
        return _normalised(
            lambda nu: engine + (advantages - nu) / (scale * engine), lowest, highest
        )
    if form == "squared_ratio":
        return _normalised(lambda nu: engine * (1 + (advantages - nu) / scale), lowest, highest)
    if form != "squared_log_ratio":
        raise ValueError(f"closed_form: expected a differentiable penalty, got {form!r}")

    def policy_of(nu: float) -> torch.Tensor:
        branch = [
            float(mpmath.lambertw(each).real) for each in ((nu - advantages) / scale).tolist()
        ]
        return engine * torch.exp(-torch.tensor(branch, dtype=torch.float64))

    lowest = max(lowest, highest - scale / math.e)  # below it, W of the best token is not real
    if float(policy_of(lowest).sum()) < 1:
        raise ValueError(
            f"closed_form: expected a larger lambda for squared_log_ratio, got {scale / 2:g}"
        )
    return _normalised(policy_of, lowest, highest)


def _normalised(
    policy_of: Callable[[float], torch.Tensor], lowest: float, highest: float
) -> torch.Tensor:
    """The policy of the nu for which it sums to 1, by bisection; its sum falls with nu."""
    for _ in range(100):
        nu = (lowest + highest) / 2
        policy = policy_of(nu).clamp(min=0.0)
        lowest, highest = (nu, highest) if float(policy.sum()) > 1 else (lowest, nu)
    return policy


def descend(
    problem: Problem,
    form: str,
    start: torch.Tensor,
    *,
    num_updates: int,
    step_size: float,
    decay: float = 1.0,
) -> torch.Tensor:
    """Gradient ascent on `<p, A> - lambda * Omega` over logits, with the package's penalty, whose
    expectation over the engine's tokens is summed exactly.

    Args:
        start: [V] float64, logits. decay: factor of the step size from update to update, below 1
            for the penalty that has a kink.

    Returns:
        [V] float64, the policy at the end.
    """
    logits, everything = start.clone(), torch.ones_like(start, dtype=torch.bool)
    for _ in range(num_updates):
        logits.requires_grad_()
        logprobs = logits.log_softmax(0)
        penalty = differentiable_penalty(logprobs, problem.engine.log(), everything, form=form)
        value = (logprobs.exp() * problem.advantages).sum()
        value = value - problem.dual_value * (problem.engine * penalty).sum()
        (gradient,) = torch.autograd.grad(value, logits)
        logits = logits.detach() + step_size * gradient
        step_size *= decay
    return logits.softmax(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """What updates from sampled tokens do with the gap.

    Example: DC-GRPO as published: `Arm(label="shaping", penalty="shaping", is_weighted=False,
    color="C3")`.
    """

    label: str
    penalty: str  # none, shaping, or a form of objective/penalty.py
    is_weighted: bool  # whether the surrogate has the importance weight p / q
    color: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """The course of one run. Example: `Course(policies=[[0.5, 0.5]], gaps=[0.02])`."""

    policies: torch.Tensor  # [N, V] float64, before each update and at the end
    gaps: torch.Tensor  # [N] float64, E_q |p - q|


def sample_updates(
    problem: Problem,
    arm: Arm,
    start: torch.Tensor,
    *,
    num_updates: int,
    num_tokens: int,
    step_size: float,
    seed: int,
    engine_error: torch.Tensor | None = None,
) -> Course:
    """Updates from tokens that the engine samples: one mini-batch, so that the ratio is 1.

    Args:
        start: [V] float64, the learner's logits. num_tokens: of an update.
        engine_error: [V] float64; if given, the engine's logits are the learner's plus this, in
            every update; otherwise its distribution remains that of the problem.
    """
    generator = torch.Generator().manual_seed(seed)
    logits, policies, gaps = start.clone(), [], []
    for update in range(num_updates + 1):
        policy, engine = logits.softmax(0), problem.engine
        if engine_error is not None:
            engine = (logits + engine_error).softmax(0)
        policies.append(policy)
        gaps.append((engine * (policy - engine).abs()).sum())
        if update == num_updates:
            break
        tokens = torch.multinomial(engine, num_tokens, replacement=True, generator=generator)
        logits.requires_grad_()
        loss = _loss(problem, arm, logits.log_softmax(0)[tokens], engine.log()[tokens], tokens)
        (gradient,) = torch.autograd.grad(loss, logits)
        logits = logits.detach() - step_size * gradient
    return Course(policies=torch.stack(policies), gaps=torch.stack(gaps))


def _loss(
    problem: Problem,
    arm: Arm,
    policy_logprobs: torch.Tensor,
    rollout_logprobs: torch.Tensor,
    tokens: torch.Tensor,
) -> torch.Tensor:
    """The loss of sampled tokens [N], made of the functions of objective/."""
    everything, ids = torch.ones_like(tokens, dtype=torch.bool), torch.zeros_like(tokens)
    recomputed_logprobs = policy_logprobs.detach()
    advantages = problem.advantages[tokens]
    if arm.penalty == "shaping":
        gap = discrepancy(recomputed_logprobs, rollout_logprobs)
        advantages = shape_advantages(advantages, gap, problem.dual_value)
    inputs = LossInputs.of(
        policy_logprobs=policy_logprobs,
        old_logprobs=recomputed_logprobs,
        advantages=advantages,
        mask=everything,
        sequence_ids=ids,
        clip_low=0.2,
        clip_high=0.24,
        ratio_cap=0.0,
        dual_clip=0.0,
    )
    values = surrogate(inputs).values
    if arm.is_weighted:
        weights, _ = importance_weights(
            recomputed_logprobs,
            rollout_logprobs,
            everything,
            ids,
            level="token",
            mode="truncate",
            lower=0.0,
            upper=math.inf,
        )
        values = values * weights
    if arm.penalty not in ("none", "shaping"):
        values = values - problem.dual_value * differentiable_penalty(
            policy_logprobs, rollout_logprobs, everything, form=arm.penalty
        )
    return -values.mean()


ARMS = (
    Arm(label="GRPO, weighted", penalty="none", is_weighted=True, color="0.6"),
    Arm(label="shaping, as published", penalty="shaping", is_weighted=False, color="C3"),
    Arm(label="shaping, weighted", penalty="shaping", is_weighted=True, color="C1"),
    Arm(label="(p - q)²", penalty="squared_difference", is_weighted=True, color="C0"),
    Arm(label="(p / q - 1)²", penalty="squared_ratio", is_weighted=True, color="C2"),
    Arm(label="log(p / q)²", penalty="squared_log_ratio", is_weighted=True, color="C4"),
    Arm(label="|p - q|", penalty="differentiable", is_weighted=True, color="C9"),
)
ENGINE = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
DISPLACEMENT = torch.tensor([0.5, -0.3, -0.2], dtype=torch.float64)  # of the learner's first logits
ENGINE_ERROR = torch.tensor([0.15, 0.0, -0.15], dtype=torch.float64)  # of an engine that follows
# Title of the panel, advantages, and whether the engine follows.
CASES = (
    ("Engine fixed, all advantages 0", (0.0, 0.0, 0.0), False),
    ("Engine fixed", (-0.1, 0.0, 0.1), False),
    ("Engine follows, with a fixed error of its logits", (-0.1, 0.0, 0.1), True),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, run every arm in every case and draw; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/toy.png"))
    parser.add_argument("--num-updates", type=int, default=1000)
    options = parser.parse_args(arguments)
    figure, grid = pyplot.subplots(2, 2, figsize=(11, 9.4))
    draw_forces(grid[0, 1])
    for axes, (title, advantages, follows) in zip(
        (grid[0, 0], grid[1, 0], grid[1, 1]), CASES, strict=True
    ):
        problem = Problem(
            advantages=torch.tensor(advantages, dtype=torch.float64), engine=ENGINE, dual_value=1.0
        )
        print(title)
        draw_triangle(axes, title, problem, follows)
        for arm in ARMS:
            course = sample_updates(
                problem,
                arm,
                ENGINE.log() + DISPLACEMENT,
                num_updates=options.num_updates,
                num_tokens=512,
                step_size=0.2,
                seed=0,
                engine_error=ENGINE_ERROR if follows else None,
            )
            has_solution = not follows and arm.penalty not in ("none", "shaping")
            solution = closed_form(problem, arm.penalty) if has_solution else None
            draw_course(axes, arm, course, solution)
            print(line_of(arm, course, solution))
    legend = [Line2D([], [], color=arm.color, label=arm.label) for arm in ARMS]
    for marker, label, size in (
        ("s", "first policy p", 6),
        ("X", "engine's policy q", 8),
        ("o", "last policy", 6),
        ("*", "closed form", 12),
    ):
        style = {"color": "black", "linestyle": "", "marker": marker, "markersize": size}
        legend.append(Line2D([], [], label=label, **style))
    figure.legend(handles=legend, loc="lower center", ncols=4, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    figure.savefig(options.output, dpi=120)
    pyplot.close(figure)
    print(options.output)
    return 0


def line_of(arm: Arm, course: Course, solution: torch.Tensor | None) -> str:
    """What is printed of a run: its last policy and gap, and the closed form if there is one."""
    policy = " ".join(f"{each:.3f}" for each in course.policies[-1].tolist())
    line = f"  {arm.label:22} p {policy}  gap {course.gaps[0]:.3f} -> {course.gaps[-1]:.3f}"
    if solution is None:
        return line
    return line + "  closed form " + " ".join(f"{each:.3f}" for each in solution.tolist())


def draw_triangle(axes: Axes, title: str, problem: Problem, follows: bool) -> None:
    """Draw the triangle whose corners are the three tokens, the first policy, and the engine's."""
    axes.plot(*flat(torch.eye(3, dtype=torch.float64)[[0, 1, 2, 0]]), color="0.75", linewidth=1)
    start = (ENGINE.log() + DISPLACEMENT).softmax(0)
    axes.plot(*flat(start[None]), "s", color="black", markersize=7, zorder=4)
    if not follows:
        axes.plot(*flat(ENGINE[None]), "X", color="black", markersize=7, zorder=7)
    places = [(0, -0.04, "top"), (1, -0.04, "top"), (0.5, 0.9, "bottom")]
    for token, (x, y, alignment) in enumerate(places):
        label = f"token {token + 1}\nA = {problem.advantages[token]:g}"
        axes.text(x, y, label, ha="center", va=alignment, fontsize=9)
    axes.set_xlim(-0.08, 1.08)
    axes.set_ylim(-0.14, 1.02)
    axes.set_aspect("equal")
    axes.set_axis_off()
    axes.set_title(title, fontsize=11)


def draw_course(axes: Axes, arm: Arm, course: Course, solution: torch.Tensor | None) -> None:
    """Draw the path of one run, its last policy, and the closed form if there is one."""
    axes.plot(*flat(course.policies), color=arm.color, linewidth=1.6)
    if solution is not None:
        style = {"markersize": 15, "markeredgecolor": "black", "markeredgewidth": 0.6}
        axes.plot(*flat(solution[None]), "*", color=arm.color, zorder=5, **style)
    axes.plot(*flat(course.policies[-1:]), "o", color=arm.color, markersize=6, zorder=6)


def flat(policies: torch.Tensor) -> tuple[list[float], list[float]]:
    """Coordinates in the triangle of policies [N, 3]: tokens 1 and 2 at the base, 3 at the top."""
    x = policies[:, 1] + policies[:, 2] / 2
    return x.tolist(), (policies[:, 2] * math.sqrt(3) / 2).tolist()


def draw_forces(axes: Axes) -> None:
    """Draw what shaping and two penalties add to the coefficient of a sampled token's grad log p,
    for lambda = 1.
    """
    engine = 0.3
    policy = torch.linspace(0.001, 0.8, 400, dtype=torch.float64)
    gap = policy - engine
    forces = {
        "shaping": -gap.abs(),
        "squared_difference": -2 * gap * policy,
        "differentiable": -gap.sign() * policy,
    }
    colors = {arm.penalty: arm.color for arm in reversed(ARMS)}
    for penalty, force in forces.items():
        axes.plot(gap, force, color=colors[penalty], linewidth=2)
    for line in (axes.axhline, axes.axvline):
        line(0, color="0.5", linewidth=0.8)
    axes.text(
        -0.3, 0.68, "p_train below p_inf:\nthe penalties raise p,\nshaping lowers it", va="top"
    )
    axes.text(0.02, 0.68, "p_train above p_inf:\nall of them lower p", va="top")
    axes.set_ylim(-0.85, 0.7)
    axes.set_xlabel(f"p_train - p_inf of a sampled token, with p_inf = {engine}")
    axes.set_ylabel("added to the coefficient of grad log p")
    axes.set_title("Why: shaping does not know the sign of the gap", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    sys.exit(main())
