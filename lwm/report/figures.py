"""Figures as PNG files. Only drawing imports matplotlib, which takes half a second."""

import pathlib
from typing import Any


def new_figure(width: float, height: float) -> Any:
  """An empty `matplotlib.figure.Figure` of a size in inches."""
  from matplotlib.figure import Figure

  return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: pathlib.Path) -> None:
  """Writes a PNG and replaces `path` atomically; its folder is created."""
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_suffix(".partial")
  figure.savefig(partial, dpi=120, format="png")
  partial.replace(path)
