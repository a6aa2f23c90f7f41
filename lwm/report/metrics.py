"""What a run leaves for tools: metrics.jsonl and TensorBoard events.

metrics.jsonl holds one JSON object per line. Its "kind" is one of four:

    train       one per step, exactly once however often the run was killed and resumed: stage,
                step (of the stage), total_steps, loss, gradient_norm, learning_rate, seconds,
                mfu, data_seconds (waiting for the batch), starved_seconds (the part of them in
                which the device had nothing to run). A language model adds text_loss and
                vision_loss (absent without targets), tokens (without padding), tokens_per_second,
                text_targets, vision_targets, attended_pairs, and what the model's blocks report
                (expert_load, ...). A VQGAN adds the parts of its loss, psnr, usage,
                codebook_perplexity, frames, frames_per_second
    evaluation  stage, step, total_steps, and `held_out`, a list. A language model has one entry for
                each dataset and modality: dataset, modality, loss, unigram_entropy (both in nats),
                targets. A VQGAN has one for each dataset: dataset, psnr, ssim, usage,
                codebook_perplexity, frames
    goodput     when an attempt begins, when steps begin (at the start and after an evaluation or
                a checkpoint) and at the end: total_steps, time (seconds since 1970), attempts,
                wall_seconds and its parts by the categories of goodput.py (step_seconds,
                input_seconds, ...), and goodput, the share of step_seconds
    fault       stage, step, total_steps (steps done), event (`skip`, `rollback` or `checkpoint`),
                text (the printed line)
"""

import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from lwm.errors import UserError
from lwm.report.tensorboard import EventFile

FILE_NAME = "metrics.jsonl"


class MetricsLog:
  """Appends records to WORKDIR/metrics.jsonl and events to WORKDIR/tensorboard."""

  def __init__(
    self, workdir: pathlib.Path, total_steps: int, carried: Sequence[dict[str, Any]] = ()
  ):
    """Opens the log of a run after step `total_steps`, dropping the records of later steps.

    The records `carried` are appended in the same atomic write.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / FILE_NAME
    kept = [record for record in read_metrics(path) if record["total_steps"] <= total_steps]
    kept += carried
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
    partial.replace(path)
    self._file = path.open("a")
    self._events = EventFile(workdir / "tensorboard", purge_step=total_steps + 1)

  def write(self, record: dict[str, Any]) -> None:
    """Appends one record; the file contains all of it when this returns."""
    self._file.write(json.dumps(record) + "\n")
    self._file.flush()
    step = record["total_steps"]
    for name, value in record.items():
      if isinstance(value, float) and name != "time":
        self._events.add_scalar(f"{record['kind']}/{name}", value, step)
    for row in record.get("held_out", ()):
      prefix = f"{row['modality']}_" if "modality" in row else ""
      for name, value in row.items():
        if isinstance(value, float):
          self._events.add_scalar(f"held_out/{row['dataset']}/{prefix}{name}", value, step)

  def sync(self) -> None:
    """Returns once the records are on disk: a checkpoint needs those of all steps before it."""
    os.fsync(self._file.fileno())
    self._events.flush()

  def close(self) -> None:
    """Closes both files."""
    self._file.close()
    self._events.close()


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
  """The records of a metrics.jsonl, without a last line that a kill cut short.

  Raises UserError if another line is damaged.
  """
  if not path.exists():
    return []
  records = []
  for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
    if line.endswith(b"\n"):
      try:
        records.append(json.loads(line))
      except ValueError:
        raise UserError(
          f"Line {number} of {path} is damaged: restore the file from a copy, or remove the line."
        ) from None
  return records
