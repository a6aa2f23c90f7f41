"""A VQGAN in the same loop: resumed, on eight devices, and what the run leaves."""

import pathlib
import runpy

import jax
import numpy as np
import pytest
from PIL import Image

from lwm.checkpoint.reader import newest
from lwm.config.validate import check_devices, validate
from lwm.convert import export_trained_vqgan
from lwm.data.frame_parts import FrameParts
from lwm.errors import ConfigError, UserError
from lwm.program.stage import build_program
from lwm.report.metrics import read_metrics
from lwm.report.reporter import Reporter
from lwm.train import loop
from lwm.vision.codec import Codec
from tests.lwm.train.test_resume import complete, final_state, what_was_learnt

CONFIG = pathlib.Path(__file__).with_name("tiny_vqgan.py")


@pytest.fixture(scope="module")
def make_vqgan(tmp_path_factory):
  """Makes the experiment of tiny_vqgan.py, on frames of ramps that move."""
  directory = tmp_path_factory.mktemp("frames")
  ramp = np.tile(np.linspace(0, 255, 16).astype(np.uint8), (16, 1))
  parts = FrameParts(directory / "frames", 16, {})
  with parts.part(0) as writer:
    for index in range(40):
      frame_HxW = np.roll(ramp, index, axis=1) // (1 + index % 3)
      split = "validation" if index % 4 == 0 else "train"
      writer.write(split, np.stack([frame_HxW, frame_HxW.T, 255 - frame_HxW], axis=-1))
  parts.join(1)
  get_config = runpy.run_path(str(CONFIG))["get_config"]
  return lambda: get_config(str(directory))


@pytest.fixture(scope="module")
def undisturbed_vqgan(make_vqgan, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("vqgan") / "run"
  loop.train(make_vqgan(), workdir, jax.devices()[:1])
  return workdir


class Killed(BaseException):
  """Ends a run at once, as a signal would."""


@pytest.mark.slow
def test_a_killed_run_ends_as_if_undisturbed(make_vqgan, undisturbed_vqgan, tmp_path, monkeypatch):
  experiment, killed = make_vqgan(), tmp_path / "killed"
  validate(experiment)

  def step(self, stage, step, metrics, wait):
    reported(self, stage, step, metrics, wait)
    if step == 5:
      raise Killed

  reported = Reporter.step
  monkeypatch.setattr(Reporter, "step", step)
  with pytest.raises(Killed):
    loop.train(experiment, killed, jax.devices()[:1])
  monkeypatch.undo()
  assert complete(killed) == [3] and not (killed / "vqgan.npz").exists()
  loop.train(experiment, killed, jax.devices()[:1])

  assert complete(killed) == complete(undisturbed_vqgan) == [6, 8]
  assert what_was_learnt(killed) == what_was_learnt(undisturbed_vqgan)
  states = [final_state(workdir, 8) for workdir in (killed, undisturbed_vqgan)]
  jax.tree.map(np.testing.assert_array_equal, *states)
  # Everything that lasts is in the checkpoint: the codebook, the discriminator, the averages.
  assert {"generator", "discriminator", "codebook", "average"} <= states[0][0].keys()
  assert (killed / "vqgan.npz").read_bytes() == (undisturbed_vqgan / "vqgan.npz").read_bytes()


@pytest.mark.slow
def test_what_a_run_learns_and_leaves(make_vqgan, undisturbed_vqgan, tmp_path):
  records = read_metrics(undisturbed_vqgan / "metrics.jsonl")
  train = [record for record in records if record["kind"] == "train"]
  assert train[-1]["pixel"] < 0.8 * train[0]["pixel"]
  assert {"psnr", "usage", "codebook_perplexity", "frames_per_second", "mfu"} <= train[0].keys()
  held_out = [record["held_out"][0] for record in records if record["kind"] == "evaluation"]
  assert len(held_out) == 2 and held_out[1]["psnr"] > held_out[0]["psnr"] > 5
  assert held_out[0]["frames"] == 16 and 0 < held_out[0]["usage"] <= 1

  # Two rows of six frames, each pixel twice as large.
  with Image.open(undisturbed_vqgan / "reconstructions" / "only.png") as sheet:
    assert sheet.size == (6 * 36 - 4, 68)
  assert (undisturbed_vqgan / "curves" / "only.png").is_file()
  codec = Codec(undisturbed_vqgan)
  assert codec.config == make_vqgan().vqgan

  export_trained_vqgan(newest(undisturbed_vqgan), tmp_path / "exported.npz")
  assert Codec(tmp_path / "exported.npz").sha256 == codec.sha256
  with pytest.raises(UserError, match="holds a VQGAN: name a run of a language model"):
    newest(undisturbed_vqgan).experiment  # noqa: B018


@pytest.mark.slow
def test_eight_devices_learn_what_one_does(make_vqgan, undisturbed_vqgan, tmp_path):
  experiment = make_vqgan()
  experiment.stages[0].mesh.data, experiment.stages[0].mesh.fsdp = 2, 4
  check_devices(experiment, 8)
  program = build_program(experiment, experiment.stages[0])
  kernel = program.state.params["generator"]["decoder"]["stem"]["kernel"]
  assert np.prod(kernel.sharding.shard_shape(kernel.shape)) == np.prod(kernel.shape) / 4
  loop.train(experiment, tmp_path / "eight")
  one, eight = (
    [(r["loss"], r["psnr"], r["gradient_norm"]) for r in records if r["kind"] == "train"]
    for records in (
      read_metrics(workdir / "metrics.jsonl") for workdir in (undisturbed_vqgan, tmp_path / "eight")
    )
  )
  # After the first steps, rounding gives some latents another code.
  assert len(eight) == len(one) == 8
  np.testing.assert_allclose(eight[:3], one[:3], rtol=1e-4)
  np.testing.assert_allclose(eight[3:], one[3:], rtol=5e-2)


def test_wrong_settings_are_one_sentence(make_vqgan):
  def changed(change):
    experiment = make_vqgan()
    change(experiment)
    return experiment

  cases = {
    "config.losses: codebook_decay=2 ": lambda e: setattr(e.losses, "codebook_decay", 2),
    "config.vqgan: resolution=15 ": lambda e: setattr(e.vqgan, "resolution", 15),
    "mesh.ring=2 must be 1": lambda e: setattr(e.stages[0].mesh, "ring", 2),
    "optimizer.trainable must be empty": lambda e: e.optimizer.trainable.append("*"),
    "frames_per_batch=0": lambda e: setattr(e.stages[0], "frames_per_batch", 0),
    "dataset='clips' must be one of 'ramps'": lambda e: setattr(
      e.stages[0].mixture[0], "dataset", "clips"
    ),
  }
  for message, change in cases.items():
    with pytest.raises(ConfigError) as error:
      validate(changed(change))
    assert message in str(error.value)
  with pytest.raises(ConfigError, match="frames_per_batch=8 does not divide over mesh data x fsdp"):
    check_devices(make_vqgan(), 16)
  other = changed(lambda e: setattr(e.vqgan, "resolution", 32))
  with pytest.raises(UserError, match="frames of resolution 16, but config.vqgan.resolution is 32"):
    loop.train(other, pathlib.Path("/nowhere"))
