"""Upcycling: a dense model becomes a model with experts that computes the same (arXiv 2212.05055).

Every expert is a copy of the layer's feed-forward network, and the shares of a token's experts sum
to 1, so any router gives the result of the dense layer. Training then tells the copies apart.

E experts, M model width.
"""

import dataclasses
import pathlib

import numpy as np

from lwm.checkpoint.arrays import ArrayInfo
from lwm.checkpoint.parameters import write_parameters
from lwm.checkpoint.reader import StoredCheckpoint
from lwm.config.experiment import Experiment
from lwm.config.model import ExpertsConfig
from lwm.convert.merged import merged
from lwm.data.tokenizer import tokenizer_files
from lwm.errors import UserError

_DENSE = "blocks.feed_forward."
_PROJECTIONS = ("gate", "up", "down")


def upcycle(
  stored: StoredCheckpoint, output: pathlib.Path, experts: ExpertsConfig, noise: float, seed: int
) -> Experiment:
  """Writes a dense checkpoint as one with experts in all layers, one layer at a time.

  Args:
    stored: the dense checkpoint; LoRA's additions are merged into it.
    output: the new checkpoint, for `Experiment.init_from`.
    experts: its width is replaced by that of the dense network.
    noise: standard deviation of what is added to the copies, relative to that of the weights of the
      layer. 0: all copies are equal.
    seed: of the routers and the noise.

  Returns:
    The experiment of the new checkpoint.

  Raises:
    UserError: the model is not dense, or the experts could not compute what it does.
  """
  dense = merged(stored)
  model = dense.experiment.model
  if model.experts is not None or model.stretches or model.adapter is not None:
    raise UserError(
      f"{stored.path} has experts, several stretches or adapters already: name a dense model."
    )
  if experts.shared_experts or not experts.renormalise or experts.scale != 1:
    raise UserError(
      "Experts with shared_experts, scale or without renormalise would not compute what the dense "
      "model does: leave these settings at their defaults."
    )
  experts = dataclasses.replace(experts, width=model.feed_forward_width)
  stage = dense.stage
  experiment = Experiment(
    name=f"{dense.experiment.name}_experts",
    model=dataclasses.replace(model, experts=experts),
    stages=[stage],
    tokenizer=dense.tokenizer_path.name,
  )
  reader, E = dense.reader(), experts.num_experts
  arrays = {}
  for path, info in reader.arrays.items():
    if path.startswith(_DENSE):
      shape = (info.shape[0], E, *info.shape[1:])
      arrays[_DENSE + "expert_" + path.removeprefix(_DENSE)] = ArrayInfo(shape, info.dtype)
    else:
      arrays[path] = info
  float32 = np.dtype(np.float32)
  arrays[_DENSE + "router"] = ArrayInfo((model.num_layers, model.width, E), float32)
  if experts.router == "sigmoid":
    arrays[_DENSE + "router_bias"] = ArrayInfo((model.num_layers, E), float32)

  rng = np.random.default_rng(seed)
  with write_parameters(
    output, experiment, tokenizer_files(dense.tokenizer_path), arrays
  ) as writer:
    for path in arrays:
      if not path.startswith(_DENSE):
        writer.write(path, reader.read(path))
    for layer in range(model.num_layers):
      router_MxE = model.initializer_std * rng.standard_normal((model.width, E))
      writer.write(_DENSE + "router", router_MxE.astype(float32), (layer,))
      if experts.router == "sigmoid":
        writer.write(_DENSE + "router_bias", np.zeros(E, float32), (layer,))
      for name in _PROJECTIONS:
        weight = reader.read(_DENSE + name, (layer,))
        copies = np.broadcast_to(weight, (E, *weight.shape))
        if noise:
          scale = noise * weight.astype(float32).std()
          copies = copies + scale * rng.standard_normal(copies.shape, float32)
        writer.write(f"{_DENSE}expert_{name}", copies.astype(weight.dtype), (layer,))
  return experiment
