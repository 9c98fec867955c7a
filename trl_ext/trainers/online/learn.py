"""The fourth step of online training: from what is preferred to a loss."""

import dataclasses
from typing import Any

import torch
from accelerate.utils import send_to_device

from trl_ext.data.columns import WEIGHT
from trl_ext.rows import Plan, Rows, from_batch, to_batch
from trl_ext.trainers.online.blocks import Known
from trl_ext.trainers.online.checks import check_rewards
from trl_ext.trainers.online.metrics import dropped_prompts, of_completions, of_learnt, without_comparisons
from trl_ext.trainers.online.selection import Selection, Table, build_table
from trl_ext.trainers.teachers import with_divergences


class Learning:
    """How [`OnlineDPOTrainer`] learns."""

    def learn(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        selections: list[Selection],
        known: Known | None = None,
    ) -> torch.Tensor:
        """
        Fourth step: the mean loss over the prompts of the batch; a prompt without a pair adds 0.

        Args:
            model (`torch.nn.Module`):
                The policy, wrapped or not.
            inputs (`dict[str, Any]`):
                A batch of the dataset: lists by column.
            selections (`list[Selection]`):
                One, or for `bias_variance` one with reasoning and one without.
            known ([`~trl_ext.trainers.online.blocks.Known`], *optional*):
                What has been found out about these completions; what is found out here is added.
        """
        terms, scorer, known = self._terms, self._scorer, Known() if known is None else known
        table = known.table = known.table or self._table(inputs, selections)
        for each in filter(None, (table.plan.columns, table.plan.empty_columns)):
            for name, loss in terms.losses.items():
                check_rewards(name, loss, each)
        rows, plan = self._on_device(self._laid_out(table.rows), table.plan)

        # The reference first: what the policy keeps for its backward is not in memory yet
        if self._needs_reference and not self._is_current(known):
            with torch.no_grad(), self._reference() as reference, self.accelerator.autocast():
                known.ref_token_logps = scorer(reference, rows, statistics=()).log_probs
            known.ref_step = self.state.global_step
        ref_token_logps = known.ref_token_logps
        if ref_token_logps is not None:
            ref_token_logps = ref_token_logps.to(rows.prompt.device)
        divergence = None if self._teachers is None else self._teachers.divergence(rows, plan)
        outputs = scorer(model, rows, statistics=(), divergence=divergence)
        scored = scorer.scored(rows, outputs.log_probs, ref_token_logps, terms.reads)
        if divergence is not None:
            scored = with_divergences(scored, outputs, rows)
        if known.behaviour_logps is None:  # the policy that has just sampled
            known.behaviour_logps = scored.logps.detach()
        known.behaviour_logps = known.behaviour_logps.to(scored.logps.device)
        if "behaviour_logps" in terms.reads:
            scored = dataclasses.replace(scored, behaviour_logps=known.behaviour_logps)
        total, metrics, alone = terms.total(scored, plan, self.beta, self.model.training, self._over_processes)
        compared = bool(self.judge or self.reward_funcs)
        self._note(metrics if compared else without_comparisons(metrics), len(plan.pairs))
        self._note({"beta": self.beta})
        if len(terms.losses) > 1:
            self._note(alone, plan.count)
        parts = zip(table.selections, table.places, table.dropped, ("", "_empty_trace"), strict=False)
        for selection, place, lost, suffix in parts:
            values = of_completions(selection.completions, selection.scores) | {"pairs/dropped_prompts": lost}
            values |= of_learnt(selection, place, scored.logps, scored.ref_logps, self.beta)
            if self._off_policy and self.model.training:
                values["objective/behaviour_kl"] = (known.behaviour_logps - scored.logps.detach())[
                    place[selection.members].to(scored.logps.device)
                ]
            values = values if compared else without_comparisons(values)
            self._note({name + suffix: value for name, value in values.items()})
        if self.model.training:
            self._ties.count(learnt=any(bool((lost == 0).any()) for lost in table.dropped))
        # A batch without a pair still runs, so that all processes take part; it adds nothing
        return total + 0.0 * scored.logps.sum()

    def _is_current(self, known: Known) -> bool:
        """Whether the reference is as it was when it was asked."""
        if known.ref_token_logps is None:
            return False
        return not self.args.sync_ref_model or known.ref_step == self.state.global_step

    def _table(self, inputs: dict[str, Any], selections: list[Selection]) -> Table:
        columns = {name: torch.tensor([float(value) for value in inputs[name]]) for name in self._data.columns}
        dropped = [dropped_prompts(selection) for selection in selections]
        if WEIGHT in columns:  # what does not count is not learnt from
            selections = [selection.only(columns[WEIGHT][selection.prompts] > 0) for selection in selections]
        found = build_table(selections, columns, self.max_length, self._tokenizer.pad_token_id, self._win_rates)
        return Table(*found, selections, dropped)

    def _laid_out(self, rows: Rows) -> Rows:
        """The rows with the layout in which completions share their prompt's, where they are to."""
        if self._scorer.sharing is None:
            return rows
        layout = self._scorer.sharing.layout(rows.inputs, rows.completion_mask, rows.prompt)
        return dataclasses.replace(rows, layout=layout)

    def _on_device(self, rows: Rows, plan: Plan) -> tuple[Rows, Plan]:
        return from_batch(send_to_device(to_batch(rows, plan), self.accelerator.device))
