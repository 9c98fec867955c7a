"""How many tokens one tile of logits holds, and whether what the backward needs of all of them is kept."""

from typing import NamedTuple

import torch


# A head that is trained runs three products instead of four if all tiles are kept: worth this many tiles' memory
KEEP_TILES = 3

# Tokens after which a tile of an accelerator is large enough for its products to run at full speed
TILE_TOKENS = 4096

# Bytes that a tile of an accelerator may take whatever they do to the peak: what TRL's head takes, 4096 x 32768 in half precision
LEAST = 2**28


class Plan(NamedTuple):
    """
    Attributes:
        rows (`int`):
            Tokens per tile, at least 1.
        keep (`bool`):
            Whether a head that is trained keeps all tiles for its backward.
    """

    rows: int
    keep: bool


def plan_for_budget(budget_mb: float, tokens: int, vocabulary: int, bytes_per_logit: int) -> Plan:
    """A tile takes at most `budget_mb` MiB, and all of them are kept where [`KEEP_TILES`] of that size hold all logits."""
    rows = max(1, min(int(budget_mb * 2**20 / (vocabulary * bytes_per_logit)), tokens))
    return Plan(rows, tokens <= KEEP_TILES * rows)


def plan_for_memory(free: int, room: int, tokens: int, vocabulary: int, bytes_per_logit: int) -> Plan:
    """
    A tile of [`TILE_TOKENS`] tokens, halved until it raises no peak or takes no more than [`LEAST`], and at most a quarter of
    the free memory; all tiles are kept where that raises no peak and takes at most half of the free memory.

    Args:
        free (`int`):
            Bytes that can still be allocated.
        room (`int`):
            Bytes that the run has needed before, and that neither it nor the head's own gradients need now: in full fine-tuning the
            memory of all gradients, else that of a layer's backward. In the first step there are none.
        tokens (`int`):
            Tokens to score.
        vocabulary (`int`):
            Logits per token.
        bytes_per_logit (`int`):
            What a tile takes per logit.
    """
    per_token = vocabulary * bytes_per_logit
    rows = max(1, min(TILE_TOKENS, tokens))
    while rows > 1 and rows * per_token > min(free // 4, max(room, LEAST)):
        rows //= 2
    return Plan(rows, tokens * per_token <= min(room, free // 2))


def free_and_room(device: torch.device) -> tuple[int, int] | None:
    """`free` and `room` of [`plan_for_memory`], from counters of the host; `None` for a device that has none."""
    module = getattr(torch, device.type, None)
    if not hasattr(module, "mem_get_info"):
        return None
    allocated = module.memory_allocated(device)
    free = module.mem_get_info(device)[0] + module.memory_reserved(device) - allocated
    return free, module.max_memory_allocated(device) - allocated
