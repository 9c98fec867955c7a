"""From examples to rows and a plan: what stands where, by hand."""

import pickle

import pytest
import torch
from torch.utils.data import DataLoader
from trl.trainer.dpo_trainer import DataCollatorForPreference

from trl_ext.data.collator import RowsCollator
from trl_ext.logprobs import Sharing
from trl_ext.rows import from_batch


def pair(prompt, chosen, rejected, **columns):
    return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected, **columns}


def trls(**options):
    return DataCollatorForPreference(pad_token_id=0, **options)


def unpadded(rows):
    """Tokens of each row, and those to score."""
    ids, attention, scored = (
        rows.inputs["input_ids"],
        rows.inputs["attention_mask"].bool(),
        rows.completion_mask.bool(),
    )
    return [row[mask].tolist() for row, mask in zip(ids, attention, strict=True)], [
        row[mask].tolist() for row, mask in zip(ids, scored, strict=True)
    ]


PAIRS = [
    pair([1], [2, 3], [4], weight=2, score="0.5", other=1),
    pair([1, 2], [3], [4, 5, 6], weight=0.5, score=-1, other=2),
    pair([7, 7, 7], [8], [9], weight=0, score=3, other=3),
]


@pytest.mark.parametrize("options", [{}, {"pad_to_multiple_of": 8}, {"max_length": 3}], ids=str)
def test_pairs_alone_are_trls_batch(options):
    batch = RowsCollator(trls(**options), ["weight"])(PAIRS)
    expected = trls(**options)(PAIRS)
    assert list(batch) == [*expected, "table"]
    for name, value in expected.items():
        assert batch[name].dtype == value.dtype and torch.equal(batch[name], value)
    rows, plan = from_batch(batch)
    assert plan.pairs.tolist() == [[0, 3], [1, 4], [2, 5]]
    assert rows.prompt.tolist() == [0, 1, 2, 0, 1, 2] and rows.partner.tolist() == [3, 4, 5, 0, 1, 2]
    assert (
        plan.empty_pairs is plan.groups is plan.scores is rows.layout is rows.ref_logps is rows.behaviour_logps is None
    )


def test_columns_are_read_before_the_collator_changes_the_examples():
    def empties(examples):
        batch = trls()(examples)
        for example in examples:
            example.clear()
        return batch

    _, plan = from_batch(RowsCollator(empties, ["weight", "score"])([dict(row) for row in PAIRS]))
    assert list(plan.columns) == ["weight", "score"]
    assert plan.columns["weight"].tolist() == [2.0, 0.5, 0.0] and plan.columns["score"].tolist() == [0.5, -1.0, 3.0]
    assert plan.columns["weight"].dtype == torch.float32
    assert plan.share.tolist() == [2.0, 0.5, 0.0]  # what each pair counts
    assert from_batch(RowsCollator(trls(), ["score"])(PAIRS))[1].share is None


@pytest.mark.parametrize(
    ("options", "chosen", "rejected"),
    [
        ({}, [[-1, 0, -1, 1, 2], [-1, -1, 0, -1, -1]], [[-1, 0, -1, -1, -1], [-1, -1, 0, 0, 1]]),
        ({"pad_to_multiple_of": 6}, [[-1, 0, -1, 1, 2, -1], [-1, -1, 0, -1, -1, -1]], [[-1, 0, *[-1] * 4], [-1, -1, 0, 0, 1, -1]]),
        ({"max_length": 3}, [[-1, 0, -1], [-1, -1, 0]], [[-1, 0, -1], [-1, -1, 0]]),
        # Numbered anew
        ({"max_length": 3, "truncation_mode": "keep_end"}, [[-1, 0, 1], [-1, -1, 0]], [[-1, 0, -1], [0, 0, 1]]),
        # A row's first token is never scored: what is left begins behind it
        ({"max_length": 2, "truncation_mode": "keep_end"}, [[0, 0], [-1, 0]], [[-1, 0], [0, 0]]),
        # Nothing is left of the second pair
        ({"max_length": 2}, [[-1, 0], [-1, -1]], [[-1, 0], [-1, -1]]),
    ],
    ids=str,
)  # fmt: skip
def test_turns_are_cut_and_padded_with_their_tokens(options, chosen, rejected):
    examples = [
        pair([1], [2, 3, 4, 5], [6], chosen_turns=[0, -1, 1, 2], rejected_turns=[0]),
        pair([1, 2], [3], [4, 5, 6], chosen_turns=[0], rejected_turns=[0, 0, 1]),
    ]
    rows, _ = from_batch(RowsCollator(trls(**options), turns=True)(examples))
    assert rows.turns.tolist() == [*chosen, *rejected]
    expected = trls(**options)(examples)
    assert torch.equal(rows.inputs["input_ids"], expected["input_ids"])
    assert rows.completion_mask.dtype == expected["completion_mask"].dtype
    assert torch.equal(rows.completion_mask, expected["completion_mask"] * (rows.turns >= 0))
    plain, _ = from_batch(RowsCollator(trls(**options))(examples))
    assert plain.turns is None and torch.equal(plain.completion_mask, expected["completion_mask"])


def test_turns_of_a_completion_that_was_emptied():
    examples = [
        pair([1], [], [6], chosen_turns=[0] * 9, rejected_turns=[0]),
        pair([1], [2, 3], [4], chosen_turns=[0, 1]),
    ]
    rows, _ = from_batch(RowsCollator(trls(), turns=True)(examples))
    assert rows.turns.tolist() == [[-1, -1, -1], [-1, 0, 1], [-1, 0, -1], [-1, 0, -1]]


FURTHER = pair([1, 9], [5], [6, 7, 8])


def test_pairs_with_an_empty_trace_stand_behind():
    """Padded with the others, to one width; the second example has none."""
    batch = RowsCollator(trls(), empty_trace=True)(
        [{**PAIRS[0], "further_pairs": [FURTHER]}, {**PAIRS[1], "further_pairs": []}]
    )
    rows, plan = from_batch(batch)
    tokens, scored = unpadded(rows)
    assert tokens == [[1, 2, 3], [1, 2, 3], [1, 4], [1, 2, 4, 5, 6], [1, 9, 5], [1, 9, 6, 7, 8]]
    assert scored == [[2, 3], [3], [4], [4, 5, 6], [5], [6, 7, 8]]
    assert rows.completion_mask.shape == (6, 5)
    assert plan.pairs.tolist() == [[0, 2], [1, 3]] and plan.empty_pairs.tolist() == [[4, 5], [-1, -1]]
    assert rows.prompt.tolist() == [0, 1, 0, 1, 0, 0] and rows.partner.tolist() == [2, 3, 0, 1, 5, 4]
    assert plan.groups is None


@pytest.mark.parametrize("none", [[], None])
def test_a_batch_without_any_empty_trace(none):
    _, plan = from_batch(RowsCollator(trls(), empty_trace=True)([{**row, "further_pairs": none} for row in PAIRS[:2]]))
    assert plan.empty_pairs.tolist() == [[-1, -1], [-1, -1]] and plan.pairs.tolist() == [[0, 2], [1, 3]]
    assert from_batch(RowsCollator(trls(), empty_trace=True)(PAIRS[:1]))[1].empty_pairs.tolist() == [[-1, -1]]


def test_a_row_without_the_traced_pair_has_nothing_to_score():
    batch = RowsCollator(trls(), empty_trace=True)([pair([1], [], [], further_pairs=[FURTHER])])
    rows, plan = from_batch(batch)
    assert unpadded(rows) == ([[1], [1], [1, 9, 5], [1, 9, 6, 7, 8]], [[], [], [5], [6, 7, 8]])
    assert plan.pairs.tolist() == [[0, 1]] and plan.empty_pairs.tolist() == [[2, 3]]


def test_an_empty_trace_pair_is_two_rows_whatever_is_in_them():
    rows, plan = from_batch(
        RowsCollator(trls(), empty_trace=True)([pair([1], [2], [3], further_pairs=[pair([4], [5], [])])])
    )
    assert unpadded(rows)[0] == [[1, 2], [1, 3], [4, 5], [4]] and plan.empty_pairs.tolist() == [[2, 3]]
    assert rows.partner.tolist() == [1, 0, 3, 2]


# The first group has five completions, the second two, the third four and the fourth three
GROUPS = [
    pair([1], [2], [3], group_scores=[9, 1, 3, 4, 5],
         further_pairs=[pair([1], [4, 4], [5]), pair([1], [6], [])]),
    pair([7], [8], [9], group_scores=[2, -2], further_pairs=[]),
    pair([1, 1], [2], [3], group_scores=[8, 6, 7, 7.5], further_pairs=[pair([1, 1], [4], [5, 5, 5])]),
    pair([2, 2], [2], [3], group_scores=[1, 0, 0.5], further_pairs=[pair([2, 2], [4], [])]),
]  # fmt: skip


def test_groups_of_different_sizes():
    """Best and worst of all groups as TRL's pairs, then the others of each in turn; an absent one has no row."""
    rows, plan = from_batch(RowsCollator(trls(), groups=True)(GROUPS))
    tokens, _ = unpadded(rows)
    assert tokens == [
        [1, 2], [7, 8], [1, 1, 2], [2, 2, 2],
        [1, 3], [7, 9], [1, 1, 3], [2, 2, 3],
        [1, 4, 4], [1, 5], [1, 6],
        [1, 1, 4], [1, 1, 5, 5, 5],
        [2, 2, 4],
    ]  # fmt: skip
    assert plan.pairs.tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert plan.groups.tolist() == [[0, 4, 8, 9, 10], [1, 5, -1, -1, -1], [2, 6, 11, 12, -1], [3, 7, 13, -1, -1]]
    assert plan.scores.tolist() == [[9, 1, 3, 4, 5], [2, -2, 0, 0, 0], [8, 6, 7, 7.5, 0], [1, 0, 0.5, 0, 0]]
    assert plan.scores.dtype == torch.float32
    assert rows.prompt.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 0, 0, 2, 2, 3]
    # One that stands alone is its own partner
    assert rows.partner.tolist() == [4, 5, 6, 7, 0, 1, 2, 3, 9, 8, 10, 12, 11, 13]
    assert plan.empty_pairs is None


def test_groups_of_two_have_no_others():
    rows, plan = from_batch(RowsCollator(trls(), groups=True)([GROUPS[1], GROUPS[1]]))
    assert plan.groups.tolist() == [[0, 2], [1, 3]] and plan.scores.tolist() == [[2, -2], [2, -2]]
    assert len(rows.prompt) == 4


def test_log_probs_of_the_policy_that_sampled_go_to_their_rows():
    """In the order of each group's scores: best, worst, the others."""
    given = [[-1, -2, -3, -4, -5], [-6, -7], [-8, -9, -10, -11], [-12, -13, -14]]
    examples = [{**group, "behaviour_logps": logps} for group, logps in zip(GROUPS, given, strict=True)]
    rows, _ = from_batch(RowsCollator(trls(), groups=True)(examples))
    assert rows.behaviour_logps.tolist() == [-1, -6, -8, -12, -2, -7, -9, -13, -3, -4, -5, -10, -11, -14]
    # Where examples are pairs, lists of a row are of no concern
    assert from_batch(RowsCollator(trls())([dict(PAIRS[0], behaviour_logps=[-1, -2])]))[0].behaviour_logps is None


def referenced(example, chosen, rejected):
    return {**example, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}


def test_precomputed_references_go_to_their_rows():
    first = referenced(PAIRS[0], -1.0, -2.0)
    second = referenced(PAIRS[1], -3.0, -4.0)
    rows, _ = from_batch(RowsCollator(trls())([first, second]))
    assert rows.ref_logps.tolist() == [-1, -3, -2, -4] and set(rows.inputs) == {"input_ids", "attention_mask"}
    first["further_pairs"] = [referenced(FURTHER, -5.0, -6.0)]
    rows, plan = from_batch(RowsCollator(trls(), empty_trace=True)([first, second]))
    assert rows.ref_logps.tolist() == [-1, -3, -2, -4, -5, -6] and set(rows.inputs) == {"input_ids", "attention_mask"}
    group = referenced(GROUPS[0], -1.0, -2.0)
    group["further_pairs"] = [
        referenced(GROUPS[0]["further_pairs"][0], -3.0, -4.0), referenced(GROUPS[0]["further_pairs"][1], -5.0, 0.0),
    ]  # fmt: skip
    rows, plan = from_batch(RowsCollator(trls(), groups=True)([group]))
    assert rows.ref_logps[plan.groups].tolist() == [[-1, -2, -3, -4, -5]]


class Own:
    """A collator of a user's own: to a width of 8, with padding 99 on the left, and with what else it is told to give."""

    def __init__(self, **more):
        self.more = more

    def __call__(self, examples):
        sides = [(row["prompt_ids"], row[f"{side}_ids"]) for side in ("chosen", "rejected") for row in examples]
        pads = [8 - len(prompt) - len(completion) for prompt, completion in sides]
        table = {
            "completion_mask": [[0] * (8 - len(completion)) + [1] * len(completion) for _, completion in sides],
            "attention_mask": [[0] * pad + [1] * (8 - pad) for pad in pads],
            "input_ids": [[99] * pad + [*prompt, *text] for pad, (prompt, text) in zip(pads, sides, strict=True)],
        }
        more = {name: make(len(sides)) for name, make in self.more.items()}
        return {name: torch.tensor(value) for name, value in table.items()} | more


def test_the_users_own_collator():
    """Its padding, its width, and what else it has for each row, which goes along in the order of the rows."""
    number = torch.arange
    batch = RowsCollator(Own(number=number, wide=lambda n: number(2 * n).view(n, 2)), groups=True)(GROUPS[:2])
    rows, _ = from_batch(batch)
    assert unpadded(rows)[0] == [[1, 2], [7, 8], [1, 3], [7, 9], [1, 4, 4], [1, 5], [1, 6]]
    assert rows.completion_mask.shape == (7, 8) and rows.inputs["input_ids"][0].tolist() == [99] * 6 + [1, 2]
    # As collated: 8 rows, chosen of the four pairs (0 to 3) and rejected (4 to 7), of which the last is absent
    assert rows.inputs["number"].tolist() == [0, 1, 4, 5, 2, 6, 3]
    assert rows.inputs["wide"].tolist() == [[2 * n, 2 * n + 1] for n in (0, 1, 4, 5, 2, 6, 3)]


@pytest.mark.parametrize(
    "value",
    [lambda n: 1, lambda n: torch.tensor(1.0), lambda n: torch.zeros(n // 2), lambda n: ["text"] * n],
    ids=["number", "scalar", "one per pair", "list"],
)
def test_what_has_no_row_for_each_completion_is_refused_beside_further_ones(value):
    collator = RowsCollator(Own(extra=value), groups=True)
    with pytest.raises(
        ValueError, match=r"gives 'extra', which has no row for each of the 8 completions.*Leave it out"
    ):
        collator(GROUPS[:2])
    rows, _ = from_batch(collator(GROUPS[1:2]))  # pairs alone: nothing is to be told apart
    assert "extra" in rows.inputs


def test_prompts_are_laid_out_in_the_collator():
    """The layout of the rows as they stand, by hand for one group of three: the prompt's first token once, then two per row."""
    batch = RowsCollator(trls(), groups=True, sharing=Sharing(8, always=True))([GROUPS[3]])
    rows, _ = from_batch(batch)
    # Rows 2 2 2, 2 2 3 and 2 2 4 of width 3; slots: row 0 token 0, then token 1 of each row
    assert rows.layout.tokens.tolist() == [[0, 1, 4, 7]] and rows.layout.parts.tolist() == [[0, 1, 2, 3]]
    assert rows.layout.slots.tolist() == [[0, 1], [0, 2], [0, 3]] and rows.layout.scored.tolist() == [1, 3, 5]
    with pytest.raises(ValueError, match=r"cannot share prompts: the model is given \['extra'\] too"):
        RowsCollator(Own(extra=torch.arange), groups=True, sharing=Sharing(8, always=True))([GROUPS[3]])


def assert_same_batch(batch, expected):
    assert batch.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, dict):
            assert_same_batch(batch[name], value)
        elif isinstance(value, torch.Tensor):
            assert torch.equal(batch[name], value), name
        else:
            assert batch[name] == value, name


def test_a_collator_goes_to_another_process():
    collator = RowsCollator(trls(), groups=True, sharing=Sharing(8, always=True))
    assert_same_batch(pickle.loads(pickle.dumps(collator))(GROUPS), collator(GROUPS))


@pytest.mark.slow
def test_a_collator_works_in_a_spawned_worker():
    collator = RowsCollator(trls(), groups=True, sharing=Sharing(8, always=True))
    (batch,) = DataLoader(GROUPS, batch_size=4, num_workers=1, collate_fn=collator, multiprocessing_context="spawn")
    assert_same_batch(batch, collator(GROUPS))
