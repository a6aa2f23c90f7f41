"""Real runs, small ones: what they learn, what they leave, and that a mesh changes nothing."""

import jax
import numpy as np
import pytest

from lwm.data import Loader
from lwm.errors import UserError
from lwm.experiment import MeshConfig
from lwm.train import loop
from lwm.train.evaluate import by_modality
from lwm.train.metrics import read_metrics
from lwm.train.program import build_program


@pytest.mark.slow
def test_a_run_learns_and_leaves_what_it_says(experiment, tmp_path, capsys):
  experiment.stages[0].steps = 60
  experiment.evaluation.every_steps = 30
  experiment.checkpoint.every_steps = 30
  with jax.numpy_rank_promotion("raise"):
    loop.train(experiment, tmp_path / "run", jax.devices()[:1])
  output = capsys.readouterr().out

  records = read_metrics(tmp_path / "run" / "metrics.jsonl")
  train = [record for record in records if record["kind"] == "train"]
  assert [record["total_steps"] for record in train] == list(range(1, 66))
  assert [record["step"] for record in train] == [*range(1, 61), *range(1, 6)]
  assert all("vision_loss" not in record for record in train[:60])
  assert all("vision_loss" in record and "text_loss" in record for record in train[60:])
  assert train[0]["text_loss"] == pytest.approx(np.log(320), rel=0.05)
  assert train[64]["vision_loss"] < train[60]["vision_loss"] - 0.5

  held_out = {
      record["total_steps"]: by_modality(record["held_out"])
      for record in records if record["kind"] == "evaluation"
  }
  assert list(held_out) == [30, 60, 65]
  assert held_out[60]["text"]["loss"] < held_out[60]["text"]["unigram_entropy"]
  assert set(held_out[65]) == {"text", "vision"}

  assert "text_64 60/60 | loss" in output
  assert "held-out loss" in output and str(tmp_path / "run" / "checkpoints" / "65") in output
  assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
      "checkpoints", "config.txt", "curves", "metrics.jsonl", "tensorboard"
  ]
  assert sorted(path.name for path in (tmp_path / "run" / "curves").iterdir()) == [
      "text_64.png", "video_128.png"
  ]
  assert (tmp_path / "run" / "checkpoints" / "65" / "params").is_dir()

  # The same command, once more: nothing is left to do, and nothing is lost.
  loop.train(experiment, tmp_path / "run", jax.devices()[:1])
  assert read_metrics(tmp_path / "run" / "metrics.jsonl") == records


MESHES = {
    "data": (MeshConfig(data=4, fsdp=1), "contiguous"),
    "fsdp": (MeshConfig(fsdp=8), "contiguous"),
    "ring": (MeshConfig(fsdp=1, ring=4), "contiguous"),
    "ring_zigzag": (MeshConfig(fsdp=1, ring=4), "zigzag"),
    "tensor": (MeshConfig(fsdp=1, tensor=2), "contiguous"),
    "data_ring_tensor": (MeshConfig(data=2, fsdp=1, ring=2, tensor=2), "zigzag"),
    "fsdp_ring_accumulated": (MeshConfig(fsdp=2, ring=2), "zigzag", 4),
    "accumulated": (MeshConfig(fsdp=1), "contiguous", 4),
}


def losses_on(experiment, mesh, layout, accumulation_steps=1) -> np.ndarray:
  """Losses and gradient norms of five steps of the second stage: float32 [5, 4]."""
  stage = experiment.stages[1]
  stage.mesh, stage.layout, stage.accumulation_steps = mesh, layout, accumulation_steps
  num_devices = np.prod([size for size in mesh.axis_sizes().values()])
  program = build_program(experiment, stage, jax.devices()[:num_devices])
  losses = []
  with jax.set_mesh(program.mesh), jax.numpy_rank_promotion("raise"):
    state = program.fresh_state(program.initial_params(experiment.seed))
    loader = Loader(experiment, 1, program.mesh)
    for batch in loader.iterate():
      state, metrics = program.train_step(state, batch)
      names = ("loss", "text_loss", "vision_loss", "gradient_norm")
      losses.append([metrics[name] for name in names])
    return np.array(jax.device_get(losses))


@pytest.fixture(scope="module")
def one_device_losses():
  return {}


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_changes_no_loss(name, experiment, one_device_losses):
  if not one_device_losses:
    one_device_losses["losses"] = losses_on(experiment, MeshConfig(fsdp=1), "contiguous")
  expected = one_device_losses["losses"]
  assert np.all(np.diff(expected[:, 0]) < 0)
  losses = losses_on(experiment, *MESHES[name])
  np.testing.assert_allclose(losses[:, :3], expected[:, :3], rtol=1e-5)
  # Adam and clipping would hide gradients that are all off by one factor.
  np.testing.assert_allclose(losses[:, 3], expected[:, 3], rtol=1e-4)


@pytest.mark.slow
def test_stages_on_different_meshes(experiment, undisturbed, tmp_path):
  """Parameters move from mesh to mesh between stages; the losses are those of one device."""
  experiment.stages[0].mesh = MeshConfig(fsdp=4, tensor=2)
  experiment.stages[1].mesh = MeshConfig(data=2, fsdp=2, ring=2)
  loop.train(experiment, tmp_path / "run")
  many, one = (
      [record["loss"] for record in read_metrics(workdir / "metrics.jsonl") if "loss" in record]
      for workdir in (tmp_path / "run", undisturbed)
  )
  assert len(one) == 12
  np.testing.assert_allclose(many, one, rtol=2e-5)


def test_a_missing_dataset_is_one_sentence(experiment, tmp_path):
  experiment.datasets[1].path = str(tmp_path / "nowhere")
  with pytest.raises(UserError, match="no prepared dataset at .*nowhere.*prepare"):
    loop.train(experiment, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_a_missing_tokenizer_is_one_sentence(experiment, tmp_path):
  experiment.tokenizer = str(tmp_path / "none.model")
  with pytest.raises(UserError, match="no tokenizer file .*none.model"):
    loop.train(experiment, tmp_path / "run")
