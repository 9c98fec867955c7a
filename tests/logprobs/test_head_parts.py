"""The parts of the heads, each with numbers worked by hand."""

import contextlib
import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from tests.logprobs.test_head import draw, reference
from trl_ext.logprobs import Head, Transform, liger_head, torch_head
from trl_ext.logprobs import head as heads
from trl_ext.logprobs.head import STATISTICS, compute_dtype
from trl_ext.logprobs.products import statistics_dtype


@pytest.mark.parametrize("rows", [1, 2, 3, 7])
@pytest.mark.parametrize("keep", [False, True], ids=["", "keep"])
@pytest.mark.parametrize(("backend", "dtype"), [("torch", torch.float64), ("liger", torch.float32)])
def test_both_passes_by_hand(backend, dtype, keep, rows):
    """Logits are ln 1, ln 2 and ln 5, whatever the tile: probabilities 1/8, 2/8 and 5/8."""
    module = heads.BACKENDS[backend]

    def approx(value):
        return pytest.approx(value, rel=1e-12 if dtype == torch.float64 else 1e-5)

    weight = torch.tensor([[0.0], [math.log(2)], [math.log(5)]], dtype=dtype)
    hidden, targets = torch.ones(3, 1, dtype=dtype), torch.tensor([2, 0, 1])
    gradient_rows = torch.empty_like(hidden)
    inputs = (hidden, weight, None, targets)
    outputs, kept = heads._forward(module, *inputs, Transform(), STATISTICS, rows, keep, gradient_rows)
    log_probs, entropy, log_sum_sq, mean, top1 = outputs
    assert log_probs.exp().tolist() == approx([5 / 8, 1 / 8, 2 / 8])
    assert entropy.tolist() == approx([math.log(8) - (2 * math.log(2) + 5 * math.log(5)) / 8] * 3)
    assert log_sum_sq.exp().tolist() == approx([30 / 64] * 3)
    assert mean.tolist() == approx([math.log(10) / 3] * 3)
    assert top1.tolist() == [True, False, False]
    # The mean row of the weight under 1/8, 2/8 and 5/8, taken from the row of the target
    mean_row = (2 * math.log(2) + 5 * math.log(5)) / 8
    slopes = [math.log(5) - mean_row, -mean_row, math.log(2) - mean_row]
    assert (-gradient_rows).squeeze(1).tolist() == approx(slopes)
    if keep:
        assert kept.tolist() == [
            approx(row) for row in ([1 / 8, 2 / 8, -3 / 8], [-7 / 8, 2 / 8, 5 / 8], [1 / 8, -6 / 8, 5 / 8])
        ]
    else:
        assert kept is None
    upstream = torch.tensor([1.0, 10.0, 100.0], dtype=dtype)
    # Upstream times (onehot - p), summed over tokens: the gradient of the weight (hidden states are 1) and of a bias
    summed = [10 - 111 / 8, 100 - 222 / 8, 1 - 555 / 8]
    for needs in itertools.product((True, False), repeat=3):
        bias = torch.zeros(3, dtype=dtype) if needs[2] else None
        gradients = heads._backward(
            upstream, module, hidden, weight, bias, targets, log_probs, kept, Transform(), rows, needs, dtype
        )
        assert [gradient is not None for gradient in gradients] == list(needs)
        of_hidden, of_weight, of_bias = gradients
        if needs[0]:
            assert of_hidden.squeeze(1).tolist() == approx([s * u for s, u in zip(slopes, (1, 10, 100), strict=True)])
        if needs[1]:
            assert of_weight.squeeze(1).tolist() == approx(summed)
        if needs[2]:
            assert of_bias.tolist() == approx(summed)


@pytest.mark.parametrize("backend", ["torch", "liger"])
def test_statistics_are_those_asked_for(backend):
    values, targets, _ = draw(3, 4, 5, True)
    for name in STATISTICS:
        output = Head(backend)(*values, targets, statistics=(name,))
        assert [field for field in output._fields if getattr(output, field) is not None] == ["log_probs", name]
        assert getattr(output, name).dtype == (torch.bool if name == "is_top1" else torch.float32)
    assert Head(backend)(*values, targets)[1:] == (None,) * 4


@pytest.mark.parametrize("frozen", [False, True], ids=["full", "frozen"])
def test_statistics_have_no_gradient(frozen):
    values, targets, _ = draw(3, 4, 5, False)
    hidden, weight = values[0].requires_grad_(), values[1].requires_grad_(not frozen)
    output = Head()(hidden, weight, None, targets, statistics=STATISTICS)
    assert output.log_probs.requires_grad
    assert not any(getattr(output, name).requires_grad for name in STATISTICS)


def test_bytes_of_a_logit():
    """The tile is float32 at least; the torch head has a product of its own in half precision beside it."""
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    assert [torch_head.bytes_per_logit(dtype) for dtype in dtypes] == [8, 4, 6, 6]
    assert [liger_head.bytes_per_logit(dtype) for dtype in dtypes] == [8, 4, 2, 2]
    assert (
        [torch_head.tile_dtype(dtype) for dtype in dtypes]
        == [statistics_dtype(dtype) for dtype in dtypes]
        == [torch.float64] + [torch.float32] * 3
    )


def test_what_the_products_run_in():
    hidden = torch.empty(1, 1, dtype=torch.float64)
    assert compute_dtype(hidden) == torch.float64
    with torch.autocast("cpu", torch.float16):
        assert compute_dtype(hidden) == torch.float16
    with torch.autocast("cpu", enabled=False):
        assert compute_dtype(hidden) == torch.float64


def test_what_a_backend_can():
    capped, hot, both = Transform(softcap=2.0), Transform(temperature=0.5), Transform(softcap=2.0, temperature=0.5)
    each = (Transform(), capped, hot, both)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert [liger_head.can(transform, dtype) for transform in each] == [True, True, True, False]
    assert not any(liger_head.can(transform, torch.float64) for transform in each)
    assert all(torch_head.can(transform, torch.float64) for transform in each)
    assert Transform(scale=3.0, temperature=2.0).factor == 1.5


@pytest.mark.parametrize(
    ("dtype", "backend"), [(torch.bfloat16, "torch"), (torch.bfloat16, "liger"), (torch.float32, "liger")]
)
def test_of_several_largest_logits_the_first_counts(backend, dtype):
    """As in TRL. In float32 the torch head lets each of them count: its logits are not rounded to the same value."""
    hidden, weight, targets = torch.zeros(4, 2, dtype=dtype), torch.ones(3, 2, dtype=dtype), torch.tensor([0, 1, 2, 0])
    weight[0] = -1
    hidden[3] = -1
    # Rows of three equal logits, and one whose first is the largest
    output = Head(backend)(hidden, weight, None, targets, statistics=("is_top1",))
    assert output.is_top1.tolist() == [True, False, False, True]


@pytest.mark.parametrize("backend", ["torch", "liger"])
def test_a_token_that_cannot_be_sampled(backend):
    """Logits of minus infinity, which a bias may bring about: 1/4 and 3/4 remain."""
    hidden, weight = torch.ones(1, 1), torch.tensor([[0.0], [0.0], [math.log(3)]])
    bias = torch.tensor([0.0, -math.inf, 0.0])
    output = Head(backend)(hidden, weight, bias, torch.tensor([2]), statistics=("entropy", "log_sum_sq_probs"))
    assert output.log_probs.exp().item() == pytest.approx(3 / 4, rel=1e-5)
    assert output.entropy.item() == pytest.approx(math.log(4) - 0.75 * math.log(3), rel=1e-5)
    assert output.log_sum_sq_probs.exp().item() == pytest.approx(10 / 16, rel=1e-5)


@pytest.mark.parametrize("frozen", [False, True], ids=["full", "frozen"])
def test_sharded_parameters_are_made_whole_in_the_backward(frozen):
    """Weight and bias, where they are needed again; with a frozen head nothing is."""
    values, targets, _ = draw(6, 3, 5, True)
    hidden, weight, bias = (value.requires_grad_(index == 0 or not frozen) for index, value in enumerate(values))
    seen = []

    @contextlib.contextmanager
    def gather(*parameters):
        seen.append([tuple(parameter.shape) for parameter in parameters])
        yield

    Head()(hidden, weight, bias, targets, gather=gather).log_probs.sum().backward()
    assert seen == ([] if frozen else [[(5, 3), (5,)]])
    seen.clear()
    Head()(hidden, weight, None, targets, gather=gather).log_probs.sum().backward()
    assert seen == ([] if frozen else [[(5, 3)]])


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias"])
def test_each_gradient_alone(trained):
    values, targets, upstream = draw(5, 3, 7, True)
    names = ("hidden", "weight", "bias")
    exact = [value.double().requires_grad_() for value in values]
    (reference(*exact, targets, Transform())["log_probs"] * upstream).sum().backward()
    for value, name in zip(values, names, strict=True):
        value.requires_grad_(name == trained)
    (Head()(*values, targets).log_probs * upstream).sum().backward()
    for value, other, name in zip(values, exact, names, strict=True):
        if name == trained:
            torch.testing.assert_close(value.grad.double(), other.grad, rtol=1e-5, atol=1e-5)
        else:
            assert value.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("frozen", [False, True], ids=["full", "frozen"])
def test_gradients_have_the_dtype_of_their_tensors(dtype, frozen):
    """Half-precision states under a float32 head in autocast, and the other way round."""
    for of_hidden, of_weight in ((dtype, torch.float32), (torch.float32, dtype)):
        values, targets, _ = draw(5, 4, 7, False)
        hidden = values[0].to(of_hidden).requires_grad_()
        weight = values[1].to(of_weight).requires_grad_(not frozen)
        with torch.autocast("cpu", dtype):
            Head()(hidden, weight, None, targets).log_probs.sum().backward()
        assert hidden.grad.dtype == of_hidden
        assert frozen or weight.grad.dtype == of_weight


def test_warps_are_those_that_liger_launches_with(monkeypatch):
    half, single, on_cpu = (
        SimpleNamespace(is_cuda=is_cuda, device="cuda:1", element_size=lambda size=size: size)
        for is_cuda, size in ((True, 2), (True, 4), (False, 2))
    )
    for capability, expected in (((9, 0), [32, 32, 32]), ((10, 0), [8, 32, 32]), ((12, 0), [8, 32, 32])):
        monkeypatch.setattr(torch.cuda, "get_device_capability", {"cuda:1": capability}.__getitem__)
        assert [liger_head._warps(tile) for tile in (half, single, on_cpu)] == expected
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert liger_head._warps(half) == 16
