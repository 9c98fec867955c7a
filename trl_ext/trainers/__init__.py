"""TRL's trainers with more losses. `trl_seam/` holds what is private to TRL and transformers."""
