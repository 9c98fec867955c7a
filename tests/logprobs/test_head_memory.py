"""How large a tile is, what is kept, in which dtype gradients are summed, and that the host waits for none of it."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.logprobs.test_head import counted_products, draw, kib, reference
from trl_ext.logprobs import Head, Transform, memory
from trl_ext.logprobs import head as heads
from trl_ext.logprobs.head import STATISTICS
from trl_ext.logprobs.memory import Plan, free_and_room, plan_for_budget, plan_for_memory


GIB = 2**30


# The rule


def test_a_budget_by_hand():
    # 2 ** 15 logits of 4 bytes: 8 tokens per MiB
    assert plan_for_budget(32, 5000, 2**15, 4) == Plan(256, False)
    assert plan_for_budget(1, 5000, 2**15, 8) == Plan(4, False)
    assert [plan_for_budget(1, tokens, 2**15, 4) for tokens in (7, 8, 24, 25)] == [
        Plan(7, True), Plan(8, True), Plan(8, True), Plan(8, False)
    ]  # fmt: skip
    assert plan_for_budget(1e-6, 5000, 2**15, 4) == Plan(1, False)
    assert plan_for_budget(32, 0, 2**15, 4).rows == 1
    for vocabulary in (32_000, 151_936, 262_144):
        rows = plan_for_budget(64, 4096, vocabulary, 4).rows
        assert rows * vocabulary * 4 <= 64 * 2**20 < (rows + 1) * vocabulary * 4


@pytest.mark.parametrize(
    ("free", "room", "tokens", "rows"),
    [
        # 4096 tokens of 2 ** 17 logits of 2 bytes: 1 GiB, a quarter
        (4 * GIB, GIB, 16_384, 4096),
        (4 * GIB - 1, GIB, 16_384, 2048),
        (4 * GIB, GIB - 1, 16_384, 2048),  # the peak would rise by a byte
        (4 * GIB, GIB, 4095, 4095),
        (2 * GIB, GIB, 3000, 1500),  # 750 MiB would be more than a quarter
        (80 * GIB, 0, 16_384, 1024),  # 256 MiB whatever the peak
        (80 * GIB, -GIB, 16_384, 1024),
        (2**20, GIB, 16_384, 1),  # 256 KiB is a quarter, and one token
        (0, 0, 16_384, 1),
        (4 * GIB, GIB, 0, 1),
    ],
)
def test_a_tile_raises_no_peak_and_takes_a_quarter_of_the_free_memory(free, room, tokens, rows):
    assert plan_for_memory(free, room, tokens, 2**17, 2).rows == rows


@pytest.mark.parametrize(
    ("free", "room", "keep"),
    [
        (8 * GIB, 2 * GIB, True),  # 8192 tokens: 2 GiB
        (8 * GIB, 2 * GIB - 1, False),
        (4 * GIB, 8 * GIB, True),
        (4 * GIB - 1, 8 * GIB, False),
        (8 * GIB, -GIB, False),
    ],
)
def test_what_is_kept_raises_no_peak(free, room, keep):
    assert plan_for_memory(free, room, 8192, 2**17, 2).keep is keep


def test_counters_of_a_device(monkeypatch):
    counters = {"memory_allocated": 30, "memory_reserved": 50, "max_memory_allocated": 42, "mem_get_info": (100, 1000)}
    device = SimpleNamespace(type="gpu", index=3)
    asked = []

    def read(name):
        return lambda which: (asked.append(which), counters[name])[1]

    monkeypatch.setattr(torch, "gpu", SimpleNamespace(**{name: read(name) for name in counters}), raising=False)
    # 100 of the device and 20 that are reserved and not in use; 12 less than at the peak
    assert free_and_room(device) == (120, 12)
    assert asked == [device] * len(asked)
    # A device that does not say, and two that torch has no counters of
    monkeypatch.delattr(torch.gpu, "mem_get_info")
    assert [free_and_room(each) for each in (device, torch.device("cpu"), torch.device("meta"))] == [None] * 3


def test_which_rule(monkeypatch):
    hidden, weight = torch.empty(5000, 1), torch.empty(2**15, 1)
    assert Head().plan(hidden, weight, 4, True).rows == 256  # 32 MiB on a CPU
    assert Head().plan(hidden.to("meta"), weight, 4, True).rows == 2048  # 256 elsewhere
    assert Head(memory_mb=1).plan(hidden, weight, 4, True).rows == 8
    assert Head().plan(hidden, torch.empty(2**14, 1), 4, True).rows == 512
    # A device that says what it has: gradients in float32 stand beside what is kept, 20 kB and 128 KiB, the second of a trained head
    needed = 5000 * 2**15 * 4
    for trained, beside in ((True, 20_000 + 2**17), (False, 20_000)):
        for missing in (0, 1):
            monkeypatch.setattr(heads, "free_and_room", lambda device, n=needed + beside - missing: (4 * GIB, n))
            assert Head().plan(hidden, weight, 4, trained) == Plan(4096, not missing)
    assert Head(memory_mb=1).plan(hidden, weight, 4, True) == Plan(8, False)  # what was asked for
    # A reference needs a tile alone
    tile = 4096 * 2**15 * 4
    monkeypatch.setattr(heads, "free_and_room", lambda device: (4 * GIB, tile + 20_000))
    assert Head().plan(hidden, weight, 4, False).rows == 4096
    assert Head().plan(hidden, weight, 4, True).rows == 2048


@pytest.mark.parametrize("backend", ["torch", "liger"])
@pytest.mark.parametrize(("room", "expected"), [(GIB, 3), (0, 4)])
def test_the_memory_of_a_device_decides_what_is_kept(backend, room, expected, monkeypatch):
    monkeypatch.setattr(heads, "free_and_room", lambda device: (GIB, room))
    monkeypatch.setattr(memory, "TILE_TOKENS", 5)
    values, targets, upstream = draw(13, 8, 31, True)
    exact = [value.double().requires_grad_() for value in values]
    (reference(*exact, targets, Transform())["log_probs"] * upstream).sum().backward()
    for value in values:
        value.requires_grad_()

    def step():
        (Head(backend)(*values, targets).log_probs * upstream).sum().backward()

    # The gradient of the bias is a product of one column
    assert counted_products(step) == 13 * 31 * (8 * expected + 1)
    for value, other in zip(values, exact, strict=True):
        torch.testing.assert_close(value.grad.double(), other.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "liger"])
def test_evaluation_and_a_frozen_head_keep_nothing(backend, monkeypatch):
    monkeypatch.setattr(heads, "free_and_room", lambda device: (GIB, GIB))
    monkeypatch.setattr(memory, "TILE_TOKENS", 5)
    values, targets, _ = draw(13, 4, 31, False)
    hidden, weight = values[0].requires_grad_(), values[1]
    largest = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            result = operation(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.shape[1:] == (31,):
                largest.append(result.shape[0])
            return result

    with Watch():
        Head(backend)(hidden, weight, None, targets).log_probs.sum().backward()
        with torch.no_grad():
            Head(backend)(hidden, weight.requires_grad_(), None, targets, statistics=STATISTICS)
    assert max(largest) == 5


@pytest.mark.parametrize(("softcap", "expected"), [(None, [13]), (4.0, [5, 5, 3])])
def test_what_is_kept_under_a_soft_cap_is_computed_in_tiles(softcap, expected, monkeypatch):
    """The derivative of a soft cap takes a second tile, which would else be as large as all that is kept."""
    seen = []
    plain = heads.torch_head.forward_tile
    monkeypatch.setattr(
        heads.torch_head,
        "forward_tile",
        lambda tile, *rest, **more: (seen.append(len(tile)), plain(tile, *rest, **more)),
    )
    values, targets, _ = draw(13, 8, 31, False)
    Head("torch", kib(5, 31))(values[0], values[1].requires_grad_(), None, targets, Transform(softcap=softcap))
    assert seen == expected


# What gradients are summed in


@pytest.mark.parametrize(
    ("backend", "dtype", "of_weight", "rows", "summed"),
    [
        ("liger", torch.bfloat16, torch.bfloat16, 13, torch.bfloat16),  # one product
        ("liger", torch.bfloat16, torch.bfloat16, 4, torch.float32),
        ("liger", torch.bfloat16, torch.float32, 13, torch.float32),  # the gradient is wanted in float32
        ("liger", torch.float16, torch.float16, 13, torch.float32),
        ("torch", torch.bfloat16, torch.bfloat16, 13, torch.float32),
        ("torch", torch.float32, torch.float32, 4, torch.float32),
    ],
)
def test_what_the_gradient_of_the_weight_is_summed_in(backend, dtype, of_weight, rows, summed):
    values, targets, upstream = draw(13, 8, 31, False)
    hidden, weight = values[0].to(dtype).requires_grad_(), values[1].to(of_weight).requires_grad_()
    seen = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            result = operation(*args, **(kwargs or {}))
            if operation._schema.name == "aten::addmm" and result.shape == weight.shape:
                seen.add(result.dtype)
            return result

    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32), Watch():
        head = Head(backend, kib(rows, 31, dtype.itemsize))
        (head(hidden, weight, None, targets).log_probs * upstream).sum().backward()
    assert seen == {summed} and weight.grad.dtype == of_weight


@pytest.mark.parametrize("backend", ["torch", "liger"])
@pytest.mark.parametrize("rows", [13, 4])
def test_float16_takes_small_gradients(backend, rows):
    """Far below what float16 holds (6e-8), as in a mean over many tokens; and none at all."""
    values, targets, upstream = draw(13, 8, 31, True)
    values = [value.half().float().requires_grad_() for value in values]
    exact = [value.detach().double().requires_grad_() for value in values]
    (reference(*exact, targets, Transform())["log_probs"] * upstream * 1e-9).sum().backward()

    def gradients(factor):
        with torch.autocast("cpu", torch.float16):
            output = Head(backend, kib(rows, 31, 2))(*values, targets)
        return torch.autograd.grad((output.log_probs * upstream * factor).sum(), values)

    for value, other in zip(gradients(1e-9), exact, strict=True):
        assert (value.double() - other.grad).norm() < 0.01 * other.grad.norm()
    assert not any(value.any() for value in gradients(0.0))


@pytest.mark.parametrize("backend", ["torch", "liger"])
def test_a_graph_that_is_kept_can_be_walked_again(backend):
    values, targets, upstream = draw(13, 8, 31, False)
    hidden, weight = (value.requires_grad_() for value in values[:2])
    loss = (Head(backend)(hidden, weight, None, targets).log_probs * upstream).sum()
    first, second = (torch.autograd.grad(loss, (hidden, weight), retain_graph=True) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


# The host


@pytest.fixture
def reads(monkeypatch):
    """Names of operations whose result the host has to wait for."""
    found = []
    waits = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal.default", "is_nonzero")

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            if any(part in str(operation) for part in waits):
                found.append(str(operation))
            return operation(*args, **(kwargs or {}))

    tolist = torch.Tensor.tolist  # is no operation
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: (found.append("tolist"), tolist(tensor))[1])
    with Reads():
        yield found


@pytest.mark.parametrize("backend", ["torch", "liger"])
@pytest.mark.parametrize("frozen", [False, True], ids=["full", "frozen"])
@pytest.mark.parametrize("rows", [13, 4], ids=["kept", "tiles"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_host_waits_for_nothing(backend, frozen, rows, dtype, reads):
    values, targets, upstream = draw(13, 8, 31, True)
    hidden, weight, bias = (value.requires_grad_(i == 0 or not frozen) for i, value in enumerate(values))
    with torch.autocast("cpu", torch.float16, enabled=dtype == torch.float16):
        head = Head(backend, kib(rows, 31, dtype.itemsize))
        output = head(hidden, weight, bias, targets, statistics=STATISTICS)
    (output.log_probs * upstream).sum().backward()
    assert not reads


def test_reads_are_seen(reads):
    torch.ones(2).sum().item()
    bool(torch.ones(()))
    torch.ones(2).tolist()
    assert len(reads) == 3
