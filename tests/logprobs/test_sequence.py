"""Sums over completion tokens, by hand."""

import torch

from trl_ext.logprobs import completion_lengths, scored_tokens, sum_completions


# Rows are a pair: 4 and 2 completion tokens after prompts of 2, padded to 7
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 0], [0, 0, 1, 1, 0, 0, 0]])
# Of tokens 1 to 6: the first is the prompt's, what follows the completion is padding; neither is to be counted
LOGPS = torch.tensor([[-64.0, -1.0, -2.0, -4.0, -8.0, -128.0], [-64.0, -16.0, -32.0, -256.0, -256.0, -256.0]])
# Each is the other's partner
PAIR = torch.tensor([1, 0])


def test_lengths():
    assert completion_lengths(MASK).tolist() == [4, 2]
    # The first position of a row is never scored
    assert completion_lengths(torch.tensor([[1, 1, 0], [1, 0, 0]])).tolist() == [1, 0]


def test_sums():
    assert sum_completions(LOGPS, MASK).tolist() == [-15.0, -48.0]


def test_tokens_beyond_the_shared_length_count_less():
    # Both have 2 tokens; the third and the fourth of the longer one count a quarter
    assert sum_completions(LOGPS, MASK, 0.25, PAIR).tolist() == [-3.0 - 12.0 / 4, -48.0]
    assert sum_completions(LOGPS, MASK, 0.0, PAIR).tolist() == [-3.0, -48.0]
    assert sum_completions(LOGPS, MASK, 1.0, PAIR).tolist() == [-15.0, -48.0]
    # The longer one may be the second
    assert sum_completions(LOGPS.flip(0), MASK.flip(0), 0.25, PAIR).tolist() == [-48.0, -6.0]


def test_prompts_of_unequal_length_and_several_pairs():
    # Chosen rows, then rejected: 1, 3 and 2 tokens against 3, 1 and 2
    mask = torch.tensor([[0, 0, 0, 1], [0, 1, 1, 1], [0, 1, 1, 0], [0, 1, 1, 1], [0, 1, 0, 0], [0, 0, 1, 1]])
    logps = -torch.tensor([[64, 64, 1], [2, 4, 8], [3, 5, 64], [16, 32, 128], [256, 64, 64], [64, 7, 9]]).double()
    assert sum_completions(logps, mask).tolist() == [-1, -14, -8, -176, -256, -16]
    pairs = torch.tensor([3, 4, 5, 0, 1, 2])
    assert sum_completions(logps, mask, 0.5, pairs).tolist() == [-1, -2 - 6, -8, -16 - 80, -256, -16]


def test_pairs_stand_anywhere():
    """Rows 0 and 3 are a pair of 3 and 1 tokens, rows 1 and 4 one of 1 and 2; row 2 is nobody's and loses nothing."""
    mask = torch.tensor([[0, 1, 1, 1], [0, 1, 0, 0], [0, 1, 1, 1], [0, 0, 1, 0], [0, 0, 1, 1]])
    logps = -torch.tensor([[1, 2, 4], [8, 0, 0], [16, 32, 64], [0, 128, 0], [0, 256, 512]]).double()
    partner = torch.tensor([3, 4, 2, 0, 1])
    assert sum_completions(logps, mask, 0.5, partner).tolist() == [-1 - 3, -8, -112, -128, -256 - 256]


def test_what_is_scored_token_by_token():
    """What stands outside the completion is 0, be it padding, the prompt or virtual tokens in front."""
    expected = [[0, -1, -2, -4, -8, 0], [0, -16, -32, 0, 0, 0]]
    for given in (LOGPS, torch.cat([torch.full((2, 3), -1024.0), LOGPS], dim=1)):
        values, scored = scored_tokens(given, MASK)
        assert values.tolist() == expected
        assert scored.tolist() == [[0, 1, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0]]


def test_an_empty_completion_shares_no_token():
    mask = torch.tensor([[0, 1, 1], [0, 0, 0]])
    logps = torch.tensor([[-1.0, -2.0], [-64.0, -64.0]])
    assert sum_completions(logps, mask, 0.5, PAIR).tolist() == [-1.5, 0.0]


def test_virtual_tokens_in_front_are_left_out():
    virtual = torch.full((2, 3), -1024.0)
    for ld_alpha in (None, 0.25):
        expected = sum_completions(LOGPS, MASK, ld_alpha, PAIR)
        assert torch.equal(sum_completions(torch.cat([virtual, LOGPS], dim=1), MASK, ld_alpha, PAIR), expected)
    assert sum_completions(virtual, MASK[:, :1]).tolist() == [0.0, 0.0]  # rows of one token, which is not scored


def test_gradients_reach_completion_tokens_alone():
    logps = LOGPS.clone().requires_grad_()
    sum_completions(logps, MASK, 0.25, PAIR).sum().backward()
    assert logps.grad.tolist() == [[0.0, 1.0, 1.0, 0.25, 0.25, 0.0], [0.0, 1.0, 1.0, 0.0, 0.0, 0.0]]
