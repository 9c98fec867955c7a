"""Which cases there are, by name, and where each is run. A name means the same case everywhere."""

from functools import partial

from tests.conversations import rows as conversations
from tests.distributed import cases, corners
from tests.distributed.cases import MOVES, groups, lora, scripted, train


GREEDY = {"do_sample": False}
ALONE = ["trpa", "drpo"]  # losses of whole groups
OF_GROUPS = {"trpa": {"correct": 0.75}, "drpo": {"correct": 0.45, "max_length": 16, "kl_weight": 1.0}}
ONLINE_GROUPS = {"drpo": {"correct": 30.0, "max_length": 16}}
TURNS = conversations() * 2

CASES = {
    # Offline
    "every loss": cases.every_loss,
    "every loss, lora": partial(cases.every_loss, peft=lora()),
    "stream": partial(cases.every_loss, stream=True),
    "trl backend": partial(train, loss_type=["sigmoid", "offset"], logprob_backend="trl", evaluate=True),
    "liger backend": partial(train, loss_type=["sigmoid", "offset"], logprob_backend="liger", max_steps=1),
    "taught": cases.taught,
    "groups": partial(groups, precompute_ref_log_probs=True),
    "groups, shared prompts": partial(groups, precompute_ref_log_probs=True, share_prefix=True),
    "whole groups": partial(groups, loss_type=ALONE, learning_rate=0.01, loss_kwargs=OF_GROUPS),
    "lora, shared prompts": partial(train, peft=lora(), loss_type="offset", share_prefix=True),
    "trained head": partial(train, peft=lora(modules_to_save=["lm_head"]), loss_type="offset"),
    "accumulation": partial(train, steps=2, loss_type=["inpo", "sppo_soft"], share_prefix=False, learning_rate=1e-3),
    "masked": cases.masked,
    "masked, checkpointing": partial(cases.masked, gradient_checkpointing=True),
    "lists of scores": partial(cases.lists, stream=True),
    "turns": partial(train, rows=TURNS, loss_type="dmpo", evaluate=True, learning_rate=1e-3),
    "turns, lora": partial(train, rows=TURNS, loss_type="dmpo", peft=lora(), learning_rate=1e-2),
    # State
    "remembering": cases.remembering,
    "remembering, accumulation": partial(cases.remembering, steps=2),
    "statistics": cases.statistics,
    "selfish": cases.selfish,
    # The reference
    "known reference": cases.known_reference,
    "known tokens": partial(cases.known_reference, loss_type="dmpo"),
    "known adapter": partial(cases.known_reference, peft=lora(init_lora_weights=False)),
    "moved reference": cases.moved_reference,
    "moved adapter": partial(scripted, peft=lora(), loss_type="anchored", **MOVES, max_steps=3, learning_rate=1.0),
    # `alpha="auto"`
    "measured alpha": cases.measured_alpha,
    "run with measured alpha": corners.measured,
    "refused alpha": cases.refused_alpha,
    # Nothing to learn, and ends that do not divide
    "idle": partial(corners.idle, loss_type=["sigmoid", "offset", "bias_variance"]),
    "idle, lora": partial(corners.idle, loss_type="offset", peft=lora()),
    "pairs of one side": corners.one_sided,
    "tied online": corners.tied,
    "uneven": partial(corners.uneven, rows=9, loss_type=["offset", "length_regularized"]),
    "uneven, dropped": partial(corners.uneven, rows=13, drop=True, loss_type="offset"),
    # Checkpoints
    "checkpoints": corners.checkpoints,
    "checkpoints, lora": partial(corners.checkpoints, peft=lora()),
    "checkpoints in parts": partial(corners.checkpoints, sharded=True),
    # What is logged
    "one process logs": cases.one_process_logs,
    "held out": cases.held_out,
    # Online
    "online": partial(scripted, num_generations=4, loss_type=["offset", "anchored"]),
    "online, lora": partial(scripted, num_generations=4, loss_type=["offset", "simpo"], peft=lora()),
    "groups online": partial(scripted, num_generations=4, loss_type="anchored", pairing="group"),
    "whole groups online": partial(scripted, num_generations=4, loss_type=ALONE, loss_kwargs=ONLINE_GROUPS),
    "blocks online": partial(cases.blocks_online, current=[True, False] * 2, loss_type="trpa"),
    "blocks of two steps online": partial(
        cases.blocks_online, current=[True, False, False, False], loss_type="offset", steps_per_generation=4
    ),
    "remembering online": cases.remembering_online,
    "taught online": cases.taught_online,
    "generated": partial(cases.generated, generation_kwargs=GREEDY),
    "sampled": partial(cases.generated, temperature=1e-4),
    "in parts": partial(cases.in_parts, generation_kwargs=GREEDY),
    # Other trainers
    "preferring": cases.preferring,
    "rewards": partial(corners.judge, absolute_weight=0.5),
    "preferences": partial(corners.judge, preference_dim=4),
    "fine-tuned": cases.fine_tuned,
    "fine-tuned per sequence": partial(cases.fine_tuned, steps=2, per_sequence_loss=True),
    "rounds": corners.rounds,
    # Refused wherever it is built
    "refused dispatch": corners.refused_dispatch,
    "refused alpha online": corners.refused_online,
}
REFUSED = {name for name in CASES if name.startswith("refused")}

# Where they run: strategy and number of processes. These in every run of the tests, ...
CORE = {
    ("ddp", 2): [
        "every loss", "taught", "groups, shared prompts", "whole groups", "whole groups online", "lora, shared prompts",
        "accumulation", "masked, checkpointing", "measured alpha", "known reference", "stream", "lists of scores",
        "remembering", "remembering, accumulation", "statistics", "selfish", "one process logs", "held out", "turns", "online",
        "blocks online", "remembering online", "preferring", "fine-tuned", "fine-tuned per sequence", "idle", "uneven",
        "refused dispatch", "refused alpha online",
    ],
    ("fsdp", 2): [
        "every loss", "taught", "remembering", "masked", "trained head", "moved reference", "moved adapter", "known reference",
        "groups", "refused alpha", "held out", "groups online", "blocks of two steps online", "taught online", "generated", "in parts",
        "fine-tuned", "idle", "checkpoints in parts",
    ],
    ("zero3", 2): [
        "every loss", "taught", "masked", "trained head", "moved reference", "moved adapter", "known reference", "refused alpha",
        "held out", "generated", "in parts", "idle",
    ],
}  # fmt: skip
# ... and all of these by `make test-distributed`
FOUR = [
    "every loss", "taught", "whole groups", "statistics", "trained head", "known reference", "idle", "pairs of one side",
    "tied online", "uneven", "checkpoints in parts", "online", "generated", "fine-tuned", "rounds",
]  # fmt: skip
# Parameters are whole there, as under DDP
ZERO2 = [
    *FOUR, "every loss, lora", "turns", "groups", "moved reference", "held out", "checkpoints", "groups online", "preferences",
    "refused alpha",
]  # fmt: skip
ONE_MEMORY = {
    "known tokens",
    "selfish",
    "measured alpha",
    "run with measured alpha",
    "preferring",
}  # not of a sharded policy
EVERYWHERE = [name for name in CASES if name not in ONE_MEMORY]
PLACES = {
    ("ddp", 2): [name for name in CASES if name != "refused alpha"],
    ("fsdp", 2): EVERYWHERE,
    ("zero2", 2): ZERO2,
    ("zero3", 2): EVERYWHERE,
    ("ddp", 4): [*FOUR, "run with measured alpha"],
    ("fsdp", 4): [*FOUR, "refused alpha"],
    ("zero3", 4): [*FOUR, "refused alpha"],
}
FURTHER = {place: [name for name in names if name not in CORE.get(place, ())] for place, names in PLACES.items()}
