"""
`trl-ext compare`: trainings side by side, in a table and in plots.

A run is a folder that a trainer wrote, its `trainer_state.json` in it or in its last checkpoint, or a CSV file of metrics with a
column `step`. Runs whose names differ in the seed alone are one line, with a mean and a spread.
"""

import argparse

from .metrics import chosen_metrics
from .runs import grouped, read_run
from .show import plot, table, write_csv


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="folder that a trainer wrote, or CSV file of metrics with a column `step`",
    )
    parser.add_argument(
        "--metrics",
        nargs="+",
        metavar="NAME",
        help="which; by default reward, KL, length, win rate, accuracy and loss, as far as there",
    )
    parser.add_argument(
        "--group",
        default="seed",
        choices=["seed", "folder", "none"],
        help="what is one line: runs whose names differ in a part such as seed3 or s3; runs in one folder; or each (default: %(default)s)",
    )
    parser.add_argument("--csv", metavar="FILE", help="write the table here, unrounded")
    parser.add_argument("--plot", metavar="FILE", help="draw the metrics over steps here")


def run(args: argparse.Namespace) -> int:
    """Read the runs, then write and show what was asked for."""
    from rich.console import Console

    if args.plot:
        from trl_ext.data.plots import check_plot

        check_plot(args.plot)
    runs = [read_run(path) for path in args.runs]
    groups, metrics = grouped(runs, args.group), chosen_metrics(runs, args.metrics)
    Console().print(table(groups, metrics))
    if args.csv:
        write_csv(groups, metrics, args.csv)
        print(f"Table: {args.csv}")
    if args.plot:
        plot(groups, metrics, args.plot)
        print(f"Plot: {args.plot}")
    return 0
