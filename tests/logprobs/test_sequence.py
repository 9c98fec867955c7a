"""Sums over completion tokens, by hand."""

import torch

from trl_ext.logprobs import completion_lengths, sum_completions


# Rows are a pair: 4 and 2 completion tokens after prompts of 2, padded to 7
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 0], [0, 0, 1, 1, 0, 0, 0]])
# Of tokens 1 to 6: the first is the prompt's, what follows the completion is padding; neither is to be counted
LOGPS = torch.tensor([[-64.0, -1.0, -2.0, -4.0, -8.0, -128.0], [-64.0, -16.0, -32.0, -256.0, -256.0, -256.0]])


def test_lengths():
    assert completion_lengths(MASK).tolist() == [4, 2]
    # The first position of a row is never scored
    assert completion_lengths(torch.tensor([[1, 1, 0], [1, 0, 0]])).tolist() == [1, 0]


def test_sums():
    assert sum_completions(LOGPS, MASK).tolist() == [-15.0, -48.0]


def test_tokens_beyond_the_shared_length_count_less():
    # Both have 2 tokens; the third and the fourth of the longer one count a quarter
    assert sum_completions(LOGPS, MASK, ld_alpha=0.25).tolist() == [-3.0 - 12.0 / 4, -48.0]
    assert sum_completions(LOGPS, MASK, ld_alpha=0.0).tolist() == [-3.0, -48.0]
    assert sum_completions(LOGPS, MASK, ld_alpha=1.0).tolist() == [-15.0, -48.0]
    # The longer one may be the second
    assert sum_completions(LOGPS.flip(0), MASK.flip(0), ld_alpha=0.25).tolist() == [-48.0, -6.0]


def test_prompts_of_unequal_length_and_several_pairs():
    # Chosen rows, then rejected: 1, 3 and 2 tokens against 3, 1 and 2
    mask = torch.tensor([[0, 0, 0, 1], [0, 1, 1, 1], [0, 1, 1, 0], [0, 1, 1, 1], [0, 1, 0, 0], [0, 0, 1, 1]])
    logps = -torch.tensor([[64, 64, 1], [2, 4, 8], [3, 5, 64], [16, 32, 128], [256, 64, 64], [64, 7, 9]]).double()
    assert sum_completions(logps, mask).tolist() == [-1, -14, -8, -176, -256, -16]
    assert sum_completions(logps, mask, ld_alpha=0.5).tolist() == [-1, -2 - 6, -8, -16 - 80, -256, -16]


def test_an_empty_completion_shares_no_token():
    mask = torch.tensor([[0, 1, 1], [0, 0, 0]])
    logps = torch.tensor([[-1.0, -2.0], [-64.0, -64.0]])
    assert sum_completions(logps, mask, ld_alpha=0.5).tolist() == [-1.5, 0.0]


def test_virtual_tokens_in_front_are_left_out():
    virtual = torch.full((2, 3), -1024.0)
    for ld_alpha in (None, 0.25):
        expected = sum_completions(LOGPS, MASK, ld_alpha)
        assert torch.equal(sum_completions(torch.cat([virtual, LOGPS], dim=1), MASK, ld_alpha), expected)
    assert sum_completions(virtual, MASK[:, :1]).tolist() == [0.0, 0.0]  # rows of one token, which is not scored


def test_gradients_reach_completion_tokens_alone():
    logps = LOGPS.clone().requires_grad_()
    sum_completions(logps, MASK, ld_alpha=0.25).sum().backward()
    assert logps.grad.tolist() == [[0.0, 1.0, 1.0, 0.25, 0.25, 0.0], [0.0, 1.0, 1.0, 0.0, 0.0, 0.0]]
