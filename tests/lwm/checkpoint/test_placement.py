"""Placement of experts belongs to no checkpoint: any mesh and policy resumes any run."""

import dataclasses

import jax
import numpy as np
import pytest

from lwm.checkpoint.checkpoints import Checkpoints
from lwm.checkpoint.identity import Identity
from lwm.checkpoint.position import Position
from lwm.config.experiment import Experiment, MixtureEntry, OptimizerConfig, Stage
from lwm.config.model import ExpertsConfig, ModelConfig
from lwm.model.placement import choose_slots
from lwm.parallel.sharding import MeshConfig
from lwm.program.stage import build_program

LENGTH, VOCAB, E = 16, 32, 8


def experiment_of(placement, **mesh):
  return Experiment(
    model=ModelConfig(
      num_layers=1,
      width=16,
      num_heads=4,
      num_kv_heads=4,
      head_dim=4,
      text_vocab_size=VOCAB,
      initializer_std=0.5,
      experts=ExpertsConfig(E, 2, width=16, placement=placement, load_decay=0.5),
      compute_dtype="float32",
    ),
    # Adam would turn the smallest differences into full steps.
    optimizer=OptimizerConfig(peak_learning_rate=0.1, epsilon=1.0, moment_dtype="float32"),
    stages=[
      Stage(
        sequence_length=LENGTH,
        tokens_per_batch=8 * LENGTH,
        steps=9,
        warmup_steps=0,
        mixture=[MixtureEntry("text")],
        mesh=MeshConfig(**{"fsdp": 1, **mesh}),
      )
    ],
  )


def program_of(placement, **mesh):
  experiment = experiment_of(placement, **mesh)
  devices = jax.devices()[: max(int(np.prod(list(mesh.values()))), 1)]
  return build_program(experiment, experiment.stages[0], devices)


def batch_of(program, step):
  rng = np.random.default_rng(step)
  # Few ids are common, and so a few experts get most of the tokens.
  tokens = np.minimum(rng.geometric(0.8, (8, LENGTH + 1)), VOCAB - 1)
  column = np.broadcast_to(np.arange(LENGTH), (8, LENGTH))
  zeros = np.zeros_like(column)
  batch = dict(
    tokens=tokens[:, :-1],
    targets=tokens[:, 1:],
    loss_weights=zeros + 1,
    segment_ids=zeros + 1,
    positions=column,
    modality=zeros,
    key_start=zeros,
    key_stop=column + 1,
  )
  return {
    name: jax.device_put(batch[name].astype(field.dtype), field.sharding)
    for name, field in program.batch.items()
  }


def steps(program, state, numbers):
  """The state after these steps, and the imbalance of each."""
  imbalances = []
  with jax.set_mesh(program.mesh):
    for number in numbers:
      state, metrics = program.train_step(state, batch_of(program, number), np.inf)
      imbalances.append(np.asarray(metrics.get("expert_imbalance", 0)))
  return state, imbalances


def restored(directory, program, step):
  with jax.set_mesh(program.mesh), Checkpoints(directory, 9) as checkpoints:
    return checkpoints.restore(Position(0, step, step), program.state)


def loads(state):
  return np.asarray(state.params["blocks"]["feed_forward"]["expert_load"])


def without_loads(state):
  layer = {**state.params["blocks"]["feed_forward"]}
  layer.pop("expert_load", None)
  blocks = state.params["blocks"] | {"feed_forward": layer}
  return state._replace(params=state.params | {"blocks": blocks})


@pytest.mark.slow
def test_resumes_bit_for_bit_and_on_other_devices(tmp_path):
  program = program_of("replicate", expert=4)
  with jax.set_mesh(program.mesh):
    state = program.fresh_state(program.initial_params(0))
  identity = Identity(experiment_of("replicate", expert=4), {"tokenizer.model": b""}, {})
  with Checkpoints(tmp_path, 9) as checkpoints:
    state, _ = steps(program, state, [0, 1])
    checkpoints.save(state, Position(0, 2, 2), identity)
    then = loads(state)
    checkpoints.wait()
    state, imbalances = steps(program, state, [2, 3])
    checkpoints.save(without_loads(state), Position(0, 4, 4), identity)
  before, after = imbalances[-1][0]
  assert after < before
  experts = identity.experiment.model.experts
  slots = [np.asarray(choose_slots(experts, load, 4)) for load in (then, loads(state))]
  assert (slots[0] != slots[1]).any()

  resumed, _ = steps(program, restored(tmp_path, program, 2), [2, 3])
  for one, other in zip(jax.tree.leaves(resumed), jax.tree.leaves(state), strict=True):
    np.testing.assert_array_equal(one, other)

  # On one device all experts are at home.
  alone = program_of("replicate")
  resumed, _ = steps(alone, restored(tmp_path, alone, 2), [2, 3])
  np.testing.assert_array_equal(loads(resumed), loads(state))
  for one, other in zip(jax.tree.leaves(resumed), jax.tree.leaves(state), strict=True):
    one, other = np.asarray(one), np.asarray(other)
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5 * np.abs(other).max())

  # Another policy may resume the run, and there loads are left out, or zero if they were.
  moved = dataclasses.replace(identity, experiment=experiment_of("move", expert=2))
  with Checkpoints(tmp_path, 9) as checkpoints:
    assert checkpoints.latest(moved)[0] == Position(0, 4, 4)
  home = restored(tmp_path, program_of("home"), 2)
  kept = without_loads(restored(tmp_path, program, 2))
  for one, other in zip(jax.tree.leaves(home), jax.tree.leaves(kept), strict=True):
    np.testing.assert_array_equal(one, other)
  assert not loads(restored(tmp_path, program, 4)).any()
