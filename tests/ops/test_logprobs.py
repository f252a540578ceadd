import math

import pytest
import torch

from megatron_rl.errors import ConfigError, DataError, DivergenceError
from megatron_rl.ops.logprobs import (
    linear_token_logprobs,
    token_logprobs,
    token_logprobs_and_entropy,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GRADIENT_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def _exact(logits, labels, temperature=1.0, vocab_size=None):
    """float64 log_softmax of the same numbers; returns the logits to differentiate too."""
    exact = logits.detach().double().requires_grad_()
    columns = exact[:, :vocab_size] / temperature
    logprobs = torch.log_softmax(columns, dim=1).gather(1, labels[:, None])[:, 0]
    return exact, logprobs


def _close(got, expected, tolerance=5e-7):
    error = (got.double() - expected).abs() / expected.abs().clamp(min=1.0)
    assert error.max().item() <= tolerance


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (5, 2), (7, 127), (3, 129), (2, 151936)])
def test_values_and_gradients_agree_with_float64(dtype, temperature, rows, vocab):
    torch.manual_seed(rows)
    logits = (torch.randn(rows, vocab) * 4).to(dtype).requires_grad_()
    labels = torch.randint(vocab, (rows,))
    incoming = torch.randn(rows)
    exact_logits, expected = _exact(logits, labels, temperature)
    got = token_logprobs(logits, labels, temperature=temperature)
    assert (got.dtype, got.shape) == (torch.float32, (rows,))
    _close(got, expected)
    got.backward(incoming)
    expected.backward(incoming.double())
    assert logits.grad.dtype == dtype
    scale = exact_logits.grad.abs().max().clamp(min=1e-30)
    error = (logits.grad.double() - exact_logits.grad).abs().max() / scale
    assert error.item() <= GRADIENT_TOLERANCE[dtype]


@pytest.mark.parametrize("vocab", [70000, 151936])
def test_company_and_threads_change_no_bit(vocab):
    torch.manual_seed(0)
    logits, labels = torch.randn(7, vocab), torch.randint(vocab, (7,))
    num_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        together = torch.stack(token_logprobs_and_entropy(logits, labels))
        alone = [
            torch.stack(token_logprobs_and_entropy(logits[i : i + 1], labels[i : i + 1]))
            for i in range(7)
        ]
        torch.set_num_threads(1)
        single = torch.stack(token_logprobs_and_entropy(logits, labels))
    finally:
        torch.set_num_threads(num_threads)
    assert torch.equal(together, torch.cat(alone, dim=1))
    assert torch.equal(together, single)


@pytest.mark.parametrize("dtype", DTYPES)
def test_padded_columns_do_not_count_and_get_no_gradient(dtype):
    torch.manual_seed(0)
    logits = torch.randn(6, 40).to(dtype)
    labels = torch.randint(33, (6,))
    logits[:, 33:] = torch.tensor([math.nan, math.inf, 1e4, 0.0, -math.inf, 5.0, 9.0]).to(dtype)
    logits.requires_grad_()
    exact_logits, expected = _exact(logits[:, :33], labels)
    got, entropy = token_logprobs_and_entropy(logits, labels, vocab_size=33)
    _close(got, expected)
    got.sum().backward()
    expected.sum().backward()
    assert logits.grad[:, 33:].eq(0).all()
    error = (logits.grad[:, :33].double() - exact_logits.grad).abs().max().item()
    assert error <= GRADIENT_TOLERANCE[dtype]
    assert torch.equal(entropy, token_logprobs_and_entropy(logits[:, :33], labels)[1])


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_entropy(temperature):
    torch.manual_seed(0)
    logits = torch.randn(9, 777) * 3
    logits[2, ::2] = -math.inf
    logits[3] = 0.0
    logits[4, 5] = 1e4
    labels = torch.full((9,), 5)
    _, entropy = token_logprobs_and_entropy(logits, labels, temperature=temperature)
    probabilities = torch.softmax(logits.double() / temperature, dim=1)
    expected = torch.special.entr(probabilities).sum(1)
    _close(entropy, expected)
    assert entropy[3].item() == pytest.approx(math.log(777), rel=1e-6)
    assert 0.0 <= entropy[4].item() < 5e-7
    assert not entropy.requires_grad


def test_extreme_logits():
    logits = torch.zeros(5, 6)
    logits[0, 1] = 1e4  # a label that is certain, and one that is nearly impossible
    logits[1, 1] = 1e4
    logits[2] = torch.tensor([-math.inf, 3.0, -math.inf, -math.inf, 3.0, -math.inf])
    logits[3, 2] = -math.inf  # the label itself cannot be sampled
    logits[4] = -2e6
    labels = torch.tensor([1, 0, 4, 2, 3])
    logits.requires_grad_()
    got = token_logprobs(logits, labels)
    assert got.tolist() == pytest.approx(
        [0.0, -1e4, -math.log(2), -math.inf, -math.log(6)], rel=1e-6, abs=1e-7
    )
    got.sum().backward()
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[2].tolist() == pytest.approx([0, -0.5, 0, 0, 0.5, 0])
    assert logits.grad[0].tolist() == pytest.approx([0.0] * 6, abs=1e-7)
    assert logits.grad[1].tolist() == pytest.approx([1.0, -1.0, 0.0, 0.0, 0.0, 0.0], abs=1e-7)


def test_a_logprob_is_never_above_zero():
    torch.manual_seed(0)
    logits = torch.randn(2000, 3) * 30
    labels = logits.argmax(1)
    assert token_logprobs(logits, labels).max().item() <= 0.0


@pytest.mark.parametrize("gap", [5.0, 12.0, 20.0, 40.0])
def test_the_gradient_of_a_likely_label_is_exact_to_float32_of_p(gap):
    logits = torch.tensor([[gap, 0.0]], requires_grad=True)
    token_logprobs(logits, torch.tensor([0])).backward()
    expected = 1 / (1 + math.exp(gap))
    assert logits.grad[0].tolist() == pytest.approx([expected, -expected], abs=1e-7)


def test_rows_without_incoming_gradient_are_positive_zero():
    logits = torch.randn(3, 20, requires_grad=True)
    token_logprobs(logits, torch.tensor([1, 2, 3])).backward(torch.tensor([0.0, 1.0, -0.0]))
    assert torch.equal(logits.grad[::2].view(torch.int32), torch.zeros(2, 20, dtype=torch.int32))


def test_no_rows():
    logits = torch.zeros(0, 7, requires_grad=True)
    labels = torch.zeros(0, dtype=torch.int64)
    logprobs, entropy = token_logprobs_and_entropy(logits, labels)
    logprobs.sum().backward()
    assert (logprobs.shape, entropy.shape, logits.grad.shape) == ((0,), (0,), (0, 7))
    hidden = torch.zeros(0, 4, requires_grad=True)
    weight = torch.ones(7, 4, requires_grad=True)
    linear_token_logprobs(hidden, weight, labels).sum().backward()
    assert hidden.grad.shape == (0, 4)
    assert weight.grad.eq(0).all()


def test_rows_that_are_not_contiguous():
    torch.manual_seed(0)
    whole = torch.randn(20, 10)
    labels = torch.randint(20, (10,))
    assert torch.equal(token_logprobs(whole.T, labels), token_logprobs(whole.T.clone(), labels))


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (math.nan, "NaN"),
        (math.inf, r"\+inf"),
        (-math.inf, "nothing but -inf"),
        (2.2e6, r"2\.2e\+06"),
        (-1e30, r"-1e\+30"),
    ],
)
def test_broken_logits_are_named(bad, words):
    logits = torch.zeros(4, 5)
    logits[2, 3] = bad
    if bad < 0:
        logits[2] = bad
    with pytest.raises(DivergenceError, match=rf"row 2.*{words}.*1 of 4"):
        token_logprobs(logits, torch.zeros(4, dtype=torch.int64))
    if bad > -math.inf:  # times 0 it would be NaN in every column
        weight, hidden = torch.eye(5), logits
        with pytest.raises(DivergenceError, match="row 2"):
            linear_token_logprobs(hidden, weight, torch.zeros(4, dtype=torch.int64), chunk_size=3)


def test_writing_over_the_logits_is_opt_in():
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 300).bfloat16(), torch.randint(300, (5,))
    kept = logits.clone().requires_grad_()
    token_logprobs(kept, labels, temperature=0.7, vocab_size=290).sum().backward()
    assert torch.equal(kept, logits)

    leaf = logits.clone().requires_grad_()
    given = leaf * 1.0
    logprobs = token_logprobs(given, labels, temperature=0.7, vocab_size=290, overwrite_logits=True)
    logprobs.sum().backward(retain_graph=True)
    assert torch.equal(leaf.grad, kept.grad)
    assert torch.equal(given, kept.grad)
    with pytest.raises(RuntimeError, match="second"):
        logprobs.sum().backward()


def test_logits_that_another_node_needs_are_not_written_over_silently():
    leaf = torch.randn(5, 30, requires_grad=True)
    given = leaf * 1.0
    square = given.square().sum()
    token_logprobs(given, torch.arange(5), overwrite_logits=True).sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


@pytest.mark.parametrize("label", [-1, -100, 30, 32])
def test_a_label_outside_the_vocabulary_is_named(label):
    labels = torch.tensor([0, 29, label])
    with pytest.raises(DataError, match=rf"row 2: .*0 to 29, got {label}"):
        token_logprobs(torch.zeros(3, 32), labels, vocab_size=30)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ignored_rows_give_0_and_take_nothing(dtype):
    torch.manual_seed(0)
    logits, labels, incoming = torch.randn(5, 30).to(dtype), torch.arange(5), torch.randn(5)
    labels[1], labels[4] = -100, -100
    logits[4, 7], is_counted = math.nan, labels >= 0
    leaf = logits.clone().requires_grad_()
    logprobs, entropy = token_logprobs_and_entropy(leaf, labels, ignore_index=-100)
    logprobs.backward(incoming)
    other = logits[is_counted].clone().requires_grad_()
    expected, expected_entropy = token_logprobs_and_entropy(other, labels[is_counted])
    expected.backward(incoming[is_counted])
    for got, of_counted in ((logprobs, expected), (entropy, expected_entropy)):
        assert torch.equal(got[is_counted], of_counted)
        assert got[~is_counted].eq(0).all()
    assert torch.equal(leaf.grad[is_counted], other.grad)
    ignored = leaf.grad[~is_counted].float().view(torch.int32)
    assert torch.equal(ignored, torch.zeros_like(ignored))
    assert torch.equal(token_logprobs(logits, labels, ignore_index=-100), logprobs)
    with pytest.raises(DataError, match="row 1"):
        token_logprobs(logits, labels, ignore_index=-1)
    labels[4] = 0
    with pytest.raises(DivergenceError, match="row 4"):
        token_logprobs(logits, labels, ignore_index=-100)


def test_linear_ignores_rows():
    torch.manual_seed(0)
    hidden, weight = torch.randn(9, 6), torch.randn(20, 6)
    labels = torch.tensor([3, -1, 5, 19, -1, 0, 1, 2, -1])
    is_counted = labels >= 0
    results = []
    for rows in (torch.ones(9, dtype=torch.bool), is_counted):
        leaves = hidden[rows].clone().requires_grad_(), weight.clone().requires_grad_()
        logprobs = linear_token_logprobs(*leaves, labels[rows], chunk_size=4, ignore_index=-1)
        logprobs.sum().backward()
        results.append((logprobs.detach(), leaves[0].grad, leaves[1].grad))
    for got, expected in zip(results[0], results[1]):
        got, ignored = (got, got[:0]) if len(got) == 20 else (got[is_counted], got[~is_counted])
        torch.testing.assert_close(got, expected)
        assert ignored.eq(0).all()


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_a_temperature_that_cannot_be(temperature):
    with pytest.raises(ConfigError, match="temperature"):
        token_logprobs(torch.zeros(1, 2), torch.tensor([0]), temperature=temperature)


def test_shapes_and_dtypes_are_checked():
    labels = torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"\[N, V\]"):
        token_logprobs(torch.zeros(1, 2, 3), labels)
    with pytest.raises(ValueError, match="labels"):
        token_logprobs(torch.zeros(3, 4), labels)
    with pytest.raises(ValueError, match="labels"):
        token_logprobs(torch.zeros(2, 4), labels.int())
    with pytest.raises(ValueError, match="float64"):
        token_logprobs(torch.zeros(2, 4).double(), labels)
    with pytest.raises(ValueError, match="vocab_size"):
        token_logprobs(torch.zeros(2, 4), labels, vocab_size=5)
    with pytest.raises(ValueError, match=r"\[N, H\]"):
        linear_token_logprobs(torch.zeros(2, 4), torch.zeros(5, 3), labels)
    with pytest.raises(ConfigError, match="chunk_size"):
        linear_token_logprobs(torch.zeros(2, 4), torch.zeros(5, 4), labels, chunk_size=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk_size", [1, 16, 1024])
def test_linear_agrees_with_float64(dtype, chunk_size):
    torch.manual_seed(0)
    num_rows, width, vocab = 37, 24, 61
    hidden = torch.randn(num_rows, width).to(dtype).requires_grad_()
    weight = (torch.randn(64, width) / 4).to(dtype).requires_grad_()
    labels, incoming = torch.randint(vocab, (num_rows,)), torch.randn(num_rows)
    got = linear_token_logprobs(
        hidden, weight, labels, temperature=0.8, vocab_size=vocab, chunk_size=chunk_size
    )
    got.backward(incoming)

    exact_hidden = hidden.detach().double().requires_grad_()
    exact_weight = weight.detach().double().requires_grad_()
    exact_logits = exact_hidden @ exact_weight.T
    columns = exact_logits[:, :vocab] / 0.8
    expected = torch.log_softmax(columns, dim=1).gather(1, labels[:, None])[:, 0]
    expected.backward(incoming.double())
    # Logits are rounded to the dtype between the product and the softmax.
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    _close(got, expected, tolerance)
    for leaf, exact in ((hidden, exact_hidden), (weight, exact_weight)):
        assert leaf.grad.dtype == dtype
        error = (leaf.grad.double() - exact.grad).norm() / exact.grad.norm()
        assert error.item() <= tolerance
    assert weight.grad[vocab:].eq(0).all()


def test_linear_does_not_depend_on_order_or_company():
    torch.manual_seed(0)
    hidden, weight = torch.randn(50, 32), torch.randn(99, 32)
    labels, order = torch.randint(99, (50,)), torch.randperm(50)
    whole = linear_token_logprobs(hidden, weight, labels, chunk_size=16)
    shuffled = linear_token_logprobs(hidden[order], weight, labels[order], chunk_size=16)
    alone = linear_token_logprobs(hidden[:1], weight, labels[:1], chunk_size=16)
    assert torch.equal(whole[order], shuffled)
    assert torch.equal(whole[:1], alone)


def test_linear_never_holds_all_logits():
    class _LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            result = function(*arguments, **(keywords or {}))
            for tensor in result if isinstance(result, tuple | list) else (result,):
                if isinstance(tensor, torch.Tensor):
                    self.largest = max(self.largest, tensor.numel())
            return result

    hidden = torch.randn(512, 8, requires_grad=True)
    weight = torch.randn(1000, 8, requires_grad=True)
    labels = torch.randint(1000, (512,))
    with _LargestTensor() as seen:
        linear_token_logprobs(hidden, weight, labels, chunk_size=32).sum().backward()
    assert seen.largest == 32 * 1000
