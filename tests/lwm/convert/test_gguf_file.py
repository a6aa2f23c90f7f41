"""Reading GGUF files: every type, and files that are damaged or hostile."""

import struct

import gguf
import jax.numpy as jnp
import numpy as np
import pytest

from lwm.convert.gguf.file import GGUFSource
from lwm.errors import UserError

QUANTISED = (
  *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
  *("IQ4_NL", "IQ4_XS", "TQ1_0", "MXFP4"),
)


def write(path, tensors, metadata=None):
  """Writes a file with the package's own writer; tensors are (name, array, type)."""
  writer = gguf.GGUFWriter(path, "llama")
  writer.add_string("text", "value")
  writer.add_array("words", ["one", "two"])
  for key, value in (metadata or {}).items():
    writer.add_uint32(key, value)
  for name, array, kind in tensors:
    writer.add_tensor(name, array, raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


@pytest.fixture
def plain(tmp_path):
  weight = np.arange(64, dtype=np.float32).reshape(2, 32)
  return write(tmp_path / "plain.gguf", [("a.weight", weight, None), ("b.weight", weight, None)])


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_types_are_read_as_float32(tmp_path, name):
  kind = gguf.GGMLQuantizationType[name]
  _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
  data = np.random.default_rng(0).integers(0, 60, (3, 2 * block_bytes), np.uint8)
  path = write(tmp_path / "model.gguf", [("x", data, kind)])
  source = GGUFSource(path)
  expected = gguf.quants.dequantize(data, kind)
  assert source.tensors["x"] == (expected.shape, np.float32)
  np.testing.assert_array_equal(source.read("x"), expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
def test_plain_types_keep_their_dtype(tmp_path, dtype):
  kind = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[np.dtype(dtype).name]
  weight = np.random.default_rng(0).standard_normal((3, 2, 5)).astype(dtype)
  data = weight.view(np.uint8) if kind == "BF16" else weight
  path = write(tmp_path / "model.gguf", [("x", data, gguf.GGMLQuantizationType[kind])])
  source = GGUFSource(path)
  assert source.tensors["x"] == (weight.shape, np.dtype(dtype))
  np.testing.assert_array_equal(source.read("x"), weight)


def test_large_tensors_are_read_in_chunks(tmp_path, monkeypatch):
  weight = np.random.default_rng(0).standard_normal((7, 32)).astype(np.float32)
  data = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q8_0)
  path = write(tmp_path / "model.gguf", [("x", data, gguf.GGMLQuantizationType.Q8_0)])
  monkeypatch.setattr("lwm.convert.gguf.file._CHUNK_ELEMENTS", 70)
  expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType.Q8_0)
  np.testing.assert_array_equal(GGUFSource(path).read("x"), expected)


def test_metadata_and_factors_of_rope(tmp_path):
  factors = np.array([1, 2], np.float32)
  source = GGUFSource(
    write(tmp_path / "model.gguf", [("rope_freqs.weight", factors, None)], {"number": 7})
  )
  assert source.metadata == {
    "general.architecture": "llama",
    "text": "value",
    "words": ["one", "two"],
    "number": 7,
  }
  assert source.tensors == {}
  np.testing.assert_array_equal(source.rope_factors, factors)


def test_no_prefix_of_a_file_is_a_file(plain):
  whole = plain.read_bytes()
  for length in [*range(0, 200, 7), *range(200, len(whole), 40), len(whole) - 1]:
    plain.write_bytes(whole[:length])
    with pytest.raises(UserError, match="plain.gguf"):
      GGUFSource(plain)


def replaced(path, old, new):
  content = path.read_bytes()
  assert content.count(old) == 1
  path.write_bytes(content.replace(old, new))


def test_counts_beyond_the_file_end_at_once(plain):
  whole = plain.read_bytes()
  # Tensors, keys, and the length of the first key.
  for offset in (8, 16, 24):
    plain.write_bytes(whole[:offset] + struct.pack("<Q", 1 << 62) + whole[offset + 8 :])
    with pytest.raises(UserError, match="plain.gguf is damaged: "):
      GGUFSource(plain)


def test_an_array_longer_than_the_file(plain):
  strings = struct.pack("<IIQ", 9, 8, 2)
  replaced(plain, strings, struct.pack("<IIQ", 9, 8, 1 << 60))
  with pytest.raises(UserError, match="the key words ends after the file"):
    GGUFSource(plain)
  replaced(plain, struct.pack("<IIQ", 9, 8, 1 << 60), struct.pack("<IIQ", 9, 12, 1 << 60))
  with pytest.raises(UserError, match="the key words ends after the file"):
    GGUFSource(plain)
  replaced(plain, struct.pack("<IIQ", 9, 12, 1 << 60), struct.pack("<IIQ", 9, 9, 2))
  with pytest.raises(UserError, match="the key words is an array of arrays"):
    GGUFSource(plain)


# A tensor's description: name, dimensions, type and offset in the data.
SECOND = b"b.weight" + struct.pack("<IQQIQ", 2, 32, 2, 0, 256)


@pytest.mark.parametrize(
  ("description", "message"),
  [
    ((9, 32, 2, 0, 256), "has 9 dimensions"),
    ((2, 1 << 62, 1 << 62, 0, 256), "ends at byte"),
    ((2, 0, 1 << 62, 0, 256), "has shape"),
    ((2, 32, 2, 0, 1 << 60), "ends at byte"),
    ((2, 32, 2, 99, 256), "has type 99, which cannot be read"),
    ((2, 32, 2, int(gguf.GGMLQuantizationType.F64), 256), r"has type 28 \(F64\), which cannot"),
    (
      (2, 31, 2, int(gguf.GGMLQuantizationType.Q8_0), 256),
      "has rows of 31, which blocks of 32 do not",
    ),
  ],
)
def test_wrong_descriptions_of_a_tensor(plain, description, message):
  replaced(plain, SECOND, b"b.weight" + struct.pack("<IQQIQ", *description))
  with pytest.raises(UserError, match=f"plain.gguf.* the tensor b.weight {message}"):
    GGUFSource(plain)


@pytest.mark.parametrize(
  ("old", "new", "message"),
  [
    (b"b.weight", b"a.weight", "the tensor a.weight occurs twice"),
    (b"b.weight", b"b.w\xffight", "tensor 1 is not UTF-8"),
    (b"text" + struct.pack("<I", 8), b"text" + struct.pack("<I", 77), "unknown type 77"),
    (b"GGUF\3", b"GGUF\1", "GGUF of version 1"),
    (b"GGUF\3", b"GGML\3", "is not a GGUF file"),
  ],
)
def test_other_damage(plain, old, new, message):
  replaced(plain, old, new)
  with pytest.raises(UserError, match=f"plain.gguf.*{message}"):
    GGUFSource(plain)


def test_a_wrong_alignment(tmp_path):
  path = write(tmp_path / "model.gguf", [], {"general.alignment": 0})
  with pytest.raises(UserError, match="the key general.alignment is 0"):
    GGUFSource(path)


def test_a_file_that_is_cut_while_it_is_read(plain):
  source = GGUFSource(plain)
  plain.write_bytes(plain.read_bytes()[:-100])
  with pytest.raises(UserError, match="plain.gguf: the tensor b.weight cannot be read"):
    source.read("b.weight")


def test_a_missing_file(tmp_path):
  with pytest.raises(UserError, match="missing.gguf cannot be read: No such file"):
    GGUFSource(tmp_path / "missing.gguf")
