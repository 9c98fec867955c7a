"""
A whole online step, generate, score, learn and update, through TRL's `OnlineDPOTrainer` and ours in one run.

    python benchmarks/online.py                        # 12 M parameters, 4 prompts of 60-100 tokens, 96 new tokens
    python benchmarks/online.py --accumulation 8       # an optimizer step of eight such micro-batches
    python benchmarks/online.py --no-checkpointing     # TRL then generates with a cache too
    python benchmarks/online.py --scale accumulation 1 2 4 8
    python benchmarks/online.py --lora --device cuda --size 0.6b --vocab 151936 --dtype bfloat16

- `trl`: TRL's trainer as it is, with gradient checkpointing (and then without a cache while it generates)
- `trl-no-checkpointing`: the same without
- `trl-best`: that with all prompts of the optimizer step in one micro-batch, so that it generates once
- `ours`: `trl_ext.OnlineDPOTrainer`, with gradient checkpointing as `trl`

A step is an optimizer step, with as many micro-batches as `--accumulation` says. All paths get the same prompts and write equally
many tokens (`--ragged`: on average). `update` is the optimizer's step, `learn` what is left: log-probabilities, reference, loss,
backward. Agreement of loss and gradients is that of learning from the same given completions. Memory is measured in a process of
its own: the peak of a whole step, libraries and models included, and what learning from given completions adds to what was there
before (gradients, activations, logits).
"""

import argparse
import json
import os
import statistics
import sys
import warnings


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import datasets
import torch
from common import (
    SIZES,
    distance,
    in_own_process,
    interleaved,
    peak_mb,
    peak_of,
    plot,
    provenance,
    ratio,
    scaled,
    table,
    timed,
    write,
)
from online_paths import PATHS, Path
from transformers.utils.logging import set_verbosity_error


# What `--scale` takes, and its heading
AXES = {"accumulation": "micro-\nbatches", "num_generations": "comple-\ntions", "prompt": "tokens of\na prompt"}
SETTING = ("size", "vocab", "prompts", "accumulation", "num_generations", "new_tokens", "ragged", "lora", "dtype")
PARTS = ("generate", "score", "update")
# Column of a speed, and the path that it is compared with
SPEEDS = {"speed": "trl", "speed_no_checkpointing": "trl-no-checkpointing", "speed_best": "trl-best"}
TIME = {
    "path": "path",
    "seconds": "seconds\nper step",
    "completion_ms": "ms per\ncompletion",
    "completion_tokens": "its new\ntokens",
    "speed": "speed,\nTRL = 1",
    "speed_no_checkpointing": "no check-\npoints = 1",
    "speed_best": "speed,\nbest = 1",
    "generate": "generate\ns",
    "score": "score\ns",
    "learn": "learn\ns",
    "update": "update\ns",
    "learn_speed": "learn,\nTRL = 1",
}
MEMORY = {
    "path": "path",
    "peak_mb": "process,\npeak MiB",
    "memory": "process,\nTRL = 1",
    "added_mb": "learning\nadds, MiB",
    "added_memory": "learning,\nTRL = 1",
    "loss_difference": "loss\nvs TRL",
    "gradient_difference": "gradient\nvs TRL",
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paths", nargs="+", choices=PATHS, default=["trl", "trl-best", "ours"])
    parser.add_argument("--size", choices=SIZES, default="12m", help="shape of the model")
    parser.add_argument("--vocab", type=int, default=32000, help="entries of the vocabulary")
    parser.add_argument("--prompts", type=int, default=4, help="prompts of a micro-batch")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches of an optimizer step")
    parser.add_argument(
        "--num-generations",
        "--num_generations",
        type=int,
        default=2,
        help="completions of each prompt, an even number: ours samples and learns from them together, in all pairs; TRL's trainer "
        "samples two, so it gets each prompt half as often as that, and as many completions in all; losses then differ",
    )
    parser.add_argument(
        "--prompt",
        type=int,
        nargs="+",
        default=[60, 100],
        metavar="TOKENS",
        help="their tokens: MIN and MAX, or one number",
    )
    parser.add_argument("--new-tokens", type=int, default=96, help="tokens of a completion")
    parser.add_argument(
        "--ragged",
        action="store_true",
        help="completions end where the end is drawn, after a third of --new-tokens on average, and there at the latest; each path "
        "draws its own, so give it more --steps",
    )
    parser.add_argument("--lora", action="store_true", help="train a LoRA of rank 16 on all linear layers")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--steps", type=int, default=7, help="rounds that count")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own choice by default")
    parser.add_argument(
        "--no-checkpointing", action="store_true", help="train without gradient checkpointing, all paths"
    )
    parser.add_argument(
        "--memory",
        choices=["process", "none"],
        default="process",
        help="of each path in a process of its own; or not at all",
    )
    parser.add_argument(
        "--scale", nargs="+", metavar=("AXIS", "VALUE"), help=f"{', '.join(AXES)}, and the values to run it at"
    )
    parser.add_argument("--csv", help="write the rows here")
    parser.add_argument("--plot", help="draw a plot here")
    parser.add_argument("--measure-memory", metavar="PATH", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.scale and (args.scale[0] not in AXES or len(args.scale) < 2):
        parser.error(f"--scale takes one of {', '.join(AXES)}, then values: --scale accumulation 1 2 4 8")
    if args.paths[0] != "trl":
        parser.error("--paths begins with trl: the others are compared with it")
    if args.no_checkpointing and "trl-no-checkpointing" in args.paths:
        parser.error("--no-checkpointing makes trl what trl-no-checkpointing is: leave one of them out")
    if min(args.accumulation, args.prompts, args.steps) < 1:
        parser.error("--accumulation, --prompts and --steps take numbers from 1")
    if args.num_generations < 2 or args.num_generations % 2:
        parser.error(
            f"--num-generations takes an even number, as TRL's trainer samples two; not {args.num_generations}"
        )
    if len(args.prompt) > 2 or not 1 <= args.prompt[0] <= args.prompt[-1]:
        parser.error(f"--prompt takes MIN and MAX, or one number of tokens; not {args.prompt}")
    if args.ragged and args.new_tokens < 4:
        parser.error("--ragged draws an end after a third of --new-tokens on average: 4 at least")
    args.prompt = [args.prompt[0], args.prompt[-1]]
    return args


def figures(name: str, seconds: dict[str, list[float]], steps: dict[str, list[dict]], completions: int) -> dict:
    """What a path's steps took, in parts and beside the others, and for each of the completions of a step."""
    learn = {
        path: [
            total - sum(step.get(part, 0.0) for part in PARTS) for total, step in zip(each, steps[path], strict=True)
        ]
        for path, each in seconds.items()
    }
    return {
        "seconds": statistics.median(seconds[name]),
        "seconds_min": min(seconds[name]),
        "seconds_max": max(seconds[name]),
        "completion_ms": 1e3 * statistics.median(seconds[name]) / completions,
        "completion_tokens": statistics.mean(step["tokens"] for step in steps[name]) / completions,
        **{column: ratio(seconds[peer], seconds[name]) for column, peer in SPEEDS.items() if peer in seconds},
        **{part: statistics.median(step.get(part, 0.0) for step in steps[name]) for part in PARTS},
        "learn": statistics.median(learn[name]),
        "learn_speed": ratio(learn["trl"], learn[name]),
    }


def agreements(args: argparse.Namespace) -> dict[str, dict]:
    """How far loss and gradients of each path are from TRL's; with more than two completions, ours learns from other pairs."""
    theirs = Path("trl", args).learn_from_given()
    found = {}
    for name in args.paths:
        if name == "ours" and args.num_generations > 2:
            found[name] = {}
            continue
        loss, gradients = theirs if name == "trl" else Path(name, args).learn_from_given()
        found[name] = {
            "loss_difference": abs(loss - theirs[0]) / abs(theirs[0]),
            "gradient_difference": distance(gradients, theirs[1]),
        }
    return found


def memory(name: str, args: argparse.Namespace) -> dict[str, float]:
    """Peak memory in MiB: before, with learning from given completions, and with a whole step."""
    path = Path(name, args)
    learning = peak_of(lambda: [path.learn_from_given() for _ in range(2)], args.device)
    path.step()
    return {"added_mb": learning["peak_mb"] - learning["before_mb"], "peak_mb": peak_mb(args.device)}


def measure(args: argparse.Namespace, flags: list[str]) -> list[dict]:
    """One row per path."""
    paths = {name: Path(name, args) for name in args.paths}
    seconds = interleaved(
        {name: lambda path=path: timed(path.step, args.device) for name, path in paths.items()}, args.steps, "steps"
    )
    steps = {name: path.steps[1:] for name, path in paths.items()}
    checkpointing = {name: path.trainer.args.gradient_checkpointing for name, path in paths.items()}
    del paths
    agreement = agreements(args)
    peaks = {}
    if args.memory == "process":
        peaks = {name: in_own_process(__file__, [*flags, "--measure-memory", name]) for name in args.paths}
    return [
        {
            "path": name,
            **{key: getattr(args, key) for key in SETTING},
            "prompt": args.prompt[0] if args.prompt[0] == args.prompt[1] else args.prompt,
            "checkpointing": checkpointing[name],
            **figures(name, seconds, steps, args.prompts * args.accumulation * args.num_generations),
            **beside_trl(peaks, name),
            **agreement[name],
            **provenance(args.device),
        }
        for name in args.paths
    ]


def beside_trl(peaks: dict[str, dict[str, float]], name: str) -> dict[str, float]:
    """Memory of a path, and as a multiple of TRL's; nothing where none was measured."""
    if not peaks:
        return {}
    own, theirs = peaks[name], peaks["trl"]
    return {
        **own,
        "memory": own["peak_mb"] / theirs["peak_mb"],
        "added_memory": own["added_mb"] / theirs["added_mb"],
    }


def results(args: argparse.Namespace, flags: list[str]) -> list[dict]:
    """The rows that the flags ask for."""
    datasets.disable_progress_bars()
    set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
    if args.threads:
        torch.set_num_threads(args.threads)
    # All are read before the first is measured, which may take minutes
    return [row for each, own in [(parse(own), own) for own in scaled(args, flags)] for row in measure(each, own)]


def main() -> None:
    args = parse()
    if args.measure_memory:
        set_verbosity_error()
        if args.threads:
            torch.set_num_threads(args.threads)
        print(json.dumps(memory(args.measure_memory, args)))
        return
    axis = args.scale[0] if args.scale else None
    rows = results(args, sys.argv[1:])
    what = f"An online step: {args.size}{' LoRA' if args.lora else ''}, {args.dtype}, {args.new_tokens} new tokens"
    what += " at most" if args.ragged else ""
    for columns, of in ((TIME, ""), (MEMORY, ", memory and agreement")):
        shown = {"path": columns["path"], **({axis: AXES[axis]} if axis else {}), **columns}
        table(rows, shown, f"{what}{of}; {rows[0]['device']}")
    if args.csv:
        write(rows, args.csv)
    if args.plot:
        plot(rows, args.plot, axis, what, {"completion_ms": "ms per completion", "peak_mb": "peak MiB"})


if __name__ == "__main__":
    main()
