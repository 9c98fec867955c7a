"""
Where this package leans on TRL and transformers, in one place.

Public names of TRL (`trl.data_utils`, `trl.trainer.utils`, its trainers and configs) are imported where they are used, in
`data/`, `rounds/` and `trainers/`. What begins with an underscore, or replaces a piece of a method, is listed or wrapped here:

- `names.py`: every private name that is used, by what has it
- `check.py`: looks them up when a trainer is loaded, before the rest of this package asks for them
- `forward.py`: the fused forward, its head, and what binds it to a model
- `loss.py`: TRL's loss, term by term, and what it logs
- `data.py`: TRL's preparation of pairs, and its cache of reference log-probs

`tests/test_trl_seam.py` runs each of them, so a release that moves one fails a test that names it, and refuses a private name
that is used anywhere in the package and does not stand in `names.py`.
"""

from .check import require_names
from .data import tokenize_pairs, with_cache_key
from .forward import (
    DIVERGENCE,
    NON_MODEL_KEYS,
    ROW_FIELDS,
    Replay,
    base_model,
    bind_forward,
    fused_forward,
    head_in_place,
    map_rows,
    model_inputs,
    projections_in_place,
    unbind_forward,
)
from .loss import (
    METRICS_OF,
    PAIR_METRICS,
    forget_metrics,
    forget_statistics,
    no_reference,
    only_term,
    reference_in_inputs,
)
from .names import (
    DPO_ATTRIBUTES,
    DPO_METHODS,
    FORWARD_NAMES,
    LIBRARY_NAMES,
    OBJECT_NAMES,
    ONLINE_ATTRIBUTES,
    ONLINE_METHODS,
    ONLINE_TRAINER,
    PRIVATE_NAMES,
    REWARD_ATTRIBUTES,
    REWARD_METHODS,
    REWARD_TRAINER,
    SFT_ATTRIBUTES,
    SFT_METHODS,
    SFT_TRAINER,
    VLLM_ATTRIBUTES,
)
