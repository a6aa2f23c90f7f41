"""Curves of a stage as a PNG: losses by modality, unigram entropy, and the learning rate."""

import pathlib
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lwm.config.batch import MODALITIES
from lwm.report.held_out import by_modality

_COLORS = dict(zip(MODALITIES, ("#1f6fb4", "#d1602a")))


def plot_stage(records: list[dict[str, Any]], stage: str, path: pathlib.Path) -> None:
  """Writes the curves of `stage` to `path`.

  Args:
    records: of metrics.jsonl; records of other stages are ignored.
    stage: its name.
    path: of the PNG, which is replaced atomically.
  """
  train = [r for r in records if r["kind"] == "train" and r["stage"] == stage]
  evaluations = [r for r in records if r["kind"] == "evaluation" and r["stage"] == stage]
  figure = Figure(figsize=(8, 6), layout="constrained")
  FigureCanvasAgg(figure)
  losses, rate = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
  for modality, color in _COLORS.items():
    points = [(r["step"], r[f"{modality}_loss"]) for r in train if f"{modality}_loss" in r]
    if points:
      losses.plot(*zip(*points), color=color, linewidth=0.8, alpha=0.6, label=f"{modality}, train")
    held_out = [
      (r["step"], total) for r in evaluations if (total := by_modality(r["held_out"]).get(modality))
    ]
    if held_out:
      losses.plot(
        [step for step, _ in held_out],
        [total["loss"] for _, total in held_out],
        color=color,
        marker="o",
        label=f"{modality}, held out",
      )
      losses.axhline(
        held_out[-1][1]["unigram_entropy"],
        color=color,
        linestyle="--",
        linewidth=1,
        label=f"{modality}, unigram entropy",
      )
  losses.set_ylabel("loss (nats per target)")
  losses.set_title(stage)
  losses.grid(alpha=0.3)
  losses.legend(fontsize="small")
  rate.plot([r["step"] for r in train], [r["learning_rate"] for r in train], color="black")
  rate.set_ylabel("learning rate")
  rate.set_xlabel("step")
  rate.set_ylim(bottom=0)
  rate.grid(alpha=0.3)
  partial = path.with_suffix(".partial")
  figure.savefig(partial, dpi=120, format="png")
  partial.replace(path)
