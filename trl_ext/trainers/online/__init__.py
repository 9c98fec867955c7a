"""Online training: generation, rewards, the trainer and its configuration."""
