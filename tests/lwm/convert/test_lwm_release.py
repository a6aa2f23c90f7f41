"""LWM's releases, made by flax's own msgpack, against LWM's formulas in NumPy.

S sequence, M model width, H heads, D head_dim, V vocabulary.
"""

import dataclasses
import pathlib
import tracemalloc

import flax.serialization
import flax.traverse_util
import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest

from kernels.attention import causal
from kernels.ring import Layout
from lwm import model as model_lib
from lwm.checkpoint.reader import newest
from lwm.convert import import_weights
from lwm.convert.lwm_release import flax_file, release as release_lib
from lwm.convert.lwm_release.release import ReleaseOptions, export_release, is_release, read_release
from lwm.convert.lwm_release.table import PRESETS
from lwm.errors import UserError
from lwm.parallel.mesh import make_mesh
from lwm.parallel.sharding import MeshConfig

L, M, H, D, F, TEXT, VISION = 2, 16, 2, 8, 24, 40, 12
THETA = 1000.0
OPTIONS = ReleaseOptions(rope_theta=THETA, context=64, num_heads=H)
KERNELS = {
  "attention/wq": (M, M),
  "attention/wk": (M, M),
  "attention/wv": (M, M),
  "attention/wo": (M, M),
  "feed_forward/w1": (M, F),
  "feed_forward/w2": (F, M),
  "feed_forward/w3": (M, F),
  "attention_norm": (M,),
  "ffn_norm": (M,),
}


def lwm_params(vision: bool, dtype=np.float32) -> dict[str, np.ndarray]:
  """Parameters of LWM's model by their keys, with layers apart."""
  random = np.random.default_rng(0)

  def draw(*shape):
    # Larger than at initialisation, so that attention is far from uniform and norms are not 1.
    return (0.3 * random.normal(size=shape) + (len(shape) == 1)).astype(dtype)

  params = {"transformer/wte/embedding": draw(TEXT, M), "lm_head/kernel": draw(M, TEXT)}
  if vision:
    params["transformer/vte/embedding"] = draw(VISION, M)
    params["vision_head/kernel"] = draw(M, VISION)
  params["transformer/ln_f/kernel"] = draw(M)
  for layer in range(L):
    for name, shape in KERNELS.items():
      params[f"transformer/h/{layer}/{name}/kernel"] = draw(*shape)
  return params


def scan(params: dict[str, np.ndarray], axis: int) -> dict[str, np.ndarray]:
  """The parameters with layers stacked on an axis, as `flax.linen.scan` stacks them."""
  scanned = {name: array for name, array in params.items() if not name.startswith("transformer/h/")}
  for name in KERNELS:
    layers = [params[f"transformer/h/{layer}/{name}/kernel"] for layer in range(L)]
    scanned[f"transformer/h/scan_decoder/{name}/kernel"] = np.stack(layers, axis)
  return scanned


def lwm_logits(params, ids_S, is_vision_S) -> tuple[np.ndarray, np.ndarray | None]:
  """Logits [S, V] of text and of vision: LWM's llama.py and vision_llama.py in float64."""
  params = {name: array.astype(np.float64) for name, array in params.items()}

  def norm(x_SxM, name):
    mean_square = np.square(x_SxM).mean(-1, keepdims=True)
    return x_SxM / np.sqrt(mean_square + 1e-6) * params[f"{name}/kernel"]

  def rotate(x_SxM):
    pairs = x_SxM.reshape(len(ids_S), H, D // 2, 2)
    angle = np.arange(len(ids_S))[:, None] / THETA ** (np.arange(0, D, 2) / D)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angle)[:, None]
    return np.stack([turned.real, turned.imag], -1).reshape(len(ids_S), H, D)

  x_SxM = params["transformer/wte/embedding"][np.where(is_vision_S, 0, ids_S)]
  if is_vision_S.any():
    vision_SxM = params["transformer/vte/embedding"][np.where(is_vision_S, ids_S, 0)]
    x_SxM = np.where(is_vision_S[:, None], vision_SxM, x_SxM)
  for layer in range(L):
    block = f"transformer/h/{layer}"
    normal = norm(x_SxM, f"{block}/attention_norm")
    query, key, value = (
      normal @ params[f"{block}/attention/{w}/kernel"] for w in ("wq", "wk", "wv")
    )
    scores = np.einsum("qhd,khd->hqk", rotate(query), rotate(key)) / np.sqrt(D)
    scores = np.where(np.tri(len(ids_S)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    mixed = np.einsum("hqk,khd->qhd", weights, value.reshape(-1, H, D)).reshape(-1, M)
    x_SxM = x_SxM + mixed @ params[f"{block}/attention/wo/kernel"]
    normal = norm(x_SxM, f"{block}/ffn_norm")
    w1, w2, w3 = (params[f"{block}/feed_forward/w{i}/kernel"] for i in (1, 2, 3))
    gate = normal @ w1
    x_SxM = x_SxM + (gate / (1 + np.exp(-gate)) * (normal @ w3)) @ w2
  x_SxM = norm(x_SxM, "transformer/ln_f")
  vision_head = params.get("vision_head/kernel")
  return x_SxM @ params["lm_head/kernel"], None if vision_head is None else x_SxM @ vision_head


def write_stream(path: pathlib.Path, params: dict, prefix: tuple[str, ...] = ()) -> None:
  """As LWM's StreamingCheckpointer does."""
  packer = msgpack.Packer()
  with open(path, "wb") as file:
    for name, value in params.items():
      keys = prefix + tuple(name.split("/"))
      file.write(packer.pack((keys, flax.serialization.to_bytes(value))))


def write_training_state(path: pathlib.Path, params: dict) -> None:
  write_stream(path, {"step": 7, "opt_state/0/mu/params/lm_head/kernel": np.zeros(3)})
  first = path.read_bytes()
  write_stream(path, params, ("params", "params"))
  path.write_bytes(first + path.read_bytes())


def write_tree(path: pathlib.Path, params: dict) -> None:
  tree = flax.traverse_util.unflatten_dict(params, sep="/")
  path.write_bytes(flax.serialization.to_bytes({"params": tree}))


def read_stream(path: pathlib.Path) -> dict[str, np.ndarray]:
  """As LWM's StreamingCheckpointer does."""
  with open(path, "rb") as file:
    unpacker = msgpack.Unpacker(file, max_buffer_size=0)
    return {"/".join(keys): flax.serialization.from_bytes(None, value) for keys, value in unpacker}


@pytest.fixture
def release(tmp_path) -> pathlib.Path:
  """Where a release's file goes; its tokenizer is there."""
  (tmp_path / "tokenizer.model").write_bytes(b"pieces")
  return tmp_path / "params"


def our_logits(directory: pathlib.Path, ids_S: np.ndarray) -> np.ndarray:
  stored = newest(directory)
  reader = stored.reader()
  params = flax.traverse_util.unflatten_dict(
    {path: reader.read(path).astype(np.float32) for path in reader.arrays}, sep="."
  )
  config = dataclasses.replace(stored.experiment.model, compute_dtype="float32")
  model = model_lib.build(config)

  @jax.jit
  def logits(params, ids):
    hidden = model.hidden(
      params,
      ids,
      jnp.arange(ids.shape[1], dtype=jnp.int32)[None],
      causal(*ids.shape),
      rope_theta=stored.experiment.stages[0].rope_theta,
      layout=Layout("contiguous", 1),
    )
    return model.logits(params, hidden)

  with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
    return np.asarray(logits(params, jnp.asarray(ids_S, jnp.int32)[None])[0])


def write_params(path, params):
  write_stream(path, params)


def write_prefixed(path, params):
  write_stream(path, params, ("params", "params"))


@pytest.mark.parametrize(
  "kind, write, layout, vision, dtype",
  [
    ("params", write_params, "axis 0", True, jnp.bfloat16),
    ("params", write_prefixed, "axis 1", False, np.float32),
    ("trainstate_params", write_training_state, "apart", True, np.float32),
    ("trainstate", write_training_state, "axis 1", True, jnp.bfloat16),
    ("flax_params", write_tree, "axis 0", False, np.float32),
    ("flax_params", write_tree, "apart", False, np.float32),
  ],
)
def test_logits_are_lwms(release, kind, write, layout, vision, dtype):
  params = lwm_params(vision, dtype)
  write(release, params if layout == "apart" else scan(params, int(layout[-1])))
  weights = read_release(f"{kind}::{release}", OPTIONS)
  import_weights(weights, release.with_name("ours"))

  random = np.random.default_rng(1)
  is_vision = np.arange(20) % 3 == 1 if vision else np.zeros(20, bool)
  ids = random.integers(0, np.where(is_vision, VISION, TEXT))
  text, codes = lwm_logits(params, ids, is_vision)
  ours = our_logits(release.with_name("ours"), ids + TEXT * is_vision)
  assert np.std(text) > 0.5
  np.testing.assert_allclose(ours[:, :TEXT], text, rtol=1e-4, atol=1e-4)
  if vision:
    np.testing.assert_allclose(ours[:, TEXT:], codes, rtol=1e-4, atol=1e-4)
  stored = newest(release.with_name("ours")).reader().arrays
  assert {info.dtype for info in stored.values()} == {np.dtype(dtype)}


@pytest.mark.parametrize("vision", [False, True])
@pytest.mark.parametrize("scanned", [False, True])
def test_there_and_back_is_exact(release, monkeypatch, scanned, vision):
  params = lwm_params(vision, jnp.bfloat16)
  params["lm_head/kernel"].view(np.uint16)[0, 0] = 0x7FC1  # A NaN keeps its bits.
  params = scan(params, 0) if scanned else params
  write_stream(release, params)
  import_weights(read_release(f"params::{release}", OPTIONS), release.with_name("ours"))
  if not scanned:  # As if float32 of 7B.
    monkeypatch.setattr(release_lib, "fits_record", lambda shape, dtype: False)
  # As if arrays were of several GiB.
  monkeypatch.setattr(flax_file, "_CHUNK_BYTES", 100)
  theirs = release.with_name("theirs")
  export_release(newest(release.with_name("ours")), theirs)
  back = read_stream(theirs / "params")
  assert back.keys() == params.keys()
  for name, array in params.items():
    assert back[name].dtype == array.dtype
    np.testing.assert_array_equal(back[name].view(np.uint16), array.view(np.uint16), err_msg=name)
  assert (theirs / "tokenizer.model").read_bytes() == b"pieces"


def test_arrays_that_flax_splits(release, monkeypatch):
  monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 100)
  params = scan(lwm_params(vision=True), 1)
  write_stream(release, params)
  source = release_lib.ReleaseSource("params", release)
  for name, array in params.items():
    moved = np.moveaxis(array, 1, 0) if "scan_decoder" in name else array
    assert source.tensors[name] == (moved.shape, moved.dtype)
    np.testing.assert_array_equal(source.read(name), moved, err_msg=name)


def test_large_arrays_are_indexed_without_reading_them(release):
  """5 GiB of zeros in a sparse file."""
  shape, dtype = (2560, 2**20), np.dtype(jnp.bfloat16)
  with open(release, "wb") as file:
    for header, count in flax_file._layout(shape, dtype):
      file.write(header)
      file.seek(count, 1)
    file.truncate()
  tracemalloc.start()
  stored = flax_file.index_tree(release)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert stored[()].shape == shape and len(stored[()].pieces) == 5
  assert peak < 2**20


def test_presets_are_lwms():
  text = {name: preset[:2] for name, preset in PRESETS.items() if not preset.has_vision}
  assert text == {
    "lwm-text-128k": (10000000, 131072),
    "lwm-text-256k": (10000000, 262144),
    "lwm-text-512k": (25000000, 524288),
    "lwm-text-1m": (50000000, 1048576),
  }
  assert {preset.rope_theta for preset in PRESETS.values() if preset.has_vision} == {50000000}


def test_settings(release):
  write_stream(release, scan(lwm_params(vision=True), 0))
  name = f"params::{release}"
  options = ReleaseOptions(preset="lwm-1m", num_heads=H)
  weights = read_release(name, options)
  assert (weights.name, weights.rope_theta, weights.context) == ("lwm-1m", 5e7, 2**20)
  assert weights.config.norm_epsilon == 1e-6
  assert (weights.config.text_vocab_size, weights.config.vision_vocab_size) == (TEXT, VISION)
  assert read_release(name, dataclasses.replace(options, rope_theta=2.0)).rope_theta == 2.0
  for wrong, message in {
    ReleaseOptions(num_heads=H, context=64): "give --rope_theta and --context, or --preset",
    ReleaseOptions(preset="lwm-text-1m", num_heads=H): "is a model of vision and text",
    ReleaseOptions(preset="lwm", num_heads=H): "--preset=lwm is not one of lwm-text-128k",
    ReleaseOptions(preset="lwm-1m"): "2 layers of width 16 .* --num_heads",
    ReleaseOptions(preset="lwm-1m", num_heads=3): "--num_heads=3 does not divide the width 16",
    dataclasses.replace(options, num_heads=-1): "--num_heads=-1 must be a positive number",
    dataclasses.replace(options, rope_theta=float("inf")): "--rope_theta=inf must be a positive",
    dataclasses.replace(options, tokenizer=release.with_name("x")): "There is no tokenizer .*/x",
  }.items():
    with pytest.raises(UserError, match=message):
      read_release(name, wrong)


def test_names_of_releases():
  assert is_release("params::/weights/params")
  assert not is_release("/weights/params") and not is_release("s3::/weights")


def broken(release: pathlib.Path, kind: str, message: str) -> None:
  """Importing fails with one sentence that names the file, and leaves nothing."""
  with pytest.raises(UserError, match=message) as error:
    import_weights(read_release(f"{kind}::{release}", OPTIONS), release.with_name("ours"))
  assert str(release) in str(error.value) and "\n" not in str(error.value)
  assert {path.name for path in release.parent.iterdir()} <= {"params", "tokenizer.model"}


@pytest.mark.parametrize("kind, write", [("params", write_params), ("flax_params", write_tree)])
def test_truncated_files(release, kind, write):
  write(release, scan(lwm_params(vision=True), 0))
  content = release.read_bytes()
  for length in {*range(1, 200, 7), *range(200, len(content), 997), len(content) - 1}:
    release.write_bytes(content[:length])
    broken(release, kind, "too early|in the middle of|lacks the tensor|are missing")


def test_damaged_files(release):
  params = lwm_params(vision=True)
  write_stream(release, params)
  content = release.read_bytes()
  for number in range(0, len(content), 499):
    damaged = bytearray(content)
    damaged[number] ^= 0x55
    release.write_bytes(damaged)
    try:
      read_release(f"params::{release}", OPTIONS)
    except UserError as error:
      assert str(release) in str(error)
  release.write_bytes(b"\x80\x04 not msgpack")
  broken(release, "params", "after the beginning, there is something other than keys and arrays")
  release.unlink()
  broken(release, "params", "cannot be read: No such file")


def test_wrong_tensors(release):
  params = scan(lwm_params(vision=True), 0)
  norm = "transformer/h/scan_decoder/ffn_norm/kernel"
  for changed, message in {
    "vision_head/kernel": None,
    norm: None,
    "transformer/h/scan_decoder/attention/bq/kernel": np.zeros((L, M), np.float32),
    "transformer/h/scan_decoder/attention/wk/kernel": np.zeros((L, M, M // 2), np.float32),
    "transformer/wte/embedding": np.zeros(M, np.float32),
    "transformer/vte/embedding": np.zeros((), np.float32),
    "transformer/h/scan_decoder/feed_forward/w1/kernel": np.zeros((L, M, 0), np.float32),
  }.items():
    wrong = params | {changed: message}
    wrong = {name: array for name, array in wrong.items() if array is not None}
    write_stream(release, wrong)
    broken(release, "params", f"the tensor {changed}")
  write_stream(release, params | {norm: np.zeros((L, M), np.int32)})
  broken(release, "params", f"{norm} is 'int32', not one of float16")
  write_stream(release, {**params, "params/lm_head/kernel": params["lm_head/kernel"]})
  broken(release, "params", "holds lm_head/kernel twice")
  write_stream(release, {**params, "step": 3})
  broken(release, "params", "step is neither a dictionary nor an array")
  as_many_layers = {
    name: np.repeat(array, M // L, 0) if "scan" in name else array for name, array in params.items()
  }
  write_stream(release, as_many_layers)
  broken(release, "params", "does not tell on which axis the layers are")


def test_other_models_are_not_exported(release):
  write_stream(release, lwm_params(vision=False))
  import_weights(read_release(f"params::{release}", OPTIONS), release.with_name("ours"))
  for setting, value in {"num_kv_heads": 1, "sliding_window": 8, "tied_head": True}.items():
    stored = newest(release.with_name("ours"))
    setattr(stored.experiment.model, setting, value)
    with pytest.raises(UserError, match=setting if setting != "tied_head" else "output"):
      export_release(stored, release.with_name("theirs"))
  assert not release.with_name("theirs").exists()
