"""The table that is scored: how it travels, and what losses are given of it, by hand."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from torch.utils.data import DataLoader
from trl.trainer.dpo_trainer import DataCollatorForPreference

from tests.conftest import preference_rows
from tests.helpers import build
from tests.test_collator import GROUPS, assert_same_batch, pair
from trl_ext import DPOConfig, DPOTrainer
from trl_ext.data.collator import RowsCollator
from trl_ext.logprobs import Sharing
from trl_ext.rows import Plan, Rows, Scored, from_batch, to_batch


# The way to the device


def tensors(record):
    """All tensors of a dataclass or dict, by name."""
    values = vars(record) if dataclasses.is_dataclass(record) else record
    for name, value in values.items():
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, dict) or dataclasses.is_dataclass(value):
            yield from ((f"{name}.{inner}", tensor) for inner, tensor in tensors(value))


def groups():
    given = [[-1, -2, -3, -4, -5], [-6, -7], [-8, -9, -10, -11], [-12, -13, -14]]
    return [
        {**group, "behaviour_logps": logps, "score": 1.5, "weight": 2}
        for group, logps in zip(GROUPS, given, strict=True)
    ]


def test_workers_hand_over_rows_and_plan():
    """Two worker processes, whose tensors travel through shared memory: the batches are those of this process."""
    collator = RowsCollator(
        DataCollatorForPreference(pad_token_id=0), ["score", "weight"], groups=True, sharing=Sharing(8, always=True)
    )
    batches = list(DataLoader(groups(), batch_size=2, num_workers=2, collate_fn=collator))
    for batch, examples in zip(batches, (groups()[:2], groups()[2:]), strict=True):
        assert_same_batch(batch, collator(examples))
        rows, plan = from_batch(batch)
        assert rows.layout.tokens.dim() == 2 and plan.columns["score"].tolist() == [1.5, 1.5]
        assert plan.share.tolist() == [2, 2] and set(rows.inputs) == {"input_ids", "attention_mask"}


def test_all_of_it_moves_to_the_device():
    collator = RowsCollator(
        DataCollatorForPreference(pad_token_id=0), ["score", "weight"], groups=True, sharing=Sharing(8, always=True)
    )
    batch = collator(groups())
    moved = from_batch(send_to_device(batch, "meta"))
    found = {name for record in moved for name, value in tensors(record) if value.is_meta}
    assert found == {name for record in moved for name, _ in tensors(record)} >= {
        "inputs.input_ids", "completion_mask", "prompt", "partner", "behaviour_logps", "layout.tokens", "layout.scored",
        "pairs", "groups", "scores", "columns.score", "share",
    }  # fmt: skip
    assert_same_batch(to_batch(*from_batch(send_to_device(batch, "cpu"))), batch)


def test_columns_keep_their_precision(tiny_model_dir, tmp_path, monkeypatch):
    """Under DeepSpeed transformers casts what a batch holds to the model's dtype, in which 6.1 and 6.12 are one number."""
    rows = preference_rows(4)
    for row in rows:
        row["score_chosen"], row["score_rejected"] = 6.12, 6.1
    trainer = build(
        DPOTrainer, DPOConfig, tiny_model_dir, tmp_path, loss_type="offset", dataset=Dataset.from_list(rows)
    )
    half = SimpleNamespace(hf_ds_config=SimpleNamespace(dtype=lambda: torch.bfloat16))
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", True)
    monkeypatch.setattr(type(trainer.accelerator.state), "deepspeed_plugin", half, raising=False)
    batch = trainer._prepare_inputs(
        {**trainer.data_collator(list(trainer.train_dataset)), "float": torch.tensor(6.12)}
    )
    assert batch["float"].dtype == torch.bfloat16  # which the rest of a batch is cast to
    columns = batch["table"]["plan"]["columns"]
    assert columns["score_chosen"].tolist() == pytest.approx([6.12] * 4, rel=1e-6)
    assert columns["score_rejected"].tolist() == pytest.approx([6.1] * 4, rel=1e-6)


def test_what_is_not_there_is_not_in_the_batch():
    mask = torch.tensor([[0, 1], [0, 1]])
    rows = Rows.of_pairs({"input_ids": mask + 3}, mask)
    batch = to_batch(rows, Plan(torch.tensor([[0, 1]]), count=3))
    assert batch["table"].keys() == {"plan", "prompt", "partner"} and batch["table"]["plan"].keys() == {
        "pairs",
        "columns",
        "count",
    }
    again, plan = from_batch(batch)
    assert plan.count == 3 and again.layout is again.ref_logps is again.behaviour_logps is None
    assert plan.empty_pairs is plan.groups is plan.scores is plan.empty_columns is plan.share is None


def test_rows_of_pairs_in_trls_order():
    rows = Rows.of_pairs({}, torch.ones(6, 2), ref_logps=torch.arange(6))
    assert rows.prompt.tolist() == [0, 1, 2, 0, 1, 2] and rows.partner.tolist() == [3, 4, 5, 0, 1, 2]
    assert rows.ref_logps.tolist() == [0, 1, 2, 3, 4, 5]


# What losses are given


def scored(**fields):
    """Six rows with powers of two, so that each is told from the others."""
    powers = -(2.0 ** torch.arange(6))
    return Scored(**{"logps": powers, "lengths": torch.arange(6) + 1, "ref_logps": 10 * powers, **fields})


def test_pairs_by_index():
    batch = scored().pair_batch(
        Plan(torch.tensor([[5, 0], [2, 3]]), columns={"c": torch.tensor([7.0, 8.0])}), beta=0.3
    )
    assert batch.chosen_logps.tolist() == [-32, -4] and batch.rejected_logps.tolist() == [-1, -8]
    assert batch.ref_chosen_logps.tolist() == [-320, -40] and batch.ref_rejected_logps.tolist() == [-10, -80]
    assert batch.chosen_lengths.tolist() == [6, 3] and batch.rejected_lengths.tolist() == [1, 4]
    assert batch.beta == 0.3 and batch.column("c").tolist() == [7, 8]
    assert batch.empty_trace is batch.tokens is None
    assert scored(ref_logps=None).pair_batch(Plan(torch.tensor([[5, 0]])), 0.1).ref_chosen_logps is None


def test_absent_pairs_have_no_tokens():
    """Of three prompts, the first lacks the empty-trace pair and the second the traced one."""
    plan = Plan(
        torch.tensor([[0, 1], [-1, -1], [2, 3]]),
        empty_pairs=torch.tensor([[-1, -1], [4, 5], [1, 0]]),
        columns={"c": torch.tensor([1.0, 2.0, 3.0])},
    )
    batch = scored().pair_batch(plan, beta=0.1)
    assert batch.chosen_logps.tolist() == [-1, 0, -4] and batch.rejected_logps.tolist() == [-2, 0, -8]
    assert batch.chosen_lengths.tolist() == [1, 0, 3] and batch.rejected_lengths.tolist() == [2, 0, 4]
    empty = batch.empty_trace
    assert empty.chosen_logps.tolist() == [0, -16, -2] and empty.rejected_logps.tolist() == [0, -32, -1]
    assert empty.ref_chosen_logps.tolist() == [0, -160, -20] and empty.chosen_lengths.tolist() == [0, 5, 2]
    assert empty.rejected_lengths.tolist() == [0, 6, 1] and empty.beta == 0.1
    assert empty.columns["c"].tolist() == [1, 2, 3] and empty.empty_trace is None
    own = dataclasses.replace(plan, empty_columns={"c": torch.tensor([4.0, 5.0, 6.0])})
    batch = scored().pair_batch(own, beta=0.1)
    assert batch.columns["c"].tolist() == [1, 2, 3] and batch.empty_trace.columns["c"].tolist() == [4, 5, 6]


def test_nothing_flows_back_into_rows_that_a_pair_lacks():
    logps = torch.zeros(4, requires_grad=True)
    plan = Plan(torch.tensor([[0, 1], [-1, -1]]), empty_pairs=torch.tensor([[-1, -1], [2, 3]]))
    batch = Scored(logps, torch.ones(4), torch.zeros(4)).pair_batch(plan, beta=0.1)
    (batch.chosen_logps.sum() + 2 * batch.rejected_logps.sum() + 4 * batch.empty_trace.chosen_logps.sum()).backward()
    assert logps.grad.tolist() == [1, 2, 4, 0]


def test_groups_by_index():
    plan = Plan(
        torch.tensor([[0, 1], [2, 3]]), groups=torch.tensor([[0, 1, 5, 4], [2, 3, -1, -1]]),
        scores=torch.tensor([[9.0, 1, 2, 3], [1, 0, 0, 0]]), columns={"c": torch.tensor([7.0, 8.0])},
    )  # fmt: skip
    batch = scored(behaviour_logps=-torch.arange(6.0)).group_batch(plan, beta=0.2)
    assert batch.logps.tolist() == [[-1, -2, -32, -16], [-4, -8, 0, 0]]
    assert batch.ref_logps.tolist() == [[-10, -20, -320, -160], [-40, -80, 0, 0]]
    assert batch.lengths.tolist() == [[1, 2, 6, 5], [3, 4, 0, 0]]
    assert batch.behaviour_logps.tolist() == [[0, -1, -5, -4], [-2, -3, 0, 0]]
    assert batch.mask.tolist() == [[True] * 4, [True, True, False, False]] and batch.mask.dtype == torch.bool
    assert batch.scores.tolist() == [[9, 1, 2, 3], [1, 0, 0, 0]] and batch.beta == 0.2
    assert batch.columns["c"].tolist() == [7, 8]
    bare = scored(ref_logps=None).group_batch(plan, beta=0.2)
    assert bare.ref_logps is None and bare.behaviour_logps is None


def test_tokens_and_turns_by_index():
    token_logps = torch.tensor([[-1.0, -2, 0], [0, -4, -8], [-16, 0, 0], [-32, -64, -128]])
    turns = torch.tensor([[0, 0, -1], [-1, 0, 0], [0, -1, -1], [0, 0, 1]])
    known = Scored(
        token_logps.sum(1),
        (turns >= 0).sum(1),
        None,
        token_logps=token_logps,
        ref_token_logps=10 * token_logps,
        turns=turns,
    )
    tokens = known.pair_batch(Plan(torch.tensor([[3, 0], [1, 2]])), beta=0.1).tokens
    assert tokens.chosen_logps.tolist() == [[-32, -64, -128], [0, -4, -8]]
    assert tokens.rejected_logps.tolist() == [[-1, -2, 0], [-16, 0, 0]]
    assert tokens.ref_chosen_logps.tolist() == [[-320, -640, -1280], [0, -40, -80]]
    assert tokens.ref_rejected_logps.tolist() == [[-10, -20, 0], [-160, 0, 0]]
    assert tokens.chosen_turns.tolist() == [[0, 0, 1], [-1, 0, 0]]
    assert tokens.rejected_turns.tolist() == [[0, 0, -1], [0, -1, -1]] and tokens.rejected_turns.dtype == torch.int64
    # Of a pair that is not there nothing is scored
    plan = Plan(torch.tensor([[3, 0], [-1, -1]]), empty_pairs=torch.tensor([[-1, -1], [1, 2]]))
    both = known.pair_batch(plan, beta=0.1)
    assert both.tokens.chosen_logps.tolist() == [[-32, -64, -128], [0, 0, 0]]
    assert both.tokens.chosen_turns.tolist() == [[0, 0, 1], [-1, -1, -1]]
    assert both.empty_trace.tokens.rejected_turns.tolist() == [[-1, -1, -1], [0, -1, -1]]
    assert both.empty_trace.tokens.ref_rejected_logps.tolist() == [[0, 0, 0], [-160, 0, 0]]
    without = (
        dataclasses.replace(known, ref_token_logps=None).pair_batch(Plan(torch.tensor([[3, 0]])), beta=0.1).tokens
    )
    assert without.ref_chosen_logps is without.ref_rejected_logps is None


@pytest.mark.parametrize("kind", ["empty traces", "groups"])
def test_the_partner_of_a_row_is_the_other_of_its_pair(kind):
    """What LD-DPO compares lengths with: the other side of the same pair, never a row of another one."""
    if kind == "groups":
        examples, options = GROUPS, {"groups": True}
    else:
        further = [pair([1, 9], [5], [6, 7, 8])]
        examples, options = [pair([1], [2], [3]), pair([1], [4], [5], further_pairs=further)], {"empty_trace": True}
    rows, plan = from_batch(RowsCollator(DataCollatorForPreference(pad_token_id=0), **options)(examples))
    for table in (plan.pairs, plan.empty_pairs):
        for chosen, rejected in [] if table is None else table[table[:, 0] >= 0].tolist():
            assert rows.partner[chosen] == rejected and rows.partner[rejected] == chosen
