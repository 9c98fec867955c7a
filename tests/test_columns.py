"""What a dataset must hold, and what it is told when it does not: before a model is loaded."""

import math
import re
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, IterableDataset

from tests.conftest import preference_rows
from tests.helpers import build, options
from trl_ext import DPOConfig, DPOTrainer, get_loss
from trl_ext.data.columns import check_values, checked, used_columns


def construct(tmp_path, rows, *, loss_type="offset", stream=False, eval_rows=None, **overrides):
    """Build a trainer on a model that does not exist: an error about the data has to come first."""
    dataset = Dataset.from_list(rows)
    dataset = dataset.to_iterable_dataset() if stream else dataset
    DPOTrainer(
        model=str(tmp_path / "no-such-model"),
        args=DPOConfig(**options(tmp_path, loss_type=loss_type, **overrides)),
        train_dataset=dataset,
        eval_dataset=None if eval_rows is None else Dataset.from_list(eval_rows),
    )


def rows_with(**changes):
    """Preference rows, with columns replaced; a dict value changes single rows."""
    rows = preference_rows(6)
    for column, change in changes.items():
        for index, row in enumerate(rows):
            if not isinstance(change, dict):
                row[column] = change
            elif index in change:
                row[column] = change[index]
            else:
                row.setdefault(column, 1.0)
    return rows


def without(*columns):
    return [{key: value for key, value in row.items() if key not in columns} for row in preference_rows(6)]


@pytest.mark.parametrize("stream", [False, True], ids=["dataset", "stream"])
@pytest.mark.parametrize(
    ("loss_type", "rows", "message"),
    [
        ("offset", without("score_rejected"), r"'offset' needs the column 'score_rejected'.*columns are \[.*'prompt'"),
        ("bias_variance", without("chosen_empty_trace"), r"'bias_variance' needs the column 'chosen_empty_trace'"),
        ("anchored", without("score_chosen"), r"'score_rejected' without 'score_chosen': a pair needs both"),
        ("offset", rows_with(score_chosen="4.5"), r"'score_chosen' of the train dataset holds text.*row 0: '4.5'"),
        ("offset", rows_with(score_chosen=None), r"'score_chosen'.*has no value in row 0"),
        ("offset", rows_with(score_chosen=True), r"'score_chosen'.*holds a bool"),
        ("offset", rows_with(score_chosen=[1.0]), r"'score_chosen'.*holds a list"),
        ("margin_adaptive", rows_with(score_chosen=float("nan")), r"'score_chosen'.*is not finite in row 0: nan"),
        (
            "margin_adaptive",
            rows_with(score_rejected=float("-inf")),
            r"'score_rejected'.*is not finite in row 0: -inf",
        ),
        ("anchored", rows_with(preference_prob=1.5), r"'preference_prob'.*is no probability.*row 0: 1.5"),
        ("length_regularized", rows_with(weight=-1.0), r"'weight'.*is negative.*row 0: -1.0"),
        ("sigmoid", rows_with(weight=float("nan")), r"'weight'.*is not finite in row 0: nan"),
        ("ipo", rows_with(weight=1.0), r"'weight'.*\['ipo'\] cannot be weighted"),
        (["sigmoid", "sft"], rows_with(weight=1.0), r"\['sft'\] cannot be weighted"),
        ("offset", rows_with(score_chosen=0.0, score_rejected=1.0), r"first in row 0.*margin_floor.*linear"),
        ("offset", rows_with(score_chosen=1.0, score_rejected=1.0), r"first in row 0.*drop the ties"),
    ],
    ids=lambda value: None if isinstance(value, list) else str(value)[:24],
)
def test_bad_column(loss_type, rows, message, stream, tmp_path):
    with pytest.raises(ValueError, match=message):
        construct(tmp_path, rows, loss_type=loss_type, stream=stream)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score_chosen": {3: None}}, r"'score_chosen' of the train dataset has no value in row 3"),
        ({"score_chosen": {4: float("inf")}}, r"is not finite in row 4"),
        ({"score_chosen": {2: -5.0, 4: -6.0}}, r"2 of 6 pairs.*first in row 2 \(score_chosen=-5.0"),
        ({"weight": {5: -0.5}}, r"'weight'.*row 5: -0.5"),
    ],
)
def test_names_the_row(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        construct(tmp_path, rows_with(**changes))


def test_a_stream_is_checked_row_by_row(tiny_model_dir, tmp_path):
    dataset = Dataset.from_list(rows_with(score_chosen={4: float("nan")})).to_iterable_dataset()
    trainer = build(
        DPOTrainer, DPOConfig, tiny_model_dir, tmp_path, loss_type="offset", dataset=dataset,
        train_sampling_strategy="sequential", trainer_kwargs={"eval_dataset": None},
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"'score_chosen' of the train dataset is not finite in row 4"):
        trainer.train()


def test_rows_are_numbered_as_the_user_sees_them(tmp_path):
    """Also after select and shuffle, where the table underneath has another order."""
    dataset = Dataset.from_list(rows_with(score_chosen={1: None})).select([3, 2, 1, 0])
    with pytest.raises(ValueError, match="no value in row 2"):
        DPOTrainer(
            model=str(tmp_path / "none"),
            args=DPOConfig(**options(tmp_path, loss_type="offset")),
            train_dataset=dataset,
        )


def test_evaluation_data_are_checked_too(tmp_path):
    with pytest.raises(ValueError, match=r"'score_chosen', which the eval dataset does not have"):
        construct(tmp_path, preference_rows(4), eval_rows=without("score_chosen"))
    with pytest.raises(ValueError, match=r"eval dataset is not finite in row 1"):
        construct(tmp_path, preference_rows(6), eval_rows=rows_with(score_chosen={1: float("nan")}))
    with pytest.raises(ValueError, match=r"eval dataset lacks the columns \['weight'\]"):
        construct(tmp_path, rows_with(weight=1.0), eval_rows=preference_rows(4))


def test_empty_dataset(tmp_path):
    empty = Dataset.from_list(preference_rows(1)).select([])
    for dataset in (empty, IterableDataset.from_generator(lambda: iter(()))):
        for loss_type in ("offset", "sigmoid"):
            with pytest.raises(ValueError, match="The train dataset is empty"):
                DPOTrainer(
                    model=str(tmp_path / "none"),
                    args=DPOConfig(**options(tmp_path, loss_type=loss_type)),
                    train_dataset=dataset,
                )


def test_near_names_are_suggested(tmp_path):
    rows = [{**row, "chosen_score": 1.0} for row in without("score_chosen")]
    with pytest.raises(ValueError, match=re.escape("dataset.rename_column('chosen_score', 'score_chosen')")):
        construct(tmp_path, rows)


def test_incomplete_empty_trace_pair(tiny_model_dir, tmp_path):
    def fails(message, **changes):
        rows = preference_rows(4)
        rows[2].update(changes)
        with pytest.raises(ValueError, match=message):
            build(
                DPOTrainer,
                DPOConfig,
                tiny_model_dir,
                tmp_path,
                loss_type="bias_variance",
                dataset=Dataset.from_list(rows),
            )

    fails(r"Row 2 of the train dataset has an incomplete empty-trace pair", chosen_empty_trace=None)
    fails(r"Row 2 of the train dataset has an incomplete traced pair", rejected=None)
    both = dict.fromkeys(["chosen", "rejected", "chosen_empty_trace", "rejected_empty_trace"])
    fails(r"Row 2 of the train dataset has neither", **both)


@pytest.mark.parametrize("column", ["image", "images"])
def test_images_with_empty_trace(column, tmp_path):
    with pytest.raises(ValueError, match=r"\['bias_variance'\] cannot be used on a vision dataset"):
        construct(tmp_path, rows_with(**{column: "x.png"}), loss_type=["offset", "bias_variance"])


def test_implicit_prompt_with_empty_trace(tmp_path):
    with pytest.raises(ValueError, match="needs an explicit column 'prompt'"):
        construct(tmp_path, without("prompt"), loss_type="bias_variance")


def test_integers_are_numbers(tiny_model_dir, tmp_path):
    dataset = Dataset.from_list(rows_with(score_chosen=5, score_rejected=2))
    trainer = build(DPOTrainer, DPOConfig, tiny_model_dir, tmp_path, loss_type="offset", dataset=dataset)
    trainer.train()
    assert trainer.state.log_history[0]["offset/mean"] == pytest.approx(1.0986, abs=1e-4)  # log 3


def test_columns_reach_the_loss_in_their_order(tiny_model_dir, tmp_path):
    """Row by row: the score beside the tokens it belongs to, shuffled and with rows dropped on the way."""
    rows = preference_rows(8)
    for index, row in enumerate(rows):
        row["chosen"] = " good" * (index + 1)
        row["score_chosen"], row["score_rejected"] = float(index + 1), 0.0
    rows[3]["prompt"] = " long" * 60  # fills max_length: TRL drops the row
    trainer = build(
        DPOTrainer, DPOConfig, tiny_model_dir, tmp_path, loss_type="margin_adaptive", dataset=Dataset.from_list(rows),
        max_length=40, per_device_train_batch_size=7,
    )  # fmt: skip
    batch = next(iter(trainer.get_train_dataloader()))
    lengths = batch["completion_mask"].sum(1)[:7] - 1  # without the end-of-sequence token
    tokens = len(trainer.processing_class(" good")["input_ids"])
    assert sorted((lengths // tokens).tolist()) == [1, 2, 3, 5, 6, 7, 8]
    assert (lengths / tokens).tolist() == batch["table"]["plan"]["columns"]["score_chosen"].tolist()


def test_a_text_is_not_taken_for_a_score():
    with pytest.raises(ValueError, match="needs the column 'score_chosen'") as error:
        used_columns(["prompt", "chosen", "rejected"], {"offset": get_loss("offset")}, "train")
    assert "rename_column" not in str(error.value)
    assert "`trl_ext.data.score_preferences` adds scores." in str(error.value)


def loss(required=(), optional=(), bad=None):
    return SimpleNamespace(
        required_columns=required,
        optional_columns=optional,
        check_columns=lambda columns: bad,
        column_help="Mend them.",
    )


def test_columns_stand_once_and_in_their_order():
    losses = {"one": loss(["b", "score_chosen", "score_rejected"], ["c", "not there"]), "two": loss(["c"], ["b", "a"])}
    available = ["weight", "a", "b", "c", "prompt", "score_chosen", "score_rejected", "unused"]
    assert used_columns(available, losses, "train") == ["b", "score_chosen", "score_rejected", "c", "a", "weight"]
    assert used_columns(["weight"], {}, "train") == []  # TRL's own losses alone: nothing reads the weights
    for alone, other in (("score_chosen", "score_rejected"), ("rejected_empty_trace", "chosen_empty_trace")):
        with pytest.raises(
            ValueError, match=f"eval dataset has the column '{alone}' without '{other}': a pair needs both"
        ):
            used_columns([alone], {"one": loss((), [alone, other])}, "eval")


@pytest.mark.parametrize(
    ("available", "hint"),
    [
        (["rejected_score"], "rename_column('rejected_score', 'score_rejected')"),
        (["score_rejectd", "unlike"], "rename_column('score_rejectd', 'score_rejected')"),
        (["unlike"], "`trl_ext.data.score_preferences` adds scores."),
        # One that the loss itself reads under its own name is not the one that is missing
        (["score_chosen"], "`trl_ext.data.score_preferences` adds scores."),
    ],
)
def test_hints_for_a_column_that_is_missing(available, hint):
    with pytest.raises(ValueError, match=re.escape(hint)):
        used_columns(available, {"one": loss(["score_rejected"], ["score_chosen"])}, "train")
    with pytest.raises(ValueError) as error:
        used_columns(["unlike"], {"one": loss(["other"])}, "train")
    assert str(error.value).endswith("columns are ['unlike'].")


def test_values_at_the_edges():
    check_values({"preference_prob": [0, 1.0], "weight": [0.0, 3], "score": [-1e30, 5]}, {"one": loss()}, "train")
    for name, value, problem in (
        ("preference_prob", -0.1, "is no probability"),
        ("preference_prob", 1.0001, "is no probability"),
        ("weight", -0.1, "is negative"),
        ("score", math.inf, "is not finite"),
        ("score", True, "holds a bool, not a number"),
        ("score", "1", "holds text, not a number (convert it: dataset.cast_column('score', Value('float32')))"),
        ("score", None, "has no value"),
    ):
        with pytest.raises(ValueError) as error:
            check_values({name: [0.5, value], "a": [1.0, 1.0]}, {}, "eval", first_row=7)
        said = str(error.value)
        assert f"The column {name!r} of the eval dataset {problem}" in said and f"in row 8: {value!r}." in said
        assert said.endswith(f"read here: {sorted([name, 'a'])}.")


def test_rows_that_a_loss_cannot_take():
    values = {"a": [1.0, 2.0, 3.0], "weight": [1.0] * 3}
    bad = torch.tensor([False, True, True])
    with pytest.raises(ValueError, match=r"^2 of 3 pairs of the eval dataset .* in row 6 \(a=2\.0\)\. Mend them\.$"):
        check_values(values, {"fine": loss(), "one": loss(bad=bad)}, "eval", first_row=5)
    with pytest.raises(ValueError, match=r"^A pair of the eval dataset .* in row 5 \(a=1\.0\)"):
        check_values({"a": [1.0]}, {"one": loss(bad=bad[1:2])}, "eval", first_row=5)
    check_values(values, {"one": loss(bad=torch.zeros(3).bool())}, "eval")
    seen = []
    reader = loss()
    reader.check_columns = seen.append
    check_values({"a": [1, 1 + 1e-12]}, {"one": reader}, "eval")
    assert seen[0]["a"].tolist() == [1.0, 1 + 1e-12]  # as exact as given


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_read(stream):
    rows = [{"a": 1.0, "text": "x", "chosen_empty_trace": "y"}, {"a": None, "text": "x", "chosen_empty_trace": "y"}]
    data = Dataset.from_list(rows)
    data = data.to_iterable_dataset() if stream else data
    assert checked(data, ["chosen_empty_trace"], {}, "train") is data  # texts are looked at elsewhere
    with pytest.raises(ValueError, match="'a' of the train dataset has no value in row 1"):
        list(checked(data, ["chosen_empty_trace", "a"], {}, "train"))
    assert list(checked(data.take(1), ["a"], {}, "train")) == rows[:1]
