"""The perceptual loss and the file of its network."""

import jax.numpy as jnp
import numpy as np
import pytest

from lwm.config.vqgan import VQGANConfig, VQGANLossConfig
from lwm.errors import UserError
from lwm.vision.objective import VQGANObjective
from lwm.vision.perceptual import channel_weights, feature_distance, load_network, network_features


def network() -> dict[str, np.ndarray]:
  """Two stages, of two convolutions and of one."""
  random = np.random.default_rng(0)
  arrays = {"mean": np.array([0.4, 0.5, 0.6]), "std": np.array([0.2, 0.3, 0.4])}
  for name, inputs, outputs in (("0.conv0", 3, 4), ("0.conv1", 4, 5), ("1.conv0", 5, 6)):
    arrays[f"stage{name}.kernel"] = random.normal(size=(3, 3, inputs, outputs)) / inputs**0.5
    arrays[f"stage{name}.bias"] = 0.1 * random.normal(size=outputs)
  arrays["stage1.weight"] = random.uniform(size=6)
  return arrays


def convolve(image, kernel, bias):
  height, width, _ = image.shape
  padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
  result = np.stack(
    [
      [np.einsum("hwi,hwio->o", padded[y : y + 3, x : x + 3], kernel) for x in range(width)]
      for y in range(height)
    ]
  )
  return np.maximum(result + bias, 0)


def reference(arrays, ours, theirs) -> float:
  """The distance of two frames [H, W, 3] in [-1, 1]."""

  def features(image):
    hidden = ((image + 1) / 2 - arrays["mean"]) / arrays["std"]
    hidden = convolve(hidden, arrays["stage0.conv0.kernel"], arrays["stage0.conv0.bias"])
    first = convolve(hidden, arrays["stage0.conv1.kernel"], arrays["stage0.conv1.bias"])
    pooled = np.stack([first[y::2, x::2] for y in (0, 1) for x in (0, 1)]).max(0)
    return first, convolve(pooled, arrays["stage1.conv0.kernel"], arrays["stage1.conv0.bias"])

  total = 0.0
  weights = np.full(5, 1 / 5), arrays["stage1.weight"]
  for one, other, weight in zip(features(ours), features(theirs), weights):
    one, other = (part / np.sqrt((part**2).sum(-1, keepdims=True) + 1e-10) for part in (one, other))
    total += (weight * (one - other) ** 2).sum(-1).mean()
  return total


def test_the_distance_is_the_definition(tmp_path):
  np.savez(tmp_path / "network.npz", **network())
  weights = {
    name: jnp.asarray(array) for name, array in load_network(tmp_path / "network.npz").items()
  }
  frames = np.random.default_rng(1).uniform(-1, 1, (2, 1, 6, 8, 3)).astype(np.float32)
  features = [network_features(weights, pixels, (-1, 1)) for pixels in frames]
  distance = feature_distance(*features, channel_weights(weights, 2))
  np.testing.assert_allclose(distance, reference(network(), frames[0, 0], frames[1, 0]), rtol=1e-4)
  assert feature_distance(features[0], features[0], [None, None]) == 0


def test_the_network_is_part_of_the_parameters(tmp_path):
  np.savez(tmp_path / "network.npz", **network())
  losses = VQGANLossConfig(
    perceptual_weight=1.0, perceptual_file=str(tmp_path / "network.npz"), average_decay=0.0
  )
  objective = VQGANObjective(VQGANConfig(), losses)
  params = objective.abstract()
  assert set(params) == {"generator", "codebook", "perceptual"}
  assert params["perceptual"]["stage1"]["conv0"]["kernel"].shape == (3, 3, 5, 6)
  assert objective.trained == ["generator.*"]


@pytest.mark.parametrize(
  "change, message",
  [
    ({"mean": None}, "mean has shape None"),
    ({"stage0.conv1.bias": np.zeros(4)}, r"stage0.conv1.bias has shape \(4,\)"),
    ({"stage1.conv0.kernel": np.zeros((3, 3, 4, 6))}, r"\(3, 3, 5, 6\) is expected"),
    ({"classifier": np.zeros(4)}, "classifier has shape .* None is expected"),
  ],
)
def test_other_layouts_are_refused(tmp_path, change, message):
  arrays = {name: array for name, array in (network() | change).items() if array is not None}
  np.savez(tmp_path / "network.npz", **arrays)
  with pytest.raises(UserError, match=message):
    load_network(tmp_path / "network.npz")


def test_files_that_are_not_arrays_are_refused(tmp_path):
  (tmp_path / "text.npz").write_text("text")
  for name in ("text.npz", "missing.npz"):
    with pytest.raises(UserError, match=f"perceptual_file=.*{name}"):
      load_network(tmp_path / name)
