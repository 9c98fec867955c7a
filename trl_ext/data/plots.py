"""Plots of what data holds, and whether one can be drawn at all. matplotlib is imported where it is used."""

import os
from pathlib import Path


def check_plot(path: str | Path) -> None:
    """Raise a `ValueError` where a plot could not be written: no matplotlib, no such folder, or an unknown format."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise ValueError("A plot needs matplotlib: pip install matplotlib.") from error
    path, formats = Path(path), sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix.lower()[1:] not in formats:
        raise ValueError(f"Cannot draw {str(path)!r}: its name must end in one of {['.' + each for each in formats]}.")
    if not path.parent.is_dir():
        raise ValueError(f"Cannot draw {str(path)!r}: there is no folder {str(path.parent)!r}.")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"Cannot draw {str(path)!r}: it cannot be written there.")
