"""The C++ kernels against the plain torch of ops/reference.py: zero differing bytes."""

import itertools
import math
import sys

import pytest
import torch

import megatron_rl
from megatron_rl.errors import ConfigError
from megatron_rl.ops import extension, kernels, reference
from megatron_rl.ops.logprobs import token_logprobs, token_logprobs_and_entropy
from tests.ops.rows import (
    DTYPES,
    TEMPERATURES,
    Native,
    assert_same_bits,
    bits_of,
    make_problem,
    pad_columns,
    run_shards,
)

kernels.load()
OPS = torch.ops.megatron_rl
INSTRUCTION_SETS = OPS.instruction_sets()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_kernels_have_the_bits_of_the_reference(dtype, temperature):
    torch.manual_seed(0)
    sizes = [1, 2, 15, 16, 17, 127, 128, 129, 300, 2047, 2048, 2049, 4097, 6200, 33000]
    for vocab_size, scale in itertools.product(sizes, [1.0, 30.0]):
        problem = make_problem(2 if vocab_size > 9000 else 12, vocab_size, dtype, scale)
        layout = {"temperature": temperature, "edges": [0, vocab_size], "vocab_size": vocab_size}
        expected = run_shards(reference, *problem, **layout)
        for name in INSTRUCTION_SETS:
            got = run_shards(Native(name), *problem, **layout)
            assert_same_bits(got, expected)
            without = run_shards(Native(name), *problem, **layout, has_entropy=False)
            assert without[1].numel() == 0
            assert_same_bits(without[:1] + got[1:2] + without[2:], expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_have_the_bits_of_the_reference_at_the_size_of_a_model(dtype):
    torch.manual_seed(0)
    problem = make_problem(2, 151936, dtype)
    layout = {"temperature": 1.0, "edges": [0, 151936], "vocab_size": 151936}
    expected = run_shards(reference, *problem, **layout)
    for name in INSTRUCTION_SETS:
        assert_same_bits(run_shards(Native(name), *problem, **layout), expected)


@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [(151936, torch.bfloat16), (50257, torch.float32), (1000, torch.float16)],
)
def test_shards_with_megatrons_padding_change_no_bit(vocab_size, dtype):
    torch.manual_seed(0)
    logits, labels, incoming = make_problem(6, vocab_size, dtype)
    labels[0], labels[1] = 0, vocab_size - 1
    names = [name for name in INSTRUCTION_SETS if name != "portable" or vocab_size < 100000]
    whole = {"edges": [0, vocab_size], "vocab_size": vocab_size, "temperature": 0.7}
    rows = slice(0, 1 if vocab_size > 10000 else 6)
    expected = run_shards(Native(names[0]), logits, labels, incoming, **whole)
    twin = run_shards(reference, logits[rows], labels[rows], incoming[rows], **whole)
    assert_same_bits([tensor[rows] for tensor in expected], twin)
    for num_ranks, name in itertools.product([1, 2, 3, 4, 6, 8, 16, 32, 64], names):
        width = -(-vocab_size // (128 * num_ranks)) * 128
        edges = [width * rank for rank in range(num_ranks + 1)]
        padded = pad_columns(logits, edges[-1])
        got = run_shards(Native(name), padded, labels, incoming, **whole | {"edges": edges})
        assert bits_of(got[-1][:, vocab_size:]).eq(0).all()
        assert_same_bits((*got[:-1], got[-1][:, :vocab_size]), expected)


@pytest.mark.parametrize(
    ("edges", "vocab_size"),
    [
        ([0, 334, 668, 1002], 1000),
        ([0, 5, 10, 15], 7),
        ([0, 30, 60, 90, 100, 300, 300, 513, 2100, 2500], 2500),
        ([0, 1, 129, 130, 257, 4096, 6145], 6145),
        ([0, 3001, 6002, 9003], 5000),
        ([0, 64, 128, 192, 256], 201),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shards_cut_anywhere_change_no_bit(edges, vocab_size, dtype):
    torch.manual_seed(0)
    logits, labels, incoming = make_problem(6, vocab_size, dtype)
    logits = pad_columns(logits, edges[-1])
    whole = {"edges": [0, edges[-1]], "vocab_size": vocab_size, "temperature": 1.3}
    expected = run_shards(reference, logits, labels, incoming, **whole)
    cut = whole | {"edges": edges}
    assert_same_bits(run_shards(reference, logits, labels, incoming, **cut), expected)
    for name in INSTRUCTION_SETS:
        assert_same_bits(run_shards(Native(name), logits, labels, incoming, **cut), expected)


def _values_and_gradient(logits, labels, incoming):
    leaf = logits.clone().requires_grad_()
    logprobs, entropy = token_logprobs_and_entropy(leaf, labels, temperature=0.7)
    logprobs.backward(incoming)
    return logprobs.detach(), entropy, leaf.grad


@pytest.fixture
def num_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_order_and_company_change_no_bit(dtype, num_threads):
    torch.manual_seed(0)
    problem = make_problem(66, 20001, dtype)
    torch.set_num_threads(2)
    expected = _values_and_gradient(*problem)
    torch.set_num_threads(1)
    single = _values_and_gradient(*problem)
    torch.set_num_threads(2)
    order = torch.randperm(66)
    shuffled = _values_and_gradient(*(tensor[order] for tensor in problem))
    alone = [_values_and_gradient(*(tensor[i : i + 1] for tensor in problem)) for i in range(66)]
    for index, tensor in enumerate(expected):
        assert torch.equal(bits_of(single[index]), bits_of(tensor))
        assert torch.equal(bits_of(shuffled[index]), bits_of(tensor[order]))
        assert torch.equal(bits_of(torch.cat([one[index] for one in alone])), bits_of(tensor))


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_flushing_denormals_changes_no_bit_and_stays_set(name, dtype, monkeypatch):
    monkeypatch.setenv(extension.INSTRUCTION_SET_VARIABLE, name)
    torch.manual_seed(0)
    problem = make_problem(66, 2100, dtype)
    problem[0][:, 1500:] *= 1e-40  # denormal logits, in the dtypes that have them
    problem[2].mul_(1e-36)  # and denormal gradients
    expected = _values_and_gradient(*problem)
    assert (expected[2].float().abs() < 2.0**-126).logical_and(expected[2] != 0).any() or (
        dtype == torch.float16
    )
    assert torch.set_flush_denormal(True)
    try:
        got = _values_and_gradient(*problem)
        is_flushed = (torch.tensor([1e-30]) * torch.tensor([1e-12])).item() == 0.0
    finally:
        torch.set_flush_denormal(False)
    assert is_flushed
    for a, b in zip(got, expected):
        assert torch.equal(bits_of(a), bits_of(b))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_logit_is_widened_exactly(dtype):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x[x.float().abs() <= reference.LARGEST_LOGIT][::3]
    logits = x[:, None].expand(-1, 128).contiguous()
    labels, incoming = torch.zeros(len(x), dtype=torch.int64), torch.ones(len(x))
    layout = {"temperature": 1.0, "edges": [0, 128], "vocab_size": 128}
    expected = run_shards(reference, logits, labels, incoming, **layout)
    assert torch.equal(expected[4], x.float())
    for name in INSTRUCTION_SETS:
        assert_same_bits(run_shards(Native(name), logits, labels, incoming, **layout), expected)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_entropy", [True, False])
def test_a_nan_is_never_lost(name, dtype, has_entropy):
    torch.manual_seed(0)
    vocab_size = 2500
    logits = torch.randn(400, vocab_size).to(dtype)
    logits[::2, :] -= torch.where(torch.rand(200, vocab_size) < 0.5, math.inf, 0.0).to(dtype)
    column = torch.randint(vocab_size, (400,))
    # Quiet and signalling ones, of either sign, with payloads in the lowest bits.
    patterns = {
        torch.float32: (torch.int32, [0x7F800001, 0x7FC00000, -1, 0x7F8001FF]),
        torch.bfloat16: (torch.int16, [0x7F81, 0x7FC0, -1, 0x7FFF]),
        torch.float16: (torch.int16, [0x7C01, 0x7E00, -1, 0x7FFF]),
    }
    integer, values = patterns[dtype]
    bits = torch.tensor(values, dtype=integer).repeat(100)
    logits.view(integer)[torch.arange(400), column] = bits
    edges = [0, 1250, vocab_size]
    labels = torch.randint(vocab_size, (400,))
    native = Native(name)
    for cut in ([0, vocab_size], edges):
        words = [
            native.nodes(logits[:, a:b], labels, 1.0, cut, rank, vocab_size, has_entropy)
            for rank, (a, b) in enumerate(itertools.pairwise(cut))
        ]
        finished = native.finish(torch.stack(words), labels, cut, vocab_size, has_entropy)
        assert finished[4].isnan().all()
        assert finished[0].isnan().all()
        assert finished[1].isnan().all()


def _exact_error(got, expected):
    return ((got.double() - expected).abs() / expected.abs().clamp(min=1.0)).max().item()


@pytest.mark.parametrize("vocab_size", [128, 32000, 151936, 262144])
@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0, 30.0, 100.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_error_against_float64(vocab_size, scale, temperature):
    torch.manual_seed(0)
    logits = torch.randn(6, vocab_size) * scale
    labels = torch.cat([logits[:3].argmax(1), torch.randint(vocab_size, (3,))])
    logprobs, entropy = token_logprobs_and_entropy(logits, labels, temperature=temperature)
    expected, expected_entropy = reference.exact(logits, labels, temperature)
    bound = 5e-7
    if temperature != 1.0:
        bound += 1.2e-7 * float(logits.abs().max()) / temperature
    assert _exact_error(logprobs, expected) <= bound
    assert _exact_error(entropy, expected_entropy) <= bound


def _fuzz(num_rows):
    torch.manual_seed(0)
    for start in range(0, num_rows, 1000):
        vocab_size = int(torch.randint(1, 400, ()))
        logits = torch.randn(1000, vocab_size) * 10.0 ** float(torch.randint(-3, 5, ()))
        logits[::7] = logits[::7, :1]
        logits[::5, : vocab_size // 2] = -math.inf
        labels = logits.argmax(1)
        dtype = DTYPES[start // 1000 % 3]
        logprobs, entropy = token_logprobs_and_entropy(
            logits.clamp(min=-6e4).to(dtype) if dtype == torch.float16 else logits.to(dtype), labels
        )
        assert (logprobs <= 0).all()
        assert (entropy >= 0).all()


def test_never_above_0_and_entropy_never_below():
    _fuzz(60_000)


@pytest.mark.slow
def test_never_above_0_and_entropy_never_below_over_a_million_rows():
    _fuzz(1_000_000)


@pytest.mark.slow
def test_many_tokens_have_the_bits_of_the_reference():
    torch.manual_seed(0)
    sizes = [(100, 151936)] * 20 + [(7000, 1000)] * 14
    for index, (num_rows, vocab_size) in enumerate(sizes):
        problem = make_problem(num_rows, vocab_size, DTYPES[index % 3])
        layout = {"temperature": TEMPERATURES[index // 3 % 3], "vocab_size": vocab_size}
        expected = run_shards(reference, *problem, edges=[0, vocab_size], **layout)
        for name in INSTRUCTION_SETS:
            for num_ranks in (1, 3, 8):
                edges = [vocab_size * rank // num_ranks for rank in range(num_ranks + 1)]
                assert_same_bits(
                    run_shards(Native(name), *problem, edges=edges, **layout), expected
                )


def test_an_extension_that_is_not_built_is_an_error(monkeypatch):
    monkeypatch.delattr(megatron_rl, "_C", raising=False)
    monkeypatch.setitem(sys.modules, "megatron_rl._C", None)
    with pytest.raises(ConfigError, match=r"tools/bootstrap\.sh"):
        extension.load_extension.__wrapped__()


def test_an_instruction_set_is_asked_for_by_name(monkeypatch):
    assert kernels.instruction_set() == INSTRUCTION_SETS[0]
    assert INSTRUCTION_SETS[0] in kernels.backend(torch.device("cpu"))
    monkeypatch.setenv(extension.INSTRUCTION_SET_VARIABLE, "portable")
    assert kernels.instruction_set() == "portable"
    monkeypatch.setenv(extension.INSTRUCTION_SET_VARIABLE, "sse9")
    with pytest.raises(ConfigError, match="sse9"):
        token_logprobs(torch.zeros(1, 2), torch.tensor([0]))


@pytest.mark.skipif(bool(OPS.cuda_architectures()), reason="built with CUDA kernels")
def test_cuda_kernels_that_are_not_built_are_told_or_an_error(monkeypatch):
    assert kernels.backend(torch.device("cuda")).startswith("torch operations")
    monkeypatch.setenv(extension.CUDA_VARIABLE, "1")
    with pytest.raises(ConfigError, match="MEGATRON_RL_CUDA=1"):
        extension.load_extension.__wrapped__()


@pytest.mark.parametrize("has_entropy", [True, False])
def test_the_operators_declare_what_they_do(has_entropy):
    logits, labels, incoming = make_problem(6, 300, torch.bfloat16)
    checks = ("test_schema", "test_faketensor")
    given = (logits[:, :150], labels, 1.0, [0, 150, 300], 0, 290, has_entropy)
    torch.library.opcheck(OPS.token_logprobs_nodes.default, given, test_utils=checks)
    words = torch.stack([OPS.token_logprobs_nodes(*given)] * 2)
    given = (words, labels, [0, 150, 300], 290, has_entropy)
    torch.library.opcheck(OPS.token_logprobs_finish.default, given, test_utils=checks)
    exponent, total = OPS.token_logprobs_finish(*given)[2:4]
    given = (logits, labels, incoming, exponent, total, 1.0, 0, 290, torch.empty_like(logits))
    torch.library.opcheck(OPS.token_logprobs_gradient.default, given, test_utils=checks)
