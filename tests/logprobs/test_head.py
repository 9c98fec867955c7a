"""Each head against full logits in float64: values, and gradients under upstream gradients that differ by token."""

import pytest
import torch

from trl_ext.logprobs import Head, Transform
from trl_ext.logprobs.head import STATISTICS


@pytest.fixture(autouse=True)
def unfilled_memory_is_nan():
    """What a head reads and never wrote shows."""
    if torch.cuda.is_available():  # cuBLAS wants an environment variable for it
        yield
        return
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Number(float):
    """As Triton's compiler sees a number; its interpreter hands floats to kernels as they are."""

    def to(self, dtype):
        return self


@pytest.fixture
def interpreted_tanh(monkeypatch):
    """Triton's interpreter has no tanh, so Liger's kernel is given one."""
    if torch.cuda.is_available():
        return
    import triton.language as tl
    from liger_kernel.ops import cross_entropy

    monkeypatch.setattr(cross_entropy, "tanh", lambda x: 2 * tl.sigmoid(2 * x) - 1)


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
    "softcap": Transform(softcap=2.0 if torch.cuda.is_available() else Number(2.0)),
    "all": Transform(scale=0.5, softcap=3.0, temperature=1.5),
}


@pytest.mark.parametrize("frozen", [False, True], ids=["full", "frozen"])
@pytest.mark.parametrize("memory", [None, 1e-3], ids=["one-tile", "tiles"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_torch_head(shape, bias, transform, memory, frozen):
    compare("torch", shape, bias, TRANSFORMS[transform], memory, frozen)


@pytest.mark.usefixtures("interpreted_tanh")
@pytest.mark.parametrize("frozen", [False, True], ids=["full", "frozen"])
@pytest.mark.parametrize("memory", [None, 1e-3], ids=["one-tile", "tiles"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_liger_head(shape, transform, memory, frozen):
    compare("liger", shape, transform in ("scale", "softcap"), TRANSFORMS[transform], memory, frozen)


def test_liger_head_over_several_blocks_of_its_kernels():
    """The last block of each kernel is not full: Liger's takes 32768 logits, ours 1024."""
    compare("liger", (2, 4, 40_001), True, TRANSFORMS["scale"], None, False)


@pytest.mark.gpu
@pytest.mark.parametrize("frozen", [False, True], ids=["full", "frozen"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [*SHAPES, (333, 64, 4099)], ids=str)
def test_head_on_a_gpu(shape, backend, transform, frozen):
    torch.backends.cuda.matmul.allow_tf32 = False
    compare(backend, shape, False, TRANSFORMS[transform], 0.1, frozen, device="cuda", rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("memory", [None, 1e-3])
def test_float64_stays_float64(memory, backend):
    compare(backend, (47, 31, 123), True, TRANSFORMS["all"], memory, False, torch.float64, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("frozen", [False, True], ids=["full", "frozen"])
# With Liger the upstream gradient times the hidden states is rounded too, which TRL does not do. With a tile per token, a
# weight gradient that is summed over tiles in half precision would be further away than TRL's.
@pytest.mark.parametrize(
    ("backend", "memory", "bar"),
    [("torch", None, 1.0), ("torch", 503 * 7 / 2**20, 1.0), ("liger", None, 1.1), ("liger", 503 * 7 / 2**20, 1.1)],
)
def test_bfloat16_is_no_further_from_float64_than_trl(backend, memory, bar, frozen):
    ours, theirs = distances(backend, memory, frozen, (64, 32, 503))
    assert all(mine <= their * bar for mine, their in zip(ours, theirs, strict=True)), (ours, theirs)


def distances(backend, memory, frozen, shape, device="cpu"):
    """Of log-probabilities and gradients from float64, relative: ours and TRL's in bfloat16."""
    from trl.kernels import ChunkedLogProbFunction

    values, targets, upstream = draw(*shape, False, torch.bfloat16, device)
    hidden, weight, _ = values
    h64, w64 = hidden.double().requires_grad_(), weight.double().requires_grad_(not frozen)
    exact = reference(h64, w64, None, targets, Transform())["log_probs"]
    (exact * upstream).sum().backward()

    def measured(run):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
        log_probs = run(h, w)
        (log_probs * upstream).sum().backward()
        pairs = [(log_probs, exact), (h.grad, h64.grad)] + ([] if frozen else [(w.grad, w64.grad)])
        return [((mine.double() - theirs).norm() / theirs.norm()).item() for mine, theirs in pairs]

    ours = measured(lambda h, w: Head(backend, memory)(h, w, None, targets).log_probs)
    return ours, measured(lambda h, w: ChunkedLogProbFunction.apply(h, w, None, targets, 1.0, 32768)[0])


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


def kib(rows, vocabulary=123, width=4):
    """MiB that hold so many rows of logits."""
    return rows * vocabulary * width / 2**20


# The statistics of a step that is logged, and under a soft cap: no further product
@pytest.mark.usefixtures("interpreted_tanh")
@pytest.mark.parametrize("transform", ["plain", "softcap"])
@pytest.mark.parametrize("statistics", [(), STATISTICS], ids=["", "statistics"])
@pytest.mark.parametrize(
    ("mode", "rows", "expected"),
    [
        ("reference", 46, 1),
        ("reference", 7, 1),
        ("frozen", 46, 2),
        ("frozen", 7, 2),
        ("full", 46, 3),
        ("full", 23.5, 3),
        ("full", 15, 4),
        ("full", 7, 4),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_number_of_products(backend, mode, rows, expected, statistics, transform):
    """Of N x H x V multiplications each. 46 tokens: one tile, or two that are kept, or four and seven that are not."""
    values, targets, upstream = draw(46, 32, 123, False)
    hidden, weight = values[0].requires_grad_(mode != "reference"), values[1].requires_grad_(mode == "full")

    def step():
        head = Head(backend, kib(rows))
        output = head(hidden, weight, None, targets, TRANSFORMS[transform], statistics).log_probs
        if mode != "reference":
            (output * upstream).sum().backward()

    assert counted_products(step) / (46 * 32 * 123) == expected


def test_nothing_is_computed_for_gradients_where_none_is_wanted():
    values, targets, _ = draw(46, 32, 123, False)
    hidden, weight = (value.requires_grad_() for value in values[:2])
    with torch.no_grad():
        assert counted_products(lambda: Head()(hidden, weight, None, targets)) == 46 * 32 * 123


def counted_products(function) -> int:
    """Multiplications in matrix products."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        multiplications = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func._schema.name.startswith(("aten::mm", "aten::addmm")):
                left, right = args[-2:] if "addmm" not in func._schema.name else args[1:3]
                self.multiplications += left.shape[0] * left.shape[1] * right.shape[1]
            return func(*args, **(kwargs or {}))

    with Count() as count:
        function()
    return count.multiplications
