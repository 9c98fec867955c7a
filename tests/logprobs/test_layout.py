"""How prompts and completions are laid out in shared rows, slot by slot; and which models take such rows."""

import types

import pytest
import torch
from torch import nn

from tests.logprobs.families import tiny
from trl_ext.logprobs import SharedPrefixLayout, pays, shared_prefix_layout, takes_masks, why_not_shared


def layout_of(rows, prompts, width=None, unpadded=False):
    """
    The layout of rows `(prompt, completion)` of token ids, padded on the right to the longest, or to `width`; `prompts` says which
    prompt each row continues.
    """
    width = width or max(len(prompt) + len(completion) for prompt, completion in rows)
    ids, attention, scored = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(3))
    for row, (prompt, completion) in enumerate(rows):
        length = len(prompt) + len(completion)
        ids[row, :length] = torch.tensor([*prompt, *completion])
        attention[row, :length] = 1
        scored[row, len(prompt) : length] = 1
    return shared_prefix_layout(ids, attention, scored, torch.tensor(prompts), unpadded)


def test_a_pair_slot_by_slot():
    """The example of the module: p0 p1 | p2 c0 c1 | p2 r0 r1 r2."""
    layout = layout_of([([1, 2, 3], [4, 5, 6]), ([1, 2, 3], [7, 8, 9, 10])], [0, 0])
    assert layout.tokens.tolist() == [[0, 1, 2, 3, 4, 7 + 2, 7 + 3, 7 + 4, 7 + 5]]
    assert layout.positions.tolist() == [[0, 1, 2, 3, 4, 2, 3, 4, 5]]
    assert layout.groups.tolist() == [[0] * 9]
    assert layout.parts.tolist() == [[0, 0, 1, 1, 1, 2, 2, 2, 2]]
    assert layout.slots.tolist() == [[0, 0, 2, 3, 4, 0], [0, 0, 5, 6, 7, 8]]
    # Tokens 3 to 5 of the first row and 3 to 6 of the second, in the flattened (2, 6)
    assert layout.scored.tolist() == [2, 3, 4, 8, 9, 10, 11]
    assert layout.tokens.dtype == layout.slots.dtype == layout.scored.dtype == torch.int64


def test_short_rows_are_packed_together():
    """Units of 2, 3, 4 and 7 slots, the longest first: 7; then 4 and 3; then 2 alone."""
    rows = [([1, 2], [3]), ([5], [5, 7, 8]), ([3, 3, 3], [4, 4]), ([9, 8, 7, 6, 5], [4, 3, 2])]
    layout = layout_of(rows, [0, 1, 2, 3])
    assert layout.groups.tolist() == [[0] * 7, [1, 1, 1, 1, 2, 2, 2], [3, 3, -1, -1, -1, -1, -1]]
    assert layout.tokens.tolist() == [
        [24, 25, 26, 27, 28, 29, 30],
        [16, 17, 18, 19, 8, 9, 10],
        [0, 1, 0, 0, 0, 0, 0],
    ]
    assert layout.positions.tolist() == [[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 0, 1, 2], [0, 1, 0, 0, 0, 0, 0]]
    assert layout.parts.tolist() == [[0, 0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1], [0, 1, 0, 0, 0, 0, 0]]
    assert layout.slots.tolist() == [
        [0, 15, 0, 0, 0, 0, 0],
        [11, 12, 13, 0, 0, 0, 0],
        [0, 0, 9, 10, 0, 0, 0],
        [0, 0, 0, 0, 4, 5, 6],
    ]


def test_members_with_other_prompts_stand_alone():
    """Of four rows, the first and the last have one prompt, the others one each: as long, and longer."""
    rows = [([1, 2, 3], [4]), ([1, 9, 3], [4]), ([1, 2, 3, 4], [5]), ([1, 2, 3], [6, 7])]
    layout = layout_of(rows, [0, 0, 0, 0])
    # 2 + 1 + 2 slots for the shared one, 4 for the longer, 3 for the third: two rows of 5
    assert layout.groups.tolist() == [[0] * 5, [1, 1, 1, 1, -1], [2, 2, 2, -1, -1]]
    assert layout.parts.tolist() == [[0, 0, 1, 2, 2], [0, 0, 0, 1, 0], [0, 0, 1, 0, 0]]
    assert layout.tokens.tolist() == [[0, 1, 2, 17, 18], [10, 11, 12, 13, 0], [5, 6, 7, 0, 0]]
    assert layout.slots.tolist() == [[0, 0, 2, 0], [0, 0, 12, 0], [0, 0, 0, 8], [0, 0, 3, 4]]


def test_only_the_last_token_of_the_prompts_differs():
    """That token stands in the parts, so what is in front of it is shared all the same."""
    layout = layout_of([([1, 2, 3], [4]), ([1, 2, 9], [5])], [0, 0])
    assert layout.tokens.tolist() == [[0, 1, 2, 6]]
    assert layout.parts.tolist() == [[0, 0, 1, 2]]


@pytest.mark.parametrize("prompts", [[0, 1, 0, 1], [7, 3, 7, 3]])
def test_rows_of_a_prompt_stand_anywhere(prompts):
    """Rows 0 and 2 have one prompt, rows 1 and 3 another, as in a batch of pairs; what their numbers are is of no matter."""
    layout = layout_of([([1, 2], [3]), ([5, 6], [7]), ([1, 2], [4]), ([5, 6], [8])], prompts)
    assert layout.tokens.tolist() == [[0, 1, 7], [3, 4, 10]]
    assert layout.slots.tolist() == [[0, 1], [0, 4], [0, 2], [0, 5]]
    assert layout.groups.tolist() == [[0, 0, 0], [1, 1, 1]]


def test_groups_of_different_sizes():
    """Prompt 0 has rows 0, 2, 3 and 5, prompt 1 has rows 1 and 4: one slot for the first token, then two per completion."""
    rows = [([1, 2], [3, 3]), ([5, 6], [7]), ([1, 2], [4]), ([1, 2], [5, 5]), ([5, 6], [8, 8]), ([1, 2], [6])]
    layout = layout_of(rows, [0, 1, 0, 0, 1, 0])
    # Width 4. Units of 1 + 2 + 1 + 2 + 1 = 7 and of 1 + 1 + 2 = 4 slots
    assert layout.tokens.tolist() == [[0, 1, 2, 9, 13, 14, 21], [4, 5, 17, 18, 0, 0, 0]]
    assert layout.parts.tolist() == [[0, 1, 1, 2, 3, 3, 4], [0, 1, 2, 2, 0, 0, 0]]
    assert layout.groups.tolist() == [[0] * 7, [1, 1, 1, 1, -1, -1, -1]]
    assert layout.slots.tolist() == [[0, 1, 2], [0, 8, 0], [0, 3, 0], [0, 4, 5], [0, 9, 10], [0, 6, 0]]
    assert layout.scored.tolist() == [1, 2, 4, 7, 10, 11, 13, 14, 16]


def test_equal_rows_of_different_prompts_are_not_shared():
    layout = layout_of([([1, 2, 3], [4]), ([1, 2, 3], [5])], [0, 1])
    assert layout.tokens.tolist() == [[0, 1, 2], [4, 5, 6]] and layout.parts.tolist() == [[0, 0, 1], [0, 0, 1]]


def test_rows_that_hold_little():
    # An empty completion scores nothing and takes no slot; what it has of the prompt is the other's
    layout = layout_of([([1, 2, 3], []), ([1, 2, 3], [4])], [0, 0])
    assert layout.slots.tolist() == [[0, 0, 0], [0, 0, layout.tokens.tolist()[0].index(4 + 2)]]
    assert layout.scored.tolist() == [5]
    # No prompt at all: the first token is not scored, the others are
    layout = layout_of([([], [1, 2, 3])], [0])
    assert (layout.tokens.tolist(), layout.parts.tolist()) == ([[0, 1]], [[1, 1]])
    assert layout.slots.tolist() == [[0, 1]]
    # One token: nothing predicts anything
    layout = layout_of([([1], []), ([1], [])], [0, 0])
    assert (layout.tokens.shape, layout.groups.tolist(), layout.slots.shape) == ((1, 1), [[-1]], (2, 0))
    assert layout_of([([], []), ([], [])], [0, 0], width=3) is None


def test_padding_on_the_left_in_one_row_is_enough():
    ids = torch.tensor([[1, 2, 3], [1, 2, 3]])
    attention, scored = torch.ones_like(ids), torch.tensor([[0, 0, 1], [0, 0, 1]])
    prompt = torch.zeros(2, dtype=torch.long)
    assert shared_prefix_layout(ids, attention, scored, prompt) is not None
    attention[1, 0] = 0
    assert shared_prefix_layout(ids, attention, scored, prompt) is None
    attention[1] = torch.tensor([1, 0, 1])
    assert shared_prefix_layout(ids, attention, scored, prompt) is None


def test_what_a_slot_sees():
    """Two prompts in a row; the first has two completions, and there is padding."""
    empty = torch.zeros(1, 6, dtype=torch.long)
    groups, parts = torch.tensor([[0, 0, 0, 1, 1, -1]]), torch.tensor([[0, 1, 2, 0, 1, 0]])
    layout = SharedPrefixLayout(empty, empty, groups, parts, empty, empty)
    index = torch.arange(6)
    seen = layout.sees(torch.tensor(0), index[:, None], index[None])
    assert seen.int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 0, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


@pytest.mark.parametrize(
    ("shape", "rows", "width", "hidden_size", "expected"),
    [
        ((1, 4), 1, 4, 8, False),  # the same is no gain
        ((1, 7), 2, 4, 1, False),  # 7 * (6 + 7) = 91 against 8 * (6 + 4) = 80
        ((1, 7), 2, 4, 10, True),  # 7 * 67 = 469 against 8 * 64 = 512
        ((1, 7), 2, 4, 3, True),  # 7 * 25 = 175 against 8 * 22 = 176
        ((3, 3), 2, 4, 10, False),  # 9 * 63 = 567
        ((2, 4), 3, 4, 0, True),  # 32 against 48
    ],
)
def test_what_pays_by_hand(shape, rows, width, hidden_size, expected):
    layout = types.SimpleNamespace(tokens=torch.empty(shape))
    assert pays(layout, rows, width, hidden_size) is expected


REASONS = {
    "is_encoder_decoder": (True, "it is an encoder-decoder"),
    "layer_types": (["full_attention", "strange", "odd"], "it has layers of type ['odd', 'strange']"),
    "layers_block_type": (["attention", "mamba"], "it has layers of type ['mamba']"),
    "attention_chunk_size": (8, "it attends in chunks"),
    "use_bidirectional_attention": (True, "it attends in both directions"),
    "alibi": (True, "it takes no position ids"),
    "rope_parameters": ({"rope_type": "default", "mrope_section": [1, 1]}, "it has multimodal rotary positions"),
}


@pytest.mark.parametrize("option", REASONS)
def test_options_that_make_a_shared_prompt_inexact(option):
    model = tiny("llama", {})
    assert why_not_shared(model) is None
    value, reason = REASONS[option]
    setattr(model.config, option, value)
    assert why_not_shared(model) == reason


def test_options_that_do_not():
    model = tiny("llama", {})
    model.config.layers_block_type = ["attention"]
    model.config.layer_types = ["full_attention", "sliding_attention"]
    model.config.rope_parameters = None
    assert why_not_shared(model) is None
    model.config.rope_scaling = {"mrope_section": [1, 1]}
    assert why_not_shared(model) == "it has multimodal rotary positions"


def test_models_that_cannot_share_a_prompt(monkeypatch):
    model = tiny("llama", {})
    for attention in ("eager", "sdpa", "flash_attention_2", "flash_attention_3"):
        model.config._attn_implementation = attention
        assert why_not_shared(model) is None
        assert takes_masks(model) is (attention in ("eager", "sdpa"))
    model.config._attn_implementation = "paged|eager"
    assert why_not_shared(model).startswith("`attn_implementation='paged|eager'` is none of")
    model.config._attn_implementation = "sdpa"
    with monkeypatch.context() as patch:
        patch.setattr(model, "_is_stateful", True, raising=False)
        assert why_not_shared(model) == "it has recurrent or convolutional layers"
    with monkeypatch.context() as patch:
        patch.setattr(model.config, "get_text_config", lambda: tiny("llama", {}).config)
        assert why_not_shared(model) == "it is multimodal"
    with monkeypatch.context() as patch:
        patch.delattr("transformers.models.llama.modeling_llama.create_causal_mask")
        assert why_not_shared(model) == "it does not build its attention masks through transformers"
    model.layer = nn.Conv1d(1, 1, 1)
    assert why_not_shared(model) == "it has recurrent or convolutional layers"


def test_dropout_anywhere():
    model = tiny("llama", {})
    model.layer = nn.Dropout(0.0)
    assert why_not_shared(model) is None
    model.layer.p = 0.1
    assert why_not_shared(model) == "dropout is on"
    model.layer = nn.Identity()
    model.layer.p = 0.5  # is no dropout
    assert why_not_shared(model) is None
    model.layer.attention_dropout = nn.Identity()  # neither is a module of that name
    assert why_not_shared(model) is None
    model.model.layers[1].self_attn.attention_dropout = 1.0
    assert why_not_shared(model) == "dropout is on"


def test_masks_are_those_of_the_layout_alone():
    """What a caller says of the slots, as of padding, has no say in shared rows."""
    model = tiny("llama", {})
    layout = layout_of([([1, 2, 3], [4, 5]), ([1, 2, 3], [7, 8])], [0, 0])
    given = {"input_ids": torch.tensor([[1, 2, 3, 4, 3, 7]]), "position_ids": layout.positions}
    hidden = torch.ones(1, 6, dtype=torch.long)
    hidden[0, 1] = 0
    with torch.no_grad(), layout.masks():
        states = model.model(**given).last_hidden_state
        torch.testing.assert_close(model.model(**given, attention_mask=hidden).last_hidden_state, states)
    # As in rows of their own
    for tokens, slots in (([1, 2, 3, 4], [0, 1, 2, 3]), ([1, 2, 3, 7], [0, 1, 4, 5])):
        with torch.no_grad():
            alone = model.model(input_ids=torch.tensor([tokens])).last_hidden_state[0]
        torch.testing.assert_close(states[0, slots], alone)
