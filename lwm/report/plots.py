"""Curves of a stage as a PNG: what its presentation shows, and the learning rate."""

import pathlib

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lwm.report.presentation import Curve, Panel, Presentation, Record


def plot_stage(
  presentation: Presentation, records: list[Record], stage: str, path: pathlib.Path
) -> None:
  """Writes the curves of `stage` to `path`.

  Args:
    presentation: of the experiment.
    records: of metrics.jsonl; records of other stages are ignored.
    stage: its name.
    path: of the PNG, which is replaced atomically.
  """
  train = [r for r in records if r["kind"] == "train" and r["stage"] == stage]
  evaluations = [r for r in records if r["kind"] == "evaluation" and r["stage"] == stage]
  rates = [(r["step"], r["learning_rate"]) for r in train]
  rate = Panel("learning rate", [Curve("", rates, {"color": "black"})])
  panels = [*presentation.panels(train, evaluations), rate]
  heights = [panel.height for panel in panels]
  figure = Figure(figsize=(8, 1.5 * sum(heights)), layout="constrained")
  FigureCanvasAgg(figure)
  subplots = figure.subplots(len(panels), 1, sharex=True, height_ratios=heights)
  for axes, panel in zip(subplots, panels):
    for curve in panel.curves:
      axes.plot(*zip(*curve.points), label=curve.label, **curve.style)
    axes.set_ylabel(panel.label)
    axes.grid(alpha=0.3)
    if panel is not rate:
      axes.legend(fontsize="small", ncols=1 + len(panel.curves) // 4)
  subplots[0].set_title(stage)
  subplots[-1].set_xlabel("step")
  subplots[-1].set_ylim(bottom=0)
  partial = path.with_suffix(".partial")
  figure.savefig(partial, dpi=120, format="png")
  partial.replace(path)
