"""The step's arithmetic, with a model of one parameter vector where the model does not matter."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kernels.ring import Layout
from lwm.config.experiment import LossConfig
from lwm.model import LossSums, ModelConfig, build, extras
from lwm.parallel.sharding import MeshConfig
from lwm.program.objective import Objective, split_rows
from lwm.program.optimizer import kept_unless_applied
from lwm.program.stage import build_program
from lwm.program.state import TrainState
from lwm.program.step import train_step
from lwm.program.trainable import Trainable


def batch_of(weights_BxS, modality_BxS):
  weights_BxS, modality_BxS = jnp.array(weights_BxS), jnp.array(modality_BxS)
  one = jnp.ones(weights_BxS.shape, jnp.int32)
  return {
    "loss_weights": weights_BxS,
    "modality": modality_BxS,
    "key_start": 0 * one,
    "key_stop": 3 * one,
  }


def run_toy_step(batch, loss, config=ModelConfig()):
  """One step of SGD-like bookkeeping: every target's loss is the parameter of its modality."""

  def losses(params, batch, **unused):
    sums = [
      jnp.sum(jnp.where(batch["modality"] == m, batch["loss_weights"] * params[m], 0))
      for m in (0, 1)
    ]
    weights = [jnp.sum(jnp.where(batch["modality"] == m, batch["loss_weights"], 0)) for m in (0, 1)]
    return LossSums(jnp.stack(sums), jnp.stack(sums), jnp.stack(weights), extras.nothing())

  model = build(config)
  model.losses = losses
  optimizer = optax.sgd(1.0)
  params = jnp.array([2.0, 5.0])
  state = TrainState(params, optimizer.init(params), jnp.int32(0))
  return train_step(
    state,
    batch,
    objective=Objective(model, loss, rope_theta=1e4, layout=Layout("contiguous", 1)),
    optimizer=optimizer,
    learning_rate=lambda step: jnp.float32(1),
  )


def test_modalities_count_by_their_shares_not_their_targets():
  batch = batch_of([[1.0, 2.0, 0.5, 0.0]], [[0, 0, 1, 1]])
  state, metrics = run_toy_step(batch, LossConfig(text_weight=1.0, vision_weight=3.0))
  np.testing.assert_allclose(metrics["text_loss"], 2)
  np.testing.assert_allclose(metrics["vision_loss"], 5)
  np.testing.assert_allclose(metrics["loss"], 0.25 * 2 + 0.75 * 5)
  np.testing.assert_allclose(state.params, [2 - 0.25, 5 - 0.75])
  assert metrics["text_targets"] == 2 and metrics["vision_targets"] == 1
  assert metrics["tokens"] == 4 and metrics["attended_pairs"] == 12


def test_an_absent_modality_leaves_the_whole_loss_to_the_other():
  state, metrics = run_toy_step(batch_of([[1.0, 0.0]], [[0, 1]]), LossConfig())
  np.testing.assert_allclose(metrics["loss"], 2)
  np.testing.assert_allclose(metrics["vision_loss"], 0)
  np.testing.assert_allclose(state.params, [1, 5])


def test_a_batch_without_targets_changes_nothing():
  state, metrics = run_toy_step(batch_of([[0.0, 0.0]], [[0, 1]]), LossConfig())
  np.testing.assert_allclose(metrics["loss"], 0)
  np.testing.assert_allclose(state.params, [2, 5])


def test_pairs_outside_the_sliding_window_are_not_counted():
  batch = batch_of([[1.0, 1.0, 1.0, 1.0]], [[0, 0, 0, 0]])
  _, metrics = run_toy_step(batch, LossConfig(), ModelConfig(sliding_window=2))
  assert metrics["tokens"] == 4 and metrics["attended_pairs"] == 8


def test_padding_is_not_counted():
  batch = batch_of([[1.0, 1.0, 0.0]], [[0, 0, 0]])
  batch["key_stop"] = jnp.array([[1, 2, 0]])
  _, metrics = run_toy_step(batch, LossConfig())
  assert metrics["tokens"] == 2 and metrics["attended_pairs"] == 3


class MovingAverage:
  """Minimises the mean of one parameter; another one, frozen, follows the batch."""

  trainable = Trainable(frozenset({"trained"}))

  def gradients(self, params, batch, step):
    frozen = {"average": 0.5 * params["average"] + 0.5 * batch["value"] + step}
    return {"trained": jnp.ones(2)}, frozen, {"loss": batch["value"]}

  def counts(self, batch):
    return {}


def test_a_step_may_rewrite_frozen_parameters_but_a_bad_one_does_not():
  optimizer = optax.sgd(1.0)
  params = {"trained": jnp.zeros(2), "average": jnp.float32(2.0)}
  state = TrainState(params, optimizer.init({"trained": params["trained"]}), jnp.int32(3))
  for value, trained, average, step in ((4.0, -1.0, 6.0, 4), (np.inf, 0.0, 2.0, 3)):
    after, metrics = train_step(
      state,
      {"value": jnp.float32(value)},
      objective=MovingAverage(),
      optimizer=kept_unless_applied(optimizer),
      learning_rate=lambda step: jnp.float32(1),
    )
    np.testing.assert_array_equal(after.params["trained"], [trained, trained])
    assert after.params["average"] == average and after.step == step
    assert metrics["applied"] == (step == 4)


def test_split_rows_moves_nothing_between_devices(experiment):
  stage = experiment.stages[0]
  stage.mesh = MeshConfig(data=2, fsdp=2, ring=2)
  program = build_program(experiment, stage)
  array_BxS = np.arange(8 * 64).reshape(8, 64)
  with jax.set_mesh(program.mesh):
    batch = {"tokens": jax.device_put(array_BxS, program.batch_sharding)}
    split = jax.jit(lambda batch: split_rows(batch, 2, program.model.rules))
    parts_AxBxS = split(batch)["tokens"]
    text = split.lower(batch).compile().as_text()
  assert not any(name in text for name in ("all-gather", "all-to-all", "collective-permute"))
  np.testing.assert_array_equal(np.sort(np.asarray(parts_AxBxS).reshape(8, 64), axis=0), array_BxS)
  shards = {shard.device: shard.data for shard in batch["tokens"].addressable_shards}
  for shard in parts_AxBxS.addressable_shards:
    assert shard.data.shape == (2, 1, 32)
    np.testing.assert_array_equal(shard.data[:, 0], shards[shard.device])
