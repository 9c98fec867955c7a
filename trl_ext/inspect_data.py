"""
`trl-ext inspect`: what a preference dataset holds, before one trains on it, and which losses to try.

`data/inspection.py` looks, `data/advice.py` has the rules, `data/plots.py` draws. What the arguments alone show to be wrong is refused
before torch is imported.
"""

import argparse
import json

from trl_ext.data.paths import refuse_missing_path, refuse_unreadable_data
from trl_ext.data.plots import check_plot


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.description = (
        "Columns, which losses can use them and why others cannot, lengths and their bias, ties, contradictions, "
        "duplicates and truncation; which losses to try, why, and what to begin with."
    )
    parser.add_argument("dataset", metavar="DATASET", help="hub name, folder or file (JSON Lines, CSV, Parquet)")
    parser.add_argument("--split", default="train", help="of a dataset that has several (default: %(default)s)")
    parser.add_argument(
        "--processing_class", metavar="PATH", help="tokenizer that counts tokens, not words; hub name or folder"
    )
    parser.add_argument("--max_length", type=int, default=1024, help="of training, in tokens (default: %(default)s)")
    parser.add_argument(
        "--columns",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=COLUMN",
        help="columns that are called otherwise in the data: --columns score_chosen=my_column",
    )
    parser.add_argument("--plot", metavar="FILE", help="draw lengths and margins here")
    parser.add_argument("--json", action="store_true", help="print all that the tables show as JSON, and nothing else")


def run(args: argparse.Namespace) -> int:
    """Look at the data, then show what was found; returns the exit status."""
    # What can be refused is, before anything is loaded
    if args.max_length < 1:
        raise ValueError(f"`--max_length {args.max_length}` must be at least 1.")
    if args.plot:
        check_plot(args.plot)
    columns = _renames(args.columns)
    refuse_missing_path(args.processing_class, "tokenizer")
    refuse_unreadable_data(args.dataset)
    from trl_ext.data.adapters import rename
    from trl_ext.data.inspection import inspect_preferences
    from trl_ext.data.load import load_preferences, load_tokenizer

    tokenizer = load_tokenizer(args.processing_class) if args.processing_class else None
    dataset = rename(load_preferences(args.dataset, split=args.split), columns)
    report = inspect_preferences(dataset, processing_class=tokenizer, max_length=args.max_length)
    if args.plot:
        report.plot(args.plot)
    if args.json:
        print(json.dumps(report.to_dict() | ({"plot": args.plot} if args.plot else {}), indent=2))
        return 0
    from rich.console import Console

    for table in report.tables():
        Console().print(table)
    if args.plot:
        print(f"Plot: {args.plot}")
    return 0


def _renames(given: list[str]) -> dict[str, str]:
    """Our name for a column and what the data calls it, from `name=column`."""
    pairs = [each.partition("=")[::2] for each in given]
    for each, (name, column) in zip(given, pairs, strict=True):
        if not name or not column:
            raise ValueError(f"`--columns {each}`: expected NAME=COLUMN, as in score_chosen=my_column.")
    for place, what in ((0, "name"), (1, "column")):
        twice = {pair[place] for pair in pairs if [other[place] for other in pairs].count(pair[place]) > 1}
        if twice:
            raise ValueError(f"`--columns {' '.join(given)}` has the {what} {sorted(twice)} twice.")
    return dict(pairs)
