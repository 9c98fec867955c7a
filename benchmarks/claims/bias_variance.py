"""BVPO (2510.05095): mixing in pairs with an empty trace makes gradients less noisy than traces alone, and the policy better."""

import dataclasses
import statistics
from typing import Any

from datasets import Dataset

from trl_ext.trainers.mixing import estimate_alpha

from . import data
from .frame import Claim, Run, Side
from .judging import Row, row, select, unmeasured
from .worlds import World


MIX, TRACES, TWICE, GRADIENTS = "bias_variance", "traces alone", "traces alone, twice the pairs", "gradients"
BETA = 0.3
ALPHAS = (0.0, 0.25, 0.5, 0.75)
BETAS = tuple({"loss_type": "sigmoid", "beta": beta} for beta in (0.1, 0.3, 1.0, 3.0))


def mixed(beta: float, alpha: float) -> dict[str, Any]:
    return {"loss_type": "bias_variance", "beta": beta, "loss_kwargs": {"alpha": alpha}}


class BiasVariance(Claim):
    name = "bias_variance"
    paper = "2510.05095"
    text = (
        "A mix with pairs that have an empty trace has gradients of less variance, and of less error, than pairs with traces alone, and "
        "trains a policy of more reward."
    )
    sides = (
        Side(MIX, (mixed(BETA, 0.25), mixed(BETA, 0.5), mixed(BETA, 0.75), mixed(1.0, 0.5))),
        Side(TRACES, BETAS),
        Side(TWICE, BETAS),
    )
    pairs = 480
    toy_only = True  # traces that can be switched off without a chat template

    def runs(self) -> list[Run]:
        runs = super().runs()
        return [Run(self.name, "", GRADIENTS, 0, seed) for seed in sorted({run.seed for run in runs})] + runs

    def data(self, world: World, run: Run) -> Dataset:
        """Pairs with traces; the same prompts once more with reasoning switched off, or with further traces."""
        number = self.scale.count(self.pairs)
        traced, further = (
            data.labelled(world.groups(seed, number // 2, kind="traced"), run.seed)
            for seed in (run.seed, 1000 + run.seed)
        )
        if run.side == TRACES:
            return data.pairs(traced)
        if run.side == TWICE:
            return data.pairs(traced + further)
        empty = data.labelled(world.groups(run.seed, number // 2, kind="empty"), run.seed)
        both = [
            {**a, "chosen_empty_trace": b["chosen"], "rejected_empty_trace": b["rejected"]}
            for a, b in zip(traced, empty, strict=True)
        ]
        return data.pairs(both, "chosen_empty_trace", "rejected_empty_trace")

    def execute(self, world: World, run: Run) -> dict[str, Any]:
        steps, dataset = self.scale.count(self.steps), self.data(world, run)
        if run.side == GRADIENTS:
            with world.trainer(dataset, mixed(BETA, 0.5), run.seed, steps, self.batch) as trainer:
                found = estimate_alpha(trainer, rows=self.scale.count(64))
            table = {str(alpha): (found.variance(alpha), found.error(alpha)) for alpha in (*ALPHAS, 1.0)}
            return {"points": [], "variance_error": table, "alpha": found.alpha}
        prompts = [world.variant(prompt, "traced") for prompt in world.held_out]
        return {
            "points": world.train(dataset, self.settings(run), run.seed, steps, self.batch, prompts=prompts).points
        }

    def rows(self, results: list[dict[str, Any]]) -> list[Row]:
        gradients = [each for each in results if "error" not in each and each["side"] == GRADIENTS]
        found = []
        for place, what in ((0, "variance"), (1, "mean squared error")):
            measured = f"share by which the gradient's {what} is smaller at alpha 0.5 than with traces alone"
            if not gradients:
                found.append(unmeasured(self.name, measured, "no run finished"))
                continue
            shares = {
                alpha: [
                    1 - each["variance_error"][str(alpha)][place] / each["variance_error"]["1.0"][place]
                    for each in gradients
                ]
                for alpha in ALPHAS
            }
            note = "by alpha: " + ", ".join(
                f"{alpha}: {sum(values) / len(values):.2f}" for alpha, values in shares.items()
            )
            if place:
                best = [each["alpha"] for each in gradients]
                note += f"; least error at alpha {sum(best) / len(best):.2f}; traces are taken to be unbiased"
            found.append(row(self.name, measured, shares[0.5], 0.05, note))
        first, second = self.against(results, "", MIX, TRACES), self.against(results, "", MIX, TWICE)
        return [*found, dataclasses.replace(first, note=f"{first.note}; {self.ends(results)}"), second]

    def ends(self, results: list[dict[str, Any]]) -> str:
        """Reward and KL where training ends, over alpha, all at one beta; alpha 1 is traces alone."""
        shown = []
        for side in self.sides[:2]:
            for setting, given in enumerate(side.settings):
                runs = select(results, lambda each, s=side.name: each["side"] == s).get(setting)
                if given["beta"] == BETA and runs:
                    reward, kl = (
                        statistics.fmean(path[-1][key] for path in runs.values()) for key in ("reward", "kl")
                    )
                    shown.append(f"{given.get('loss_kwargs', {}).get('alpha', 1.0)}: {reward:.2f} (KL {kl:.2g})")
        return f"at the end, beta {BETA}, by alpha: {', '.join(shown)}"
