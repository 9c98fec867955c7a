"""
Sampling alone: completions that leave the batch when they have finished, against transformers' loop, where all rows stay until the
last has finished. Both share a prompt's prefill among its completions, take the same random numbers and give the same completions.

    python benchmarks/decoding.py
    python benchmarks/decoding.py --mean 0          # all completions have the same length
    python benchmarks/decoding.py --shares 0.01 0.0625 0.125 0.25 0.5
"""

import argparse
from unittest import mock

import torch
from common import interleaved, model, peak_mb, plot, provenance, ratio, table, timed, write
from transformers import GenerationConfig, LogitsProcessor

from trl_ext.generation import decoding, sample, sampling


END = 1
COLUMNS = {"path": "loop", "seconds": "s", "speed": "speed", "mean_length": "mean length", "longest": "longest"}


class Ends(LogitsProcessor):
    """Ends each row after as many tokens as it is given."""

    def __init__(self, lengths: torch.Tensor):
        self.lengths, self.tokens = lengths, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.tokens += 1
        scores[:, END] = torch.where(self.lengths <= self.tokens, 1e9, -1e9)
        return scores

    def keep_rows(self, stay: torch.Tensor) -> None:
        self.lengths = self.lengths[stay]


def all_stay(*args, leave, fill, **kwargs):
    return decoding.draw_on_cpu(*args, **kwargs)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="12m")
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--generations", type=int, default=8, help="completions per prompt")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--completion", type=int, default=96, help="tokens of a completion at most")
    parser.add_argument("--mean", type=float, default=32.0, help="of geometric lengths; 0: all have the longest")
    parser.add_argument("--shares", type=float, nargs="+", default=[decoding.SHARE], help="that leave together")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--csv")
    parser.add_argument("--plot")
    args = parser.parse_args(arguments)

    torch.manual_seed(0)
    network, count = model(args.size, args.vocab, 0, torch.float32, "cpu").eval(), args.prompts * args.generations
    ids = torch.randint(END + 1, args.vocab, (args.prompts, args.prompt))
    lengths = torch.full((count,), args.completion)
    if args.mean:
        lengths = torch.distributions.Geometric(1 / args.mean).sample((count,)).long().clamp(1, args.completion)
    config = GenerationConfig(max_new_tokens=args.completion, do_sample=True, pad_token_id=0, eos_token_id=END)
    outputs = {}

    def path(name: str, patch) -> float:
        torch.manual_seed(1)
        with patch, torch.no_grad():
            return timed(
                lambda: outputs.update(
                    {
                        name: sample(
                            network, ids, torch.ones_like(ids), config, args.generations, lambda _: Ends(lengths)
                        )
                    }
                ),
                "cpu",
            )

    paths = {"transformers": lambda: path("transformers", mock.patch.object(sampling, "decode", all_stay))}
    for share in args.shares:
        paths[f"{share:g} leave"] = lambda share=share: path(
            f"{share:g} leave", mock.patch.object(decoding, "SHARE", share)
        )
    seconds = interleaved(paths, args.steps, "decoding")
    rows = [
        {
            "path": name,
            "seconds": sorted(each)[len(each) // 2],
            "speed": ratio(seconds["transformers"], each),
            "peak_mb": peak_mb("cpu"),
            "mean_length": lengths.float().mean().item(),
            "longest": int(lengths.max()),
            "same": torch.equal(outputs[name], outputs["transformers"]),
            **{key: value for key, value in vars(args).items() if key not in ("csv", "plot", "shares")},
            **provenance("cpu"),
        }
        for name, each in seconds.items()
    ]
    table(rows, COLUMNS, f"{count} completions of {args.prompts} prompts")
    if args.csv:
        write(rows, args.csv)
    if args.plot:
        plot(rows, args.plot, None, "Sampling")


if __name__ == "__main__":
    main()
