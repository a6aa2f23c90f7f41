"""A checkpoint of a model with LoRA, read as the model that its additions make."""

import dataclasses
import functools
import pathlib

import numpy as np

from lwm.checkpoint.arrays import ArrayInfo, ArrayReader, Index
from lwm.checkpoint.reader import PARAMS, StoredCheckpoint
from lwm.config.experiment import Experiment
from lwm.config.model import LoraConfig
from lwm.model import lora as lora_lib


class MergedReader(ArrayReader):
  """Reads parameters with LoRA's additions merged into them, which are float32."""

  def __init__(self, item: pathlib.Path, lora: LoraConfig):
    super().__init__(item)
    self._lora = lora
    added = (lora_lib.A, lora_lib.B)
    self._added = {path for path in self.arrays if path.endswith(added)}
    self.arrays = {
      path: ArrayInfo(info.shape, np.dtype(np.float32)) if self._is_merged(path) else info
      for path, info in self.arrays.items()
      if path not in self._added
    }

  def _is_merged(self, path: str) -> bool:
    return path + lora_lib.A in self._added

  def read(self, path: str, where: Index = ()) -> np.ndarray:
    array = super().read(path, where)
    if not self._is_merged(path):
      return array
    a, b = (super(MergedReader, self).read(path + name, where) for name in (lora_lib.A, lora_lib.B))
    if where:
      return lora_lib.merged(array, a, b, self._lora)
    return np.stack(
      [lora_lib.merged(*layer, self._lora) for layer in zip(array, a, b, strict=True)]
    )


class MergedCheckpoint(StoredCheckpoint):
  """A checkpoint of a model with LoRA as one of the same model without it."""

  def __init__(self, tuned: StoredCheckpoint):
    super().__init__(tuned.path)
    self._tuned = tuned

  @functools.cached_property
  def experiment(self) -> Experiment:
    experiment = self._tuned.experiment
    return dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, lora=None))

  def reader(self) -> ArrayReader:
    lora = self._tuned.experiment.model.lora
    assert lora
    return MergedReader(self.path / PARAMS, lora)


def merged(stored: StoredCheckpoint) -> StoredCheckpoint:
  """The checkpoint for an export: without LoRA, its additions merged into the parameters."""
  return MergedCheckpoint(stored) if stored.experiment.model.lora else stored
