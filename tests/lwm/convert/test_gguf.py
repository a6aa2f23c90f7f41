"""Models to GGUF and back: exactly, for each architecture, and what is refused."""

import dataclasses
import errno
import json
import os
import re

import gguf
import jax.numpy as jnp
import numpy as np
import pytest

from lwm.config.model import ModelConfig, RopeScaling, Stretch
from lwm.convert.gguf import model as gguf_format
from lwm.convert.gguf.file import GGUFSource
from lwm.convert.gguf.names import table
from lwm.convert.gguf.settings import GGUFModel, architecture_of, model_metadata, read_model
from lwm.convert.gguf.sink import GGUFSink
from lwm.convert.table import arrays_of, convert_in, describe, parameter_shapes, their_shapes
from lwm.data.tokenizer import train_sentencepiece
from lwm.errors import UserError

BASE = ModelConfig(
  num_layers=2,
  width=32,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  feed_forward_width=64,
  text_vocab_size=300,
)
LLAMA_3 = RopeScaling(factor=8.0, original_context=64)
MODELS = {
  "llama": ("llama", {}),
  "llama multi-head tied": ("llama", {"num_kv_heads": 4, "tied_head": True, "head_dim": 16}),
  "llama 3": ("llama", {"rope_scaling": LLAMA_3}),
  "mistral": ("llama", {"sliding_window": 16, "norm_epsilon": 1e-6}),
  "lwm": ("llama", {"vision_vocab_size": 40, "vocab_multiple": 64}),
  "qwen2": ("qwen2", {"attention_bias": True}),
  "qwen2 multi-head": ("qwen2", {"attention_bias": True, "num_kv_heads": 4}),
  "qwen3": ("qwen3", {"query_key_norm": True, "head_dim": 16}),
  "qwen3 multi-head": ("qwen3", {"query_key_norm": True, "num_kv_heads": 4}),
  "phi3": ("phi3", {}),
  "phi3 multi-head": ("phi3", {"num_kv_heads": 4}),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
  train_sentencepiece(["the cat sat on the mat, the end"], path, 275)
  return path


def parameters(config: ModelConfig, dtype=np.float32) -> dict[str, np.ndarray]:
  """Random parameters by path, with rows of padding as a checkpoint has them."""
  rng = np.random.default_rng(0)
  padding = config.padded_vocab_size - config.vocab_size
  params = {
    path: rng.standard_normal(shape).astype(dtype)
    for path, shape in parameter_shapes(config).items()
  }
  params["embedding"] = np.pad(params["embedding"], [(0, padding), (0, 0)])
  return params


class Arrays:
  """Takes the place of an ArrayWriter; keeps the arrays in memory."""

  def __init__(self, arrays):
    self.arrays = {path: np.full(info.shape, np.nan, info.dtype) for path, info in arrays.items()}

  def write(self, path, array, where=()):
    self.arrays[path][where] = array


def imported(path) -> tuple[gguf_format.Weights, dict[str, np.ndarray]]:
  weights = gguf_format.read_gguf(path)
  arrays = arrays_of(weights.source, weights.table, weights.config)
  writer = Arrays(arrays)
  convert_in(weights.source, weights.table, writer, arrays)
  return weights, writer.arrays


@pytest.mark.parametrize("name", MODELS)
def test_round_trip_is_exact(tmp_path, tokenizer, name):
  architecture, settings = MODELS[name]
  config = dataclasses.replace(BASE, **settings)
  model = GGUFModel(architecture, "a model", config, 5e7, 4096)
  params = parameters(config)
  path = tmp_path / "model.gguf"
  notes = gguf_format.write_gguf(
    path, model, tokenizer, lambda path, where: params[path][where], "F32"
  )
  weights, arrays = imported(path)
  manifest = json.loads(path.with_name("model.gguf.manifest.json").read_text())
  assert manifest == {name: describe(weights.source.read(name)) for name in weights.source.tensors}
  assert weights.config == dataclasses.replace(config, vocab_multiple=0)
  assert (weights.name, weights.rope_theta, weights.context) == ("a model", 5e7, 4096)
  assert bool(notes) == (name == "mistral")
  params["embedding"] = params["embedding"][: config.vocab_size]
  assert arrays.keys() == params.keys()
  for path, array in params.items():
    assert arrays[path].dtype == array.dtype
    np.testing.assert_array_equal(arrays[path], array, err_msg=path)


@pytest.mark.parametrize(("file_type", "dtype"), [("F16", np.float16), ("BF16", jnp.bfloat16)])
def test_half_precision_is_exact(tmp_path, tokenizer, file_type, dtype):
  params = parameters(BASE, dtype)
  model = gguf_format.describe_model("half", BASE, 1e4, 128)
  path = tmp_path / "model.gguf"
  gguf_format.write_gguf(path, model, tokenizer, lambda path, where: params[path][where], file_type)
  _, arrays = imported(path)
  for path, array in params.items():
    # Vectors are always float32.
    assert arrays[path].dtype == (np.float32 if path.endswith("scale") else dtype)
    np.testing.assert_array_equal(arrays[path].astype(np.float32), array.astype(np.float32))


@pytest.mark.parametrize("file_type", ["Q8_0", "Q4_0", "Q4_1"])
def test_quantised_files_hold_what_the_package_quantises(tmp_path, file_type, monkeypatch):
  monkeypatch.setattr("lwm.convert.gguf.sink._CHUNK_ELEMENTS", 100)
  weight = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
  odd = np.random.default_rng(1).standard_normal((3, 40)).astype(np.float32)
  path = tmp_path / "model.gguf"
  shapes = {"weight": weight.shape, "odd": odd.shape, "norm": (40,)}
  with GGUFSink(path, {"general.architecture": "llama"}, shapes, file_type) as sink:
    sink.write("weight", weight)
    assert sink.dtype("odd") == np.float16
    sink.write("odd", odd.astype(np.float16))
    sink.write("norm", odd[0])
  assert sink.notes[0].startswith("1 tensors, such as odd, are stored as F16, because blocks of 32")
  reader = gguf.GGUFReader(path)
  assert [tensor.tensor_type.name for tensor in reader.tensors] == [file_type, "F16", "F32"]
  kind = gguf.GGMLQuantizationType[file_type]
  np.testing.assert_array_equal(reader.tensors[0].data, gguf.quants.quantize(weight, kind))
  source = GGUFSource(path)
  assert source.metadata["general.file_type"] == gguf.LlamaFileType[f"MOSTLY_{file_type}"]
  np.testing.assert_array_equal(source.read("odd"), odd.astype(np.float16))
  np.testing.assert_array_equal(source.read("norm"), odd[0])


def test_llama_interleaves_the_rows_of_a_head():
  config = dataclasses.replace(BASE, num_heads=2, num_kv_heads=2, head_dim=4, width=1)
  rows = {tensor.name: tensor.parts for tensor in table(config, "llama")}
  query_MxHxD = np.arange(8.0).reshape(1, 2, 4)
  for name in ("q", "k"):
    (part,) = rows[f"blk.1.attn_{name}.weight"]
    theirs = part.transform.to_theirs(query_MxHxD)
    assert theirs.tolist() == [[0], [2], [1], [3], [4], [6], [5], [7]]
  (part,) = rows["blk.1.attn_v.weight"]
  assert part.transform.to_theirs(query_MxHxD)[:, 0].tolist() == list(range(8))


def test_phi3_fuses_query_key_value_and_gate_up():
  rows = {tensor.name: [part.path for part in tensor.parts] for tensor in table(BASE, "phi3")}
  attention, feed_forward = "blocks.attention.", "blocks.feed_forward."
  assert rows["blk.0.attn_qkv.weight"] == [attention + x for x in ("query", "key", "value")]
  assert rows["blk.0.ffn_up.weight"] == [feed_forward + x for x in ("gate", "up")]


def write_model(path, config=BASE, change=None, extra=(), factors=None, architecture="llama"):
  """A file of zeros with changed metadata: a key that is None is left out."""
  model = GGUFModel(architecture, "m", config, 1e4, 128)
  metadata = model_metadata(model) | (change or {})
  metadata = {key: value for key, value in metadata.items() if value is not None}
  shapes = their_shapes(table(config, architecture), config) | dict.fromkeys(extra, (1,))
  with GGUFSink(path, metadata, shapes, "F16", factors) as sink:
    for name, shape in shapes.items():
      sink.write(name, np.zeros(shape, sink.dtype(name)))
  return GGUFSource(path)


def test_scaling_of_llama_3_is_found_in_the_factors(tmp_path):
  # Of Llama 3.2 1B: head_dim 64, theta 500000, factor 32.
  pairs = np.arange(32) / 32
  frequency = 500000.0**-pairs
  wavelength = 2 * np.pi / frequency
  smooth = (8192 / wavelength - 1) / (4 - 1)
  factors = np.where(wavelength > 8192, 32.0, 1 / ((1 - smooth) / 32 + smooth))
  factors = np.where(wavelength < 8192 / 4, 1.0, factors).astype(np.float32)
  config = dataclasses.replace(BASE, head_dim=64)
  theta = {"llama.rope.freq_base": 500000.0}
  source = write_model(tmp_path / "model.gguf", config, theta, factors=factors)
  assert read_model(source).config.rope_scaling == RopeScaling(factor=32.0)
  factors[16] *= 1.01
  source = write_model(tmp_path / "wrong.gguf", config, theta, factors=factors)
  with pytest.raises(UserError, match="rope_freqs.weight are not those of Llama-3 scaling by 32"):
    read_model(source)


def test_defaults_of_missing_keys(tmp_path):
  optional = ("attention.head_count_kv", "attention.key_length", "attention.value_length")
  optional += ("rope.dimension_count", "rope.freq_base", "vocab_size")
  change = dict.fromkeys([f"llama.{key}" for key in optional], None)
  config = dataclasses.replace(BASE, num_kv_heads=4)
  source = write_model(tmp_path / "model.gguf", config, change | {"general.name": None})
  assert read_model(source) == ("llama", "model", config, 1e4, 128)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"general.architecture": "gemma"}, "general.architecture is 'gemma', which is not supported"),
    ({"llama.block_count": None}, "lacks the key llama.block_count"),
    ({"llama.context_length": None}, "lacks the key llama.context_length"),
    ({"llama.block_count": 2_000_000_000}, "block_count is 2000000000, but the file holds only"),
    ({"llama.attention.head_count": 0}, "llama.attention.head_count is 0"),
    ({"llama.attention.head_count": [4, 4]}, "head_count is a list of 2, not a number"),
    ({"llama.embedding_length": "wide"}, "llama.embedding_length is 'wide', not a number"),
    ({"llama.rope.dimension_count": 4}, "rope.dimension_count is 4 and not the size of a head, 8"),
    ({"llama.attention.head_count_kv": 3}, "4 query heads, 3 key heads"),
    ({"llama.expert_count": 8}, "llama.expert_count is 8, which is not supported"),
    ({"llama.rope.scaling.type": "yarn"}, "rope.scaling.type is 'yarn', which is not supported"),
    ({"llama.logit_scale": 2.0}, "llama.logit_scale is 2.0, a setting which is not known"),
    ({"split.count": 3}, "is one of 3 files of a model"),
    ({"lwm.vision_vocab_size": 300}, "lwm.vision_vocab_size is 300"),
    ({"lwm.vision_vocab_size": True}, "lwm.vision_vocab_size is True"),
    ({"llama.rope.freq_base": float("nan")}, "llama.rope.freq_base is nan, not a number"),
  ],
)
def test_wrong_settings(tmp_path, change, message):
  source = write_model(tmp_path / "wrong.gguf", change=change)
  with pytest.raises(UserError, match=f"wrong.gguf.*{re.escape(message)}"):
    read_model(source)


def test_longrope_is_refused(tmp_path):
  source = write_model(
    tmp_path / "long.gguf", extra=["rope_factors_long.weight"], architecture="phi3"
  )
  with pytest.raises(UserError, match="long.gguf.*rope_factors_long.weight: longrope"):
    read_model(source)


def test_tensors_that_do_not_fit(tmp_path):
  source = write_model(tmp_path / "model.gguf", extra=["blk.0.attn_q.bias"])
  model = read_model(source)
  with pytest.raises(UserError, match="model.gguf holds the tensor blk.0.attn_q.bias"):
    arrays_of(source, table(model.config, "llama"), model.config)
  wide = write_model(tmp_path / "wide.gguf", change={"llama.feed_forward_length": 65})
  model = read_model(wide)
  with pytest.raises(UserError, match="wide.gguf: the tensor blk.0.ffn_gate.weight has shape"):
    arrays_of(wide, table(model.config, "llama"), model.config)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"attention_soft_cap": 30.0}, "model.attention_soft_cap"),
    ({"attention_bias": True, "query_key_norm": True}, "both model.attention_bias and"),
    ({"stretches": [Stretch("experts", 2)]}, "model.stretches of kind 'experts'"),
  ],
)
def test_models_that_gguf_does_not_know(settings, message):
  with pytest.raises(UserError, match=f"No GGUF architecture has {message}"):
    architecture_of(dataclasses.replace(BASE, **settings))


SHAPES = {"weight": (2, 32), "norm": (32,)}


def write_zeros(path):
  with GGUFSink(path, {"general.architecture": "llama"}, SHAPES, "F16") as sink:
    for name, shape in SHAPES.items():
      sink.write(name, np.zeros(shape, sink.dtype(name)))
    sink.write_beside("txt", "text")


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
  def full(descriptor):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  path = tmp_path / "deep" / "model.gguf"
  with monkeypatch.context() as patch:
    patch.setattr("os.fsync", full)
    with pytest.raises(UserError, match=r"model.gguf could not be written \(No space left"):
      write_zeros(path)
  assert list(path.parent.iterdir()) == []
  write_zeros(path)
  assert {file.name for file in path.parent.iterdir()} == {"model.gguf", "model.gguf.txt"}
  with pytest.raises(UserError, match="model.gguf exists"):
    write_zeros(path)


def test_an_error_between_tensors_leaves_nothing(tmp_path):
  path = tmp_path / "model.gguf"
  with pytest.raises(UserError, match="source"):
    with GGUFSink(path, {"general.architecture": "llama"}, SHAPES, "F16") as sink:
      sink.write("weight", np.zeros((2, 32), np.float16))
      raise UserError("the source is damaged")
  with pytest.raises(ValueError, match="'norm'.* were not written"):
    with GGUFSink(path, {"general.architecture": "llama"}, SHAPES, "F16") as sink:
      sink.write("weight", np.zeros((2, 32), np.float16))
  assert list(tmp_path.iterdir()) == []


def test_values_beyond_float16_are_an_error(tmp_path):
  path = tmp_path / "model.gguf"
  with pytest.raises(UserError, match="the tensor weight holds values that are not finite.* F16"):
    with GGUFSink(path, {"general.architecture": "llama"}, SHAPES, "F16") as sink:
      sink.write("weight", np.full((2, 32), np.inf, np.float16))
  assert list(tmp_path.iterdir()) == []
