"""How a VQGAN's run is reported: parts of the loss, and how close reconstructions are."""

from lwm.config.experiment import VQGANExperiment, VQGANStage
from lwm.program.frame_objective import FRAMES
from lwm.report.presentation import Curve, Panel, Record, Unit

# Results on held-out frames: name, text, and format.
_RESULTS = (
  ("psnr", "PSNR {:.2f} dB"),
  ("ssim", "SSIM {:.3f}"),
  ("usage", "usage {:.1%}"),
  ("codebook_perplexity", "perplexity {:.0f}"),
)
# Fields of a train record that are not parts of the loss.
_NO_LOSSES = {
  *(name for name, _ in _RESULTS),
  FRAMES,
  "step",
  "total_steps",
  "learning_rate",
  "gradient_norm",
  "seconds",
  "data_seconds",
  "starved_seconds",
  "frames_per_second",
  "mfu",
}


class VQGANPresentation:
  """See lwm/report/presentation.py."""

  unit = Unit(FRAMES, "frames/s")
  compute_dtype = "float32"
  held_out_title = "on held-out frames"

  def __init__(self, experiment: VQGANExperiment):
    self.experiment = experiment
    # FLOPs of a step by the name of the stage; `VQGANTask.notes` fills it when a stage begins.
    self.step_flops: dict[str, float] = {}

  def units_per_batch(self, stage: VQGANStage) -> int:
    return stage.frames_per_batch

  def flops(self, stage: VQGANStage, metrics: Record) -> float:
    return self.step_flops[stage.name]

  def recorded(self, metrics: Record) -> Record:
    return metrics

  def columns(self, record: Record) -> list[str]:
    return [text.format(record[name]) for name, text in _RESULTS if name in record]

  def summary(self, held_out: list[Record]) -> str:
    return " | ".join(f"{row['dataset']}: {', '.join(_texts(row))}" for row in held_out)

  def table(self, held_out: list[Record]) -> str:
    header = ("dataset", "PSNR", "SSIM", "usage", "perplexity", "frames")
    lines = ["{:<16} {:>10} {:>8} {:>8} {:>11} {:>7}".format(*header)]
    lines += [
      f"{row['dataset']:<16} {row['psnr']:>7.2f} dB {row['ssim']:>8.3f} {row['usage']:>8.1%} "
      f"{row['codebook_perplexity']:>11.0f} {row['frames']:>7}"
      for row in held_out
    ]
    return "\n".join(lines)

  def panels(self, train: list[Record], evaluations: list[Record]) -> list[Panel]:
    """PSNR and codebook usage, in training and on each dataset's held-out frames; the losses."""
    panels = []
    for name, label, height in (("psnr", "PSNR (dB)", 2), ("usage", "codebook usage", 1)):
      points = [(record["step"], record[name]) for record in train]
      curves = [Curve("train", points, {"linewidth": 0.8, "alpha": 0.6})]
      for dataset in sorted(
        {row["dataset"] for record in evaluations for row in record["held_out"]}
      ):
        points = [
          (record["step"], row[name])
          for record in evaluations
          for row in record["held_out"]
          if row["dataset"] == dataset
        ]
        curves.append(Curve(f"{dataset}, held out", points, {"marker": "o"}))
      panels.append(Panel(label, curves, height))
    losses = [
      name
      for record in train[-1:]
      for name, value in record.items()
      if isinstance(value, float) and name not in _NO_LOSSES
    ]
    curves = [
      Curve(name, [(record["step"], record[name]) for record in train], {"linewidth": 0.8})
      for name in losses
    ]
    return [*panels, Panel("losses", curves, 2)]


def _texts(row: Record) -> list[str]:
  return [text.format(row[name]) for name, text in _RESULTS if name in row]
