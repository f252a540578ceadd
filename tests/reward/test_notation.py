import pytest

from megatron_rl.reward.notation import plain, text_key


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (r"$\left( 1 ,\, 2 \right)$.", "( 1 , 2 )"),
        (r"\dfrac{1}{2}", r"\frac{1}{2}"),
        (r"5\text{ cm}^2", "5 cm ^2"),
        (r"\textbf{\textit{yes}}", "yes"),
        ("2½ \u2212 10⁻³", "2 1/2 - 10^{-3}"),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
        (r"$\$5$", r"\$5"),
        ("$5$ and $6$", "$5$ and $6$"),
        ("$", "$"),
    ],
)
def test_one_notation(answer, text):
    assert plain(answer) == text


def test_a_text_is_the_same_in_every_notation():
    for choice in ("B", "(B)", "b", r"\text{B}", r"\textbf{(B)}", "B."):
        assert text_key(choice) == "b"
    assert text_key(r"\text{No  Solution}") == text_key("no solution.")
    assert text_key("x_{1}") == text_key("x_1")
    assert text_key("p - q") == text_key("p-q") and text_key("5 m") == text_key("5m")
    for first, second in (
        ("evil", "live"),
        (r"\frac{1}{23}", r"\frac{12}{3}"),
        ("12 34", "1234"),
        ("2 2/3", "22/3"),
    ):
        assert text_key(first) != text_key(second)
