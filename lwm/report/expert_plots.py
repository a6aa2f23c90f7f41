"""Loads of experts over a stage as a PNG.

T recorded steps, L layers of experts, E experts. A 2 is (text, vision), as in MODALITIES.
"""

import pathlib
from typing import Any

import numpy as np

from lwm.config.batch import MODALITIES
from lwm.report.figures import new_figure, save_figure


def plot_loads(records: list[dict[str, Any]], stage: str, path: pathlib.Path) -> bool:
  """Writes the loads of `stage` to `path`: the largest one by layer, and all by modality.

  On a mesh that divides the experts, also the largest load of a device in any layer.

  Args:
    records: of metrics.jsonl; records of other stages are ignored.
    stage: its name.
    path: of the PNG, which is replaced atomically.

  Returns:
    Whether the stage has experts. If not, nothing is written.
  """
  train = [r for r in records if r["kind"] == "train" and r["stage"] == stage]
  if not train or "expert_load" not in train[0]:
    return False
  step_T = [r["step"] for r in train]
  load_TxLx2xE = np.array([r["expert_load"] for r in train])
  is_divided = "expert_imbalance" in train[0]
  rows = 1 + is_divided + len(MODALITIES)
  figure = new_figure(8, 3 * rows)
  largest, *middle = figure.subplots(rows, 1, sharex=True)
  by_modality = middle[is_divided:]

  load_TxLxE = load_TxLx2xE.sum(axis=2)
  for layer in range(load_TxLxE.shape[1]):
    ratio_T = load_TxLxE[:, layer].max(axis=1) / load_TxLxE[:, layer].mean(axis=1).clip(1e-9)
    largest.plot(step_T, ratio_T, linewidth=0.8, label=f"layer {layer}")
  largest.set_ylabel("largest / mean load")
  largest.set_ylim(bottom=1)
  largest.set_title(stage)
  largest.grid(alpha=0.3)
  if load_TxLxE.shape[1] <= 8:
    largest.legend(fontsize="small")
  if is_divided:
    imbalance_Tx2 = np.array([r["expert_imbalance"] for r in train]).max(axis=1)
    for values_T, label in zip(imbalance_Tx2.T, ("all experts at home", "as they were placed")):
      middle[0].plot(step_T, values_T, linewidth=0.8, label=label)
    middle[0].set_ylabel("device: largest / mean load")
    middle[0].set_ylim(bottom=1)
    middle[0].grid(alpha=0.3)
    middle[0].legend(fontsize="small")
  for axes, modality, load_TxLxE in zip(by_modality, MODALITIES, np.moveaxis(load_TxLx2xE, 2, 0)):
    mean_TxLx1 = load_TxLxE.mean(axis=2, keepdims=True)
    ratio_TxLxE = load_TxLxE / np.where(mean_TxLx1 > 0, mean_TxLx1, 1)
    image = axes.imshow(
      ratio_TxLxE.reshape(len(train), -1).T,
      aspect="auto",
      interpolation="nearest",
      extent=(step_T[0] - 0.5, step_T[-1] + 0.5, ratio_TxLxE.shape[1], 0),
      vmin=0,
      vmax=4,
    )
    axes.set_ylabel(f"{modality}: layer, expert")
    figure.colorbar(image, ax=axes, label="load / mean")
  by_modality[-1].set_xlabel("step")
  save_figure(figure, path)
  return True
