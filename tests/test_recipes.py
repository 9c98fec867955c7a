"""Recipes made of data."""

import re

import pytest
from datasets import Dataset

import trl_ext
from tests.conftest import preference_rows
from tests.helpers import build, first_batch
from trl_ext.data.recipes import (
    DualVariable,
    curriculum,
    few_shot_prompts,
    refinement_rows,
    relabel_by_cost,
    step_controlled_pairs,
    step_pairs,
    weighted_prompts,
    weighted_reward,
    without_eos,
)


def test_curriculum_goes_from_large_gaps_to_small():
    rows = [
        {"prompt": f"p{i}", "completions": ["a", "b", "c", "d"], "scores": [1.0, 4.0, 3.0 + i / 9, 2.0]}
        for i in range(4)
    ]
    stages = curriculum(Dataset.from_list(rows))
    assert [len(stage) for stage in stages] == [4, 4, 4]
    assert [set(stage["rejected"]) for stage in stages] == [{"a"}, {"d"}, {"c"}]
    gaps = [max(a - b for a, b in zip(s["score_chosen"], s["score_rejected"], strict=True)) for s in stages]
    assert gaps == sorted(gaps, reverse=True) and all(set(stage["chosen"]) == {"b"} for stage in stages)


def test_a_tie_with_the_best_is_no_pair():
    (stage,) = curriculum(
        Dataset.from_list([{"prompt": "p", "completions": ["a", "b", "c"], "scores": [2.0, 2.0, 1.0]}])
    )
    assert stage["rejected"] == ["c"]
    with pytest.raises(ValueError, match="nothing to prefer"):
        curriculum(Dataset.from_list([{"prompt": "p", "completions": ["a", "b"], "scores": [1.0, 1.0]}]))


STEPS = Dataset.from_list(
    [{"prompt": "what", "initial_reason_steps": " a film", "chosen": " was good", "rejected": " was bad"}] * 4
)


def test_steps_move_to_the_prompt_and_do_not_end(tiny_model_dir, tmp_path):
    from transformers import AutoTokenizer

    rows = step_pairs(STEPS)
    assert rows[0]["prompt"] == "what a film" and "initial_reason_steps" not in rows.column_names
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    trainer = build(
        trl_ext.DPOTrainer, trl_ext.DPOConfig, tiny_model_dir, tmp_path, dataset=without_eos(rows, tokenizer)
    )
    batch = first_batch(trainer)
    assert tokenizer.eos_token_id not in batch["input_ids"][batch["completion_mask"].bool()]
    assert tokenizer.decode(batch["input_ids"][0][batch["attention_mask"][0].bool()]) == "what a film was good"
    trainer.train()


def test_step_controlled():
    rows = [{"prompt": "q", "prefix": prefix, "chosen": "a", "rejected": "b"} for prefix in (None, " so", "")]
    assert sorted(step_controlled_pairs(Dataset.from_list(rows))["prompt"]) == ["q", "q", "q so"]


def test_few_shot_prompts_leak_nothing():
    rows = [
        {**{k: row[k] for k in ("prompt", "chosen", "rejected")}, "user_id": i % 2}
        for i, row in enumerate(preference_rows(10))
    ]
    data = few_shot_prompts(Dataset.from_list(rows), shots=2)
    assert len(data) == 10
    for shown, row in zip(data, rows, strict=True):
        assert shown["prompt"].endswith(row["prompt"]) and shown["prompt"].count("Preferred answer:") == 2
        assert f"Question: {row['prompt']}\n" not in shown["prompt"]
        mine = {other["prompt"] for other in rows if other["user_id"] == row["user_id"]}
        assert sum(f"Question: {prompt}\n" in shown["prompt"] for prompt in mine) == 2
    with pytest.raises(ValueError, match="lower `shots`"):
        few_shot_prompts(Dataset.from_list(rows), shots=9)


def test_weights_in_the_prompt_are_those_of_the_reward():
    data = weighted_prompts(Dataset.from_dict({"prompt": ["a", "b"]}), ["short", "kind"])
    for row in data:
        shown = [float(part.split()[-1]) for part in row["prompt"].split("]")[0].removeprefix("[weights: ").split(",")]
        assert shown == row["objective_weights"] and sum(shown) == pytest.approx(1.0, abs=0.011)
    seen = []

    def first(prompts, completions, **kwargs):
        seen.extend(prompts)
        return [1.0] * len(prompts)

    reward = weighted_reward([first, lambda prompts, completions, **kwargs: [10.0] * len(prompts)])
    values = reward(prompts=data["prompt"], completions=["x", "y"], objective_weights=data["objective_weights"])
    assert seen == ["a", "b"]
    assert values == pytest.approx([w[0] + 10 * w[1] for w in data["objective_weights"]])


def test_one_objective_is_online_dpo():
    data = weighted_prompts(Dataset.from_dict({"prompt": ["a"]}), ["only"])
    assert data["objective_weights"] == [[1.0]]


def test_costs_turn_pairs():
    rows = [
        {
            "chosen": "a",
            "rejected": "b",
            "reward_chosen": 2.0,
            "reward_rejected": 1.0,
            "cost_chosen": 3.0,
            "cost_rejected": 0.0,
        },
        {
            "chosen": "c",
            "rejected": "d",
            "reward_chosen": 2.0,
            "reward_rejected": 1.0,
            "cost_chosen": 1.0,
            "cost_rejected": 0.0,
        },
    ]
    data = Dataset.from_list(rows)
    assert relabel_by_cost(data, 0.0)["chosen"] == ["a", "c"]
    turned = relabel_by_cost(data, 0.5)
    assert turned["chosen"] == ["b", "c"] and turned[0]["cost_chosen"] == 0.0
    assert turned["score_chosen"] == [1.0, 1.5] and turned["score_rejected"] == [0.5, 1.0]
    assert relabel_by_cost(data, 1.0)["chosen"] == ["b"]  # the second pair ties
    with pytest.raises(ValueError, match="at least 0"):
        relabel_by_cost(data, -1.0)


def test_dual_variable():
    dual = DualVariable(budget=1.0, learning_rate=0.5)
    assert dual.update([3.0, 1.0]) == 0.5
    assert dual.update([0.0]) == 0.0  # never negative


def test_refinements_show_the_worse_answer():
    plain, refined = refinement_rows(Dataset.from_list([{"prompt": "q", "chosen": "good", "rejected": "bad"}]))
    assert plain["prompt"] == "q" and (refined["chosen"], refined["rejected"]) == ("good", "bad")
    assert "bad" in refined["prompt"] and "good" not in refined["prompt"]
    with pytest.raises(ValueError, match="needs the places"):
        refinement_rows(Dataset.from_list([plain]), "better, please")


def test_stages_are_shuffled_each_by_itself():
    rows = [{"prompt": f"p{i}", "completions": ["a", "b", "c"], "scores": [0, 2, 1]} for i in range(8)]
    first, second = curriculum(Dataset.from_list(rows), seed=3)
    prompts = [f"p{i}" for i in range(8)]
    assert sorted(first["prompt"]) == sorted(second["prompt"]) == prompts
    assert len({tuple(stage["prompt"]) for stage in (first, second)} | {tuple(prompts)}) == 3
    again = [stage["prompt"] for stage in curriculum(Dataset.from_list(rows), seed=3)]
    assert (
        again == [first["prompt"], second["prompt"]]
        and curriculum(Dataset.from_list(rows))[0]["prompt"] != first["prompt"]
    )
    assert first[0] == {
        "prompt": first[0]["prompt"],
        "chosen": "b",
        "rejected": "a",
        "score_chosen": 2.0,
        "score_rejected": 0.0,
    }
    assert set(second["rejected"]) == {"c"} and set(second["score_rejected"]) == {1.0}


def test_token_ids_by_hand():
    """The prompt ends where both completions still agree with it."""

    def tokenizer(text):  # a letter makes a token, and so do `c` and `d` together
        return {"input_ids": re.findall("cd|.", text)}

    rows = [{"prompt": "abd", "chosen": "ef", "rejected": "g"}, {"prompt": "abc", "chosen": "d", "rejected": "e"}]
    first, second = without_eos(Dataset.from_list(rows), tokenizer)
    assert (first["prompt_ids"], first["chosen_ids"], first["rejected_ids"]) == (["a", "b", "d"], ["e", "f"], ["g"])
    assert (second["prompt_ids"], second["chosen_ids"], second["rejected_ids"]) == (["a", "b"], ["cd"], ["c", "e"])


def test_few_shot_examples_of_other_prompts_only():
    """A prompt that stands twice is no example for itself, and the seed chooses among the others."""
    names = ["p", "p", "q", "r", "s", "t", "u"]
    rows = Dataset.from_list(
        [{"prompt": name, "chosen": f"good {name}", "rejected": "bad", "user_id": 1} for name in names]
    )
    shown = few_shot_prompts(rows, shots=1)
    assert all(f"Question: {row['prompt']}\n" not in row["prompt"] for row in shown)
    for row in shown.select(range(2)):
        assert "good p" not in row["prompt"] and row["prompt"].endswith("\n\np")
    assert (
        few_shot_prompts(rows, shots=1, seed=1)["prompt"]
        != shown["prompt"]
        == few_shot_prompts(rows, shots=1)["prompt"]
    )
    assert all(row["prompt"].count("Preferred answer: good") == 4 for row in few_shot_prompts(rows))
    assert len(few_shot_prompts(rows, shots=5)) == 7
    with pytest.raises(ValueError, match="No user has 8 different prompts"):
        few_shot_prompts(rows, shots=7)
    with pytest.raises(ValueError, match="must be at least 1"):
        few_shot_prompts(rows, shots=0)


def test_mixed_kinds_of_steps():
    rows = Dataset.from_list([{"prompt": str(i), "prefix": None, "chosen": "a", "rejected": "b"} for i in range(8)])
    first, other = step_controlled_pairs(rows), step_controlled_pairs(rows, seed=1)
    assert first["prompt"] != other["prompt"] != [str(i) for i in range(8)] and "prefix" not in first.column_names


def test_weights_that_cannot_be():
    prompts = Dataset.from_dict({"prompt": ["a"] * 3})
    for objectives, alpha in (([], 1.0), (["x"], 0.0), (["x"], -1.0)):
        with pytest.raises(ValueError, match="positive `alpha`"):
            weighted_prompts(prompts, objectives, alpha)
    first, other = weighted_prompts(prompts, ["x", "y"]), weighted_prompts(prompts, ["x", "y"], seed=1)
    assert first["prompt"] == weighted_prompts(prompts, ["x", "y"])["prompt"] != other["prompt"]
    assert len(set(first["prompt"])) == 3
    with pytest.raises(ValueError, match="2 weights for 1 rewards"):
        weighted_reward([lambda **kwargs: [1.0]])(prompts=["a"], completions=["b"], objective_weights=[[0.5, 0.5]])


@pytest.mark.parametrize("counts", [(1, 1), (2, 1), (1, 2), (3, 3)])
def test_rewards_that_lack_values(counts):
    """One too few for two completions would leave one of them without a reward."""
    functions = [lambda count=count, **kwargs: [1.0] * count for count in counts]
    with pytest.raises(ValueError, match=r"zip\(\)"):
        weighted_reward(functions)(prompts=["a", "b"], completions=["x", "y"], objective_weights=[[0.5, 0.5]] * 2)


def test_a_price_turns_whole_rows():
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "note_chosen": "of a", "note_rejected": "of b", "kind_chosen": "alone",
           "reward_chosen": 2.0, "reward_rejected": 1.0, "cost_chosen": 3.0, "cost_rejected": 0.0}  # fmt: skip
    (turned,) = relabel_by_cost(Dataset.from_list([row]), 1.0)
    assert turned == {"prompt": "p", "chosen": "b", "rejected": "a", "note_chosen": "of b", "note_rejected": "of a",
                      "kind_chosen": "alone", "reward_chosen": 1.0, "reward_rejected": 2.0, "cost_chosen": 0.0, "cost_rejected": 3.0,
                      "score_chosen": 1.0, "score_rejected": -1.0}  # fmt: skip
    with pytest.raises(ValueError, match="All pairs tie at this price"):
        relabel_by_cost(Dataset.from_list([{**row, "cost_chosen": 1.0}]), 1.0)
    with pytest.raises(ValueError, match="must be at least 0"):
        relabel_by_cost(Dataset.from_list([row]), float("nan"))
    with pytest.raises(ValueError, match=r"lacks \['cost_rejected'\]"):
        relabel_by_cost(Dataset.from_list([row]).remove_columns("cost_rejected"), 1.0)


@pytest.mark.parametrize(("lr", "value"), [(0.0, 0.0), (-1.0, 0.0), (1.0, -0.1)])
def test_dual_variables_that_cannot_be(lr, value):
    with pytest.raises(ValueError, match="must be positive and"):
        DualVariable(budget=1.0, learning_rate=lr, value=value)


def test_the_text_of_a_refinement():
    row = {"prompt": "q", "chosen": "good", "rejected": "bad", "score_chosen": 1.0}
    plain, refined = refinement_rows(Dataset.from_list([row]), "{prompt}? Not {answer}.")
    assert plain == row and refined == {**row, "prompt": "q? Not bad."}
    for template in ("{prompt}", "{answer}"):
        with pytest.raises(ValueError, match="needs the places"):
            refinement_rows(Dataset.from_list([row]), template)
