"""Every loss on real scored pairs; `benchmarks/real_data.py` runs it."""
