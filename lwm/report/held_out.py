"""Held-out loss per dataset and modality, next to the unigram entropy of the same data.

The unigram entropy is the loss of a model that knows only how often each token occurs. A model that
has learnt anything about the order of tokens has a lower loss.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from lwm.config.batch import MODALITIES


def losses(
  params: Any,
  evaluation_step: Callable[..., tuple[jax.Array, jax.Array]],
  batches: Iterable[dict[str, jax.Array]],
  dataset: str,
  unigram_entropy: dict[str, float],
) -> list[dict[str, Any]]:
  """Mean loss in nats over the targets of each modality in `batches`.

  Args:
    params: of the model.
    evaluation_step: of the stage's program.
    batches: of one dataset's validation split; every target that counts has weight 1.
    dataset: its name.
    unigram_entropy: of the split's targets, in nats, by modality.

  Returns:
    For each modality that occurs: dataset, modality, loss, unigram_entropy, targets.
  """
  # All batches are dispatched before the first result is waited for.
  sums = [evaluation_step(params, batch) for batch in batches]
  nll_2, targets_2 = np.asarray(jax.device_get(sums), np.float64).sum(axis=0)
  return [
    {
      "dataset": dataset,
      "modality": modality,
      "loss": float(nll / targets),
      "unigram_entropy": unigram_entropy[modality],
      "targets": int(targets),
    }
    for modality, nll, targets in zip(MODALITIES, nll_2, targets_2)
    if targets
  ]


def by_modality(held_out: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
  """Mean loss and unigram entropy of each modality over all datasets, weighted by targets."""
  totals = {}
  for modality in MODALITIES:
    rows = [row for row in held_out if row["modality"] == modality]
    if rows:
      targets = sum(row["targets"] for row in rows)
      totals[modality] = {
        name: sum(row[name] * row["targets"] for row in rows) / targets
        for name in ("loss", "unigram_entropy")
      }
      totals[modality]["targets"] = targets
  return totals


def summary(held_out: list[dict[str, Any]]) -> str:
  """Held-out loss of each modality over all datasets, as one line."""
  return " | ".join(
    f"{modality} {total['loss']:.3f} (unigram entropy {total['unigram_entropy']:.3f})"
    for modality, total in by_modality(held_out).items()
  )


def table(held_out: list[dict[str, Any]]) -> str:
  """Held-out losses as lines of text: each dataset and modality, then the means over datasets."""
  rows = [(row["dataset"], row["modality"], row) for row in held_out]
  datasets = {row["dataset"] for row in held_out}
  if len(datasets) > 1:
    rows += [("all", modality, total) for modality, total in by_modality(held_out).items()]
  header = ("dataset", "modality", "held-out loss", "unigram entropy", "targets")
  lines = ["{:<16} {:<8} {:>13} {:>16} {:>9}".format(*header)]
  lines += [
    f"{name:<16} {modality:<8} {row['loss']:>13.3f} {row['unigram_entropy']:>16.3f} "
    f"{row['targets']:>9}"
    for name, modality, row in rows
  ]
  return "\n".join(lines)
