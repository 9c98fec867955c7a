"""Further pairs of a row: flattened into a dataset of pairs, and what is made of them put back."""

import pytest
from datasets import Dataset

from tests.helpers import build
from trl_ext import DPOConfig, DPOTrainer
from trl_ext.data.further import in_twos, map_further


def two(chosen, rejected):
    return {"chosen": chosen, "rejected": rejected}


def test_in_twos():
    """The last of an odd number stands twice; one alone is a pair with itself, none is none."""
    assert in_twos([]) == []
    assert in_twos(["a"]) == [two("a", "a")]
    assert in_twos(["a", "b"]) == [two("a", "b")]
    assert in_twos(["a", "b", "c"]) == [two("a", "b"), two("c", "c")]
    assert in_twos([["m"], ["n"]]) == [two(["m"], ["n"])]


def lengths(flat):
    """In place of what TRL does to pairs."""
    return flat.map(lambda row: {"long": len(row["chosen"]), "short": len(row["rejected"])})


def numbered(counts):
    """Row `i` has `counts[i]` pairs, whose texts have lengths that follow from their place."""
    rows, place = [], 0
    for row, count in enumerate(counts):
        pairs = []
        for _ in range(count):
            pairs.append(two("x" * (place % 7), "y" * (place % 5 + 1)))
            place += 1
        rows.append({"prompt": f"p{row}", "more": pairs})
    return Dataset.from_list(rows)


def by_hand(counts):
    place, rows = 0, []
    for count in counts:
        rows.append([{"long": (place + k) % 7, "short": (place + k) % 5 + 1} for k in range(count)])
        place += count
    return rows


@pytest.mark.parametrize(
    "counts",
    [
        [1, 2, 1],
        [0, 2, 1],  # the first row has none
        [2, 1, 0],  # the last
        [1, 0, 0, 2],
    ],
    ids=str,
)
def test_rows_that_have_none_keep_an_empty_list(counts):
    dataset = numbered(counts)
    if not counts[0]:
        dataset = Dataset.from_list(list(dataset), features=numbered([1]).features)
    back = map_further(dataset, "more", lengths, ("long", "short"))
    assert back["further_pairs"][:] == by_hand(counts)
    assert back.column_names == ["prompt", "further_pairs"] and back["prompt"][:] == dataset["prompt"][:]


def test_no_row_has_any():
    dataset = Dataset.from_list([{"prompt": "p", "more": []}] * 2, features=numbered([1]).features)

    def never(flat):
        raise AssertionError("called without a pair")

    back = map_further(dataset, "more", never, ("long",))
    assert back.column_names == ["prompt", "further_pairs"] and back["further_pairs"][:] == [[], []]


def test_more_rows_than_the_writer_keeps_at_once():
    """The first and the second batch of a thousand rows hold no pair, which says nothing of the column's type."""
    counts = [0] * 2000 + [2, 0, 1] + [0] * 1100
    dataset = Dataset.from_list(list(numbered(counts)), features=numbered([1]).features)
    calls = []

    def function(flat):
        calls.append(len(flat))
        return lengths(flat)

    back = map_further(dataset, "more", function, ("long", "short"))
    assert calls == [3] and back["further_pairs"][:] == by_hand(counts)


def test_what_stands_beside_is_given_to_each_pair():
    dataset = numbered([2, 0, 1])
    seen = []

    def function(flat):
        seen.extend(flat)
        return lengths(flat)

    map_further(dataset, "more", function, ("long",), beside=("prompt",))
    assert seen == [
        {**two("", "y"), "prompt": "p0"},
        {**two("x", "yy"), "prompt": "p0"},
        {**two("xx", "yyy"), "prompt": "p2"},
    ]


def test_the_column_may_be_its_own_successor():
    """What is precomputed is added to the pairs that are there already."""
    first = map_further(numbered([1, 2]), "more", lengths, ("long", "short"))
    added = map_further(
        first, "further_pairs", lambda flat: flat.map(lambda row: {"sum": row["long"] + row["short"]}), ("long", "sum")
    )
    assert added.column_names == ["prompt", "further_pairs"]
    assert added["further_pairs"][:] == [[{"long": 0, "sum": 1}], [{"long": 1, "sum": 3}, {"long": 2, "sum": 5}]]


def test_what_another_function_gave_is_not_read_from_the_cache(tmp_path):
    """Such as log-probs of another reference, of the same rows."""
    numbered([1, 2]).to_json(tmp_path / "data.jsonl")
    data = Dataset.from_json(str(tmp_path / "data.jsonl"), cache_dir=str(tmp_path / "cache"))
    for factor in (1, 10, 1):
        back = map_further(
            data, "more", lambda flat, f=factor: flat.map(lambda row: {"n": f * len(row["rejected"])}), ("n",)
        )
        assert (
            back["further_pairs"][:] == [[{"n": factor}], [{"n": 2 * factor}, {"n": 3 * factor}]] and back.cache_files
        )
    # Nor what was kept of it
    both = map_further(data, "more", lengths, ("long", "short"))
    short = map_further(data, "more", lengths, ("short",))
    assert both["further_pairs"][0] == [{"long": 0, "short": 1}] and short["further_pairs"][0] == [{"short": 1}]


def say(text):
    return [{"role": "assistant", "content": text}]


GROUPS = [
    {"prompt": [{"role": "user", "content": "what"}], "completions": [say(" good"), say(" bad"), say(" slow film"), say(" dull")],
     "scores": [1.0, 4.0, 2.0, 3.0]},
    {"prompt": [{"role": "user", "content": "why"}], "completions": [say(" sad"), say(" fast"), say(" long story")],
     "scores": [1.0, 3.0, 2.0]},
    {"prompt": [{"role": "user", "content": "how"}], "completions": [say(" short"), say(" funny")], "scores": [0.0, 1.0]},
]  # fmt: skip


def test_groups_of_conversations(tiny_model_dir, tmp_path):
    """The others of a group are rendered after its prompt, as best and worst are; the last of an odd number stands alone."""
    trainer = build(
        DPOTrainer, DPOConfig, tiny_model_dir, tmp_path, dataset=Dataset.from_list(GROUPS), loss_type="anchored"
    )
    tokenizer = trainer.processing_class

    def text(ids):
        return tokenizer.decode(ids)

    found = list(trainer.train_dataset)
    assert [len(row["further_pairs"]) for row in found] == [1, 1, 0]
    prompt = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n".format
    for row, group in zip(found, GROUPS, strict=True):
        for pair in row["further_pairs"]:
            assert text(pair["prompt_ids"]) == text(row["prompt_ids"]) == prompt(group["prompt"][0]["content"])
    (first,), (second,) = found[0]["further_pairs"], found[1]["further_pairs"]
    end = "<|im_end|>\n"
    assert (text(first["chosen_ids"]), text(first["rejected_ids"])) == (" slow film" + end, " dull" + end)
    assert text(found[0]["chosen_ids"]) == " bad" + end
    assert text(second["chosen_ids"]) == " long story" + end and second["rejected_ids"] == []
    assert [row["group_scores"] for row in found] == [[4, 1, 2, 3], [3, 1, 2], [1, 0]]


def test_prepared_groups_come_from_the_cache(tiny_model_dir, tmp_path):
    """The same data again is not tokenized again: it comes from the same files. Other data is another matter."""
    files = []
    for texts in ("abcd", "abcd", "abed"):
        path = tmp_path / f"{texts}.jsonl"
        row = {"prompt": "p", "completions": [f" {text}" for text in texts], "scores": [1.0, 4.0, 2.0, 3.0]}
        if not path.exists():  # the cache is that of the file as it was written
            Dataset.from_list([row] * 4).to_json(path)
        data = Dataset.from_json(str(path), cache_dir=str(tmp_path / "cache"))
        trainer = build(DPOTrainer, DPOConfig, tiny_model_dir, tmp_path / "out", dataset=data, loss_type="anchored")
        files.append([file["filename"] for file in trainer.train_dataset.cache_files])
    assert files[0] == files[1] != [] and files[2] != files[1]
    ids = trainer.train_dataset[0]["further_pairs"][0]["chosen_ids"]
    assert trainer.processing_class.decode(ids) == " e<|eos|>"
