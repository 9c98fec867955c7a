"""
The head alone: hidden states to token log-probabilities and back, in one run:

- `trl`: TRL's fused head
- `liger`: ours with Liger's Triton cross-entropy (a GPU, or a CPU with TRITON_INTERPRET=1, which says nothing of speed)
- `torch`: ours in plain torch
- `logits`: all logits at once
- `products`: the matrix products alone, three for a trained head and two for a frozen one: the floor

    python benchmarks/logprobs.py                      # 1024 tokens, hidden size 384, vocabulary 32000
    python benchmarks/logprobs.py --frozen             # as in LoRA
    python benchmarks/logprobs.py --reference          # no gradient at all
    python benchmarks/logprobs.py --device cuda --tokens 8192 --hidden 1024 --vocab 151936 --dtype bfloat16
    python benchmarks/logprobs.py --scale vocab 16000 64000 256000

Gradients are compared with float64 under weights that differ from token to token.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable

import roofline
import torch
from common import (
    distance,
    in_blocks,
    in_own_process,
    interleaved,
    peak_of,
    plot,
    provenance,
    ratio,
    scaled,
    table,
    timed,
    write,
)
from trl.trainer import utils

from trl_ext.logprobs import Head
from trl_ext.logprobs.memory import KEEP_TILES


SETTING = ("tokens", "hidden", "vocab", "dtype", "statistics")
PATHS = ("trl", "liger", "torch", "logits", "products")
COLUMNS = {
    "path": "path",
    "mode": "head",
    "milliseconds": "ms",
    "products": "products",
    "speed": "speed,\nTRL = 1",
    "floor": "time,\nproducts = 1",
    "over_full": "speed,\ntrained = 1",
    "added_mb": "added\nMiB",
    "value_error": "values vs\nfloat64",
    "gradient_error": "gradient vs\nfloat64",
    "bound": "most of it",
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paths", nargs="+", choices=PATHS, help="all that run on the device by default")
    parser.add_argument("--tokens", type=int, default=1024, help="scored tokens")
    parser.add_argument("--hidden", type=int, default=384, help="hidden size")
    parser.add_argument("--vocab", type=int, default=32000, help="entries of the vocabulary")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--modes", nargs="+", choices=["full", "frozen", "reference"], default=["full", "frozen"])
    parser.add_argument("--frozen", dest="modes", action="store_const", const=["frozen"], help="only a frozen head")
    parser.add_argument("--reference", dest="modes", action="store_const", const=["reference"], help="no gradient")
    parser.add_argument("--statistics", action="store_true", help="entropy, mean logits and accuracy too")
    parser.add_argument(
        "--memory",
        choices=["process", "allocator", "none"],
        default="process",
        help="of each path in a process of its own; the allocator's peak during its block (a GPU: quicker); or not at all",
    )
    parser.add_argument("--blocks", action="store_true", help="time one path after the other, as on a GPU")
    parser.add_argument("--memory-mb", type=float, help="budget of our tiles")
    parser.add_argument("--rounds", type=int, default=9, help="rounds that count")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own choice by default")
    parser.add_argument("--scale", nargs="+", metavar=("AXIS", "VALUE"), help="tokens, hidden or vocab, and values")
    parser.add_argument("--csv", help="write the rows here")
    parser.add_argument("--plot", help="draw a plot here")
    parser.add_argument("--measure-memory", nargs=2, metavar=("PATH", "MODE"), help=argparse.SUPPRESS)
    roofline.add_options(parser)
    args = parser.parse_args(arguments)
    if args.scale and (args.scale[0] not in ("tokens", "hidden", "vocab") or len(args.scale) < 2):
        parser.error("--scale takes tokens, hidden or vocab, then values: --scale vocab 16000 64000")
    args.paths = args.paths or [path for path in PATHS if path != "liger" or args.device != "cpu"]
    if not {"trl", "products"} <= set(args.paths):
        parser.error("--paths includes trl and products: the others are compared with them")
    if args.memory == "allocator" and args.device == "cpu":
        parser.error("--memory allocator needs a GPU; the peak of a CPU is that of a process: --memory process")
    args.blocks |= args.device != "cpu"
    if args.model_only and args.statistics:
        parser.error("--model-only has no model of --statistics")
    args.rates = roofline.rates(parser, args)
    return args


class Problem:
    """Hidden states, a head, targets, and an upstream gradient that differs from token to token."""

    def __init__(self, args: argparse.Namespace):
        generator = torch.Generator(args.device).manual_seed(0)
        options = {"generator": generator, "device": args.device, "dtype": torch.float32}
        dtype = getattr(torch, args.dtype)
        self.hidden = torch.randn(args.tokens, args.hidden, **options).to(dtype)
        self.weight = (torch.randn(args.vocab, args.hidden, **options) * 0.05).to(dtype)
        self.targets = torch.randint(args.vocab, (args.tokens,), generator=generator, device=args.device)
        self.upstream = torch.randn(args.tokens, **options)
        self.statistics = ("entropy", "mean_logits", "is_top1") if args.statistics else ()
        self.memory_mb = args.memory_mb

    def run(self, path: str, mode: str, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Values, and the gradients that the mode has."""
        hidden, weight = (
            tensor.detach().to(dtype or tensor.dtype).requires_grad_(needed)
            for tensor, needed in ((self.hidden, mode != "reference"), (self.weight, mode == "full"))
        )
        with torch.set_grad_enabled(mode != "reference"):
            values = self.forward(path)(hidden, weight)
            if mode != "reference":
                values.backward(self.upstream.to(values.dtype))
        return values.detach(), [tensor.grad for tensor in (hidden, weight) if tensor.grad is not None]

    def forward(self, path: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        if path in ("torch", "liger"):
            head = Head(path, self.memory_mb)
            return lambda h, w: head(h, w, None, self.targets, statistics=self.statistics).log_probs
        if path == "trl":
            chunk = utils._CHUNKED_LOGPROB_CHUNK_SIZE
            return lambda h, w: utils._ChunkedLogProbFunction.apply(
                h, w, None, self.targets, 1.0, chunk, None, 1.0, ("log_probs", *self.statistics)
            )[0]
        return lambda h, w: utils.selective_log_softmax(
            (h @ w.T).to(torch.promote_types(h.dtype, torch.float32)), self.targets
        )

    def products(self, mode: str) -> None:
        """In tiles of 1024 tokens, so that memory is not what is measured."""
        for hidden in self.hidden.split(1024):
            logits = hidden @ self.weight.T
            if mode != "reference":
                logits @ self.weight
            if mode == "full":
                logits.T @ hidden

    def call(self, path: str, mode: str) -> Callable[[], object]:
        return (lambda: self.products(mode)) if path == "products" else lambda: self.run(path, mode)


def measure(args: argparse.Namespace, flags: list[str]) -> list[dict]:
    """One row per path and mode."""
    problem = Problem(args)
    calls = {(path, mode): problem.call(path, mode) for path in args.paths for mode in args.modes}
    timers = {key: lambda call=call: timed(call, args.device) for key, call in calls.items()}
    blocks = {}
    if args.blocks:
        # Twice: what the first call has needed decides what the second keeps
        warm_ups = {key: lambda call=call: (call(), call()) for key, call in calls.items()}
        seconds, blocks = in_blocks(timers, warm_ups, args.rounds, args.device, "paths")
    else:
        seconds = interleaved(timers, args.rounds, "rounds")
    rows = []
    for mode in args.modes:
        values, gradients = problem.run("logits", mode, torch.float64)
        for path in args.paths:
            own = problem.run(path, mode) if path != "products" else None
            memory = blocks.get((path, mode))
            if args.memory == "process":
                memory = in_own_process(__file__, [*flags, "--measure-memory", path, mode])
            rows.append(
                {
                    "path": path,
                    "mode": mode,
                    **{key: getattr(args, key) for key in SETTING},
                    "seconds": statistics.median(seconds[path, mode]),
                    "milliseconds": 1000 * statistics.median(seconds[path, mode]),
                    "speed": ratio(seconds["trl", mode], seconds[path, mode]),
                    "floor": ratio(seconds[path, mode], seconds["products", mode]),
                    "over_full": ratio(seconds[path, "full"], seconds[path, mode]) if "full" in args.modes else None,
                    **(memory_columns(**memory) if args.memory != "none" else {}),
                    "value_error": distance([own[0]], [values]) if own else None,
                    "gradient_error": distance(own[1], gradients) if own and gradients else None,
                    **provenance(args.device),
                }
            )
    return rows


def memory_columns(before_mb: float, peak_mb: float) -> dict[str, float]:
    return {"peak_mb": peak_mb, "added_mb": peak_mb - before_mb}


def model_rows(args: argparse.Namespace) -> list[dict]:
    """What the roofline model says of TRL's head, ours and the bare products."""
    shape, width = roofline.Shape.of_head(args.hidden, args.vocab), getattr(torch, args.dtype).itemsize
    budget = args.memory_mb * 2**20 if args.memory_mb else roofline.LEAST
    tile = min(roofline.TILE, int(budget / (args.vocab * width)))
    rows = []
    for mode in args.modes:
        paths = {
            path: roofline.head(shape, args.tokens, path, mode, width, rows=tile if path == "ours" else roofline.TILE)
            for path in ("trl", "ours", "products")
        }
        if mode == "full" and args.memory_mb and args.tokens <= KEEP_TILES * tile:
            paths["ours, kept"] = roofline.head(shape, args.tokens, "ours", mode, width, kept=True)
        predicted = {path: roofline.predicted([each], args.rates) for path, each in paths.items()}
        rows += roofline.compared(
            [
                {
                    "path": path,
                    "mode": mode,
                    **{key: getattr(args, key) for key in SETTING},
                    "products": roofline.head_products(*path.split(", "), mode=mode),
                    **each,
                    "floor": each["milliseconds"] / predicted["products"]["milliseconds"],
                }
                for path, each in predicted.items()
            ],
            args.rates,
        )
    return rows


def results(args: argparse.Namespace, flags: list[str]) -> list[dict]:
    """All rows that the flags ask for."""
    if args.threads:
        torch.set_num_threads(args.threads)
    return [
        row for each in scaled(args, flags) for row in (model_rows(args) if args.model_only else measure(args, each))
    ]


def main() -> None:
    args = parse()
    if args.measure_memory:
        problem = Problem(args)
        print(json.dumps(peak_of(problem.call(*args.measure_memory), args.device)))
        return
    axis = args.scale[0] if args.scale else None
    rows = results(args, sys.argv[1:])
    size = f"{args.tokens} tokens, hidden size {args.hidden}, vocabulary {args.vocab}, {args.dtype}"
    columns = {"path": COLUMNS["path"], **({axis: axis} if axis else {}), **COLUMNS}
    where = roofline.title(args.rates) if args.model_only else rows[0]["device"]
    table(rows, columns, f"Token log-probabilities: {size}; {where}")
    if args.csv:
        write(rows, args.csv)
    if args.plot:
        shown = [{**row, "path": f"{row['path']} ({row['mode']})"} for row in rows]
        plot(shown, args.plot, axis, f"Token log-probabilities: {args.dtype}, {where}")


if __name__ == "__main__":
    main()
