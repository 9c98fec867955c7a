"""
Every loss that learns from pairs, on real scored pairs: what a small model has learnt of pairs that it has not seen.

    python benchmarks/real_data.py                                    # all losses, both sets of pairs: half an hour of one core
    python benchmarks/real_data.py --data DIR --losses sigmoid offset
    python benchmarks/real_data.py --quick                            # few pairs and steps: a look at whether everything works, no evidence

--data holds imdb_sentiment/pairs_train.jsonl and pairs_test.jsonl, tldr_likert/train.jsonl and test.jsonl, with prompt, chosen, rejected,
score_chosen and score_rejected. Each loss has the same number of settings, tried on validation pairs, and the same steps. Each
finished run is written at once under --work and not run again; a run that fails becomes part of a row that says so, and the others go on (--again
tries it anew). One table, CSV and Markdown in --out.
"""

import argparse
import os
import sys
from pathlib import Path


HERE = Path(__file__).resolve().parent


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data",
        type=Path,
        default=HERE.parent.parent / "shared" / "data",
        help="folder of the data (default: ../shared/data beside the checkout)",
    )
    parser.add_argument("--sets", nargs="+", metavar="NAME", help="some sets of pairs; both by default")
    parser.add_argument("--losses", nargs="+", metavar="NAME", help="some losses; all by default")
    parser.add_argument(
        "--seeds", type=int, help="runs of each loss with its setting (default: 3, and 1 with --quick)"
    )
    parser.add_argument("--quick", action="store_true", help="few pairs, few steps, one seed")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after this many")
    parser.add_argument("--again", action="store_true", help="run anew what failed")
    parser.add_argument(
        "--machine",
        default="a machine of its own",
        help="what is said of the machine in the report (default: %(default)s)",
    )
    parser.add_argument(
        "--out", type=Path, default=HERE / "results", help="folder of the report (default: %(default)s)"
    )
    parser.add_argument(
        "--work", type=Path, default=HERE / ".cache" / "real_data", help="folder of the runs (default: %(default)s)"
    )
    args = parser.parse_args(arguments)
    for name in ("workers", "seeds"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name} {value}: at least 1 is needed")
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    # Before torch is loaded, and for the workers: matrices are so small that threads would wait for each other
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH")])
    )
    sys.path[:0] = [str(HERE.parent), str(HERE)]
    from real import data, losses, report, runner

    try:
        losses.check_all_named()
        names = {
            kind: among(kind, getattr(args, kind), there)
            for kind, there in (("sets", data.SOURCES), ("losses", losses.SIDES))
        }
        size = data.QUICK if args.quick else data.Size("cpu")
        size = size.with_seeds(args.seeds or size.seeds)
        folder = args.work / size.name
        for name in names["sets"]:
            data.SOURCES[name].files(args.data)  # all of them, before the first is worked on
        about = runner.prepare_all(folder, args.data, names["sets"], size, args.workers)
    except ValueError as error:
        sys.exit(f"benchmarks/real_data.py: {error}")
    place = runner.Place(folder, size, {name: known["key"] for name, known in about.items()}, names["losses"])
    if args.again:
        place.forget_failures()
    left = runner.run_all(place, args.workers, args.minutes)
    report.write_all(*report.with_others(place, about, args.data), args.out, args.machine)
    if left:
        print(f"{left} runs are left: the same command goes on with them.")
    return 0


def among(kind: str, asked: list[str] | None, there: dict) -> list[str]:
    """The names that were asked for, in the order of the report; all by default."""
    if unknown := [name for name in asked or () if name not in there]:
        raise ValueError(f"--{kind} {' '.join(unknown)}: there are {', '.join(there)}.")
    return [name for name in there if asked is None or name in asked]


if __name__ == "__main__":
    sys.exit(main())
