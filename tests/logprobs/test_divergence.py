"""Numbers from the logits of several models, in tiles, against full logits in float64."""

from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trl_ext.logprobs import Divergence, Head, Projection, Transform, divergence
from trl_ext.logprobs import head as heads


TOKENS, VOCABULARY = 11, 23
TRANSFORMS = [
    (Transform(), Transform(), Transform()),
    # Three heads, each with its own way to make logits
    (Transform(scale=0.5, softcap=3.0), Transform(scale=2.0), Transform(softcap=1.5, temperature=0.7)),
    (Transform(scale=0.5, temperature=2.0), Transform(), Transform()),
]


def squared(first, second, third):
    """A function of rows with no meaning."""
    return ((first.softmax(1) - second.softmax(1)) ** 2 * (2 + third.tanh())).sum(1)


def gather(*parameters):
    return nullcontext()


def draw(seed, width, tokens, bias, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(tokens, width), (VOCABULARY, width), (VOCABULARY,)]
    values = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return values if bias else [*values[:2], None]


def logits(values, transform):
    hidden, weight, bias = (None if each is None else each.double() for each in values)
    result = (hidden @ weight.t() + (0 if bias is None else bias)) * transform.scale
    if transform.softcap is not None:
        result = transform.softcap * torch.tanh(result / transform.softcap)
    return result / transform.temperature


def tiles_of(rows):
    """MiB in which so many tokens fit."""
    return rows * VOCABULARY * divergence.TILES * 4 / 2**20 + 1e-9


# Which token of the others each of the first model's is: in another order, and some of none
NUMBERS = torch.tensor([4, -1, 0, 2, 1, -1, -1, 3, 6, -1, 5])


@pytest.mark.parametrize("rows", [1, 3, 1000])
@pytest.mark.parametrize("trained", [(0, 1, 2), (0,)], ids=["full", "frozen"])
@pytest.mark.parametrize("transforms", TRANSFORMS)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_against_full_logits(rows, trained, transforms, bias):
    mine = draw(0, 8, TOKENS, bias)
    theirs = [draw(1, 5, 7, True), draw(2, 12, 7, False)]  # other widths, and seven tokens alone
    upstream = torch.randn(TOKENS, generator=torch.Generator().manual_seed(9))
    exact = [None if each is None else each.double().requires_grad_() for each in mine]
    there = NUMBERS >= 0
    full = [
        logits(values, transform)[NUMBERS[there]] for values, transform in zip(theirs, transforms[1:], strict=True)
    ]
    expected = torch.zeros(TOKENS, dtype=torch.float64)
    expected[there] = squared(logits(exact, transforms[0])[there], *full)
    (expected * upstream).sum().backward()

    mine = [None if each is None else each.requires_grad_(i in trained) for i, each in enumerate(mine)]
    others = [values[i].requires_grad_() for values in theirs for i in (0, 1)]
    projections = tuple(
        Projection(*values, transform) for values, transform in zip(theirs, transforms[1:], strict=True)
    )
    values = Divergence(squared, projections, NUMBERS)(Head("torch", tiles_of(rows)), *mine, transforms[0], gather)
    torch.testing.assert_close(values.double(), expected.detach(), rtol=1e-4, atol=1e-5)
    (values * upstream).sum().backward()
    for i, each in enumerate(mine):
        if each is not None and i in trained:
            torch.testing.assert_close(each.grad.double(), exact[i].grad, rtol=1e-4, atol=1e-5)
        elif each is not None:
            assert each.grad is None
    assert all(each.grad is None for each in others)
    assert not mine[0].grad[~there].any()
    with torch.no_grad():
        again = Divergence(squared, projections, NUMBERS)(Head("torch", tiles_of(rows)), *mine, transforms[0], gather)
    torch.testing.assert_close(again, values.detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast(dtype):
    mine, theirs = draw(0, 8, 7, True), [draw(1, 8, 7, True, dtype), draw(2, 8, 7, False)]
    mine = [each.to(dtype).float().requires_grad_() for each in mine]
    exact = [each.detach().double().requires_grad_() for each in mine]
    expected = squared(logits(exact, Transform()), *(logits(values, Transform()) for values in theirs))
    (expected * 1e-9).sum().backward()  # far below what float16 holds
    with torch.autocast("cpu", dtype):
        kept = tuple(divergence.projection(*values, Transform(), copied=False) for values in theirs)
        values = Divergence(squared, kept, torch.arange(7))(Head("torch", tiles_of(3)), *mine, Transform(), gather)
    assert kept[1].hidden.dtype == kept[1].weight.dtype == dtype and values.dtype == torch.float32
    torch.testing.assert_close(values.double(), expected.detach(), rtol=0.05, atol=0.05)
    (values * 1e-9).sum().backward()
    for each, other in zip(mine, exact, strict=True):
        assert (each.grad.double() - other.grad).norm() < 0.05 * other.grad.norm()


@pytest.mark.parametrize("frozen", [False, True], ids=["full", "frozen"])
def test_no_more_than_a_tile_of_logits(frozen):
    mine, theirs = draw(0, 8, TOKENS, False), draw(1, 8, TOKENS, False)
    mine = [mine[0].requires_grad_(), mine[1].requires_grad_(not frozen)]
    largest = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            result = operation(*args, **(kwargs or {}))
            tensor = isinstance(result, torch.Tensor) and result.is_contiguous()  # not the weight, transposed
            if tensor and result.shape[1:] == (VOCABULARY,):
                largest.append(result.shape[0])
            return result

    other = Projection(*theirs, Transform())
    run = Divergence(squared, (other, other), torch.arange(TOKENS))
    with Watch():
        run(Head("torch", tiles_of(2)), *mine, None, Transform(), gather).sum().backward()
        with torch.no_grad():
            run(Head("torch", tiles_of(2)), *mine, None, Transform(), gather)
    assert max(largest) == 2


def test_what_is_kept_counts_all_tiles_in_memory(monkeypatch):
    """The plan of the head is asked with the bytes of all tiles that a function of three takes."""
    asked = []
    plan = heads.Head.plan
    monkeypatch.setattr(heads.Head, "plan", lambda self, *args: asked.append(args[2]) or plan(self, *args))
    values = draw(0, 8, 3, False)
    other = Projection(*values, Transform())
    Divergence(squared, (other, other), torch.arange(3))(Head("torch"), *values, Transform(), gather)
    assert asked == [10 * 4]


def test_no_token_at_all():
    """A process may have nothing to learn from; its backward runs all the same."""
    mine, theirs = draw(0, 8, TOKENS, False), draw(1, 8, 0, False)
    mine = [each.requires_grad_() for each in mine[:2]]
    other = Projection(*theirs, Transform())
    values = Divergence(squared, (other, other), torch.full((TOKENS,), -1))(
        Head("torch"), *mine, None, Transform(), gather
    )
    assert not values.any()
    values.sum().backward()
    assert not mine[0].grad.any() and not mine[1].grad.any()


def test_a_head_is_kept_as_it_is_or_copied():
    hidden, weight, bias = draw(0, 8, 3, True)
    kept = divergence.projection(hidden, weight.requires_grad_(), bias, Transform(), copied=False)
    assert kept.weight.data_ptr() == weight.data_ptr() and not kept.weight.requires_grad
    copied = divergence.projection(hidden, weight, bias, Transform(), copied=True)
    assert copied.weight.data_ptr() != weight.data_ptr() and copied.bias.data_ptr() != bias.data_ptr()
    assert torch.equal(copied.weight, weight) and torch.equal(copied.bias, bias)


def test_sharded_heads_are_gathered_in_the_backward():
    values = [None if each is None else each.requires_grad_() for each in draw(0, 8, 3, True)]
    other = Projection(*draw(1, 8, 3, False), Transform())
    gathered = []

    def watched(*parameters):
        gathered.append(parameters)
        return nullcontext()

    result = Divergence(squared, (other, other), torch.arange(3))(Head("torch"), *values, Transform(), watched)
    assert not gathered
    result.sum().backward()
    assert [[each.data_ptr() for each in parameters] for parameters in gathered] == [
        [values[1].data_ptr(), values[2].data_ptr()]
    ]
