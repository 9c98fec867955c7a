"""Online training: generation, rewards, the trainer and its configuration."""

from trl_ext.trainers.trl_seam import ONLINE_TRAINER, require_names


require_names(ONLINE_TRAINER)
