"""The perceptual loss: how far apart frames are in the features of another network.

It is the distance of LPIPS (Zhang et al., arXiv 1801.03924). The network is in a file (.npz) that
the user names, a stack of 3x3 convolutions like VGG's:

    mean, std                       [3], of RGB pixels in [0, 1]; they are normalised with these
    stageI.convJ.kernel and .bias   [3, 3, in, out] and [out], I and J from 0; each convolution is
                                    followed by a ReLU; 2x2 max pooling separates the stages
    stageI.weight                   [channels], optional: how much each channel of the last
                                    activations of the stage counts; 1 / channels without it

Features are the last activations of every stage: for VGG-16, those that LPIPS uses.

Legend: B frames; H, W height and width, falling from stage to stage; C channels.
"""

import os
import re
import zipfile
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lwm.errors import UserError

_CONVOLUTION = re.compile(r"stage(\d+)\.conv(\d+)\.kernel")
_EPSILON = 1e-10

Weights = Mapping[str, jax.Array]


def load_network(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """Arrays of a file in the layout above, float32, by name.

  Raises:
    UserError: the file does not exist or has another layout.
  """
  try:
    with np.load(path) as file:
      weights = {name: np.asarray(file[name], np.float32) for name in file.files}
  except (OSError, ValueError, zipfile.BadZipFile) as error:
    raise UserError(f"perceptual_file={path} is not a file of arrays (.npz): {error}.") from error
  channels = 3
  expected: dict[str, tuple[int, ...]] = {"mean": (3,), "std": (3,)}
  for name in _convolutions(weights):
    kernel = weights[f"{name}.kernel"]
    outputs = kernel.shape[-1] if kernel.ndim else 0
    expected |= {f"{name}.kernel": (3, 3, channels, outputs), f"{name}.bias": (outputs,)}
    channels = outputs
    stage = name.split(".")[0]
    if f"{stage}.weight" in weights:
      expected[f"{stage}.weight"] = (channels,)
  for name in {**expected, **weights}:
    shape = weights[name].shape if name in weights else None
    if shape != expected.get(name):
      raise UserError(
        f"perceptual_file={path}: {name} has shape {shape}, but {expected.get(name)} is expected. "
        "lwm/vision/perceptual.py states the layout."
      )
  return weights


def _convolutions(weights: Mapping[str, object]) -> list[str]:
  """Names of the convolutions in the order of the network."""
  places = sorted(
    (int(match[1]), int(match[2])) for match in map(_CONVOLUTION.fullmatch, weights) if match
  )
  return [f"stage{stage}.conv{number}" for stage, number in places]


def network_features(
  weights: Weights, pixels_BxHxWx3: jax.Array, pixel_range: tuple[int, int]
) -> list[jax.Array]:
  """The last activations of every stage, [B, H, W, C], of pixels in `pixel_range`."""
  low, high = pixel_range
  hidden = ((pixels_BxHxWx3 - low) / (high - low) - weights["mean"]) / weights["std"]
  features: list[jax.Array] = []
  stage = None
  for name in _convolutions(weights):
    previous, stage = stage, name.split(".")[0]
    if previous not in (None, stage):
      features.append(hidden)
      hidden = _max_pool(hidden)
    hidden = jax.lax.conv_general_dilated(
      hidden,
      weights[f"{name}.kernel"],
      window_strides=(1, 1),
      padding="SAME",
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    hidden = jax.nn.relu(hidden + weights[f"{name}.bias"])
  return [*features, hidden]


def _max_pool(hidden_BxHxWxC: jax.Array) -> jax.Array:
  """The largest of every 2x2 pixels; an odd row or column at the end is left out."""
  window = (1, 2, 2, 1)
  return jax.lax.reduce_window(hidden_BxHxWxC, -jnp.inf, jax.lax.max, window, window, "VALID")


def channel_weights(weights: Weights, stages: int) -> list[jax.Array | None]:
  """The optional weights of the channels of each stage."""
  return [weights.get(f"stage{stage}.weight") for stage in range(stages)]


def feature_distance(
  ours: Sequence[jax.Array], theirs: Sequence[jax.Array], weights: Sequence[jax.Array | None]
) -> jax.Array:
  """The squared distance of unit feature vectors, a mean over pixels, summed over layers.

  Args:
    ours: [B, H, W, C] for each layer.
    theirs: the same of the other frames.
    weights: of the channels, [C], for each layer; None: 1 / C.
  """
  distance = jnp.zeros(())
  for ours_BxHxWxC, theirs_BxHxWxC, weight_C in zip(ours, theirs, weights, strict=True):
    squares = jnp.square(_unit(ours_BxHxWxC) - _unit(theirs_BxHxWxC))
    scale = 1.0 / squares.shape[-1] if weight_C is None else weight_C
    distance += (squares * scale).sum(-1).mean()
  return distance


def _unit(features_BxHxWxC: jax.Array) -> jax.Array:
  squares = jnp.square(features_BxHxWxC).sum(-1, keepdims=True)
  return features_BxHxWxC * jax.lax.rsqrt(squares + _EPSILON)
