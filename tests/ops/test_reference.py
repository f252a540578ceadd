import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from megatron_rl.ops import reference
from megatron_rl.ops.node_layout import NodeLayout, node_layout, words_per_row


def _float32(exact: Fraction) -> float:
    """The nearest float32, ties to even, of a number in the normal range: rounded by hand."""
    if exact == 0:
        return 0.0
    exponent = math.frexp(float(exact))[1] - 24
    scaled = exact / Fraction(2) ** exponent
    if abs(scaled) >= 2**24:  # float() itself had rounded up to a power of two
        exponent, scaled = exponent + 1, scaled / 2
    return float(round(scaled) * Fraction(2) ** exponent)


def test_multiply_add_rounds_once():
    torch.manual_seed(0)
    a, b = torch.randn(3000), torch.randn(3000)
    c = -(a.double() * b.double()).float() * (1 + torch.randint(-3, 4, (3000,)) * 2.0**-23)
    c[::3] = torch.randn(1000) * torch.exp2(torch.randint(-60, 30, (1000,)))
    # Plain float64 rounds this one twice, to the wrong side of a tie.
    a[0], b[0], c[0] = 65281 * 2.0**-24, 257.0, 2.0**-60
    got = reference.multiply_add(a, b, c)
    exact = [
        Fraction(x) * Fraction(y) + Fraction(z)
        for x, y, z in zip(a.tolist(), b.tolist(), c.tolist())
    ]
    assert got.tolist() == [_float32(number) for number in exact]
    assert got[0] != (a[0].double() * b[0].double() + c[0].double()).float()


def test_a_term_is_exp_to_float32():
    y = torch.linspace(-10, 0, 100001)
    zero = torch.tensor(reference.MAGIC)
    error = (reference.term(y, zero).double() / y.double().exp() - 1).abs()
    assert error.max().item() < 2e-7
    # The reference changes the exponent only.
    shifted = reference.term(y, zero + 20)
    assert torch.equal(shifted, reference.term(y, zero) * 2.0**20)


def test_a_granule_adds_bit_4_then_5_6_0_1_2_3():
    torch.manual_seed(0)
    y = torch.randn(1, 128) * 5
    maximum = y.max()
    exponent = torch.round(maximum.double() * reference.LOG2E).float()
    e = reference.term(y[0], reference.MAGIC - exponent).numpy()
    sums = dict(enumerate(e))
    for bit in (4, 5, 6, 0, 1, 2, 3):
        sums = {i: np.float32(sums[i] + sums[i | 1 << bit]) for i in sums if not i & 1 << bit}
    node = reference.granules(y)
    assert (node.exponent.item(), node.sum.item()) == (int(exponent), sums[0])


def test_an_empty_granule_is_no_number():
    y = torch.full((1, 256), -math.inf)
    y[0, 200] = -1e30
    node = reference.granules(y)
    assert node.exponent[0, 0].item() == reference.EMPTY_EXPONENT
    assert node.sum[0, 0].item() == 0.0
    assert node.exponent[0, 1].item() == round(-(2**21) * math.log2(math.e))
    assert node.sum[0, 1].item() > 0.0


def _node(exponent, total, weighted=0.0):
    return reference.Nodes(
        exponent=torch.tensor([[exponent]], dtype=torch.int32),
        sum=torch.tensor([[total]]),
        weighted=torch.tensor([[weighted]]),
    )


@pytest.mark.parametrize(
    ("low_exponent", "total"),
    [(10, 1.5 + 1.25), (9, 1.5 + 0.625), (-12, 1.5 + 1.25 * 2.0**-22), (-54, 1.5), (-(2**30), 1.5)],
)
def test_merging_scales_the_lower_node(low_exponent, total):
    for left, right in ((10, low_exponent), (low_exponent, 10)):
        sums = {10: 1.5, low_exponent: 1.25} if low_exponent != 10 else {10: 1.5}
        node = reference.merge(_node(left, sums[left]), _node(right, sums.get(right, 1.25)))
        if low_exponent == 10:
            node = reference.merge(_node(10, 1.5), _node(10, 1.25))
        assert node.exponent.item() == 10
        assert node.sum.item() == np.float32(total)


def test_logarithm():
    torch.manual_seed(0)
    x = torch.cat([torch.rand(10000).double() * 4, torch.exp2(torch.arange(-60.0, 60.0)).double()])
    x = torch.cat(
        [x, torch.tensor([math.sqrt(0.5), math.sqrt(2), 1 - 2**-24, 1 + 2**-23]).double()]
    )
    error = (reference.logarithm(x) - x.log()).abs() / x.log().abs().clamp(min=1e-3)
    assert error.max().item() < 1e-15 * 4
    assert reference.logarithm(torch.ones(1).double()).item() == 0.0


def test_the_example_of_a_layout():
    layout = node_layout([0, 100, 1000, 5000], 1, 5000)
    assert layout == NodeLayout(
        columns=(100, 1000),
        nodes=((1, 0), (2, 1), (4, 1), (6, 0)),
        head=(100, 128),
        tail=(896, 1000),
    )
    assert layout.num_words(has_entropy=False) == 2 + 4 * 2 + 28 + 104


@pytest.mark.parametrize(
    ("edges", "vocab_size"),
    [
        ([0, 151936], 151936),
        ([0, 30, 60, 90, 100, 300, 300, 513, 1000], 1000),
        ([0, 700, 1400, 2100], 1201),
        ([0, 128, 256, 384, 512], 129),
        ([0, 5, 10, 15], 7),
    ],
)
def test_layouts_share_out_every_column_once(edges, vocab_size):
    columns = []
    for rank in range(len(edges) - 1):
        layout = node_layout(edges, rank, vocab_size)
        columns += range(*layout.head)
        for granule, level in layout.nodes:
            assert granule % 2**level == 0
            columns += range(granule * 128, min((granule + 2**level) * 128, vocab_size))
        columns += range(*layout.tail)
    assert columns == list(range(vocab_size))


def test_a_row_of_nodes_is_short():
    assert words_per_row([0, 151936], 151936, has_entropy=False) == 2 + 2 * 5
    shards = [rank * 38016 for rank in range(5)]  # Megatron's padding for 4 ranks
    assert words_per_row(shards, 151936, has_entropy=False) <= 2 + 2 * 11


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_reference_agrees_with_float64(dtype, temperature):
    torch.manual_seed(0)
    logits, labels = (torch.randn(8, 3000) * 6).to(dtype), torch.randint(3000, (8,))
    incoming = torch.randn(8)
    words = reference.nodes(logits, labels, temperature, [0, 3000], 0, 3000, True)
    logprobs, entropy, exponent, total, maximum = reference.finish(
        words[None], labels, [0, 3000], 3000, True
    )
    grad_logits = torch.empty_like(logits)
    reference.gradient(logits, labels, incoming, exponent, total, temperature, 0, 3000, grad_logits)
    leaf = logits.double().requires_grad_()
    expected, expected_entropy = reference.exact(leaf, labels, temperature)
    expected.backward(incoming.double())
    tolerance = 5e-7 + (0 if temperature == 1.0 else 1.2e-7 * 50)
    torch.testing.assert_close(logprobs.double(), expected.detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        entropy.double(), expected_entropy.detach(), rtol=tolerance, atol=tolerance
    )
    assert torch.equal(maximum, reference.scaled(logits, temperature).amax(1))
    rounding = {torch.float32: 4e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(grad_logits.double(), leaf.grad, rtol=rounding, atol=2e-7)
