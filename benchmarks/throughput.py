"""
A whole DPO training step, through the trainers, on four paths in one run:

- `trl`: TRL's `DPOTrainer` as it is
- `liger`: the same with `LigerFusedLinearDPOLoss` for head and loss
- `logits`: the same with plain logits of all tokens
- `ours`: `trl_ext.DPOTrainer`; `ours-plain` is that without shared prompts, and `ours-simpo`, `ours-cpo`, `ours-asft` are those
  losses in place of DPO's, without a reference model: their step beside that of `ours`; `ours-later` is a step of a second or
  later epoch, where `ours`, as all others, is one of the first

    python benchmarks/throughput.py                                  # 26 M parameters, prompts of about 200 tokens
    python benchmarks/throughput.py --prompt 500 --lora
    python benchmarks/throughput.py --device cuda --size 0.6b --vocab 151936 --dtype bfloat16 --profile ultrafeedback
    python benchmarks/throughput.py --scale prompt 50 200 800
    python benchmarks/throughput.py --paths trl ours ours-later      # what a second epoch spares

Each path takes the same batches in turn. A step is forward, backward and an optimizer update; TRL's defaults hold, gradient
checkpointing among them. Peak memory is measured in a process of its own for each path.
"""

import argparse
import json
import os
import statistics
import sys
import warnings


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import datasets
import roofline
import torch
from common import (
    SIZES,
    distance,
    in_blocks,
    in_own_process,
    interleaved,
    peak_mb,
    plot,
    provenance,
    ratio,
    reset_peak,
    scaled,
    table,
    write,
)
from lengths import PROFILES, sampled, tokens
from paths import LATER, PATHS, REFERENCE_FREE, Models, Path
from transformers.utils.logging import set_verbosity_error


SETTING = ("size", "vocab", "prompt", "completion", "profile", "pairs", "num_generations", "lora", "dtype")
COLUMNS = {
    "path": "path",
    "seconds": "seconds\nper step",
    "milliseconds": "predicted\nms",
    "tokens_per_s": "tokens/s",
    "speed": "speed,\nTRL = 1",
    "speed_over_first": "speed, first\nepoch = 1",
    "peak_mb": "peak\nMiB",
    "memory": "memory,\nTRL = 1",
    "loss_difference": "loss\nvs TRL",
    "gradient_difference": "gradient\nvs TRL",
    "gradient_error": "gradient\nvs float64",
    "host_syncs": "waits of\nthe host",
    "recompilations": "recom-\npilations",
    "bound": "most of it",
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paths", nargs="+", choices=PATHS, default=["trl", "liger", "logits", "ours"])
    parser.add_argument("--size", choices=SIZES, default="26m", help="shape of the model")
    parser.add_argument("--vocab", type=int, default=32000, help="entries of the vocabulary")
    parser.add_argument("--prompt", type=int, default=200, help="tokens of a prompt, give or take 20%%")
    parser.add_argument("--completion", type=int, nargs=2, default=[32, 256], metavar=("MIN", "MAX"))
    parser.add_argument(
        "--profile", choices=PROFILES, help="lengths like those of a dataset, in place of the two above"
    )
    parser.add_argument("--pairs", type=int, default=4, help="pairs per step")
    parser.add_argument(
        "--num_generations",
        type=int,
        default=2,
        help="completions of each prompt, an even number: ours learns from the whole group (anchored), the others from half as "
        "many pairs with that prompt, so that all score the same completions; losses then differ",
    )
    parser.add_argument("--lora", action="store_true", help="train a LoRA of rank 16 on all linear layers")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--steps", type=int, default=7, help="rounds that count")
    parser.add_argument("--batches", type=int, default=4, help="batches that the steps go through in turn")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own choice by default")
    parser.add_argument("--no-checkpointing", action="store_true", help="train without gradient checkpointing")
    parser.add_argument(
        "--memory",
        choices=["process", "allocator", "none"],
        default="process",
        help="of each path in a process of its own; the allocator's peak during its block (a GPU: quicker); or not at all",
    )
    parser.add_argument(
        "--blocks",
        action="store_true",
        help="time one path after the other, each warmed up on all batches, as on a GPU",
    )
    parser.add_argument("--memory-mb", type=float, help="`logprob_memory_mb` of our paths")
    parser.add_argument("--exact", action="store_true", help="compare gradients with a float64 model too")
    parser.add_argument(
        "--scale",
        nargs="+",
        metavar=("AXIS", "VALUE"),
        help="prompt, vocab, pairs or num_generations, and the values to run it at",
    )
    parser.add_argument("--csv", help="write the rows here")
    parser.add_argument("--plot", help="draw a plot here")
    parser.add_argument("--measure-memory", metavar="PATH", help=argparse.SUPPRESS)
    roofline.add_options(parser)
    args = parser.parse_args(arguments)
    if args.scale and (args.scale[0] not in ("prompt", "vocab", "pairs", "num_generations") or len(args.scale) < 2):
        parser.error("--scale takes prompt, vocab, pairs or num_generations, then values: --scale prompt 50 200 800")
    if (
        args.num_generations < 2
        or args.num_generations % 2
        or (args.num_generations > 2 and args.pairs % (args.num_generations // 2))
    ):
        parser.error("--num_generations takes an even number, and --pairs a multiple of half of it")
    if args.paths[0] != "trl":
        parser.error("--paths begins with trl: the others are compared with it")
    if args.num_generations > 2 and set(args.paths) & set(REFERENCE_FREE):
        parser.error(f"--num_generations makes groups of completions, and {list(REFERENCE_FREE)} learn from pairs")
    if args.memory == "allocator" and args.device == "cpu":
        parser.error("--memory allocator needs a GPU; the peak of a CPU is that of a process: --memory process")
    args.blocks |= args.device != "cpu"
    args.rates = roofline.rates(parser, args)
    return args


def measure(args: argparse.Namespace, flags: list[str]) -> list[dict]:
    """One row per path."""
    models = Models(args)
    paths = {name: Path(name, args, models) for name in args.paths}
    agreement = agreements(paths, args)
    steps, memory = {name: path.seconds for name, path in paths.items()}, {}
    if args.blocks:
        warm_ups = {name: path.warm_up for name, path in paths.items()}
        seconds, memory = in_blocks(steps, warm_ups, args.steps, args.device, "paths")
    else:
        seconds = interleaved(steps, args.steps, "steps")
    gpu = {}
    if args.device != "cpu":
        gpu = {
            name: {"host_syncs": path.host_syncs(), "recompilations": path.recompilations}
            for name, path in paths.items()
        }
    del models, paths
    if args.memory == "process":
        memory = {name: in_own_process(__file__, [*flags, "--measure-memory", name]) for name in args.paths}
    peaks = {name: each["peak_mb"] for name, each in memory.items()} if args.memory != "none" else {}
    mean_tokens = statistics.mean(map(tokens, sampled(args)))
    return [
        {
            **setting(name, args),
            "seconds": statistics.median(seconds[name]),
            "seconds_min": min(seconds[name]),
            "seconds_max": max(seconds[name]),
            "tokens_per_s": mean_tokens / statistics.median(seconds[name]),
            "speed": ratio(seconds["trl"], seconds[name]),
            **(
                {"speed_over_first": ratio(seconds["ours"], seconds[LATER])}
                if name == LATER and "ours" in seconds
                else {}
            ),
            **({"peak_mb": peaks[name], "memory": peaks[name] / peaks["trl"]} if peaks else {}),
            **agreement[name],
            **gpu.get(name, {}),
            **provenance(args.device),
        }
        for name in args.paths
    ]


def agreements(paths: dict[str, Path], args: argparse.Namespace) -> dict[str, dict]:
    """How far loss and gradients of each path are from TRL's, and the gradients from those of a float64 model."""
    if args.num_generations > 2 and not args.exact:
        return {name: {} for name in paths}  # losses differ
    exact = Path("logits", args, Models(args, torch.float64)).gradients()[1] if args.exact else None
    theirs = paths["trl"].gradients()
    found = {}
    for name, path in paths.items():
        if name in REFERENCE_FREE:
            found[name] = {}
            continue
        loss, gradients = theirs if name == "trl" else path.gradients()
        same_loss = args.num_generations == 2
        found[name] = {
            "loss_difference": abs(loss - theirs[0]) / abs(theirs[0]) if same_loss else None,
            "gradient_difference": distance(gradients, theirs[1]) if same_loss else None,
            "gradient_error": distance(gradients, exact) if exact else None,
        }
        del gradients
    return found


def model_rows(args: argparse.Namespace) -> list[dict]:
    """What the roofline model says of TRL's path, of TRL's if it padded nothing, and of ours, with the lengths that a measurement has."""
    shape, width = roofline.Shape.of(args.size, args.vocab), getattr(torch, args.dtype).itemsize
    on_cpu = args.device == "cpu"  # only of the model's own check: there TRL scores every position
    work = {
        "trl": [roofline.plain_rows(batch, every_position=on_cpu) for batch in sampled(args)],
        "trl, unpadded": [roofline.unpadded_rows(batch) for batch in sampled(args)],
        "ours": [roofline.shared_prompts(batch) for batch in sampled(args)],
    }
    rows = []
    for name, batches in work.items():
        stages = [
            roofline.step(shape, each, name.split(",")[0], args.lora, not args.no_checkpointing, width)
            for each in batches
        ]
        rows.append(
            {
                **setting(name, args),
                "tokens": statistics.mean(each.tokens for each in batches),
                "scored_tokens": statistics.mean(each.scored for each in batches),
                **roofline.predicted(stages, args.rates),
                "peak_mb": max(roofline.peak_gb(shape, each, name.split(",")[0], args.lora, width) for each in batches)
                * 1e9
                / 2**20,
            }
        )
    return roofline.compared(rows, args.rates)


def setting(name: str, args: argparse.Namespace) -> dict:
    return {"path": name, **{key: getattr(args, key) for key in SETTING}, "checkpointing": not args.no_checkpointing}


def results(args: argparse.Namespace, flags: list[str]) -> list[dict]:
    """All rows that the flags ask for."""
    datasets.disable_progress_bars()
    set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
    if args.threads:
        torch.set_num_threads(args.threads)
    return [
        row for each in scaled(args, flags) for row in (model_rows(args) if args.model_only else measure(args, each))
    ]


def main() -> None:
    args = parse()
    if args.measure_memory:
        set_verbosity_error()
        path = Path(args.measure_memory, args, Models(args))
        reset_peak(args.device)
        path.warm_up()
        print(json.dumps({"peak_mb": peak_mb(args.device)}))
        return
    axis = args.scale[0] if args.scale else None
    rows = results(args, sys.argv[1:])
    what = f"{args.size}{' LoRA' if args.lora else ''}, {args.dtype}"
    lengths = (
        args.profile or f"prompts of {args.prompt}, completions of {args.completion[0]}-{args.completion[1]} tokens"
    )
    columns = {"path": COLUMNS["path"], **({axis: axis} if axis else {}), **COLUMNS}
    where = roofline.title(args.rates) if args.model_only else rows[0]["device"]
    table(rows, columns, f"A DPO step: {what}; {lengths}; {where}")
    if args.csv:
        write(rows, args.csv)
    if args.plot:
        plot(rows, args.plot, axis, f"A DPO step: {what}{', ' + where if args.model_only else ''}")


if __name__ == "__main__":
    main()
