"""TRL's trainers with more losses. Only this folder knows TRL; `trl_seam.py` holds what is private to it."""
