"""safetensors files: peers read ours, and damaged ones are refused in a sentence."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest

from lwm.checkpoint.arrays import ArrayInfo
from lwm.convert.safetensors import SafetensorsSink, SafetensorsSource
from lwm.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ARRAYS = {
  "b": np.arange(6, dtype=np.float32).reshape(2, 3),
  "a": np.array([1, -2, 3], ml_dtypes.bfloat16),
  "scalar": np.array(0.5, np.float16),
  "empty": np.empty((0, 4), np.float32),
}


def write(directory, shard_bytes=10**9):
  directory.mkdir()
  tensors = {name: ArrayInfo(array.shape, array.dtype) for name, array in ARRAYS.items()}
  with SafetensorsSink(directory, tensors, shard_bytes) as sink:
    for name, array in ARRAYS.items():
      sink.write(name, array)


def raw(path, header, data=b"") -> None:
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize("shard_bytes, files", [(10**9, 1), (26, 2), (1, 4)])
def test_there_and_back(tmp_path, shard_bytes, files):
  write(tmp_path / "model", shard_bytes)
  assert len(list((tmp_path / "model").glob("*.safetensors"))) == files
  source = SafetensorsSource(tmp_path / "model")
  assert source.tensors == {name: ArrayInfo(a.shape, a.dtype) for name, a in ARRAYS.items()}
  for name, array in ARRAYS.items():
    np.testing.assert_array_equal(source.read(name), array)


def test_the_reference_implementation_reads_it(tmp_path):
  peer = pytest.importorskip("safetensors")
  write(tmp_path / "model")
  with peer.safe_open(tmp_path / "model" / SINGLE, "np") as file:
    assert file.metadata() == {"format": "pt"}
    assert set(file.keys()) == set(ARRAYS)
    np.testing.assert_array_equal(file.get_tensor("b"), ARRAYS["b"])
    assert file.get_slice("a").get_dtype() == "BF16"


def test_a_tensor_that_is_not_the_next_one_is_refused(tmp_path):
  tensors = {name: ArrayInfo((2,), np.dtype(np.float32)) for name in "ab"}
  with pytest.raises(ValueError, match="b is not the tensor that comes next"):
    with SafetensorsSink(tmp_path, tensors, 1) as sink:
      sink.write("b", np.zeros(2, np.float32))
  with pytest.raises(ValueError, match="b was not written"):
    with SafetensorsSink(tmp_path, tensors, 10**9) as sink:
      sink.write("a", np.zeros(2, np.float32))


FLOATS = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
  "header, data, message",
  [
    ({"x": FLOATS}, b"1234567", "it ends before the end of the tensor x"),
    ({"x": FLOATS}, b"123456789", "it goes on after its last tensor"),
    (b"{", b"", "its header is not one"),
    (b"[" * 100_000, b"", "its header is not one"),
    (b"[1]", b"", "its header is not one"),
    (b'{"\xff": 1}', b"", "its header is not one"),
    ({"x": {"dtype": "F32"}}, b"", "its header is not one"),
    ({"x": FLOATS | {"shape": [-2]}}, bytes(8), "its header is not one"),
    ({"x": FLOATS | {"data_offsets": [0, 8.0]}}, bytes(8), "its header is not one"),
    (b'{"x": %b, "x": %b}' % (2 * (json.dumps(FLOATS).encode(),)), bytes(8), "is not one"),
    ({"x": FLOATS | {"shape": [3]}}, bytes(8), "the tensor x has 8 bytes, not 12"),
    ({"x": FLOATS | {"dtype": "I32"}}, bytes(8), "the tensor x is I32, not one of F32, F16, BF16"),
    (
      {"x": FLOATS, "y": FLOATS | {"data_offsets": [4, 12]}},
      bytes(12),
      "the tensor y does not begin where the one before it ends",
    ),
    (
      {"x": FLOATS, "y": FLOATS | {"data_offsets": [12, 20]}},
      bytes(20),
      "the tensor y does not begin where the one before it ends",
    ),
  ],
)
def test_damaged_files(tmp_path, header, data, message):
  raw(tmp_path / SINGLE, header, data)
  with pytest.raises(UserError, match=f"{SINGLE}.*{message}"):
    SafetensorsSource(tmp_path)


@pytest.mark.parametrize("content", [b"", b"1234", struct.pack("<Q", 10) + b"{}", b"\xff" * 20])
def test_a_header_that_does_not_fit(tmp_path, content):
  (tmp_path / SINGLE).write_bytes(content)
  with pytest.raises(UserError, match="its header does not fit into it"):
    SafetensorsSource(tmp_path)


@pytest.mark.parametrize(
  "file", ["../x.safetensors", "/etc/passwd", "..", "", "x\0.safetensors", "x.bin", 7]
)
def test_an_index_names_only_files_beside_it(tmp_path, file):
  (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"w": file}}))
  with pytest.raises(UserError, match="puts w into .*, which is not a safetensors file"):
    SafetensorsSource(tmp_path)


def test_files_that_differ_from_the_index(tmp_path):
  index = tmp_path / INDEX
  for content in ("{", "[]", "{}"):
    index.write_text(content)
    with pytest.raises(UserError, match=INDEX):
      SafetensorsSource(tmp_path)
  index.write_text(json.dumps({"weight_map": {"w": "x.safetensors"}}))
  with pytest.raises(UserError, match="x.safetensors is missing, which holds w"):
    SafetensorsSource(tmp_path)
  raw(tmp_path / "x.safetensors", {"v": FLOATS}, bytes(8))
  with pytest.raises(UserError, match="x.safetensors holds the tensor v, which its index does not"):
    SafetensorsSource(tmp_path)
  raw(tmp_path / "x.safetensors", {}, b"")
  with pytest.raises(UserError, match="x.safetensors lacks the tensor w, which its index names"):
    SafetensorsSource(tmp_path)


def test_directories_without_safetensors(tmp_path):
  with pytest.raises(UserError, match=f"has neither {SINGLE} nor {INDEX}"):
    SafetensorsSource(tmp_path)
  (tmp_path / "pytorch_model.bin").write_bytes(b"")
  with pytest.raises(UserError, match="holds pickles .* save_pretrained, which writes safetensors"):
    SafetensorsSource(tmp_path)


def test_a_file_that_changes_while_it_is_read(tmp_path):
  write(tmp_path / "model")
  source = SafetensorsSource(tmp_path / "model")
  (tmp_path / "model" / SINGLE).write_bytes(b"")
  with pytest.raises(UserError, match="b cannot be read"):
    source.read("b")
