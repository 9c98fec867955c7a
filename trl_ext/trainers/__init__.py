"""TRL's trainers with more losses. `trl_seam/` holds what is private to TRL and transformers."""

# Before any module here asks TRL for a name: it looks up those that are used, and says which is gone
from . import trl_seam  # noqa: F401
