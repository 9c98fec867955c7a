"""
Further pairs of an example: what stands beside TRL's pair of token ids in one column, in TRL's own form.

The pair with an empty trace is one; the other completions of a group are taken in twos, and the last of an odd number has no
`rejected_ids`. Whatever TRL does to pairs (tokenize, pad, score with the reference) is done to them as a dataset of their own.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset, Features
from datasets.fingerprint import Hasher


FURTHER = "further_pairs"


def in_twos(completions: Sequence[Any]) -> list[dict[str, Any]]:
    """Completions as pairs, the first with the second and so on; with an odd number the last one stands twice."""
    last = len(completions) - 1
    return [
        {"chosen": completions[k], "rejected": completions[min(k + 1, last)]} for k in range(0, len(completions), 2)
    ]


def map_further(
    dataset: Dataset,
    column: str,
    function: Callable[[Dataset], Dataset],
    keep: Sequence[str],
    beside: Sequence[str] = (),
) -> Dataset:
    """
    Run `function` on the pairs in a column of lists, as one dataset, and put what it gives in the column's place.

    Args:
        dataset ([`~datasets.Dataset`]):
            With the column.
        column (`str`):
            Holds lists of dicts, the pairs of each row.
        function (`Callable`):
            From a dataset of pairs to one with as many rows, in their order.
        keep (`Sequence[str]`):
            Columns of the result that go back.
        beside (`Sequence[str]`, *optional*):
            Columns of the row that each of its pairs is given.

    Returns:
        The dataset with `further_pairs` in place of `column`.
    """
    counts = [len(pairs) for pairs in dataset[column]]

    def flatten(batch: dict[str, list]) -> dict[str, list]:
        rows = range(len(batch[column]))
        pairs = [
            {**pair, **{name: batch[name][row] for name in beside}} for row in rows for pair in batch[column][row]
        ]
        return {name: [pair[name] for pair in pairs] for name in pairs[0]}

    results = None
    if any(counts):  # rows without a pair would leave open what columns there are
        holding = dataset.select([row for row, count in enumerate(counts) if count]).select_columns([column, *beside])
        results = function(holding.map(flatten, batched=True, remove_columns=holding.column_names))
    starts = [0, *itertools.accumulate(counts)]

    def gather(example: dict[str, Any], row: int) -> dict[str, Any]:
        return {FURTHER: [{name: results[i][name] for name in keep} for i in range(starts[row], starts[row + 1])]}

    features = {name: feature for name, feature in dataset.features.items() if name != column}
    source = (dataset if results is None else results).features
    features[FURTHER] = [{name: source[name] for name in keep if name in source}]
    # Stated, for that of a function that holds a dataset depends on whether the dataset was just made or comes from the cache
    known = [dataset._fingerprint, "" if results is None else results._fingerprint, column, *keep]
    return dataset.map(
        gather,
        with_indices=True,
        remove_columns=[] if column == FURTHER else [column],
        features=Features(features),
        new_fingerprint=Hasher.hash(" ".join(known)),
        desc="Adding the further pairs of each row",
    )
