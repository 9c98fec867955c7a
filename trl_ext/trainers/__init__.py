"""TRL's trainers with more losses. `trl_seam.py` holds what is private to TRL and transformers."""
