"""What only a GPU can show of the heads."""

import pytest
import torch

from tests.logprobs.test_head import BACKENDS, compare, distances, draw
from trl_ext.logprobs import Head, Transform
from trl_ext.logprobs import head as heads
from trl_ext.logprobs.head import STATISTICS


pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def exact_products():
    torch.backends.cuda.matmul.allow_tf32 = False


# Gemma's soft cap, with a vocabulary that fills no block of the kernels
@pytest.mark.parametrize("frozen", [False, True], ids=["full", "frozen"])
@pytest.mark.parametrize("memory", [None, 5.0], ids=["", "tiles"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_soft_cap(backend, memory, frozen):
    transform = Transform(scale=2.0, softcap=30.0)
    compare(backend, (100, 64, 70_001), False, transform, memory, frozen, device="cuda", rtol=1e-3, atol=1e-3)


# With Liger the upstream gradient times the hidden states is rounded too, which TRL does not do
@pytest.mark.parametrize(("backend", "bar"), [("torch", 1.05), ("liger", 1.1)])
@pytest.mark.parametrize("frozen", [False, True], ids=["full", "frozen"])
@pytest.mark.parametrize("memory", [None, 32.0], ids=["", "tiles"])
def test_bfloat16_is_no_further_from_float64_than_trl(memory, frozen, backend, bar):
    ours, theirs = distances(backend, memory, frozen, (512, 256, 151_936), "cuda")
    assert all(mine <= their * bar for mine, their in zip(ours, theirs, strict=True)), (ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_kept_raises_no_peak(backend, monkeypatch):
    """Two steps: the first has no room beyond its own, the second that of the gradients which the first had."""
    values, targets, upstream = draw(5000, 64, 32_003, False, torch.bfloat16, "cuda")
    hidden, weight = (value.requires_grad_() for value in values[:2])
    recomputed = []
    module = heads.BACKENDS[backend]
    plain = module.gradient_tile
    monkeypatch.setattr(module, "gradient_tile", lambda *arguments: (recomputed.append(1), plain(*arguments))[1])

    def step():
        hidden.grad = weight.grad = None
        (Head(backend)(hidden, weight, None, targets).log_probs * upstream).sum().backward()

    step()
    torch.cuda.reset_peak_memory_stats()
    recomputed.clear()
    step()
    assert recomputed  # no room is known
    gradients = torch.empty(3 * 2**30, device="cuda", dtype=torch.uint8)
    del gradients
    peak = torch.cuda.max_memory_allocated()
    recomputed.clear()
    step()
    assert not recomputed
    assert torch.cuda.max_memory_allocated() == peak


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", [False, True], ids=["full", "frozen"])
@pytest.mark.parametrize("memory", [None, 1.0], ids=["", "tiles"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_host_waits_for_nothing(dtype, memory, frozen, backend):
    values, targets, upstream = draw(100, 64, 32_003, True, dtype, "cuda")
    values = [value.requires_grad_(index == 0 or not frozen) for index, value in enumerate(values)]

    def step():
        output = Head(backend, memory)(*values, targets, statistics=STATISTICS)
        (output.log_probs * upstream).sum().backward()

    step()  # compiles the kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
