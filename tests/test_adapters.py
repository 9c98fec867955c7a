"""Rows of the form in which the field's preference data is published, made by hand, and what becomes of them."""

import logging

import pytest
from datasets import Dataset

from trl_ext.data import adapters, inspect_preferences
from trl_ext.data.adapters import (
    argilla_dpo_mix,
    argilla_ultrafeedback,
    helpsteer2_preference,
    hh_rlhf,
    nectar,
    ultrafeedback_binarized,
)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


PAIR = {"prompt": [user("Why?")], "chosen": [assistant("So.")], "rejected": [assistant("No.")]}
WHOLE = {"chosen": [user("Why?"), assistant("So.")], "rejected": [user("Why?"), assistant("No.")]}
HH = "\n\nHuman: Hello\n\nAssistant: Good day.\n\nHuman: Why?\n\nAssistant:"
NECTAR = {
    "prompt": "\n\nHuman: Why?\n\nAssistant: ",
    "answers": [
        {"answer": "No.", "model": "a", "rank": 3.0},
        {"answer": "So.", "model": "b", "rank": 1.0},
        {"answer": "Hm.", "model": "c", "rank": 2.0},
    ],
    "turns": 1, "num_responses": 3, "source": ["lmsys-chat-1m"], "good_natured": True,
}  # fmt: skip
HELPSTEER = {
    "split": "train", "prompt": "Why?", "response_1": "No.", "response_2": "So.", "preference_strength": 2, "preference_statement": "s",
    "preference_elaboration": "e",
}  # fmt: skip

PUBLISHED = {
    "ultrafeedback": (
        ultrafeedback_binarized,
        {"prompt": "Why?", "prompt_id": "0", **WHOLE, "messages": WHOLE["chosen"], "score_chosen": 8.5, "score_rejected": 6.0},
        {**PAIR, "score_chosen": 8.5, "score_rejected": 6.0},
    ),
    "ultrafeedback-trl-lib": (
        ultrafeedback_binarized,
        {**WHOLE, "score_chosen": 8.0, "score_rejected": 8.0},
        {**PAIR, "score_chosen": 8.0, "score_rejected": 8.0},
    ),
    "helpsteer": (helpsteer2_preference, HELPSTEER, {**PAIR, "weight": 2.0}),
    "helpsteer-first-is-better": (
        helpsteer2_preference,
        {**HELPSTEER, "preference_strength": -3},
        {**PAIR, "chosen": PAIR["rejected"], "rejected": PAIR["chosen"], "weight": 3.0},
    ),
    "helpsteer-scores": (
        lambda data: helpsteer2_preference(data, strength="scores"), HELPSTEER, {**PAIR, "score_chosen": 2.0, "score_rejected": 0.0},
    ),
    "helpsteer-turns": (
        helpsteer2_preference,
        {**HELPSTEER, "prompt": "Hello\n<extra_id_1>Assistant\nGood day.\n<extra_id_1>User\nWhy?"},
        {**PAIR, "prompt": [user("Hello"), assistant("Good day."), user("Why?")], "weight": 2.0},
    ),
    "nectar": (nectar, NECTAR, {**PAIR, "score_chosen": -1.0, "score_rejected": -3.0}),
    "nectar-groups": (
        lambda data: nectar(data, groups=True),
        NECTAR,
        {
            "prompt": [user("Why?")],
            "completions": [[assistant("So.")], [assistant("Hm.")], [assistant("No.")]],
            "scores": [-1.0, -2.0, -3.0],
        },
    ),
    "hh": (
        hh_rlhf,
        {"chosen": HH + " So.\n\nAnd so.", "rejected": HH + " No."},
        {
            "prompt": [user("Hello"), assistant("Good day."), user("Why?")],
            "chosen": [assistant("So.\n\nAnd so.")],
            "rejected": [assistant("No.")],
        },
    ),
    "hh-parts-early": (
        hh_rlhf,
        {"chosen": "\n\nHuman: A\n\nAssistant: B\n\nHuman: C\n\nAssistant: D", "rejected": "\n\nHuman: A\n\nAssistant: E"},
        {"prompt": [user("A")], "chosen": [assistant("B"), user("C"), assistant("D")], "rejected": [assistant("E")]},
    ),
    "hh-same-answer": (
        hh_rlhf,
        {"chosen": "\n\nHuman: A\n\nAssistant: B", "rejected": "\n\nHuman: A\n\nAssistant: B"},
        {"prompt": [user("A")], "chosen": [assistant("B")], "rejected": [assistant("B")]},
    ),
    "argilla-cleaned": (
        argilla_ultrafeedback,
        {"source": "s", "prompt": "Why?", **WHOLE, "chosen-rating": 4.5, "chosen-model": "m", "rejected-rating": 2.25, "rejected-model": "n"},
        {**PAIR, "score_chosen": 4.5, "score_rejected": 2.25},
    ),
    "argilla-first": (
        argilla_ultrafeedback,
        {"source": "s", "instruction": "Why?", "chosen_response": "So.", "rejected_response": "No.", "chosen_avg_rating": 5.0,
         "rejected_avg_rating": 3.75, "chosen_model": "m"},
        {**PAIR, "score_chosen": 5.0, "score_rejected": 3.75},
    ),
    "argilla-mix": (
        argilla_dpo_mix,
        {"dataset": "d", **WHOLE, "chosen_rating": 9.0, "rejected_rating": 7.0},
        {**PAIR, "score_chosen": 9.0, "score_rejected": 7.0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_rows(name):
    adapt, row, expected = PUBLISHED[name]
    adapted = adapt(Dataset.from_list([row, row]))
    assert adapted.to_list() == [expected, expected] and adapted.column_names == list(expected)
    inspect_preferences(adapted)  # in a form that is read


@pytest.mark.parametrize("name", [name for name in PUBLISHED if "scores" not in name and "groups" not in name])
def test_columns_are_checked(name):
    adapt, row, _ = PUBLISHED[name]
    needed = (
        "instruction"
        if "instruction" in row
        else next(column for column in row if "chosen" in column or column == "prompt")
    )
    data = Dataset.from_list(
        [{other: value for other, value in row.items() if other != needed and "chosen" not in other}]
    )
    with pytest.raises(ValueError, match=r"The dataset lacks \[.*\]; its columns are .* The published form has \["):
        adapt(data)


def test_rows_without_a_preference_are_counted(caplog):
    """Ties, and dialogues without an answer; also where a whole batch has none."""
    ties = [{**HELPSTEER, "preference_strength": value} for value in (0, 2, 0)]
    with caplog.at_level(logging.WARNING):
        assert len(helpsteer2_preference(Dataset.from_list(ties))) == 1
    assert "2 of 3 rows hold no preference, and are left out" in caplog.text
    many = Dataset.from_list([ties[0]] * 1000 + [ties[1]])
    assert helpsteer2_preference(many).to_list() == [{**PAIR, "weight": 2.0}]
    tied = {
        **NECTAR,
        "answers": [{"answer": "a", "model": "m", "rank": 1.0}, {"answer": "b", "model": "m", "rank": 1.0}],
    }
    assert len(nectar(Dataset.from_list([tied, NECTAR]))) == 1
    silent = {"chosen": HH, "rejected": HH + " No."}
    strangers = {"chosen": "\n\nHuman: A\n\nAssistant: B", "rejected": "\n\nHuman: C\n\nAssistant: D"}
    good = {"chosen": HH + " So.", "rejected": HH + " No."}
    assert len(hh_rlhf(Dataset.from_list([silent, strangers, good]))) == 1
    with pytest.raises(ValueError, match="None of the 1 rows holds a preference"):
        helpsteer2_preference(Dataset.from_list(ties[:1]))


def test_rows_of_another_form_are_refused():
    with pytest.raises(
        ValueError, match=r"Row 1 is not of the published form: .*is 4; expected a whole number from -3 to 3"
    ):
        helpsteer2_preference(Dataset.from_list([HELPSTEER, {**HELPSTEER, "preference_strength": 4}]))
    with pytest.raises(ValueError, match=r"Row 0 is not of the published form: .*begins with no speaker"):
        hh_rlhf(Dataset.from_list([{"chosen": "Hello", "rejected": HH + " No."}]))
    with pytest.raises(ValueError, match=r"Row 0 is not of the published form"):
        ultrafeedback_binarized(
            Dataset.from_list([{"chosen": "a", "rejected": "b", "score_chosen": 1.0, "score_rejected": 0.0}])
        )
    with pytest.raises(ValueError, match=r"`strength='both'` is unknown; choose one of \['weight', 'scores'\]"):
        helpsteer2_preference(Dataset.from_list([HELPSTEER]), strength="both")


def test_all_are_listed_by_their_name():
    functions = {
        ultrafeedback_binarized,
        helpsteer2_preference,
        nectar,
        hh_rlhf,
        argilla_ultrafeedback,
        argilla_dpo_mix,
    }
    assert set(adapters.ADAPTERS.values()) == functions
    for name, function in adapters.ADAPTERS.items():
        assert name in function.__doc__
