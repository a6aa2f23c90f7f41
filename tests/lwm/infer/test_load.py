"""Reading the model out of a run's checkpoints."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from configs import models
from kernels.quantised_matmul import GRIDS
from lwm import model as model_lib
from lwm.checkpoint.checkpoints import Checkpoints, Identity
from lwm.checkpoint.position import Position
from lwm.checkpoint.reader import StoredCheckpoint
from lwm.config.experiment import Experiment, Stage
from lwm.data.tokenizer import tokenizer_files
from lwm.errors import UserError
from lwm.infer import load_trained, quantized_params
from lwm.parallel.mesh import make_mesh
from lwm.parallel.sharding import MeshConfig
from lwm.program.state import TrainState


@pytest.fixture
def experiment(tmp_path) -> Experiment:
  tokenizer = tmp_path / "tokenizer.model"
  tokenizer.write_bytes(b"pieces")
  return Experiment(
    tokenizer=str(tokenizer),
    model=models.debug(),
    stages=[Stage(name="short", rope_theta=1e4), Stage(name="long", rope_theta=1e6)],
  )


def save(experiment: Experiment, workdir: pathlib.Path, *all_progress: Position):
  """Checkpoints whose parameters differ by their step; the initial ones."""
  params = jax.jit(model_lib.build(experiment.model).init)(jax.random.key(0))
  checkpoints = Checkpoints(workdir / "checkpoints", keep=2)
  identity = Identity(experiment, tokenizer_files(pathlib.Path(experiment.tokenizer)), {})
  for progress in all_progress:
    moved = jax.tree.map(lambda w: w + progress.total_steps, params)
    state = TrainState(moved, {"moments": jnp.zeros(3)}, jnp.int32(progress.step))
    checkpoints.save(state, progress, identity)
  checkpoints.close()
  return params


@pytest.fixture(autouse=True)
def mesh():
  with jax.set_mesh(make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])) as mesh:
    yield mesh


@pytest.mark.slow
def test_newest_parameters_and_the_theta_of_their_stage(experiment, tmp_path):
  params = save(experiment, tmp_path / "run", Position(0, 4, 4), Position(1, 2, 6))
  before = sorted((tmp_path / "run").rglob("*"))
  trained = load_trained(tmp_path / "run")
  assert (trained.stage.name, trained.total_steps, trained.rope_theta) == ("long", 6, 1e6)
  for actual, initial in zip(jax.tree.leaves(trained.params), jax.tree.leaves(params), strict=True):
    np.testing.assert_array_equal(actual, initial + 6)
  assert sorted((tmp_path / "run").rglob("*")) == before


def test_weights_are_rounded_while_they_are_read(experiment, tmp_path):
  experiment.model.vision_vocab_size = 0
  params = save(experiment, tmp_path / "run", Position(0, 4, 4))
  arrays = flatten_dict(jax.tree.map(lambda w: np.asarray(w + 4), params), sep=".")
  rounded = flatten_dict(load_trained(tmp_path / "run", "bfloat16").params, sep=".")
  for path, array in arrays.items():
    dtype = "float32" if path.endswith("scale") else "bfloat16"
    np.testing.assert_array_equal(rounded[path], array.astype(dtype), strict=True)
  trained = load_trained(tmp_path / "run", "int4")
  in_memory = quantized_params(
    trained.model,
    lambda path, layer: arrays[path] if layer is None else arrays[path][layer],
    GRIDS["int4"],
  )
  jax.tree.map(np.testing.assert_array_equal, trained.params, in_memory)


def test_a_checkpoint_being_written_is_left_alone(experiment, tmp_path):
  save(experiment, tmp_path / "run", Position(0, 4, 4))
  unfinished = tmp_path / "run" / "checkpoints" / "9.orbax-checkpoint-tmp"
  unfinished.mkdir()
  assert load_trained(tmp_path / "run").total_steps == 4
  assert unfinished.is_dir()


def test_a_damaged_checkpoint_is_one_sentence(experiment, tmp_path):
  save(experiment, tmp_path / "run", Position(0, 4, 4))
  checkpoint = tmp_path / "run" / "checkpoints" / "4"
  path = max((checkpoint / "params").rglob("d/*"), key=lambda path: path.stat().st_size)
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)
  with pytest.raises(
    UserError, match=rf"checkpoints/4 is damaged \({path.relative_to(checkpoint)}"
  ):
    load_trained(tmp_path / "run")


@pytest.mark.parametrize("exists", [False, True])
def test_no_checkpoint_is_one_sentence(experiment, tmp_path, exists):
  if exists:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
  with pytest.raises(UserError, match=r"no checkpoint in .*run: name the --workdir of a run"):
    load_trained(tmp_path / "run")


def test_the_experiment_comes_from_the_checkpoint(experiment, tmp_path):
  (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
  save(experiment, tmp_path / "run", Position(0, 4, 4))
  pathlib.Path(experiment.tokenizer).write_bytes(b"others")
  trained = load_trained(tmp_path / "run")
  assert trained.experiment == experiment
  assert trained.tokenizer.read_bytes() == b"pieces"
  assert trained.tokenizer.with_name("chat_template.jinja").read_text() == "{{ messages }}"


def test_a_setting_of_a_newer_version_is_one_sentence(experiment, tmp_path):
  save(experiment, tmp_path / "run", Position(0, 4, 4))
  path = tmp_path / "run" / "checkpoints" / "4" / "config" / "metadata"
  config = json.loads(path.read_text())
  config["model"]["rotors"] = 3
  path.write_text(json.dumps(config))
  with pytest.raises(
    UserError, match="newer version of this program, which has the setting 'rotors'"
  ):
    _ = StoredCheckpoint(path.parent.parent).experiment
