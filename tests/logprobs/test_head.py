"""Each head against full logits in float64: values, and gradients under upstream gradients that differ by token."""

import pytest
import torch

from trl_ext.logprobs import Head, Transform
from trl_ext.logprobs.head import STATISTICS


SHAPES = [(1, 3, 5), (3, 8, 31), (47, 31, 123), (64, 16, 1000)]
BACKENDS = ["torch", "liger"]


def reference(hidden, weight, bias, targets, transform):
    logits = hidden @ weight.t() + (0 if bias is None else bias)
    logits = logits * transform.scale
    if transform.softcap is not None:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    logits = logits / transform.temperature
    log_p = logits.log_softmax(-1)
    return {
        "log_probs": log_p.gather(1, targets[:, None]).squeeze(1),
        "entropy": -(log_p.exp() * log_p).sum(1),
        "log_sum_sq_probs": (2 * log_p).logsumexp(1),
        "mean_logits": logits.mean(1),
        "is_top1": logits.argmax(1) == targets,
    }


def draw(tokens, width, vocabulary, bias, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(tokens + width + vocabulary)
    hidden, weight = (
        torch.randn(tokens, width, generator=generator),
        torch.randn(vocabulary, width, generator=generator),
    )
    values = [hidden, weight, torch.randn(vocabulary, generator=generator) if bias else None]
    values = [None if value is None else value.to(device, dtype) for value in values]
    targets = torch.randint(vocabulary, (tokens,), generator=generator).to(device)
    upstream = torch.randn(tokens, generator=generator).to(device)
    return values, targets, upstream


def compare(backend, shape, bias, transform, memory, frozen, dtype=torch.float32, device="cpu", **tolerance):
    tolerance = tolerance or {"rtol": 1e-4, "atol": 2e-5}
    values, targets, upstream = draw(*shape, bias, dtype, device)
    # A copy: in float64 they would else be the values themselves, gradients included
    exact = [None if value is None else value.double().clone().requires_grad_() for value in values]
    trained = [0] if frozen else [0, 1, 2]
    values = [None if v is None else v.requires_grad_(i in trained) for i, v in enumerate(values)]
    expected = reference(*exact, targets, transform)
    (expected["log_probs"] * upstream).sum().backward()
    output = Head(backend, memory)(*values, targets, transform, STATISTICS)
    (output.log_probs * upstream).sum().backward()
    for name, value in expected.items():
        if name == "is_top1":
            assert torch.equal(getattr(output, name), value)
        else:
            torch.testing.assert_close(getattr(output, name).double(), value, **tolerance)
    for i, value in enumerate(values):
        if value is not None and i in trained:
            torch.testing.assert_close(value.grad.double(), exact[i].grad, **tolerance)
        elif value is not None:
            assert value.grad is None


TRANSFORMS = {
    "plain": Transform(),
    "scale": Transform(scale=0.3),
    "temperature": Transform(temperature=0.7),
    "softcap": Transform(softcap=2.0),
    "all": Transform(scale=0.5, softcap=3.0, temperature=1.5),
}


@pytest.mark.parametrize("frozen", [False, True], ids=["full", "frozen"])
@pytest.mark.parametrize("memory", [None, 1e-3], ids=["one-tile", "tiles"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_torch_head(shape, bias, transform, memory, frozen):
    compare("torch", shape, bias, TRANSFORMS[transform], memory, frozen)


# The interpreter has no tanh, so a soft cap takes a GPU
@pytest.mark.parametrize("frozen", [False, True], ids=["full", "frozen"])
@pytest.mark.parametrize("memory", [None, 1e-3], ids=["one-tile", "tiles"])
@pytest.mark.parametrize("transform", ["plain", "scale", "temperature", "all"])
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_liger_head(shape, transform, memory, frozen):
    compare("liger", shape, transform == "scale", TRANSFORMS[transform], memory, frozen)


@pytest.mark.gpu
@pytest.mark.parametrize("frozen", [False, True], ids=["full", "frozen"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [*SHAPES, (333, 64, 4099)], ids=str)
def test_head_on_a_gpu(shape, backend, transform, frozen):
    torch.backends.cuda.matmul.allow_tf32 = False
    compare(backend, shape, False, TRANSFORMS[transform], 0.1, frozen, device="cuda", rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("memory", [None, 1e-3])
def test_float64_stays_float64(memory):
    compare("torch", (47, 31, 123), True, TRANSFORMS["all"], memory, False, torch.float64, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("frozen", [False, True], ids=["full", "frozen"])
# Liger rounds the gradient of the logits once more than TRL. With a tile per token, a weight gradient that is summed over
# tiles in half precision would be further away than TRL's.
@pytest.mark.parametrize(
    ("backend", "memory", "bar"), [("torch", None, 1.0), ("torch", 503 * 7 / 2**20, 1.0), ("liger", None, 1.1), ("liger", 503 * 7 / 2**20, 1.1)]
)
def test_bfloat16_is_no_further_from_float64_than_trl(backend, memory, bar, frozen):
    from trl.kernels import ChunkedLogProbFunction

    values, targets, upstream = draw(64, 32, 503, False, torch.bfloat16)
    hidden, weight, _ = values

    def distances(run):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
        log_probs = run(h, w)
        (log_probs * upstream).sum().backward()
        h64, w64 = hidden.double().requires_grad_(), weight.double().requires_grad_(not frozen)
        exact = reference(h64, w64, None, targets, Transform())["log_probs"]
        (exact * upstream).sum().backward()
        pairs = [(log_probs, exact), (h.grad, h64.grad)] + ([] if frozen else [(w.grad, w64.grad)])
        return [((mine.double() - theirs).norm() / theirs.norm()).item() for mine, theirs in pairs]

    ours = distances(lambda h, w: Head(backend, memory)(h, w, None, targets).log_probs)
    theirs = distances(lambda h, w: ChunkedLogProbFunction.apply(h, w, None, targets, 1.0, 32768)[0])
    assert all(mine <= their * bar for mine, their in zip(ours, theirs, strict=True)), (ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens(backend):
    values, targets, _ = draw(3, 8, 31, False)
    hidden, weight = values[0][:0].requires_grad_(), values[1].requires_grad_()
    output = Head(backend)(hidden, weight, None, targets[:0])
    assert output.log_probs.shape == (0,)
    output.log_probs.sum().backward()
    assert not weight.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend):
    values, targets, upstream = draw(47, 32, 123, False)
    hidden, weight = (value.requires_grad_() for value in values[:2])
    with torch.autocast("cpu", torch.bfloat16):
        output = Head(backend)(hidden, weight, None, targets)
    assert output.log_probs.dtype == torch.float32
    (output.log_probs * upstream).sum().backward()
    expected = reference(*(v.detach().double() for v in (hidden, weight)), None, targets, Transform())["log_probs"]
    torch.testing.assert_close(output.log_probs.double(), expected, rtol=0.02, atol=0.1)
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_work_without_gradients(backend, monkeypatch):
    """The reference computes logits once: one product a tile, and nothing is kept."""
    values, targets, _ = draw(47, 32, 123, False)
    hidden, weight = values[0], values[1].requires_grad_()
    products = counted_products(lambda: Head(backend)(hidden, weight, None, targets), no_grad=True)
    assert products == 1


@pytest.mark.parametrize(
    ("backend", "frozen", "memory", "expected"),
    [
        ("torch", True, None, 2),
        ("torch", False, None, 3),
        ("torch", False, 0.5 * 47 * 123 * 4 / 2**20, 3),  # two tiles, kept
        ("torch", False, 0.26 * 47 * 123 * 4 / 2**20, 4 * 4),  # four tiles
        ("liger", True, None, 2),
        ("liger", False, None, 4),
    ],
)
def test_number_of_products(backend, frozen, memory, expected):
    values, targets, upstream = draw(46, 32, 123, False)
    hidden, weight = values[0].requires_grad_(), values[1].requires_grad_(not frozen)
    if backend == "liger":
        memory = 64  # one tile

    def step():
        (Head(backend, memory)(hidden, weight, None, targets).log_probs * upstream).sum().backward()

    assert counted_products(step) == expected


def counted_products(function, no_grad=False) -> int:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        products = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.products += func._schema.name in ("aten::mm", "aten::addmm", "aten::addmm_")
            return func(*args, **(kwargs or {}))

    with Count() as count, torch.set_grad_enabled(not no_grad):
        function()
    return count.products
