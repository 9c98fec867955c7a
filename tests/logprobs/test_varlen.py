"""Attention over sequences of any length: tables and values by hand, and what models of many families make of them."""

import dataclasses
import itertools
import types

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from trl.trainer.utils import add_fused_lm_head

from tests.logprobs.families import EXACT, MORE, batch, tiny
from tests.logprobs.test_layout import layout_of
from tests.logprobs.test_shared_prefix import assert_same
from trl_ext.logprobs import varlen
from trl_ext.logprobs.varlen import SequenceMask, attend, serve_sequences


EAGER = {"gemma2", "gpt_oss"}  # which attend through masks
FAMILIES = {name: options for name, options in {**EXACT, **MORE}.items() if name not in EAGER}


@pytest.fixture(autouse=True)
def served():
    """Attention functions that take sequences, and the library's own again afterwards."""
    before = dict(AttentionInterface._global_mapping)
    for name in ("sdpa", "flash_attention_2"):
        serve_sequences(name)
    yield
    AttentionInterface._global_mapping.update(before)


# Tables


def tables(layout):
    keys, query_ends, key_ends, queries, seen = vars(layout.sequences).values()
    assert (query_ends.diff().tolist(), key_ends.diff().tolist()) == (queries, seen)
    return [*(value.tolist() for value in (keys, query_ends, key_ends)), max(queries), max(seen)]


def unpadded(rows, prompts, width=None):
    return layout_of(rows, prompts, width, unpadded=True)


def test_a_pair_slot_by_slot():
    """
    The example of `shared_prefix.py`: p0 p1 | p2 c0 c1 | p2 r0 r1 r2. The first completion is a plain row; of the second the four
    tokens of its part ask, and see p0 and p1 in front of themselves.
    """
    layout = unpadded([([1, 2, 3], [4, 5, 6]), ([1, 2, 3], [7, 8, 9, 10])], [0, 0])
    assert layout.tokens.tolist() == [[0, 1, 2, 3, 4, 9, 10, 11, 12]]
    assert layout.positions.tolist() == [[0, 1, 2, 3, 4, 2, 3, 4, 5]]
    assert tables(layout) == [[0, 1, 2, 3, 4, 0, 1, 5, 6, 7, 8], [0, 5, 9], [0, 5, 11], 5, 6]
    assert layout.sequences.query_ends.dtype == layout.sequences.key_ends.dtype == torch.int32
    assert layout.sequences.keys.dtype == torch.int64


def test_all_prompts_lie_in_one_row():
    """The longest first: prompt 1 of two tokens with one and two more, then prompt 0 with three completions of one token."""
    rows = [([1, 2], [3]), ([5, 6, 7], [8]), ([1, 2], [4]), ([5, 6, 7], [9, 9]), ([1, 2], [5])]
    layout = unpadded(rows, [0, 1, 0, 1, 0])
    assert layout.tokens.tolist() == [[5, 6, 7, 17, 18, 0, 1, 11, 21]]
    assert layout.positions.tolist() == [[0, 1, 2, 2, 3, 0, 1, 1, 1]]
    assert layout.slots.tolist() == [[0, 6, 0, 0], [0, 0, 2, 0], [0, 7, 0, 0], [0, 0, 3, 4], [0, 8, 0, 0]]
    keys = [[0, 1, 2], [0, 1, 3, 4], [5, 6], [5, 7], [5, 8]]
    assert tables(layout) == [[slot for each in keys for slot in each], [0, 3, 5, 7, 8, 9], [0, 3, 7, 9, 11, 13], 3, 4]


def test_rows_that_hold_little():
    # No prompt in front of its last token: nothing is shared
    assert tables(unpadded([([1], [2, 3]), ([1], [4])], [0, 0])) == [[0, 1, 2], [0, 2, 3], [0, 2, 3], 2, 2]
    # The first completion is empty: the prompt asks alone
    assert tables(unpadded([([1, 2, 3], []), ([1, 2, 3], [4])], [0, 0])) == [
        [0, 1, 0, 1, 2],
        [0, 2, 3],
        [0, 2, 5],
        2,
        3,
    ]
    # The last one is: it asks for nothing
    assert tables(unpadded([([1, 2, 3], [4]), ([1, 2, 3], [])], [0, 0])) == [[0, 1, 2], [0, 3], [0, 3], 3, 3]
    # Nothing predicts anything: one slot is left, and sees itself
    layout = unpadded([([1], []), ([1], [])], [0, 0])
    assert layout.tokens.tolist() == [[0]] and tables(layout) == [[0], [0, 1], [0, 1], 1, 1]
    assert unpadded([([], []), ([], [])], [0, 0], width=3) is None


def test_masks_have_no_sequences():
    assert layout_of([([1, 2], [3]), ([1, 2], [4])], [0, 0]).sequences is None


# Values


def plain_attention(query, key, value, sees, scale):
    """Softmax of the products, in float64, one head and one query at a time."""
    output = torch.zeros(*query.shape[:2], value.size(-1), dtype=torch.float64)
    for head in range(query.size(1)):
        served = head // (query.size(1) // key.size(1))
        for place in range(len(query)):
            scores = torch.stack([(query[place, head] * key[other, served]).sum() * scale for other in sees[place]])
            weights = scores.exp() / scores.exp().sum()
            output[place, head] = sum(w * value[other, served] for w, other in zip(weights, sees[place], strict=True))
    return output


SEQUENCES = unpadded(
    [([1, 2, 3], [4, 5, 6]), ([1, 2, 3], [7, 8, 9, 10]), ([9, 9], [9]), ([9, 9], [8])], [0, 0, 1, 1]
).sequences
# What each of the twelve slots sees: p0 p1 | p2 c0 c1 | p2 r0 r1 r2, then q0 | q1 | q1
SEES = [
    [0],
    [0, 1],
    [0, 1, 2],
    [0, 1, 2, 3],
    [0, 1, 2, 3, 4],
    [0, 1, 5],
    [0, 1, 5, 6],
    [0, 1, 5, 6, 7],
    [0, 1, 5, 6, 7, 8],
    [9],
    [9, 10],
    [9, 11],
]


def draw(heads=4, served=2, size=8, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    shapes = ((12, heads, size), (12, served, size), (12, served, size))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in shapes]


@pytest.mark.parametrize("served", [1, 2, 4])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("window", [None, 1, 3])
def test_attention(window, scale, served):
    query, key, value = draw(served=served)
    sees = SEES if window is None else [seen[-window:] for seen in SEES]
    expected = plain_attention(query, key, value, sees, 8**-0.5 if scale is None else scale)
    torch.testing.assert_close(attend(query, key, value, SequenceMask(SEQUENCES, window), scale), expected)


def test_what_is_added_by_hand():
    """Two queries at the end of three keys and of four; kept by shape and dtype."""
    mask, windowed = SequenceMask(SEQUENCES), SequenceMask(SEQUENCES, 2)
    hidden = -torch.inf
    like = torch.zeros(1)
    assert mask.hidden(2, 3, like).tolist() == [[0, 0, hidden], [0, 0, 0]]
    assert mask.hidden(2, 4, like).tolist() == [[0, 0, 0, hidden], [0, 0, 0, 0]]
    assert windowed.hidden(2, 4, like).tolist() == [[hidden, 0, 0, hidden], [hidden, hidden, 0, 0]]
    assert mask.hidden(2, 3, like) is mask.hidden(2, 3, like)
    assert mask.hidden(2, 3, like.double()).dtype == torch.float64


def flash(query, key, value, query_ends, key_ends, longest_query, longest_key, scale, window, kernel_calls):
    """FlashAttention's contract: queries stand at the end of their keys, and see `window` keys before their own."""
    assert query_ends.dtype == key_ends.dtype == torch.int32 and len(query_ends) == len(key_ends)
    assert (query_ends.diff() > 0).all() and longest_query == query_ends.diff().max()
    assert longest_key == key_ends.diff().max()
    assert key_ends[-1] == len(key) == len(value) and query_ends[-1] == len(query)
    kernel_calls.append(window)
    output = []
    for i, (first, last) in enumerate(itertools.pairwise(query_ends)):
        k, v = (each[key_ends[i] : key_ends[i + 1]].double() for each in (key, value))
        k, v = (each.repeat_interleave(query.size(1) // key.size(1), dim=1) for each in (k, v))
        scores = torch.einsum("qhd,khd->hqk", query[first:last].double(), k)
        scores = scores * (query.size(-1) ** -0.5 if scale is None else scale)
        behind = torch.arange(len(k) - (last - first), len(k)).unsqueeze(1) - torch.arange(len(k))
        hidden = (behind < 0) | (behind > window if window >= 0 else torch.zeros_like(behind, dtype=torch.bool))
        output.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v))
    return torch.cat(output).to(query.dtype)


@pytest.fixture
def kernel(monkeypatch):
    """torch's kernel in plain torch; the windows that it was called with."""
    calls = []

    def varlen_attn(
        q, k, v, query_ends, key_ends, longest_query, longest_key, *, scale, window_size=(-1, -1), enable_gqa=False
    ):
        assert (enable_gqa or q.size(1) == k.size(1)) and window_size[1] == 0
        assert q.dtype == k.dtype == v.dtype
        return flash(q, k, v, query_ends, key_ends, longest_query, longest_key, scale, window_size[0], calls)

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    monkeypatch.setattr(varlen, "_kernel_takes", lambda query, value: True)
    return calls


@pytest.mark.parametrize("served", [2, 4])
@pytest.mark.parametrize("window", [None, 1, 3])
def test_what_the_kernel_is_asked(window, served, kernel):
    query, key, value = draw(served=served)
    sees = SEES if window is None else [seen[-window:] for seen in SEES]
    output = attend(query, key, value, SequenceMask(SEQUENCES, window))
    torch.testing.assert_close(output, plain_attention(query, key, value, sees, 8**-0.5))
    assert kernel == [-1 if window is None else window - 1]


@pytest.mark.parametrize("key_heads", [2, 4])
@pytest.mark.parametrize("window", [None, 3])
def test_torchs_own_function_takes_the_call(window, key_heads, monkeypatch):
    """Forward and backward, with tensors that have shapes and no values: all of torch's function but the kernel."""
    monkeypatch.setattr(varlen, "_kernel_takes", lambda query, value: True)
    monkeypatch.setattr(varlen, "_one_by_one", None)
    with FakeTensorMode(allow_non_fake_inputs=True):
        query, key, value = (
            torch.empty(1, heads, 12, 64, dtype=torch.bfloat16, requires_grad=True)
            for heads in (4, key_heads, key_heads)
        )
        fake = {name: each.clone() for name, each in vars(SEQUENCES).items() if isinstance(each, torch.Tensor)}
        mask = SequenceMask(dataclasses.replace(SEQUENCES, **fake), window)
        output, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](nn.Module(), query, key, value, mask, scaling=0.3)
        assert output.shape == (1, 12, 4, 64) and output.dtype == torch.bfloat16
        output.sum().backward()
        assert [each.grad.shape for each in (query, key, value)] == [each.shape for each in (query, key, value)]


def test_what_the_kernel_takes(monkeypatch):
    def taken(size=64, value_size=64, dtype=torch.bfloat16, cuda=True):
        query, value = (
            types.SimpleNamespace(dtype=dtype, is_cuda=cuda, size=lambda _, n=n: n) for n in (size, value_size)
        )
        return varlen._kernel_takes(query, value)

    assert taken() and taken(dtype=torch.float16) and taken(256, 256) and taken(8, 8)
    assert not taken(264, 264) and not taken(60, 60) and not taken(64, 32)
    assert not taken(dtype=torch.float32) and not taken(cuda=False)
    for other in (None, lambda q, k, v, query_ends, key_ends, longest_query, longest_key, is_causal=False: None):
        monkeypatch.setattr(varlen, "varlen_attn", other)  # torch 2.9, torch 2.10
        assert not taken() and not varlen.has_kernel()


def test_a_kernel_that_shares_heads_unasked(monkeypatch):
    """torch 2.11: no argument says that several heads of queries share one of keys."""
    monkeypatch.setattr(varlen, "_kernel_takes", lambda query, value: True)
    query, key, value = draw(served=2)

    def varlen_attn(*args, scale=None, window_size=(-1, -1)):
        return flash(*args, scale, window_size[0], [])

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    torch.testing.assert_close(
        attend(query, key, value, SequenceMask(SEQUENCES)), plain_attention(query, key, value, SEES, 8**-0.5)
    )


# Models


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name):
    assert_same(tiny(name, FAMILIES[name]), batch(), groups=3, unpadded=True)


@pytest.mark.parametrize("name", ["qwen3-window", "gemma3_text", "mistral-window", "llama"])
def test_family_through_the_kernel(name, kernel):
    assert_same(tiny(name, FAMILIES[name]), batch(), groups=3, unpadded=True)
    windows = {"qwen3-window": {4, -1}, "gemma3_text": {4, -1}, "mistral-window": {4}, "llama": {-1}}
    assert set(kernel) == windows[name]


@pytest.fixture
def flash_attention(monkeypatch):
    """The package of FlashAttention, as far as transformers asks for it, in plain torch; the windows that it was called with."""
    from transformers import modeling_flash_attention_utils as utils

    calls = []

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
        window_size=(-1, -1), softcap=0.0, deterministic=False,
    ):  # fmt: skip
        assert causal and not dropout_p
        return flash(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, window_size[0], calls
        )

    def refuse(*args, **kwargs):
        raise AssertionError("not the function for sequences of varying length")

    functions = (refuse, flash_attn_varlen_func, refuse, refuse, refuse)
    kwargs_of = utils._lazy_define_process_function(flash_attn_varlen_func)
    monkeypatch.setattr(utils, "lazy_import_flash_attention", lambda *args, **kwargs: (functions, (kwargs_of, None)))
    return calls


@pytest.mark.parametrize("name", ["qwen3-window", "gemma3_text", "mistral-window", "llama"])
def test_family_through_flash_attention(name, flash_attention):
    """Plain rows through SDPA, shared ones through what transformers calls FlashAttention with."""
    model = tiny(name, FAMILIES[name])

    def shared_rows_only(module, args, kwargs):
        rows = kwargs["input_ids"]
        module.config._attn_implementation = "flash_attention_2" if len(rows) == 1 else "sdpa"

    model.base_model.register_forward_pre_hook(shared_rows_only, with_kwargs=True)
    assert_same(model, batch(), groups=3, unpadded=True)
    windows = {"qwen3-window": {4, -1}, "gemma3_text": {4, -1}, "mistral-window": {4}, "llama": {-1}}
    assert {window if window < 10**4 else -1 for window in flash_attention} == windows[name]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3_moe"])
def test_gradient_checkpointing(name, reentrant):
    """The layers run again in the backward, when everything that was open in the forward is closed."""
    model = tiny(name, FAMILIES[name]).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_same(model, batch(), groups=3, unpadded=True)


@pytest.mark.parametrize("members", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ["llama", "qwen3-window"])
def test_group_size(name, members):
    assert_same(tiny(name, FAMILIES[name]), batch(members=members), groups=3, unpadded=True)


def test_tied_head():
    model = tiny("llama", {"tie_word_embeddings": True})
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_same(model, batch(), groups=3, unpadded=True)


def test_lora():
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(tiny("qwen3-window", FAMILIES["qwen3-window"]), config)
    model.train()
    add_fused_lm_head(model.get_base_model())
    assert_same(model.get_base_model(), batch(), groups=3, unpadded=True)


def test_lengths_from_one_to_thousands():
    """Prompts of 1 to 1500 tokens and completions of 1 to 700, under a window of 64 in one layer of two."""
    options = {**FAMILIES["qwen3-window"], "sliding_window": 64, "max_position_embeddings": 4096}
    model = tiny("qwen3-window", options)
    generator = torch.Generator().manual_seed(0)
    lengths = [(1, 1), (1500, 700), (70, 3), (1, 400), (1500, 1), (70, 130)]
    ids, attention, scored = (torch.zeros(6, 2200, dtype=torch.long) for _ in range(3))
    prompts = torch.randint(3, 97, (3, 1500), generator=generator)
    for row, (prompt, completion) in enumerate(lengths):
        ids[row, :prompt] = prompts[row % 3, :prompt]
        ids[row, prompt : prompt + completion] = torch.randint(3, 97, (completion,), generator=generator)
        attention[row, : prompt + completion] = 1
        scored[row, prompt : prompt + completion] = 1
    inputs = {"input_ids": ids, "attention_mask": attention, "completion_mask": scored}
    assert_same(model, inputs, groups=3, unpadded=True)


@pytest.mark.parametrize("name", ["qwen3", "llama"])
def test_autocast(name, kernel):
    """Norms of queries and keys leave float32 behind, beside values in half precision."""
    model = tiny(name, FAMILIES[name])
    layout = layout_of([([1, 2, 3], [4, 5]), ([1, 2, 3], [7, 8])], [0, 0], unpadded=True)
    # A cache would bring all of them into one dtype
    given = {"input_ids": torch.tensor([[1, 2, 3, 4, 3, 7]]), "position_ids": layout.positions, "use_cache": False}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with layout.masks():
            states = model.model(**given, attention_mask=torch.ones(1, 6)).last_hidden_state
        alone = model.model(input_ids=torch.tensor([[1, 2, 3, 7]])).last_hidden_state[0]
    assert len(kernel) == 2
    torch.testing.assert_close(states[0, [0, 1, 4, 5]].float(), alone.float(), rtol=0.05, atol=0.05)


def test_eager_attention_fails_loudly():
    model = tiny("gemma2", EXACT["gemma2"])
    with pytest.raises(
        ValueError, match="`share_prefix=True`, but rows that share a prompt are not exact: the model fails"
    ):
        assert_same(model, batch(), groups=3, unpadded=True)


def test_a_mask_of_its_own_is_refused():
    """A model that lets images see each other, for one, hands transformers a function of its own."""
    from transformers.masking_utils import create_causal_mask

    config, layout = tiny("llama", {}).config, layout_of([([1, 2], [3]), ([1, 2], [4])], [0, 0], unpadded=True)
    given = {"attention_mask": torch.ones(1, 3), "past_key_values": None, "position_ids": layout.positions}
    with pytest.raises(RuntimeError, match="by a mask of its own"), layout.masks():
        create_causal_mask(config, torch.zeros(1, 3, 8), **given, or_mask_function=lambda *args: True)


def test_other_models_attend_as_before():
    function = ALL_ATTENTION_FUNCTIONS["sdpa"]
    serve_sequences("sdpa")
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is function  # wrapped once
    query, key, value = (torch.randn(2, 4, 5, 8) for _ in range(3))
    module = nn.Module()
    output, weights = function(module, query, key, value, None, scaling=0.5)
    expected = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.5)
    assert torch.equal(output, expected.transpose(1, 2)) and weights is None


# On a GPU


def on_a_gpu(tensors):
    return dataclasses.replace(
        tensors, **{name: value.cuda() for name, value in vars(tensors).items() if isinstance(value, torch.Tensor)}
    )


@pytest.mark.gpu
@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("served", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernel_on_a_gpu(dtype, window, served, size):
    """torch's kernel against float64, forward and backward."""
    values = draw(served=served, size=size, dtype=dtype, device="cuda")
    upstream = torch.randn(12, 4, size, generator=torch.Generator().manual_seed(1))
    exact = [value.cpu().double().requires_grad_() for value in values]
    sees = SEES if window is None else [seen[-window:] for seen in SEES]
    expected = plain_attention(*exact, sees, size**-0.5)
    (expected * upstream).sum().backward()
    values = [value.requires_grad_() for value in values]
    assert varlen._kernel_takes(values[0], values[2])
    output = attend(*values, SequenceMask(on_a_gpu(SEQUENCES), window))
    (output * upstream.cuda()).sum().backward()
    torch.testing.assert_close(output.cpu().double(), expected, rtol=0.02, atol=0.02)
    for value, other in zip(values, exact, strict=True):
        torch.testing.assert_close(value.grad.cpu().double(), other.grad, rtol=0.03, atol=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["qwen3", "gemma3_text", "mistral-window"])
@pytest.mark.parametrize("implementation", ["sdpa", "flash_attention_2"])
def test_family_on_a_gpu(name, implementation):
    """The first batch's own comparison with plain rows; then lengths change, and nothing is compiled."""
    from tests.logprobs.test_shared_prefix import shared

    if implementation == "flash_attention_2":
        pytest.importorskip("flash_attn")
    options = {**FAMILIES[name], "head_dim": 64, "hidden_size": 128, "initializer_range": 0.1}
    model = tiny(name, options, attn_implementation=implementation).to("cuda", torch.bfloat16)
    add_fused_lm_head(model)
    before = torch._dynamo.utils.counters["frames"]["total"]
    for seed in range(4):
        inputs = {key: value.cuda() for key, value in batch(prompts=(40, 17, 9), seed=seed).items()}
        shared(model, inputs, 3, unpadded=True).log_probs.sum().backward()
    assert torch._dynamo.utils.counters["frames"]["total"] == before
