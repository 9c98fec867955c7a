"""SPPO (2405.00675) and INPO (2407.00617): where preferences go round in a circle, self-play finds the mix that nothing beats."""

import dataclasses
import functools
import random
import statistics
from typing import Any

from datasets import Dataset

from trl_ext import DPOConfig
from trl_ext.rounds.log_probs import pair_log_probs

from .data import pairs
from .frame import Claim, Run, Side
from .judging import Row, chosen, row, select, unmeasured
from .worlds import World


ROUNDS = 3
# Completions are of three kinds, by their true reward among the start's completions: the lower 75 %, the next 15 %, the upper 10 %
QUANTILES = (0.75, 0.9)
# By how much a kind is preferred to another: upper to lower, lower to middle, middle to upper. The equilibrium is a third of each
LEAD = ((0.0, 0.45, -0.45), (-0.45, 0.0, 0.45), (0.45, -0.45, 0.0))
EACH = 8  # completions of a prompt: a win rate is a mean over seven others
TWOS = ((0, 1), (2, 3), (4, 5), (6, 7))
SPPO, INPO, ROUND, FIXED = "sppo_soft", "inpo", "DPO in rounds", "DPO on the start's answers"
# DPO with the exact preference of each pair: no noise of labels speaks against it
BETAS = tuple({"loss_type": "anchored", "beta": beta} for beta in (0.1, 0.3, 1.0))


def exploitability(shares: list[float]) -> float:
    """By how much more than half the best answer to a policy wins against it: 0 at the equilibrium, 0.45 where all is of one kind."""
    return max(sum(lead * share for lead, share in zip(leads, shares, strict=True)) for leads in LEAD)


class Cyclic(Claim):
    name = "cyclic"
    paper = "2405.00675, 2407.00617"
    text = (
        "Where each of three kinds of answers beats another, no Bradley-Terry reward is right: DPO runs to one kind, which loses to another. "
        "`sppo_soft` and `inpo` come closer to the equilibrium."
    )
    sides = (
        Side(SPPO, tuple({"loss_type": "sppo_soft", "beta": beta} for beta in (0.1, 0.3, 1.0))),
        Side(
            INPO,
            tuple(
                {"loss_type": "inpo", "loss_kwargs": {"eta": eta, "tau": tau}}
                for eta, tau in ((0.1, 0.03), (0.3, 0.1), (0.3, 0.2))
            ),
        ),
        Side(ROUND, BETAS),
        Side(FIXED, BETAS),
    )
    steps = 24  # of each round
    drawn = "exploitability"
    smallest = 0.02

    def execute(self, world: World, run: Run) -> dict[str, Any]:
        """What is to be high here, and settings are chosen by, is how little a policy can be exploited: it stands as `reward`."""
        points = self.path(world, run)
        return {
            "points": [{**each, "true_reward": each["reward"], "reward": -each["exploitability"]} for each in points]
        }

    def path(self, world: World, run: Run) -> list[dict[str, float]]:
        limits = thresholds(world)
        world = dataclasses.replace(world, extra={"exploitability": functools.partial(measured, world, limits)})
        steps, size, settings = self.scale.count(self.steps), self.scale.count(64), self.gently(world, run)
        if run.side == FIXED:
            dataset = self.labelled(world, world.groups(run.seed, ROUNDS * size, EACH), limits, run)
            thirds = (1 / 3, 2 / 3, 1.0)
            return world.train(dataset, settings, run.seed, ROUNDS * steps, self.batch, marks=thirds).points
        policy, points = world.start, [{"step": 0, **world.kept_start()}]
        for number in range(ROUNDS):
            seed = 100 * run.seed + number
            dataset = self.labelled(world, world.groups(seed, size, EACH, policy if number else None), limits, run)
            trained = world.train(dataset, settings, seed, steps, self.batch, model=world.clone(policy), marks=(1.0,))
            points += [{**point, "step": point["step"] + number * steps} for point in trained.points]
            policy = world.clone(trained.trainer.model)
        return points

    def labelled(self, world: World, groups: list[dict[str, Any]], limits: list[float], run: Run) -> Dataset:
        """Four pairs of each group: labels drawn from the preference for INPO, win rates in the group for SPPO, the preference for DPO."""
        rng, rows = random.Random(run.seed), []
        for group in groups:
            kinds = [kind(score, limits) for score in group["scores"]]
            wins = [
                0.5 + statistics.fmean(LEAD[mine][other] for at, other in enumerate(kinds) if at != place)
                for place, mine in enumerate(kinds)
            ]
            for a, b in TWOS:
                if rng.random() >= 0.5 + LEAD[kinds[a]][kinds[b]]:
                    a, b = b, a
                rows.append({
                    "prompt": group["prompt"], "chosen": group["completions"][a], "rejected": group["completions"][b],
                    "score_chosen": wins[a], "score_rejected": wins[b],
                    "preference_prob": 0.5 + LEAD[kinds[a]][kinds[b]],
                })  # fmt: skip
        if run.side == SPPO:
            return pairs(rows, "score_chosen", "score_rejected")
        if run.side != INPO:
            return pairs(rows, "preference_prob")
        dataset = pairs(rows)
        args = DPOConfig(output_dir=str(world.folder / "unused"), report_to="none", **world.training)
        values = zip(*pair_log_probs(world.name, dataset, world.tokenizer, args, batch_size=32), strict=True)
        for name, column in zip(("initial_chosen_logps", "initial_rejected_logps"), values, strict=True):
            dataset = dataset.add_column(name, list(column))
        return dataset

    def rows(self, results: list[dict[str, Any]]) -> list[Row]:
        ends: dict[str, dict[int, float]] = {}
        kls = {}
        for side in self.sides:
            paths = select(results, lambda each, name=side.name: each["side"] == name)
            last = {at: {seed: points[-1]["reward"] for seed, points in each.items()} for at, each in paths.items()}
            seeds = sorted(set.intersection(*map(set, last.values()))) if last else []
            if seeds:
                picks = chosen(last, seeds)
                ends[side.name] = {seed: -last[picks[seed]][seed] for seed in seeds}
                kls[side.name] = statistics.fmean(paths[picks[seed]][seed][-1]["kl"] for seed in seeds)
        found = [self.against(results, "", ours, FIXED, what="exploitability saved") for ours in (SPPO, INPO)]
        for ours, theirs in ((SPPO, FIXED), (INPO, FIXED), (SPPO, ROUND), (INPO, ROUND)):
            text = f"exploitability saved by {ours} beside {theirs}, after three rounds"
            if not {ours, theirs} <= set(ends):
                found.append(
                    unmeasured(self.name, text, "not measured: no seed has finished with all settings of both losses")
                )
                continue
            common = sorted(set(ends[ours]) & set(ends[theirs]))
            a, b = (statistics.fmean(ends[side][seed] for seed in common) for side in (ours, theirs))
            note = f"{a:.3f} and {b:.3f}, at KL {kls[ours]:.2g} and {kls[theirs]:.2g}: the ends are compared; {len(common)} seeds"
            values = [ends[theirs][seed] - ends[ours][seed] for seed in common]
            found.append(row(self.name, text, values, self.smallest, note))
        return found


def thresholds(world: World) -> list[float]:
    """The rewards that part the three kinds."""

    def make() -> list[float]:
        scores = sorted(score for group in world.groups(999, 256) for score in group["scores"])
        return [scores[int(share * len(scores))] for share in QUANTILES]

    return world.kept("cyclic-thresholds", make)


def kind(score: float, limits: list[float]) -> int:
    return sum(score >= limit for limit in limits)


def measured(world: World, limits: list[float], prompts: list, texts: list) -> float:
    kinds = [kind(score, limits) for score in world.score(prompts, texts)]
    return exploitability([kinds.count(each) / len(kinds) for each in range(3)])
