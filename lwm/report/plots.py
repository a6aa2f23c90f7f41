"""Curves as PNG: a stage, as its presentation shows it; and the held-out losses of several runs."""

import pathlib
from collections.abc import Mapping, Sequence

from lwm.report.figures import new_figure, save_figure
from lwm.report.held_out import by_modality
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
  figure = new_figure(8, 1.5 * sum(heights))
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
  save_figure(figure, path)


def plot_held_out(runs: Mapping[str, Sequence[list[Record]]], path: pathlib.Path) -> None:
  """Writes held-out losses by step as a PNG: a panel per modality, a colour per name.

  Args:
    runs: for each name, the evaluations of its runs, records of metrics.jsonl.
    path: of the PNG, which is replaced atomically.
  """
  modalities = sorted({name for own in runs.values() for run in own for name in _losses(run)})
  figure = new_figure(4 * len(modalities), 3.2)
  subplots = figure.subplots(1, len(modalities), squeeze=False)[0]
  for axes, modality in zip(subplots, modalities):
    for number, (name, own) in enumerate(runs.items()):
      for index, records in enumerate(own):
        points = _losses(records).get(modality, [])
        label = name if index == 0 else None
        axes.plot(*zip(*points), ".-", color=f"C{number}", label=label)
    axes.set_title(modality, fontsize=10)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
  subplots[0].set_ylabel("held-out loss (nats per target)")
  subplots[0].legend(fontsize="small")
  save_figure(figure, path)


def _losses(records: list[Record]) -> dict[str, list[tuple[int, float]]]:
  """Steps and losses of each modality."""
  points: dict[str, list[tuple[int, float]]] = {}
  for record in records:
    for modality, total in by_modality(record["held_out"]).items():
      points.setdefault(modality, []).append((record["total_steps"], total["loss"]))
  return points
