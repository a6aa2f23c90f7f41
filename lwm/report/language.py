"""How a language model's run is reported: losses by modality, in nats per target."""

from typing import Any

from lwm.config.batch import MODALITIES
from lwm.config.experiment import Experiment, Stage
from lwm.model.flops import train_flops
from lwm.program.trainable import trained_shares
from lwm.report import held_out as held_out_lib
from lwm.report.held_out import by_modality
from lwm.report.presentation import Curve, Panel, Record, Unit

_COLORS = dict(zip(MODALITIES, ("#1f6fb4", "#d1602a")))
_COUNTS = ("tokens", "attended_pairs", "text_targets", "vision_targets")


class LanguagePresentation:
  """See lwm/report/presentation.py."""

  unit = Unit("tokens", "tok/s")
  held_out_title = "in nats per target"

  def __init__(self, experiment: Experiment):
    self.experiment = experiment
    self.compute_dtype = experiment.model.compute_dtype

  def units_per_batch(self, stage: Stage) -> int:
    return stage.tokens_per_batch

  def flops(self, stage: Stage, metrics: Record) -> float:
    return train_flops(
      self.experiment.model,
      **{name: metrics[name] for name in _COUNTS},
      softmax_range=self.experiment.loss.softmax_range,
      trained=trained_shares(self.experiment, stage),
    )

  def recorded(self, metrics: Record) -> Record:
    absent = {f"{name}_loss" for name in MODALITIES if metrics[f"{name}_targets"] == 0}
    return {name: value for name, value in metrics.items() if name not in absent}

  def columns(self, record: Record) -> list[str]:
    return [
      f"{modality} {record[f'{modality}_loss']:.3f}"
      for modality in MODALITIES
      if f"{modality}_loss" in record
    ]

  def summary(self, held_out: list[Record]) -> str:
    return held_out_lib.summary(held_out)

  def table(self, held_out: list[Record]) -> str:
    return held_out_lib.table(held_out)

  def panels(self, train: list[Record], evaluations: list[Record]) -> list[Panel]:
    """Losses by modality, and the unigram entropy of each."""
    curves = []
    for modality, color in _COLORS.items():
      points = [(r["step"], r[f"{modality}_loss"]) for r in train if f"{modality}_loss" in r]
      thin: dict[str, Any] = {"color": color, "linewidth": 0.8, "alpha": 0.6}
      if points:
        curves.append(Curve(f"{modality}, train", points, thin))
      held_out = [
        (r["step"], total)
        for r in evaluations
        if (total := by_modality(r["held_out"]).get(modality))
      ]
      if held_out:
        points = [(step, total["loss"]) for step, total in held_out]
        curves.append(Curve(f"{modality}, held out", points, {"color": color, "marker": "o"}))
        entropy = held_out[-1][1]["unigram_entropy"]
        steps = [r["step"] for r in (*train, *evaluations)]
        ends = [(min(steps), entropy), (max(steps), entropy)]
        dashed = {"color": color, "linestyle": "--", "linewidth": 1}
        curves.append(Curve(f"{modality}, unigram entropy", ends, dashed))
    return [Panel("loss (nats per target)", curves, 3)]
