"""Upcycling: a dense model becomes a model with experts that computes the same.

Every expert is a copy of the layer's feed-forward network, and the shares of a token's experts sum
to 1, so any router gives the result of the dense layer (arXiv 2212.05055). Training then tells the
copies apart.

A network can also be cut into slices of its hidden units, whose results sum to its own. The first
slices become shared experts, and each expert is a copy of one of the others. To choose each of
these equally often, the experts form sets of one copy per slice, and a set has one and the same
column in the router (arXiv 2410.07524).

E experts, M model width.
"""

import dataclasses
import pathlib

import numpy as np

from lwm.checkpoint.arrays import ArrayInfo
from lwm.checkpoint.parameters import write_parameters
from lwm.checkpoint.reader import StoredCheckpoint
from lwm.config.experiment import Experiment
from lwm.config.model import ExpertsConfig, ModelConfig
from lwm.convert.merged import merged
from lwm.data.tokenizer import tokenizer_files
from lwm.errors import UserError

_DENSE = "blocks.feed_forward."
# Each projection with the axis of its hidden units.
_PROJECTIONS = {"gate": -1, "up": -1, "down": -2}


def upcycle(
  stored: StoredCheckpoint,
  output: pathlib.Path,
  experts: ExpertsConfig,
  *,
  slices: int = 1,
  noise: float = 0.0,
  seed: int = 0,
) -> Experiment:
  """Writes a dense checkpoint as one with experts in all layers, one layer at a time.

  Args:
    stored: the dense checkpoint; LoRA's additions are merged into it.
    output: the new checkpoint, for `Experiment.init_from`.
    experts: its width and scale are replaced by those with which it computes the same.
    slices: the parts that each network is cut into, of which the shared experts are the first.
    noise: standard deviation of what is added to the copies, relative to that of the weights of the
      layer. 0: all copies of a slice are equal.
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
  if not experts.renormalise:
    raise UserError("Experts without renormalise would not compute what the dense model does.")
  routed = _check_slices(model, experts, slices)
  experts = dataclasses.replace(
    experts, width=model.feed_forward_width // slices, scale=float(routed)
  )
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
    if not path.startswith(_DENSE):
      arrays[path] = info
      continue
    name = path.removeprefix(_DENSE)
    shape = list(info.shape)
    shape[_PROJECTIONS[name]] = experts.width
    arrays[f"{_DENSE}expert_{name}"] = ArrayInfo((shape[0], E, *shape[1:]), info.dtype)
    if experts.shared_experts:
      shape[_PROJECTIONS[name]] = experts.shared_experts * experts.width
      arrays[f"{_DENSE}shared.{name}"] = ArrayInfo(tuple(shape), info.dtype)
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
      router_MxN = model.initializer_std * rng.standard_normal((model.width, E // routed))
      router_MxE = np.repeat(router_MxN, routed, axis=1)
      writer.write(_DENSE + "router", router_MxE.astype(float32), (layer,))
      if experts.router == "sigmoid":
        writer.write(_DENSE + "router_bias", np.zeros(E, float32), (layer,))
      for name, axis in _PROJECTIONS.items():
        weight = reader.read(_DENSE + name, (layer,))
        parts = np.split(weight, slices, axis)
        if experts.shared_experts:
          shared = np.concatenate(parts[: experts.shared_experts], axis)
          writer.write(f"{_DENSE}shared.{name}", shared, (layer,))
        copies = np.stack(parts[experts.shared_experts :] * (E // routed))
        if noise:
          scale = noise * weight.astype(float32).std()
          copies = copies + scale * rng.standard_normal(copies.shape, float32)
        writer.write(f"{_DENSE}expert_{name}", copies.astype(weight.dtype, copy=False), (layer,))
  return experiment


def _check_slices(model: ModelConfig, experts: ExpertsConfig, slices: int) -> int:
  """The number of slices that experts other than the shared ones are copies of."""
  if model.feed_forward_width % slices:
    raise UserError(
      f"A network of {model.feed_forward_width} hidden units cannot be cut into {slices} equal "
      "slices: choose another number of slices."
    )
  routed = slices - experts.shared_experts
  if routed < 1:
    raise UserError(
      f"{experts.shared_experts} shared experts leave none of {slices} slices to the other "
      "experts: choose more slices or fewer shared experts."
    )
  if experts.num_experts % routed or experts.experts_per_token % routed:
    raise UserError(
      f"{routed} of {slices} slices are not shared, so the number of experts "
      f"({experts.num_experts}) and of those that a token uses ({experts.experts_per_token}) must "
      f"be multiples of {routed}."
    )
  return routed
