"""
What is supported with what, and the tests that say so. `python -m tests.support` prints the tables of docs/support.md.

A cell is `tested` where a test has it, `refused` where it is an error when it is built, `not tried`, or `-` where there is no such thing.
"""

from dataclasses import dataclass

from tests.distributed.runs import PLACES, REFUSED


TESTED, REFUSED_CELL, UNTRIED, NONE = "tested", "refused", "not tried", "-"


@dataclass(frozen=True)
class Refusal:
    """Options of a trainer that are refused, and a part of what the error says."""

    message: str
    options: tuple = ()  # of the config, as items


# Several processes: what, and the cases of tests/distributed

STRATEGIES = {"ddp": "DDP", "fsdp": "FSDP2", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}
COLUMNS = {place: f"{STRATEGIES[place[0]]}, {place[1]}" for place in sorted(PLACES)}

OFFLINE = {
    "every loss of pairs whose rows are averaged, TRL's `sigmoid` beside them; rows that lack a pair": ["every loss"],
    "them with LoRA": ["every loss, lora"],
    "them from a stream": ["stream"],
    "LoRA with a trained head": ["trained head"],
    "losses with a state: `alpha_dpo`, `beta_dpo`, `robust_em`": ["statistics"],
    "a loss of one's own with a state": ["remembering", "remembering, accumulation"],
    "groups, precomputed reference": ["groups"],
    "groups that share their prompt's row": ["groups, shared prompts"],
    "whole groups: `trpa`, `drpo`": ["whole groups"],
    "two teachers: `aligndistil`": ["taught"],
    "tokens of conversations, turn by turn: `dmpo`": ["turns"],
    "tokens, with LoRA": ["turns, lora"],
    "lists of scores": ["lists of scores"],
    "shared prompts, LoRA": ["lora, shared prompts"],
    "shared prompts under a dense mask, gradient checkpointing": ["masked", "masked, checkpointing"],
    "accumulation": ["accumulation"],
    "backends `trl` and `liger`": ["trl backend", "liger backend"],
    "remembered reference, resumed": ["known reference"],
    "the same of tokens": ["known tokens"],
    "the same of an adapter": ["known adapter"],
    "moving reference, resumed": ["moved reference"],
    '`alpha="auto"`': ["measured alpha", "run with measured alpha", "refused alpha"],
    "processes whose rows all have weight 0": ["idle"],
    "rows of weight 0, with LoRA": ["idle, lora"],
    "processes without one of the two pairs": ["pairs of one side"],
    "a last batch, and an evaluation, that do not divide": ["uneven"],
    "the same, dropped": ["uneven, dropped"],
    "what one process logs": ["one process logs"],
    "a state that differs between processes is found": ["selfish"],
    "`dispatch_batches=True`": ["refused dispatch"],
}
ONLINE = {
    "pairs of four completions": ["online"],
    "pairs, LoRA": ["online, lora"],
    "groups": ["groups online"],
    "whole groups: `trpa`, `drpo`": ["whole groups online"],
    "two teachers": ["taught online"],
    "a loss with a state": ["remembering online"],
    "moving reference, LoRA": ["moved adapter"],
    "processes whose prompts all tie": ["tied online"],
    "several micro-batches at once, learnt from twice": ["blocks online"],
    "the same for two steps": ["blocks of two steps online"],
    "sampled by the policy, mixed with the reference": ["generated", "sampled"],
    "in parts of different number": ["in parts"],
    "a preference model as judge": ["preferring"],
    '`alpha="auto"`': ["refused alpha online"],
}
BESIDE = {
    "checkpoints in one piece, resumed, loaded by transformers": ["checkpoints"],
    "the same of an adapter": ["checkpoints, lora"],
    "checkpoints in parts, resumed, put together, loaded": ["checkpoints in parts"],
    "`MetricsCallback`, prompts and pairs that do not divide": ["held out"],
    "`RewardTrainer` with `absolute_weight`": ["rewards"],
    "`RewardTrainer` with `preference_dim`": ["preferences"],
    "`SFTTrainer` with weights": ["fine-tuned"],
    "the same per sequence": ["fine-tuned per sequence"],
    "rounds: `trl-ext iterate`": ["rounds"],
}
SEVERAL = {"Offline": OFFLINE, "Online": ONLINE, "Beside them": BESIDE}


def cell(cases: list[str], place: tuple[str, int]) -> str:
    here = [name for name in cases if name in PLACES[place]]
    if any(name in REFUSED for name in here):
        return REFUSED_CELL
    return TESTED if here else UNTRIED


# One process: what, by trainer, and the test that has it

VALUES = "tests/test_dpo_values.py::test_loss_and_gradients_equal_the_plain_way"
PARITY = "tests/test_parity.py"
ONLINE_PARITY = "tests/online/test_trainer.py::test_loss_and_gradients_are_trls_on_the_same_completions"
LOG_PROBS = "tests/test_rounds_log_probs.py::test_equal_to_the_trainers_reference"
ROUND = "tests/test_rounds_training.py::test_a_round_is_a_training_on_its_pairs"
BACKENDS = {
    "`DPOTrainer`": {
        "`auto`": f"{PARITY}::test_backend", "`torch`": f"{PARITY}::test_backend", "`liger`": f"{PARITY}::test_backend",
        "`trl`": f"{PARITY}::test_loss_type",
    },
    "`OnlineDPOTrainer`": dict.fromkeys(("`auto`", "`torch`", "`liger`", "`trl`"), ONLINE_PARITY),
    "rounds": {"`auto`": LOG_PROBS, "`torch`": ROUND, "`liger`": ROUND, "`trl`": LOG_PROBS},
}  # fmt: skip
LORA = "tests/test_lora.py::test_gradients_follow_from_those_of_the_merged_model"
ADAPTERS = {
    "`DPOTrainer`": {
        "full": VALUES, "LoRA": f"{PARITY}::test_peft", "LoRA with a trained head": "tests/distributed/test_several_processes.py::test_core",
    },
    "`OnlineDPOTrainer`": {"full": ONLINE_PARITY, "LoRA": ONLINE_PARITY, "LoRA with a trained head": ONLINE_PARITY},
    "`RewardTrainer`": {
        "full": "tests/test_reward_trainer.py::test_eurus_terms", "LoRA": LORA,
        "LoRA with a trained head": "tests/test_preference_model.py::test_an_adapter",
    },
    "`SFTTrainer`": {"full": "tests/test_sft_trainer.py::test_values", "LoRA": LORA, "LoRA with a trained head": LORA},
    "rounds": {"full": "tests/test_rounds.py::test_two_rounds", "LoRA": NONE, "LoRA with a trained head": NONE},
}  # fmt: skip
TEACHERS = "tests/test_teachers.py"
ABILITIES = {
    "pairs": {
        "`DPOTrainer`": VALUES, "`OnlineDPOTrainer`": "tests/online/test_values.py::test_pairs",
        "rounds": "tests/test_rounds.py::test_two_rounds",
    },
    "groups: `anchored`": {
        "`DPOTrainer`": "tests/test_groups.py::test_whole_groups_by_hand", "`OnlineDPOTrainer`": "tests/online/test_values.py::test_groups",
        "rounds": "tests/test_rounds_pairs.py::test_whole_groups",
    },
    "whole groups alone: `trpa`, `drpo`": {
        "`DPOTrainer`": "tests/test_whole_groups.py::test_values_and_gradients",
        "`OnlineDPOTrainer`": "tests/online/test_whole_groups.py::test_values_and_gradients",
        "rounds": Refusal("under the policy that sampled the completions, which rounds do not keep", (("loss_type", "trpa"),)),
    },
    "the same on pairs": {
        "`DPOTrainer`": Refusal("learns from whole groups of completions alone, and it was given pairs", (("loss_type", "trpa"),)),
        "`OnlineDPOTrainer`": Refusal("makes pairs, and ['trpa'] learn from whole groups alone", (("loss_type", "trpa"), ("pairing", "best_worst"))),
        "rounds": NONE,
    },
    "state: `alpha_dpo`, `beta_dpo`, `robust_em`": {
        "`DPOTrainer`": "tests/test_losses_with_state.py::test_statistics_are_those_of_the_deltas_of_a_run",
        "`OnlineDPOTrainer`": "tests/test_losses_with_state.py::test_online_reliabilities_are_those_of_the_judges_labels",
        "rounds": ROUND,
    },
    "tokens: `dmpo`": {
        "`DPOTrainer`": "tests/test_turns_in_runs.py::test_loss_and_gradients_equal_the_plain_way",
        "`OnlineDPOTrainer`": "tests/test_turns_in_runs.py::test_online_it_is_dpo", "rounds": ROUND,
    },
    "teachers: `aligndistil`": {
        "`DPOTrainer`": f"{TEACHERS}::test_loss_and_every_gradient_equal_the_plain_way",
        "`OnlineDPOTrainer`": "tests/online/test_teachers.py::test_loss_and_gradients_equal_the_plain_way",
        "rounds": Refusal("learns from a teacher and a reverse teacher, which rounds have not", (("loss_type", "aligndistil"),)),
    },
    "a reference-free loss: `simpo`": {
        "`DPOTrainer`": "tests/test_reference_free.py::test_ours_take_one_forward_per_step",
        "`OnlineDPOTrainer`": "tests/online/test_values.py::test_no_reference_where_none_is_read",
        "rounds": "tests/test_rounds.py::test_rounds_without_a_reference",
    },
    "it, and a moving reference": {
        "`DPOTrainer`": Refusal("reads a reference model, so ['sync_ref_model'] would have no effect",
                                (("loss_type", "simpo"), ("sync_ref_model", True))),
        "`OnlineDPOTrainer`": Refusal("needs a reference model, and a run of ['simpo'] has none",
                                      (("loss_type", "simpo"), ("sync_ref_model", True))),
        "rounds": Refusal("reads a reference model, so ['sync_ref_model'] would have no effect",
                          (("loss_type", "simpo"), ("sync_ref_model", True))),
    },
    "it, and a precomputed reference": {
        "`DPOTrainer`": Refusal("reads a reference model, so ['precompute_ref_log_probs'] would have no effect",
                                (("loss_type", "simpo"), ("precompute_ref_log_probs", True))),
        "`OnlineDPOTrainer`": NONE,
        "rounds": Refusal("reads a reference model, so ['precompute_ref_log_probs'] would have no effect",
                          (("loss_type", "simpo"), ("precompute_ref_log_probs", True))),
    },
    "moving reference": {
        "`DPOTrainer`": "tests/test_reference_runs.py::test_a_reference_that_follows_the_policy",
        "`OnlineDPOTrainer`": "tests/online/test_trainer.py::test_a_reference_that_moves", "rounds": ROUND,
    },
    "precomputed reference": {
        "`DPOTrainer`": "tests/test_dpo_trainer.py::test_option_that_changes_no_number", "`OnlineDPOTrainer`": NONE, "rounds": ROUND,
    },
    "remembered reference": {
        "`DPOTrainer`": "tests/test_reference_memory.py::test_the_second_epoch_runs_no_reference", "`OnlineDPOTrainer`": NONE,
        "rounds": ROUND,
    },
    "two traces: `bias_variance`": {
        "`DPOTrainer`": VALUES, "`OnlineDPOTrainer`": "tests/online/test_values.py::test_two_traces",
        "rounds": Refusal("which rounds do not make", (("loss_type", "bias_variance"),)),
    },
    '`alpha="auto"`': {
        "`DPOTrainer`": "tests/test_mixing.py::test_auto_is_used_logged_and_leaves_no_trace",
        "`OnlineDPOTrainer`": Refusal("which is measured on a dataset of pairs: offline training alone has one",
                                      (("loss_type", "bias_variance"), ("loss_kwargs", {"alpha": "auto"}))),
        "rounds": NONE,
    },
    "a value of each completion: `step_apo`": {
        "`DPOTrainer`": VALUES,
        "`OnlineDPOTrainer`": Refusal("one value for each completion, which cannot be known before the completions are sampled",
                                      (("loss_type", "step_apo"),)),
        "rounds": Refusal("which rounds do not make", (("loss_type", "step_apo"),)),
    },
}  # fmt: skip
ALONE = {"Backends": BACKENDS, "Adapters": ADAPTERS, "Abilities of losses": ABILITIES}


def shown(found: "str | Refusal | None") -> str:
    if isinstance(found, Refusal):
        return REFUSED_CELL
    return found if found == NONE else UNTRIED if found is None else TESTED


def table(corner: str, columns: list[str], rows: dict[str, list[str]]) -> str:
    lines = [[corner, *columns], ["---"] * (len(columns) + 1), *([name, *cells] for name, cells in rows.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables() -> dict[str, str]:
    """Each table of the page, by the heading above it."""
    found = {}
    for heading, rows in ALONE.items():
        columns = list(next(iter(rows.values())))
        cells = {name: [shown(row[column]) for column in columns] for name, row in rows.items()}
        found[heading] = table("", columns, cells)
    for heading, rows in SEVERAL.items():
        cells = {name: [cell(cases, place) for place in COLUMNS] for name, cases in rows.items()}
        found[heading] = table("", list(COLUMNS.values()), cells)
    return found


if __name__ == "__main__":
    print("\n\n".join(f"### {heading}\n\n{text}" for heading, text in tables().items()))
