"""What a batch holds beside that of the wrapped collator, by hand."""

import pytest
import torch

from trl_ext.data.collator import PreferenceCollator


def plain(examples):
    """In place of TRL's collator: the examples as they came."""
    return {"seen": [dict(example) for example in examples]}


def test_columns_are_read_before_the_collator_changes_the_examples():
    def empties(examples):
        for example in examples:
            example.clear()
        return {"input_ids": 1}

    examples = [{"weight": 2, "score": "0.5", "other": 1}, {"weight": 0.5, "score": -1, "other": 2}]
    batch = PreferenceCollator(empties, ["weight", "score"])(examples)
    assert list(batch) == ["input_ids", "weight", "score"]
    assert batch["weight"].tolist() == [2.0, 0.5] and batch["score"].tolist() == [0.5, -1.0]
    assert batch["weight"].dtype == torch.float32


@pytest.mark.parametrize("scored", [False, True])
def test_the_empty_trace_pair_goes_through_the_same_collator(scored):
    names = ["prompt_ids", "chosen_ids", "rejected_ids"] + (
        ["ref_chosen_logps", "ref_rejected_logps"] if scored else []
    )
    example = {"prompt_ids": [1], **{f"empty_trace_{name}": [place] for place, name in enumerate(names)}}
    batch = PreferenceCollator(plain, [], empty_trace=True)([example])
    assert batch == {"seen": [example], "empty_trace_seen": [{name: [place] for place, name in enumerate(names)}]}
    assert PreferenceCollator(plain, [])([example]) == {"seen": [example]}


@pytest.mark.parametrize("scored", [False, True])
def test_the_other_completions_of_groups(scored):
    """In twos; where a group has fewer, its prompt and nothing to score, without a place in the mask."""
    examples = [
        {"prompt_ids": [1], "other_prompt_ids": [[1], [2], [3]], "other_ids": [[4], [5], [6]], "other_scores": [0.5, 2, 3]},
        {"prompt_ids": [7], "other_prompt_ids": [[8]], "other_ids": [[9]], "other_scores": [-1.0]},
    ]  # fmt: skip
    if scored:
        examples[0]["other_ref_logps"], examples[1]["other_ref_logps"] = [-1, -2, -3], [-4]
    batch = PreferenceCollator(plain, [], groups=True)(examples)
    side = lambda prompt, chosen, rejected: {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}  # noqa: E731
    assert batch["seen"] == examples and batch["others"] == [
        {"seen": [side([1], [4], [5]), side([8], [9], [])]},
        {"seen": [side([3], [6], []), side([7], [], [])]},
    ]
    assert batch["other_mask"].dtype == torch.bool
    assert batch["other_mask"].tolist() == [[True, True, True, False], [True, False, False, False]]
    assert batch["other_scores"].tolist() == [[0.5, 2.0, 3.0, 0.0], [-1.0, 0.0, 0.0, 0.0]]
    if scored:
        assert batch["other_ref_logps"].tolist() == [[-1.0, -2.0, -3.0, 0.0], [-4.0, 0.0, 0.0, 0.0]]
    else:
        assert "other_ref_logps" not in batch


def test_groups_of_two_have_no_others():
    example = {"prompt_ids": [1], "other_prompt_ids": [], "other_ids": [], "other_scores": []}
    batch = PreferenceCollator(plain, [], groups=True)([example, example])
    assert batch["others"] == [] and batch["other_mask"].shape == batch["other_scores"].shape == (2, 0)
