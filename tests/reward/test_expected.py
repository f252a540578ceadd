import subprocess
import sys

import pytest

from megatron_rl.config import RewardTerm
from megatron_rl.config.choices import VERIFIERS
from megatron_rl.reward.expected import READERS, answer_checks


def test_answers_that_a_verifier_cannot_read():
    checks = answer_checks(
        {
            "sums": (RewardTerm(verifier="numeric"),),
            "both": (RewardTerm(verifier="pkg:fn"), RewardTerm(verifier="exact")),
            "own": (RewardTerm(verifier="pkg:fn"),),
            "maze": (RewardTerm(verifier="reasoning_gym"),),
        }
    )
    assert checks.keys() == {"sums", "both"}
    checks["sums"]("10^5")
    checks["both"]("x + 1")
    for answer in ("x + 1", "12:30", ""):
        with pytest.raises(ValueError, match=r"expected an? (number|answer), got"):
            checks["sums"](answer)
    with pytest.raises(ValueError, match="expected an answer, got ' '"):
        checks["both"](" ")


def test_the_readers_are_of_verifiers():
    assert READERS.keys() == set(VERIFIERS) & {"exact", "math_verify", "numeric"}


def test_no_verifier_is_imported():
    script = (
        "import sys, megatron_rl.reward.expected\n"
        "print([n for n in sys.modules if n in ('torch', 'sympy', 'math_verify')])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr
