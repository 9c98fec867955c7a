"""
Claims of papers as experiments: does a loss do what its paper says, at equal KL and with equal search on every side?

    python benchmarks/quality.py                          # all claims in the demonstration's world: under an hour on two cores
    python benchmarks/quality.py --claim offset           # one of them; says whether the row that stood in --out holds the new figure
    python benchmarks/quality.py --quick                  # few seeds, short runs: a look at whether everything works, no evidence
    python benchmarks/quality.py --list                   # what is claimed
    python benchmarks/quality.py --model Qwen/Qwen3-0.6B --prompts trl-lib/ultrafeedback-prompt --gold MODEL --device cuda --out DIR

Each finished run is written at once under --work and not run again; a run that fails becomes a row that says so, and the others go on
(--again tries it anew). One table of all claims: a CSV file, a Markdown report and a plot in --out.
"""

import argparse
import json
import os
import sys
from pathlib import Path


HERE = Path(__file__).resolve().parent


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--claim", nargs="+", metavar="NAME", help="some claims; all by default")
    parser.add_argument("--list", action="store_true", help="print the claims, run nothing")
    parser.add_argument(
        "--quick", action="store_true", help="two seeds, two settings for each loss, a third of the work"
    )
    parser.add_argument("--workers", type=int, default=None, help="processes (default: 2, and 1 with --device cuda)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after this many")
    parser.add_argument("--again", action="store_true", help="run anew what failed")
    parser.add_argument(
        "--out", type=Path, default=HERE / "results", help="folder of the report (default: %(default)s)"
    )
    parser.add_argument("--work", type=Path, help="folder of the runs (default: benchmarks/.cache/quality)")
    real = parser.add_argument_group("at real size", "in place of the demonstration's world")
    real.add_argument("--model", help="the start: a chat model, hub name or folder")
    real.add_argument("--prompts", help="dataset with a column `prompt`: hub name, folder or file")
    real.add_argument(
        "--gold",
        help="the reward that is taken as true: a reward model (name or folder) or a function (module:function)",
    )
    real.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    real.add_argument("--learning-rate", type=float, default=1e-6, help="of every loss (default: %(default)s)")
    real.add_argument("--max-new-tokens", type=int, default=256)
    real.add_argument(
        "--train-batch", type=int, default=2, help="pairs at a time; gradients are accumulated to the claim's batch"
    )
    real.add_argument("--work-share", type=float, default=4.0, help="pairs and steps, in units of the toy world's")
    args = parser.parse_args(arguments)
    if args.model is None and (args.prompts or args.gold):
        parser.error("--prompts and --gold go with --model; without it the demonstration's world is taken")
    if args.model is not None and not (args.prompts and args.gold):
        parser.error("--model needs --prompts, a dataset, and --gold, the reward that is taken as true")
    if args.quick and args.model is not None:
        parser.error("--quick is a size of the demonstration's world; with --model set --work-share")
    args.workers = args.workers or (1 if args.device == "cuda" else 2)
    if args.workers < 1:
        parser.error(f"--workers {args.workers}: at least 1 process is needed")
    args.label = "quick" if args.quick else "toy" if args.model is None else "real"
    args.work = (args.work or HERE / ".cache" / "quality") / args.label
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    # Before torch is loaded: matrices of the toy world are so small that threads wait for each other
    if args.model is None:
        os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH")])
    )
    sys.path[:0] = [str(HERE.parent), str(HERE)]

    from claims import CLAIMS, report, runner
    from claims.frame import SCALES

    there = [name for name, claim in CLAIMS.items() if args.model is None or not claim.toy_only]
    names = args.claim or there
    if unknown := [name for name in names if name not in CLAIMS]:
        sys.exit(f"benchmarks/quality.py: there is no claim {', '.join(unknown)}; there are {', '.join(CLAIMS)}")
    if wrong := [name for name in names if name not in there]:
        sys.exit(
            f"benchmarks/quality.py: {', '.join(wrong)} needs what only the demonstration's world has: leave out --model"
        )
    if args.list:
        for claim in CLAIMS.values():
            print(f"{claim.name} ({claim.paper}): {claim.text}")
        return 0
    scale = SCALES.get(args.label) or SCALES["toy"].resized(args.label, args.work_share)
    place = runner.Place(args.work, scale, real_world(args))
    claims = [CLAIMS[name](scale) for name in names]
    try:
        left = runner.run_all(claims, place, args.workers, args.minutes, args.again)
    except ValueError as error:
        sys.exit(f"benchmarks/quality.py: {error}")
    written = report.Report(args.out, args.label, args.device)
    # Claims that were not asked for stay in the report as their runs on disk have them
    for name in there:
        claim = CLAIMS[name](scale)
        results = place.results(claim)
        if name in names or results:
            written.add(claim, results, ran=name in names)
    written.write()
    if left:
        print(f"{left} runs are left: the same command goes on with them.")
    return 0


def real_world(args: argparse.Namespace) -> dict | None:
    if args.model is None:
        return None
    named = ("model", "prompts", "gold", "device", "learning_rate", "max_new_tokens", "train_batch")
    return json.loads(json.dumps({name: getattr(args, name) for name in named}))


if __name__ == "__main__":
    sys.exit(main())
