"""Real runs, small ones: what they learn, what they leave, and that a mesh changes nothing."""

import jax
import numpy as np
import pytest

from lwm.data import Loader
from lwm.errors import UserError
from lwm.parallel.sharding import MeshConfig
from lwm.program.stage import build_program
from lwm.report.held_out import by_modality
from lwm.report.metrics import read_metrics
from lwm.train import loop


@pytest.mark.slow
def test_a_run_learns_and_leaves_what_it_says(undisturbed):
  records = read_metrics(undisturbed / "metrics.jsonl")
  train = [record for record in records if record["kind"] == "train"]
  assert [record["total_steps"] for record in train] == list(range(1, 52))
  assert [record["step"] for record in train] == [*range(1, 47), *range(1, 6)]
  assert all("vision_loss" not in record for record in train[:46])
  assert all("vision_loss" in record and "text_loss" in record for record in train[46:])
  assert train[0]["text_loss"] == pytest.approx(np.log(320), rel=0.05)
  assert train[50]["vision_loss"] < train[46]["vision_loss"] - 0.5

  held_out = {
    record["total_steps"]: by_modality(record["held_out"])
    for record in records
    if record["kind"] == "evaluation"
  }
  assert list(held_out) == [20, 40, 46, 51]
  assert held_out[46]["text"]["loss"] < held_out[46]["text"]["unigram_entropy"]
  assert set(held_out[51]) == {"text", "vision"}

  output = (undisturbed / "output.txt").read_text()
  assert "text_64 46/46 | loss" in output and "video_128 5/5 | loss" in output
  assert "held-out loss" in output and str(undisturbed / "checkpoints" / "51") in output
  assert sorted(path.name for path in (undisturbed / "curves").iterdir()) == [
    "text_64.png",
    "video_128.png",
  ]
  assert (undisturbed / "checkpoints" / "51" / "params").is_dir()
  assert "name='video_128'" in (undisturbed / "config.txt").read_text()
  assert list((undisturbed / "tensorboard").iterdir())


MESHES = {
  "ring_ulysses": (MeshConfig(fsdp=1, ring=2, ulysses=2), "zigzag"),
  "data_ring_tensor": (MeshConfig(data=2, fsdp=1, ring=2, tensor=2), "zigzag"),
  "fsdp_ring_accumulated": (MeshConfig(fsdp=2, ring=2), "zigzag", 4),
}


def losses_on(experiment, params, mesh, layout, accumulation_steps=1) -> np.ndarray:
  """Losses and gradient norms of five steps of the second stage: float32 [5, 4]."""
  stage = experiment.stages[1]
  stage.mesh, stage.layout, stage.accumulation_steps = mesh, layout, accumulation_steps
  num_devices = np.prod(list(mesh.axis_sizes().values()))
  program = build_program(experiment, stage, jax.devices()[:num_devices])
  names = ("loss", "text_loss", "vision_loss", "gradient_norm")
  losses = []
  with jax.set_mesh(program.mesh), jax.numpy_rank_promotion("raise"):
    state = program.fresh_state(program.place_params(params))
    for batch in Loader(experiment, 1, program.mesh).iterate():
      state, metrics = program.train_step(state, batch)
      losses.append([metrics[name] for name in names])
    return np.array(jax.device_get(losses))


@pytest.fixture(scope="module")
def initial(make_experiment):
  """Parameters to start from, on the host, and what one device makes of them."""
  experiment = make_experiment()
  experiment.stages[1].mesh = MeshConfig(fsdp=1)
  program = build_program(experiment, experiment.stages[1], jax.devices()[:1])
  with jax.set_mesh(program.mesh):
    params = jax.device_get(program.initial_params(experiment.seed))
  return params, losses_on(experiment, params, MeshConfig(fsdp=1), "contiguous")


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_changes_no_loss(name, experiment, initial):
  params, expected = initial
  assert np.all(np.diff(expected[:, 0]) < 0)
  losses = losses_on(experiment, params, *MESHES[name])
  np.testing.assert_allclose(losses[:, :3], expected[:, :3], rtol=1e-5)
  # Adam and clipping would hide gradients that are all off by one factor.
  np.testing.assert_allclose(losses[:, 3], expected[:, 3], rtol=1e-4)


@pytest.mark.slow
def test_stages_on_different_meshes(experiment, tmp_path):
  """Parameters move from mesh to mesh between stages; the losses are those of one device.

  On four devices, block inputs, attention outputs and moments wait in the host's memory.
  """
  for stage, steps in zip(experiment.stages, (3, 2)):
    stage.steps = steps
  four = (MeshConfig(fsdp=2, tensor=2), MeshConfig(data=2, fsdp=1, ring=2))
  runs = {
    "one": ((MeshConfig(fsdp=1), MeshConfig(fsdp=1)), "none", False),
    "four": (four, "offload_attention", True),
  }
  losses = {}
  for name, (meshes, remat, offload) in runs.items():
    experiment.model.remat, experiment.optimizer.offload = remat, offload
    for stage, mesh in zip(experiment.stages, meshes):
      stage.mesh = mesh
    loop.train(experiment, tmp_path / name, jax.devices()[: 1 if name == "one" else 4])
    records = read_metrics(tmp_path / name / "metrics.jsonl")
    losses[name] = [record["loss"] for record in records if record["kind"] == "train"]
  assert len(losses["one"]) == 5
  np.testing.assert_allclose(losses["four"], losses["one"], rtol=1e-5)


def test_a_missing_dataset_is_one_sentence(experiment, tmp_path):
  experiment.datasets[1].path = str(tmp_path / "nowhere")
  with pytest.raises(UserError, match="no prepared dataset at .*nowhere.*prepare"):
    loop.train(experiment, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_a_missing_tokenizer_is_one_sentence(experiment, tmp_path):
  experiment.tokenizer = str(tmp_path / "none.model")
  with pytest.raises(UserError, match="no tokenizer file .*none.model"):
    loop.train(experiment, tmp_path / "run")
