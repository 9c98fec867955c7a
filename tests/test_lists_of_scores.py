"""Scores as lists, one number per reward model: from the dataset or the rewards to a loss that takes them, and refused elsewhere."""

import copy
import math
import re

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import AutoModelForCausalLM
from trl.trainer.dpo_trainer import DataCollatorForPreference

from tests.conftest import preference_rows
from tests.helpers import (
    assert_same_parameters,
    build,
    first_batch,
    history,
    loss_and_gradients,
    options,
    parameters,
)
from tests.plain import assert_equals_plain, pair_batch
from trl_ext import DPOConfig, DPOTrainer
from trl_ext.data import Ensemble, calibrate, fit_temperature, inspect_preferences, score_preferences
from trl_ext.data.collator import RowsCollator
from trl_ext.data.groups import from_groups
from trl_ext.data.recipes import curriculum
from trl_ext.rows import from_batch


LISTS = {"loss_type": "reward_distillation", "loss_kwargs": {"combine": "min"}}


def rows_with_lists(count=8):
    """Each pair's scores, and those of a second and a third reward model that see it another way."""
    rows = preference_rows(count)
    for index, row in enumerate(rows):
        row["score_chosen"] = [row["score_chosen"], -float(index % 3), 0.5 * index]
        row["score_rejected"] = [row["score_rejected"], 0.5, 0.25 * index * index]
    return rows


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EXT_CACHE", str(tmp_path / "cache"))


# From the dataset to the loss


@pytest.mark.parametrize("combine", ["mean", "min"])
def test_loss_and_gradients_equal_the_plain_way(combine, tiny_model_dir, tmp_path):
    torch.manual_seed(1)
    reference = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    for parameter in reference.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    rows = rows_with_lists()
    trainer = build(
        DPOTrainer, DPOConfig, tiny_model_dir, tmp_path, dataset=Dataset.from_list(rows), loss_type="e_dpo",
        loss_kwargs={"combine": combine}, train_sampling_strategy="sequential", trainer_kwargs={"ref_model": reference},
    )  # fmt: skip
    loss, gradients = loss_and_gradients(trainer, first_batch(trainer))
    policy = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float64)
    batch = pair_batch(policy, copy.deepcopy(reference).double(), list(trainer.train_dataset.select(range(4))))
    each = torch.tensor(
        [[a - b for a, b in zip(row["score_chosen"], row["score_rejected"], strict=True)] for row in rows]
    )
    implicit = 0.1 * batch.delta
    if combine == "mean":
        expected = (each[:4].double().mean(dim=1) - implicit) ** 2
    else:
        expected = torch.stack([(each[:4, m].double() - implicit) ** 2 for m in range(3)]).amin(dim=0)
    assert_equals_plain(loss, gradients, expected.mean(), policy)


@pytest.mark.parametrize("form", [None, "torch", "numpy"])
def test_the_collator_makes_a_tensor_of_lists(form):
    examples = [
        {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3], "score_chosen": [0.1, 2.0, -1.0], "weight": 0.5},
        {"prompt_ids": [1, 1], "chosen_ids": [2], "rejected_ids": [3], "score_chosen": [7.0, 0.0, 4.5], "weight": 2.0},
    ]
    collator = RowsCollator(DataCollatorForPreference(pad_token_id=0), ["score_chosen", "weight"])
    read = Dataset.from_list(examples)
    if form is not None:
        read = read.with_format(form, columns=["score_chosen", "weight"], output_all_columns=True)
    _, plan = from_batch(collator([read[0], read[1]]))
    assert plan.columns["score_chosen"].dtype == plan.columns["weight"].dtype == torch.float32
    assert torch.equal(plan.columns["score_chosen"], torch.tensor([[0.1, 2.0, -1.0], [7.0, 0.0, 4.5]]))
    assert plan.columns["weight"].tolist() == [0.5, 2.0]


def test_numbers_and_lists_of_one_train_alike(tiny_model_dir, tmp_path):
    runs = []
    for count in (None, 1, 2):
        rows = preference_rows(8)
        for row in rows if count else ():
            row |= {name: [row[name]] * count for name in ("score_chosen", "score_rejected")}
        runs.append(build(DPOTrainer, DPOConfig, tiny_model_dir, tmp_path, dataset=Dataset.from_list(rows), **LISTS))
        runs[-1].train()
        runs[-1].evaluate()
    for other in runs[1:]:
        assert_same_parameters(parameters(runs[0]), parameters(other), rtol=1e-6, atol=1e-8)
    extra = [entry.keys() - plain.keys() for plain, entry in zip(history(runs[0]), history(runs[2]), strict=True)]
    assert extra == [{"reward_gap/disagreement"}] * 3 + [set(), {"eval_reward_gap/disagreement"}]


def test_rows_cut_into_micro_batches_streams_and_resumed_runs(tiny_model_dir, tmp_path):
    data = Dataset.from_list(rows_with_lists())

    def run(name, dataset=data, size=8, resume=None, **overrides):
        trainer = build(
            DPOTrainer, DPOConfig, tiny_model_dir, tmp_path / name, dataset=dataset, optim="sgd", learning_rate=0.1,
            max_steps=2, per_device_train_batch_size=size, gradient_accumulation_steps=8 // size,
            train_sampling_strategy="sequential", **LISTS, **overrides,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return parameters(trainer)

    whole = run("whole", save_strategy="steps", save_steps=1)
    assert_same_parameters(whole, run("eighths", size=1), rtol=1e-4, atol=1e-6)
    assert_same_parameters(whole, run("stream", data.to_iterable_dataset()))
    assert_same_parameters(whole, run("resumed", resume=str(tmp_path / "whole" / "checkpoint-1")))


def test_lists_beside_a_weight_and_losses_without_scores(tiny_model_dir, tmp_path):
    rows = [{**row, "weight": 0.25 * index} for index, row in enumerate(rows_with_lists(4))]
    trainer = build(
        DPOTrainer, DPOConfig, tiny_model_dir, tmp_path, dataset=Dataset.from_list(rows), loss_type=["sigmoid", "e_dpo"],
        loss_weights=[0.5, 2.0], train_sampling_strategy="sequential",
    )  # fmt: skip
    loss, _ = loss_and_gradients(trainer, first_batch(trainer))
    # The policy is its reference: log 2, and the square of the mean gap
    gaps = [sum(a - b for a, b in zip(row["score_chosen"], row["score_rejected"], strict=True)) / 3 for row in rows]
    expected = sum(row["weight"] * (0.5 * math.log(2) + 2.0 * gap**2) for row, gap in zip(rows, gaps, strict=True)) / 4
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_empty_trace_pairs_have_the_lists_of_their_row(tiny_model_dir, tmp_path):
    rows = rows_with_lists(4)
    rows[1] |= {"chosen_empty_trace": None, "rejected_empty_trace": None}
    trainer = build(
        DPOTrainer, DPOConfig, tiny_model_dir, tmp_path, dataset=Dataset.from_list(rows), loss_type="bias_variance",
        loss_kwargs={"base": "e_dpo", "alpha": 0.25}, train_sampling_strategy="sequential",
    )  # fmt: skip
    loss, _ = loss_and_gradients(trainer, first_batch(trainer))
    squares = [
        (sum(a - b for a, b in zip(row["score_chosen"], row["score_rejected"], strict=True)) / 3) ** 2 for row in rows
    ]
    assert loss.item() == pytest.approx((sum(squares) - 0.75 * squares[1]) / 4, rel=1e-5)


# What is refused, before a model is loaded


def construct(tmp_path, rows, *, stream=False, eval_rows=None, **overrides):
    if stream:  # a list of rows as it stands, which a table could not hold
        train = IterableDataset.from_generator(lambda: iter(rows))
    else:
        train = Dataset.from_list(rows)
    DPOTrainer(
        model=str(tmp_path / "no-such-model"),
        args=DPOConfig(**options(tmp_path, **{**LISTS, **overrides})),
        train_dataset=train,
        eval_dataset=None if eval_rows is None else Dataset.from_list(eval_rows),
    )


def changed(row, **columns):
    rows = rows_with_lists(4)
    rows[row] |= columns
    return rows


@pytest.mark.parametrize("stream", [False, True], ids=["dataset", "stream"])
@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"score_chosen": []}, "'score_chosen' of the train dataset holds an empty list, .* in row 0: []."),
        ({"score_chosen": [1.0, math.nan, 2.0]}, "holds a list with nan at place 1, not a finite number, in row 0:"),
        ({"score_chosen": [1.0, 2.0, -math.inf]}, "holds a list with -inf at place 2, not a finite number, in row 0:"),
        ({"score_rejected": [None, 2.0, 3.0]}, "'score_rejected' .* holds a list with None at place 0, .* in row 0:"),
        ({"score_chosen": ["1", "2", "3"]}, "holds a list with '1' at place 0, not a finite number, in row 0:"),
        ({"score_chosen": [True, False, True]}, "holds a list with True at place 0, not a finite number, in row 0:"),
        (
            {"score_chosen": [[1.0], [2.0], [3.0]]},
            "holds a list with [1.0] at place 0, not a finite number, in row 0:",
        ),
        (
            {"score_chosen": [1.0, 2.0]},
            "Row 0 .* has a list of 2 in 'score_chosen' and a list of 3 in 'score_rejected'",
        ),
        ({"score_rejected": 1.0}, "Row 0 .* has a list of 3 in 'score_chosen' and a number in 'score_rejected'"),
        ({"score_chosen": 1.0}, "Row 0 .* has a number in 'score_chosen' and a list of 3 in 'score_rejected'"),
        ({"weight": [1.0, 2.0]}, "'weight' of the train dataset holds a list, not a number, in row 0"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_lists_that_cannot_be_used(columns, message, stream, tmp_path):
    rows = [{**row, **columns} for row in rows_with_lists(3)]
    pattern = ".*".join(re.escape(part) for part in message.split(".*"))
    with pytest.raises(ValueError, match=pattern):
        construct(tmp_path, rows, stream=stream)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"score_chosen": [1.0, 2.0]},
            r"'score_chosen' .* holds a list of 2, where another row has a list of 3, in row 2: \[1.0",
        ),
        (
            {"score_rejected": []},
            r"'score_rejected' .* holds a list of 0, where another row has a list of 3, in row 2: \[\]",
        ),
        ({"score_chosen": [1.0, None, 2.0]}, r"holds a list with None at place 1, not a finite number, in row 2:"),
        ({"score_chosen": None}, r"'score_chosen' of the train dataset has no value in row 2"),
    ],
)
def test_rows_unlike_the_first(columns, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        construct(tmp_path, changed(2, **columns))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (changed(2, score_chosen=[1.0, 2.0]), r"holds a list of 2, where another row has a list of 3, in row 2"),
        (changed(3, score_rejected=1.0), r"'score_rejected' .* holds no list, which another row does .* in row 3: 1.0"),
        ([*preference_rows(2), *rows_with_lists(1)], r"'score_chosen' .* holds a list of 3, where another row has a number, in row 2"),
    ],
    ids=["shorter", "number", "list"],
)  # fmt: skip
def test_a_stream_is_compared_with_its_first_row(rows, message, tiny_model_dir, tmp_path):
    trainer = build(
        DPOTrainer, DPOConfig, tiny_model_dir, tmp_path, dataset=IterableDataset.from_generator(lambda: iter(rows)),
        trainer_kwargs={"eval_dataset": None}, **LISTS,
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        trainer.train()


@pytest.mark.parametrize(
    ("loss_type", "single"),
    [
        ("offset", "['offset']"),
        ("anchored", "['anchored']"),
        ("margin_adaptive", "['margin_adaptive']"),
        (["e_dpo", "sppo_soft", "sigmoid"], "['sppo_soft']"),
    ],
)
def test_losses_that_take_one_score(loss_type, single, tmp_path):
    said = re.escape(
        f"holds a list, not a number, and {single} take one score per completion (take the mean of the list"
    )
    with pytest.raises(
        ValueError, match=rf"'score_chosen' of the train dataset {said}.*`reward_distillation`.*in row 0"
    ):
        construct(tmp_path, rows_with_lists(3), loss_type=loss_type, loss_kwargs=None)


def test_losses_without_scores_do_not_look_at_lists(tiny_model_dir, tmp_path):
    trainer = build(DPOTrainer, DPOConfig, tiny_model_dir, tmp_path, dataset=Dataset.from_list(rows_with_lists()),
                    loss_type=["sigmoid", "length_regularized"], max_steps=1)  # fmt: skip
    trainer.train()


def test_evaluation_data_have_the_lists_of_the_training_data(tiny_model_dir, tmp_path):
    two = [
        {**row, **{name: row[name][:2] for name in ("score_chosen", "score_rejected")}} for row in rows_with_lists(3)
    ]
    alike = "holds {}, that of the train dataset {}. Score both alike"
    for rows, eval_rows, found, expected in (
        (rows_with_lists(3), preference_rows(3), "a number", "a list of 3"),
        (preference_rows(3), rows_with_lists(3), "a list of 3", "a number"),
        (rows_with_lists(3), two, "a list of 2", "a list of 3"),
    ):
        with pytest.raises(ValueError, match=f"'score_chosen' of the eval dataset {alike.format(found, expected)}"):
            construct(tmp_path, rows, eval_rows=eval_rows)
    trainer = build(
        DPOTrainer, DPOConfig, tiny_model_dir, tmp_path, dataset=Dataset.from_list(rows_with_lists()), **LISTS
    )
    with pytest.raises(ValueError, match="'score_chosen' of the other dataset holds a number"):
        trainer.evaluate({"other": Dataset.from_list(preference_rows(4))})
    again = [
        trainer.evaluate(data)["eval_loss"] for data in (trainer.eval_dataset, Dataset.from_list(rows_with_lists()))
    ]
    assert again[0] == again[1]


@pytest.mark.parametrize("pairing", ["best_worst", "group"])
def test_groups_have_one_score_per_completion(pairing):
    for scores in ([[1.0, 2.0], [0.5, 0.0]], [[1.0, 2.0], [1.0, 2.0]]):
        groups = Dataset.from_list([{"prompt": "p", "completions": ["a", "b"], "scores": scores}])
        message = r"Row 0 of the train dataset has the score \[1.0, 2.0\], a list: in a group .* one number"
        with pytest.raises(ValueError, match=message):
            from_groups(groups, pairing, "train")
        with pytest.raises(ValueError, match=r"Row 0 of the grouped dataset has the score \[1.0, 2.0\], a list"):
            curriculum(groups)


# What looks at scores


def test_inspection():
    report = inspect_preferences(Dataset.from_list(rows_with_lists(8)))
    assert report.losses["reward_distillation"] == report.losses["length_regularized"] == ""
    for name in ("offset", "anchored", "margin_adaptive", "sppo_soft"):
        assert f"holds a list, not a number, and ['{name}'] take one score per completion" in report.losses[name]
    assert report.facts["scores of a completion"] == "3, one of each reward model; below stands their mean"
    rows = rows_with_lists(8)
    gaps = [sum(a - b for a, b in zip(row["score_chosen"], row["score_rejected"], strict=True)) / 3 for row in rows]
    assert report.margins == pytest.approx(gaps)
    assert (
        report.facts["scores contradict the label"]
        == f"{sum(gap < 0 for gap in gaps)} of 8 ({sum(gap < 0 for gap in gaps) / 8:.1%})"
    )
    assert report.remarks == {}
    numbers = inspect_preferences(Dataset.from_list(preference_rows(8)))
    assert "scores of a completion" not in numbers.facts and numbers.losses["reward_distillation"] == ""


def test_inspection_of_lists_that_cannot_be_used():
    rows = rows_with_lists(4)
    rows[1]["score_chosen"] = [1.0, 2.0]
    rows[2]["score_chosen"] = []
    rows[3]["score_rejected"] = [None, 1.0, 2.0]
    report = inspect_preferences(Dataset.from_list(rows))
    assert "holds a list of 2, where another row has a list of 3, in row 1" in report.losses["reward_distillation"]
    assert len(report.margins) == 2


def test_inspection_of_ratings_that_are_lists():
    """What is minded about whole numbers and missing scores is said of numbers alone."""
    ratings = [{**row, "score_chosen": [5, 4], "score_rejected": [1, 2]} for row in preference_rows(4)]
    for row in ratings:
        del row["preference_prob"]
    report = inspect_preferences(Dataset.from_list(ratings))
    assert report.margins == [3.0] * 4 and report.remarks == {}


def test_calibration_is_of_one_reward():
    data = Dataset.from_list(rows_with_lists(4))
    with pytest.raises(ValueError, match=r"The scores are lists.*calibrate\(\[a\[0\] - b\[0\] for a, b in"):
        calibrate(data)
    assert (
        calibrate([a[0] - b[0] for a, b in zip(data["score_chosen"], data["score_rejected"], strict=True)]).pairs == 4
    )


# Scoring

PAIRS = Dataset.from_list([{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in preference_rows(8)])


def length(prompts, completions, **kwargs):
    return [float(len(completion)) for completion in completions]


def sevens(prompts, completions, **kwargs):
    return [float(len(completion) % 7) for completion in completions]


def test_scores_of_each_reward():
    both = Ensemble([length, sevens], "list", [1.0, -2.0])
    scored = score_preferences(PAIRS, both)
    for side in ("chosen", "rejected"):
        expected = [[float(len(text)), -2.0 * (len(text) % 7)] for text in PAIRS[side]]
        assert scored[f"score_{side}"] == expected
        assert score_preferences(PAIRS, both, temperature=4.0)[f"score_{side}"] == [
            [a / 4, b / 4] for a, b in expected
        ]
    assert score_preferences(PAIRS, Ensemble([length], "list"))["score_chosen"] == [
        [float(len(t))] for t in PAIRS["chosen"]
    ]


def test_each_reward_has_a_temperature_of_its_own():
    raw = score_preferences(PAIRS, Ensemble([length, sevens], "list"))
    fitted = [
        fit_temperature([a[m] - b[m] for a, b in zip(raw["score_chosen"], raw["score_rejected"], strict=True)])
        for m in range(2)
    ]
    assert fitted[0] != pytest.approx(fitted[1], rel=0.1)
    scaled = score_preferences(PAIRS, Ensemble([length, sevens], "list"), temperature="fit")
    for before, after in zip(raw["score_rejected"], scaled["score_rejected"], strict=True):
        assert after == pytest.approx([value / each for value, each in zip(before, fitted, strict=True)])


def test_lists_within_ensembles_and_of_groups_are_refused():
    for combine in ("sum", "list"):
        with pytest.raises(ValueError, match=f'`combine="list"` stands within an ensemble with `combine={combine!r}`'):
            Ensemble([Ensemble([length, sevens], "list"), length], combine)
    groups = Dataset.from_list([{"prompt": "p", "completions": ["a", "bbb"]}])
    with pytest.raises(
        ValueError, match=r'takes one number: give `Ensemble\(\[...\], "mean"\)` as `reward_funcs`, or make pairs'
    ):
        score_preferences(groups, Ensemble([length, sevens], "list"))


def test_the_trainer_gives_each_reward_to_a_loss_that_takes_it(tiny_model_dir, tmp_path):
    def scores(reward_funcs, loss_type="reward_distillation"):
        trainer = build(
            DPOTrainer, DPOConfig, tiny_model_dir, tmp_path, dataset=PAIRS, loss_type=loss_type,
            trainer_kwargs={"reward_funcs": reward_funcs},
        )  # fmt: skip
        return trainer.train_dataset["score_chosen"]

    lengths = [float(len(text)) for text in PAIRS["chosen"]]
    both = [[value, value % 7] for value in lengths]
    assert scores([length, sevens]) == both
    assert scores((length, sevens), ["sigmoid", "e_dpo", "length_regularized"]) == both
    # One reward is a number, and an ensemble is what it says
    assert scores([length]) == scores(length) == lengths
    assert scores(Ensemble([length, sevens])) == [a + b for a, b in both]
    assert scores([length, sevens], "margin_adaptive") == [a + b for a, b in both]


def test_the_trainer_refuses_a_sum_that_would_be_another_method(tiny_model_dir, tmp_path):
    def refused(message, dataset=PAIRS, loss_type="e_dpo", **kwargs):
        with pytest.raises(ValueError, match=message):
            DPOTrainer(
                model=str(tiny_model_dir),
                args=DPOConfig(**options(tmp_path, loss_type=loss_type)),
                train_dataset=dataset,
                reward_funcs=[length, sevens],
                **kwargs,
            )

    refused(
        r"Of several rewards \['reward_distillation'\] take each and \['margin_adaptive'\] the sum.* Give one reward",
        loss_type=["e_dpo", "margin_adaptive"],
    )
    groups = Dataset.from_list([{"prompt": "p", "completions": ["a", "bbb"]}])
    refused(r'In a group .* takes one number: give `Ensemble\(\[...\], "mean"\)`', groups)
    # Scores that are there are kept, and those of the evaluation data have to be like them
    refused("'score_chosen' of the eval dataset holds a list of 2, that of the train dataset a number",
            Dataset.from_list(preference_rows(4)), eval_dataset=PAIRS)  # fmt: skip
