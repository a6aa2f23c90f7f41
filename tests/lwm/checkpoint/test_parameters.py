"""Checkpoints of parameters alone, written one array at a time."""

import errno
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from configs import models
from lwm import model as model_lib
from lwm.checkpoint import digests
from lwm.checkpoint.arrays import ArrayInfo, ArrayReader, ArrayWriter
from lwm.checkpoint.parameters import write_parameters
from lwm.checkpoint.reader import newest
from lwm.config.experiment import Experiment, Stage
from lwm.errors import UserError
from lwm.infer import load_trained
from lwm.parallel.mesh import make_mesh
from lwm.parallel.sharding import MeshConfig

EXPERIMENT = Experiment(
  name="imported", tokenizer="t.model", model=models.debug(), stages=[Stage(rope_theta=5.0)]
)
TOKENIZER = {"t.model": b"pieces", "tokenizer_config.json": b"{}"}


def flat(tree) -> dict[str, np.ndarray]:
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


@pytest.fixture(scope="module")
def params() -> dict[str, np.ndarray]:
  """Random parameters by path; those of the first name are bfloat16."""
  random = flat(jax.jit(model_lib.build(EXPERIMENT.model).init)(jax.random.key(0)))
  arrays = {path: np.asarray(array) for path, array in random.items()}
  return arrays | {"embedding": arrays["embedding"].astype(ml_dtypes.bfloat16)}


def write(directory: pathlib.Path, params: dict[str, np.ndarray], leave_out: str = "") -> None:
  arrays = {path: ArrayInfo(array.shape, array.dtype) for path, array in params.items()}
  with write_parameters(directory, EXPERIMENT, TOKENIZER, arrays) as writer:
    for path, array in params.items():
      if path == leave_out:
        continue
      if path.startswith("blocks"):
        for layer, part in enumerate(array):
          writer.write(path, part, (layer,))
      else:
        writer.write(path, array[:3], (slice(3),))
        writer.write(path, array[3:], (slice(3, None),))


def test_it_is_a_checkpoint(tmp_path, params):
  write(tmp_path / "weights", params)
  mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
  with jax.set_mesh(mesh):
    trained = load_trained(tmp_path / "weights")
  assert (trained.rope_theta, trained.total_steps) == (5.0, 0)
  assert trained.tokenizer.read_bytes() == b"pieces"
  for path, array in flat(trained.params).items():
    assert array.dtype == jnp.float32
    np.testing.assert_array_equal(array, params[path].astype(np.float32))


def test_reading_by_parts(tmp_path, params):
  write(tmp_path / "weights", params)
  reader = newest(tmp_path / "weights").reader()
  assert reader.arrays == {path: ArrayInfo(a.shape, a.dtype) for path, a in params.items()}
  query = params["blocks.attention.query"]
  np.testing.assert_array_equal(reader.read("blocks.attention.query", (1,)), query[1])
  rows = reader.read("embedding", (slice(2, 9),))
  np.testing.assert_array_equal(rows, params["embedding"][2:9])


def test_what_is_missing_is_never_a_checkpoint(tmp_path, params):
  with pytest.raises(ValueError, match="norm.scale: 32 elements were not written"):
    write(tmp_path / "weights", params, leave_out="norm.scale")
  assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, params, monkeypatch):
  def full(*arguments):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(digests, "write", full)
  with pytest.raises(UserError, match=r"weights could not be written \(No space left on device\)"):
    write(tmp_path / "weights", params)
  assert not list(tmp_path.iterdir())


def test_an_existing_directory_stays_as_it_is(tmp_path, params):
  (tmp_path / "weights").mkdir()
  (tmp_path / "weights" / "notes.txt").write_text("mine")
  with pytest.raises(UserError, match="weights exists: name another --output"):
    write(tmp_path / "weights", params)
  assert [path.name for path in tmp_path.rglob("*")] == ["weights", "notes.txt"]


def test_what_cannot_be_replaced_is_refused_at_once(tmp_path, params, monkeypatch):
  (tmp_path / "link").symlink_to(tmp_path / "nowhere")
  monkeypatch.chdir(tmp_path)
  for output, message in {"link": "exists", ".": "exists", "x" * 300: "too long"}.items():
    with pytest.raises(UserError, match=message):
      write(pathlib.Path(output), params)
  assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_what_a_killed_import_left_is_replaced(tmp_path, params):
  (tmp_path / "weights.unfinished" / "params").mkdir(parents=True)
  write(tmp_path / "weights", params)
  assert [path.name for path in tmp_path.iterdir()] == ["weights"]


def test_a_damaged_array_is_one_sentence(tmp_path):
  array = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
  with ArrayWriter(tmp_path / "params", {"table": ArrayInfo(array.shape, array.dtype)}) as writer:
    writer.write("table", array)
  file = max((tmp_path / "params").rglob("d/*"), key=lambda path: path.stat().st_size)
  reader = ArrayReader(tmp_path / "params")
  file.write_bytes(file.read_bytes()[:-100])
  with pytest.raises(UserError, match="params: table is damaged"):
    reader.read("table")
  (tmp_path / "params" / "_METADATA").write_text("{")
  with pytest.raises(UserError, match="cannot be read as the arrays of a checkpoint"):
    ArrayReader(tmp_path / "params")
