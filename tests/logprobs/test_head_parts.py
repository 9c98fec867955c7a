"""The parts of the heads, each with numbers worked by hand."""

import contextlib
import math

import pytest
import torch

from tests.logprobs.test_head import draw, reference
from trl_ext.logprobs import Head, Transform, liger_head, torch_head
from trl_ext.logprobs.head import STATISTICS, compute_dtype
from trl_ext.logprobs.liger_head import chunk_multiplier


@pytest.mark.parametrize("rows", [1, 2, 3, 7])
@pytest.mark.parametrize("keep", [False, True], ids=["", "keep"])
def test_both_passes_of_the_torch_head_by_hand(rows, keep):
    """Logits are ln 1, ln 2 and ln 5, whatever the tile: probabilities 1/8, 2/8 and 5/8."""
    weight = torch.tensor([[0.0], [math.log(2)], [math.log(5)]], dtype=torch.float64)
    hidden, targets = torch.ones(3, 1, dtype=torch.float64), torch.tensor([2, 0, 1])
    rows = 3 if keep else rows
    gradient_rows = None if keep else torch.empty_like(hidden)
    (log_probs, entropy, log_sum_sq, mean, top1), saved = torch_head.forward(
        hidden, weight, None, targets, Transform(), STATISTICS, rows, gradient_rows, keep
    )
    assert log_probs.exp().tolist() == pytest.approx([5 / 8, 1 / 8, 2 / 8])
    assert entropy.tolist() == pytest.approx([math.log(8) - (2 * math.log(2) + 5 * math.log(5)) / 8] * 3)
    assert log_sum_sq.exp().tolist() == pytest.approx([30 / 64] * 3)
    assert mean.tolist() == pytest.approx([math.log(10) / 3] * 3)
    assert top1.tolist() == [True, False, False]
    # The mean row of the weight under 1/8, 2/8 and 5/8, taken from the row of the target
    mean_row = (2 * math.log(2) + 5 * math.log(5)) / 8
    slopes = [math.log(5) - mean_row, -mean_row, math.log(2) - mean_row]
    if not keep:
        assert gradient_rows.squeeze(1).tolist() == pytest.approx(slopes)
        assert saved.tolist() == pytest.approx([math.log(8)] * 3)
    else:
        assert saved.tolist() == [pytest.approx([1 / 8, 2 / 8, 5 / 8])] * 3
    upstream = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64)
    # Upstream times (onehot - p), summed over tokens: the gradient of the weight (hidden states are 1) and of a bias
    summed = [10 - 111 / 8, 100 - 222 / 8, 1 - 555 / 8]
    for needs in ((True, True, False), (False, True, False), (True, False, False)):
        arguments = (hidden, weight, None, targets, saved.clone(), Transform(), rows, needs)
        of_hidden, of_weight, of_bias = torch_head.backward(upstream, *arguments)
        assert of_bias is None
        assert (of_hidden is None, of_weight is None) == (not needs[0], not needs[1])
        if needs[0]:
            assert of_hidden.squeeze(1).tolist() == pytest.approx(
                [slope * u for slope, u in zip(slopes, (1, 10, 100), strict=True)]
            )
        if needs[1]:
            assert of_weight.squeeze(1).tolist() == pytest.approx(summed)
    bias = torch.zeros(3, dtype=torch.float64)
    arguments = (hidden, weight, bias, targets, saved.clone(), Transform(), rows, (False, False, True))
    of_hidden, of_weight, of_bias = torch_head.backward(upstream, *arguments)
    assert (of_hidden, of_weight) == (None, None)
    assert of_bias.tolist() == pytest.approx(summed)


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
    assert [torch_head.statistics_dtype(dtype) for dtype in dtypes] == [torch.float64] + [torch.float32] * 3


def test_rows_of_a_tile_by_hand():
    # 32 MiB over 2 ** 15 logits of 4 bytes on a CPU, 256 MiB elsewhere
    assert Head().tile_rows(torch.empty(5000, 1), 2**15, 4) == 256
    assert Head().tile_rows(torch.empty(5000, 1, device="meta"), 2**15, 4) == 2048
    assert Head(memory_mb=1).tile_rows(torch.empty(5000, 1), 2**15, 4) == 8
    assert Head(memory_mb=1).tile_rows(torch.empty(5000, 1), 2**15, 8) == 4
    assert Head().tile_rows(torch.empty(7, 1), 2**15, 4) == 7  # no more than there are
    assert Head().tile_rows(torch.empty(0, 1), 2**15, 4) == 1


def test_what_the_products_run_in():
    hidden = torch.empty(1, 1, dtype=torch.float64)
    assert compute_dtype(hidden) == torch.float64
    with torch.autocast("cpu", torch.float16):
        assert compute_dtype(hidden) == torch.float16
    with torch.autocast("cpu", enabled=False):
        assert compute_dtype(hidden) == torch.float64


def test_what_a_backend_can():
    capped, hot, both = Transform(softcap=2.0), Transform(temperature=0.5), Transform(softcap=2.0, temperature=0.5)
    assert [liger_head.can(each) for each in (Transform(), capped, hot, both)] == [True, True, True, False]
    assert not any(liger_head.can_keep(each) for each in (Transform(), capped))
    assert all(torch_head.can(each) for each in (Transform(), capped, hot, both))
    assert [torch_head.can_keep(each) for each in (Transform(), capped, hot, both)] == [True, False, True, False]
    assert Transform(scale=3.0, temperature=2.0).factor == 1.5


def test_ligers_multiplier_by_hand():
    # All in one tile: the least C with 1000 / (16 C) <= 1
    assert chunk_multiplier(64, (64, 16), 1000) == chunk_multiplier(65, (64, 16), 1000) == 63
    # Tiles of 4 for 10 tokens, 3 of them: the largest C with more than 2 times 16 C below 1000
    assert chunk_multiplier(5, (10, 16), 1000) == chunk_multiplier(4, (10, 16), 1000) == 31
    # 1024 / 32 = 32 exactly would be two tiles
    assert chunk_multiplier(4, (10, 16), 1024) == 31
    # The least there is
    assert chunk_multiplier(1, (100, 64), 10) == chunk_multiplier(100, (100, 64), 10) == 1


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
