"""VQGANs of LWM and of diffusers: codes and pixels against NumPy and against VQModel itself.

N frames, H, W height and width, h, w of the grid, C channels.
"""

import dataclasses
import json
import os
import pathlib
import pickle
import struct

import flax.core
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from lwm.config.vqgan import VQGANConfig
from lwm.convert.vqgan.model import export_vqgan, import_vqgan, is_vqgan
from lwm.errors import UserError
from lwm.vision.codec import Codec, save_vqgan
from lwm.vision.vqgan import VQGAN

GOLDEN = pathlib.Path(__file__).parents[2] / "golden" / "vqmodel.npz"
WEIGHTS = "diffusion_pytorch_model.safetensors"
# LWM's groups are 32, so this is about as small as its network can be.
CHANNELS, LATENT, CODES, WIDTH = (32, 64), 5, 11, 3


def lwm_vqgan() -> dict[str, np.ndarray]:
  """Random parameters of LWM's VQGAN: two levels, one residual block in each."""
  random = np.random.default_rng(0)
  arrays = {"quantize/embeddings": random.normal(size=(CODES, WIDTH))}

  def convolution(name, inputs, outputs, side=3):
    arrays[f"{name}/kernel"] = (
      random.normal(size=(side, side, inputs, outputs)) / inputs**0.5 / side
    )
    arrays[f"{name}/bias"] = 0.1 * random.normal(size=outputs)

  def norm(name, channels):
    arrays[f"{name}/scale"] = 1 + 0.2 * random.normal(size=channels)
    arrays[f"{name}/bias"] = 0.2 * random.normal(size=channels)

  def residual(name, inputs, outputs):
    norm(f"{name}/GroupNorm_0", inputs)
    convolution(f"{name}/Conv_0", inputs, outputs)
    norm(f"{name}/GroupNorm_1", outputs)
    convolution(f"{name}/Conv_1", outputs, outputs)
    if inputs != outputs:
      convolution(f"{name}/Conv_2", inputs, outputs, side=1)

  low, high = CHANNELS
  convolution("encoder/Conv_0", 3, low)
  residual("encoder/DownsamplingBlock_0/ResnetBlock_0", low, low)
  convolution("encoder/DownsamplingBlock_0/Downsample_0/Conv_0", low, low)
  residual("encoder/DownsamplingBlock_1/ResnetBlock_0", low, high)
  convolution("encoder/Conv_1", high, LATENT)
  convolution("quant_conv", LATENT, WIDTH, side=1)
  convolution("post_quant_conv", WIDTH, LATENT, side=1)
  convolution("decoder/Conv_0", LATENT, high)
  for block in range(2):
    residual(f"encoder/MidBlock_0/ResnetBlock_{block}", high, high)
    residual(f"decoder/MidBlock_0/ResnetBlock_{block}", high, high)
    residual(f"decoder/UpsamplingBlock_0/ResnetBlock_{block}", high, high)
    residual(f"decoder/UpsamplingBlock_1/ResnetBlock_{block}", low if block else high, low)
  convolution("decoder/UpsamplingBlock_0/Upsample_0/Conv_0", high, high)
  convolution("decoder/Conv_1", low, 3)
  norm("encoder/GroupNorm_0", high)
  norm("decoder/GroupNorm_0", low)
  return {name: array.astype(np.float32) for name, array in arrays.items()}


class NumpyVQGAN:
  """LWM's lwm/vqgan.py in float64."""

  def __init__(self, arrays):
    self._arrays = {name: array.astype(np.float64) for name, array in arrays.items()}

  def convolution(self, name, x_NxHxWxC, stride=1, padding=None):
    kernel = self._arrays[f"{name}/kernel"]
    side = len(kernel)
    padding = padding or (side // 2, side // 2)
    padded = np.pad(x_NxHxWxC, [(0, 0), padding, padding, (0, 0)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, (side, side), (1, 2))
    windows = windows[:, ::stride, ::stride]
    return np.einsum("nhwcab,abcd->nhwd", windows, kernel) + self._arrays[f"{name}/bias"]

  def norm_swish(self, name, x_NxHxWxC):
    grouped = x_NxHxWxC.reshape(*x_NxHxWxC.shape[:3], 32, -1)
    mean = grouped.mean((1, 2, 4), keepdims=True)
    variance = grouped.var((1, 2, 4), keepdims=True)
    normal = ((grouped - mean) / np.sqrt(variance + 1e-6)).reshape(x_NxHxWxC.shape)
    normal = normal * self._arrays[f"{name}/scale"] + self._arrays[f"{name}/bias"]
    return normal / (1 + np.exp(-normal))

  def residual(self, name, x):
    hidden = self.convolution(f"{name}/Conv_0", self.norm_swish(f"{name}/GroupNorm_0", x))
    hidden = self.convolution(f"{name}/Conv_1", self.norm_swish(f"{name}/GroupNorm_1", hidden))
    shortcut = f"{name}/Conv_2/kernel" in self._arrays
    return hidden + (self.convolution(f"{name}/Conv_2", x) if shortcut else x)

  def latents(self, pixels):
    x = self.convolution("encoder/Conv_0", pixels)
    x = self.residual("encoder/DownsamplingBlock_0/ResnetBlock_0", x)
    down = "encoder/DownsamplingBlock_0/Downsample_0/Conv_0"
    x = self.convolution(down, x, stride=2, padding=(0, 1))
    x = self.residual("encoder/DownsamplingBlock_1/ResnetBlock_0", x)
    for block in range(2):
      x = self.residual(f"encoder/MidBlock_0/ResnetBlock_{block}", x)
    x = self.convolution("encoder/Conv_1", self.norm_swish("encoder/GroupNorm_0", x))
    return self.convolution("quant_conv", x)

  def codes(self, pixels):
    distances = np.square(self.latents(pixels)[..., None, :] - self._arrays["quantize/embeddings"])
    return distances.sum(-1).argmin(-1)

  def pixels(self, codes):
    x = self.convolution("post_quant_conv", self._arrays["quantize/embeddings"][codes])
    x = self.convolution("decoder/Conv_0", x)
    for part in ("MidBlock_0", "UpsamplingBlock_0", "UpsamplingBlock_1"):
      for block in range(2):
        x = self.residual(f"decoder/{part}/ResnetBlock_{block}", x)
      if part == "UpsamplingBlock_0":
        x = self.convolution(f"decoder/{part}/Upsample_0/Conv_0", x.repeat(2, 1).repeat(2, 2))
    return self.convolution("decoder/Conv_1", self.norm_swish("decoder/GroupNorm_0", x))


class Ours:
  """The network in a file, on pixels that need not be of its resolution."""

  def __init__(self, path: pathlib.Path):
    self.codec = Codec(path)
    graph = nnx.graphdef(nnx.eval_shape(lambda: VQGAN(self.codec.config, rngs=nnx.Rngs(0))))

    def run(state, pixels, codes):
      model = nnx.merge(graph, state)
      decoded = model.reconstruct(model.codebook[...][codes])
      return model.latents(pixels), model.encode(pixels), decoded

    self._run = jax.jit(run)

  def __call__(self, pixels, codes):
    """Latents and codes of the pixels, and pixels of the codes, not clipped."""
    return self._run(self.codec.state, jnp.asarray(pixels, jnp.float32), jnp.asarray(codes))


def nested(arrays):
  return flax.traverse_util.unflatten_dict(arrays, sep="/")


def to_jax(arrays):
  return jax.tree.map(jnp.asarray, nested(arrays))


@pytest.fixture(scope="module")
def arrays():
  return lwm_vqgan()


@pytest.fixture(scope="module")
def golden():
  with np.load(GOLDEN) as file:
    names = [name for name in file if name.startswith("weights/")]
    weights = {n.removeprefix("weights/"): file[n].astype(np.float32) for n in names}
    return json.loads(str(file["config"])), weights, {n: file[n] for n in file if n not in names}


def write_vqmodel(directory, config, weights):
  directory.mkdir(exist_ok=True)
  (directory / "config.json").write_text(json.dumps({"_class_name": "VQModel", **config}))
  weights = {name: np.ascontiguousarray(array) for name, array in weights.items()}
  safetensors.numpy.save_file(weights, directory / WEIGHTS)


@pytest.mark.slow
def test_codes_and_pixels_are_lwms(tmp_path, arrays):
  (tmp_path / "vqgan").write_bytes(pickle.dumps(nested(arrays)))
  assert is_vqgan(tmp_path / "vqgan")
  config = import_vqgan(tmp_path / "vqgan", tmp_path / "vqgan.npz", resolution=16)
  assert config == VQGANConfig(16, 32, (1, 2), 1, LATENT, CODES, WIDTH, 32, (-1, 1))

  frames = np.random.default_rng(1).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
  lwm = NumpyVQGAN(arrays)
  pixels = frames / 127.5 - 1
  codes, ours = lwm.codes(pixels), Ours(tmp_path / "vqgan.npz")
  assert len(np.unique(codes)) > 4
  latents, our_codes, our_pixels = ours(pixels, codes)
  np.testing.assert_allclose(latents, lwm.latents(pixels), rtol=1e-4, atol=1e-4)
  np.testing.assert_array_equal(our_codes, codes)
  np.testing.assert_allclose(our_pixels, lwm.pixels(codes), rtol=1e-4, atol=1e-4)
  shown = np.round((np.clip(lwm.pixels(codes), -1, 1) + 1) * 127.5)
  assert np.abs(ours.codec.decode(codes) - shown).max() <= 1


@pytest.mark.parametrize(
  "make",
  [
    lambda arrays: pickle.dumps(nested(arrays), 3),
    lambda arrays: pickle.dumps(nested(arrays), 5),
    lambda arrays: pickle.dumps(to_jax(arrays)),
    lambda arrays: pickle.dumps(flax.core.freeze(to_jax(arrays))),
    lambda arrays: pickle.dumps(jax.tree.map(np.asfortranarray, nested(arrays)), 4),
    # As NumPy 1 wrote it.
    lambda arrays: pickle.dumps(nested(arrays), 3).replace(b"numpy._core.", b"numpy.core."),
  ],
  ids=["protocol 3", "protocol 5", "jax", "frozen", "fortran", "numpy 1"],
)
def test_forms_of_the_pickle(tmp_path, arrays, make):
  (tmp_path / "vqgan").write_bytes(make(arrays))
  config = import_vqgan(tmp_path / "vqgan", tmp_path / "vqgan.npz")
  assert config.resolution == 256
  with np.load(tmp_path / "vqgan.npz") as file:
    found = sorted((file[name] for name in file if name != "config"), key=lambda a: a.tobytes())
  for one, other in zip(found, sorted(arrays.values(), key=lambda a: a.tobytes()), strict=True):
    np.testing.assert_array_equal(one, other)


def test_bfloat16_and_float16_become_float32(tmp_path, arrays):
  for dtype in (jnp.bfloat16, np.float16):
    rounded = {name: array.astype(dtype) for name, array in arrays.items()}
    (tmp_path / "vqgan").write_bytes(pickle.dumps(nested(rounded), 4))
    import_vqgan(tmp_path / "vqgan", tmp_path / f"{np.dtype(dtype)}.npz")
    state = Codec(tmp_path / f"{np.dtype(dtype)}.npz").state
    np.testing.assert_array_equal(
      state["codebook"][...], rounded["quantize/embeddings"].astype(np.float32)
    )


class Hostile:
  """Pickles to a call of a function with arguments, then the setting of a state."""

  def __init__(self, function, *arguments, state=None):
    self.call = (function, arguments, state) if state else (function, arguments)

  def __reduce__(self):
    return self.call


def raw(*operations: bytes) -> bytes:
  return b"\x80\x04" + b"".join(operations) + b"."


def text(value: str) -> bytes:
  return b"X" + struct.pack("<I", len(value)) + value.encode()


DTYPE = np.dtype(np.float32).__class__
MARK = "executed"
HOSTILE = {
  "os.system": pickle.dumps({"a": Hostile(os.system, f"touch {MARK}")}),
  "builtins.eval": pickle.dumps({"a": Hostile(eval, f"open({MARK!r}, 'w')")}),
  "builtins.exec": pickle.dumps({"a": Hostile(exec, f"open({MARK!r}, 'w')")}, 0),
  "numpy's runstring": raw(
    b"cnumpy.testing._private.utils\nrunstring\n", text("open('executed', 'w')"), b"}\x86R"
  ),
  # Names the function in an instance, or through an attribute of something allowed.
  "INST": b"(S'touch executed'\nios\nsystem\n.",
  "OBJ": b"(cos\nsystem\nS'touch executed'\no.",
  "NEWOBJ": raw(b"cnumpy\nndarray\n)\x81"),
  "dotted name": raw(text("numpy"), text("ndarray.__class__"), b"\x93."),
  "name that is no text": raw(b"K\x01K\x02\x93"),
  "extension": raw(b"\x82\x01"),
  "persistent id": raw(text("id"), b"Q"),
  "out-of-band buffer": b"\x80\x05\x97.",
  "state of a dictionary": raw(b"}", text("a"), b"b"),
  "state of a function": raw(b"cnumpy._core.multiarray\n_reconstruct\n", b"}", b"b"),
  "call of a dictionary": raw(b"})R"),
  "object array": pickle.dumps({"a": np.array([Hostile(os.system, f"touch {MARK}")])}),
  "subclass of an array": raw(b"cnumpy._core.multiarray\n_reconstruct\ncnumpy\ndtype\n\x85R"),
  "structured dtype": pickle.dumps({"a": np.zeros(2, [("x", "f4")])}),
  "jax array of something else": raw(b"cjax._src.array\n_reconstruct_array\n(cnumpy\ndtype\n)}}tR"),
  "huge array": raw(
    b"cnumpy._core.numeric\n_frombuffer\n(C\x04abcdcnumpy\ndtype\n",
    text("f4"),
    b"\x89\x88\x87R\x8a\x08" + b"\xff" * 7 + b"\x7f" + b"\x85",
    text("C"),
    b"tR",
  ),
  "long text": b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"a.",
  "far memo": raw(b"}r\xff\xff\xff\x7fh\x01"),
  "dictionary in itself": raw(b"}\x94", text("a"), b"h\x00s"),
  "dictionaries that double": raw(
    b"}\x94",
    *(
      b"}\x94" + text("a") + b"h" + bytes([n]) + b"s" + text("b") + b"h" + bytes([n]) + b"s"
      for n in range(200)
    ),
  ),
  "deep dictionaries": raw((b"}" + text("a")) * 100, b"N", b"s" * 100),
  "million operations": raw(b"N" * 1_100_000),
  "no pickle": b"\x80PNG",
  "nothing": b"\x80",
  "list": pickle.dumps([np.zeros(2)]),
  "number": pickle.dumps({"a": 3}),
  "key with lines": pickle.dumps({"a\nb" * 99: {"c": 3}}),
  "wrong stack": raw(b"RRR"),
  "big-endian": pickle.dumps({"a": np.zeros(2, ">f4")}),
  "integers": pickle.dumps({"a": np.zeros(2, np.int32)}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_execute_nothing(tmp_path, monkeypatch, name):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "vqgan").write_bytes(HOSTILE[name])
  with pytest.raises(
    UserError, match="vqgan is not a pickle .* nothing in it was executed"
  ) as error:
    import_vqgan(tmp_path / "vqgan", tmp_path / "vqgan.npz")
  assert "\n" not in str(error.value) and len(str(error.value)) < 400
  assert [path.name for path in tmp_path.iterdir()] == ["vqgan"]


def test_the_hostile_pickles_are_hostile(tmp_path, monkeypatch):
  """Python's own unpickler runs the first of them."""
  monkeypatch.chdir(tmp_path)
  for name in ("os.system", "builtins.eval", "builtins.exec", "object array", "INST", "OBJ"):
    pickle.loads(HOSTILE[name])
    (tmp_path / MARK).unlink()


@pytest.mark.slow
def test_truncated_pickles(tmp_path, arrays):
  content = pickle.dumps(nested(arrays))
  for length in range(1, len(content), 9973):
    (tmp_path / "vqgan").write_bytes(content[:length])
    with pytest.raises(UserError, match="vqgan is not a pickle"):
      import_vqgan(tmp_path / "vqgan", tmp_path / "vqgan.npz")


def test_wrong_tensors_of_lwm(tmp_path, arrays):
  def broken(changed, message):
    changed = {name: array for name, array in changed.items() if array is not None}
    (tmp_path / "vqgan").write_bytes(pickle.dumps(nested(changed)))
    with pytest.raises(UserError, match=message):
      import_vqgan(tmp_path / "vqgan", tmp_path / "vqgan.npz")
    assert not (tmp_path / "vqgan.npz").exists()

  shortcut = "encoder/DownsamplingBlock_1/ResnetBlock_0/Conv_2/kernel"
  broken(arrays | {shortcut: None}, f"vqgan lacks the tensor {shortcut}")
  broken(arrays | {"encoder/Conv_0/kernel": None}, "vqgan lacks the tensor encoder/Conv_0/kernel")
  broken(arrays | {"extra": np.zeros(3)}, "vqgan holds the tensor extra")
  broken(arrays | {shortcut: np.zeros((1, 1, 2, 2))}, f"{shortcut} has shape \\(1, 1, 2, 2\\)")
  with pytest.raises(UserError, match="resolution=15 is not divisible"):
    (tmp_path / "vqgan").write_bytes(pickle.dumps(nested(arrays)))
    import_vqgan(tmp_path / "vqgan", tmp_path / "vqgan.npz", resolution=15)
  (tmp_path / "vqgan.npz").touch()
  with pytest.raises(UserError, match="vqgan.npz exists"):
    import_vqgan(tmp_path / "vqgan", tmp_path / "vqgan.npz")


@pytest.mark.slow
def test_codes_and_pixels_are_those_of_diffusers(tmp_path, golden):
  config, weights, expected = golden
  write_vqmodel(tmp_path / "vqmodel", config, weights)
  assert is_vqgan(tmp_path / "vqmodel")
  output = tmp_path / "vqgan.npz"
  assert import_vqgan(tmp_path / "vqmodel", output, (0, 1), 16).pixel_range == (0, 1)
  latents, codes, pixels = Ours(output)(expected["frames"], expected["codes"])
  np.testing.assert_allclose(latents, expected["latents"], rtol=1e-4, atol=1e-4)
  np.testing.assert_array_equal(codes, expected["codes"])
  np.testing.assert_allclose(pixels, expected["pixels"], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_pixel_range_is_recorded_and_used(tmp_path, golden):
  config, weights, _ = golden
  write_vqmodel(tmp_path / "vqmodel", config, weights)
  with pytest.raises(
    UserError, match="does not say what range its pixels have: give --pixel_range"
  ):
    import_vqgan(tmp_path / "vqmodel", tmp_path / "vqgan.npz", resolution=16)
  import_vqgan(tmp_path / "vqmodel", tmp_path / "vqgan.npz", (0, 1), 16)
  ours = Ours(tmp_path / "vqgan.npz")
  frames = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), dtype=np.uint8)
  codes = ours.codec.encode(frames)
  _, same_codes, pixels = ours(frames / 255, codes)
  np.testing.assert_array_equal(codes, same_codes)
  _, other_codes, _ = ours(frames / 127.5 - 1, codes)
  assert (codes != other_codes).any()
  assert pixels.min() < 0 and pixels.max() > 0.5
  shown = np.round(np.clip(pixels, 0, 1) * 255)
  assert np.abs(ours.codec.decode(codes) - shown).max() <= 1


@pytest.mark.slow
def test_a_vqmodel_there_and_back_is_exact(tmp_path, golden):
  config, weights, _ = golden
  write_vqmodel(tmp_path / "vqmodel", config, weights)
  import_vqgan(tmp_path / "vqmodel", tmp_path / "ours.npz", (0, 1), 16)
  export_vqgan(tmp_path / "ours.npz", tmp_path / "theirs")
  back = safetensors.numpy.load_file(tmp_path / "theirs" / WEIGHTS)
  assert back.keys() == weights.keys()
  for name, array in weights.items():
    np.testing.assert_array_equal(back[name], array, err_msg=name)
  settings = json.loads((tmp_path / "theirs" / "config.json").read_text())
  for name in settings.keys() - {"pixel_range", "resolution"}:
    assert settings[name] == config.get(name, "VQModel"), name
  # The range and the resolution are recorded now.
  import_vqgan(tmp_path / "theirs", tmp_path / "again.npz")
  assert (tmp_path / "again.npz").read_bytes() == (tmp_path / "ours.npz").read_bytes()
  with pytest.raises(UserError, match=r"records pixel_range \(0, 1\), but --pixel_range is"):
    import_vqgan(tmp_path / "theirs", tmp_path / "other.npz", (-1, 1))
  with pytest.raises(UserError, match="theirs exists"):
    export_vqgan(tmp_path / "ours.npz", tmp_path / "theirs")


def test_other_networks_are_refused(tmp_path, golden):
  config, weights, _ = golden
  for name, value in {
    "mid_block_add_attention": True,
    "norm_type": "spatial",
    "in_channels": 1,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["AttnUpDecoderBlock2D"] * 3,
    "block_out_channels": 3,
    "layers_per_block": "1",
    "norm_num_groups": 3,
    "_class_name": "AutoencoderKL",
  }.items():
    write_vqmodel(tmp_path / "vqmodel", config | {name: value}, weights)
    with pytest.raises(UserError, match="vqmodel"):
      import_vqgan(tmp_path / "vqmodel", tmp_path / "vqgan.npz", (0, 1), 16)
  assert not is_vqgan(tmp_path / "vqmodel")
  write_vqmodel(tmp_path / "vqmodel", config | {"block_out_channels": [4, 6, 8]}, weights)
  with pytest.raises(UserError, match="no multiples of 4"):
    import_vqgan(tmp_path / "vqmodel", tmp_path / "vqgan.npz", (0, 1), 16)
  less = dict(weights)
  del less["quantize.embedding.weight"]
  write_vqmodel(tmp_path / "vqmodel", config, less)
  with pytest.raises(UserError, match="vqmodel lacks the tensor quantize.embedding.weight"):
    import_vqgan(tmp_path / "vqmodel", tmp_path / "vqgan.npz", (0, 1), 16)
  unlike = VQGANConfig(16, 8, (2, 2), 1, 4, 16, 4, 4)
  for number, other in enumerate([unlike, dataclasses.replace(unlike, num_res_blocks=0)]):
    path = tmp_path / f"{number}.npz"
    shapes = nnx.state(nnx.eval_shape(lambda: VQGAN(other, rngs=nnx.Rngs(0))))
    save_vqgan(path, other, jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes))
    with pytest.raises(UserError, match=f"{number}.npz: channel_multipliers"):
      export_vqgan(path, tmp_path / "theirs")
  assert not (tmp_path / "vqgan.npz").exists() and not (tmp_path / "theirs").exists()
