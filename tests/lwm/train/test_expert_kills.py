"""A run with replicated experts is killed between two placements and resumes on fewer devices.

T steps, L layers of experts, E experts, P slots.
"""

import os
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.experts.slots import Slots
from lwm.errors import ResumeError
from lwm.model.placement import choose_slots, device_loads
from lwm.parallel.sharding import MeshConfig
from lwm.report.metrics import read_metrics
from lwm.train.mesh_choice import RecordedLoads
from tests import programs
from tests.lwm.train.test_faults import run
from tests.lwm.train.test_resume import (
  complete,
  final_state,
  kill_when,
  steps_done,
  what_was_learnt,
)

CONFIG = pathlib.Path(__file__).with_name("replicated.py")


@pytest.fixture
def train(prepared, monkeypatch):
  """Trains until a step, and is told to stop there."""

  def until(step, workdir, devices, placement="replicate", **mesh):
    experiment = runpy.run_path(str(CONFIG))["get_config"](str(prepared))
    experiment.model.experts.placement = placement
    experiment.stages[0].mesh = MeshConfig(fsdp=1, **mesh)
    with pytest.raises(ResumeError, match=f"stopped after step {step} of"):
      run(experiment, workdir, monkeypatch, stop_at=step - 1, devices=devices)
    return experiment.model.experts

  return until


def recorded(workdir, name: str) -> np.ndarray:
  """What is on record of each step."""
  records = read_metrics(workdir / "metrics.jsonl")
  return np.array([record[name] for record in records if record["kind"] == "train"])


def loads(workdir) -> np.ndarray:
  """Choices of each expert, [T, L, E]."""
  return np.sum(recorded(workdir, "expert_load"), axis=2)


def slots(experts, load_TxLxE: np.ndarray, devices: int) -> Slots:
  """The slots of the layer in every step but the first, which has no loads."""
  mean_LxE, means = np.zeros(load_TxLxE.shape[1:]), []
  for load_LxE in load_TxLxE[:-1]:
    relative_LxE = load_LxE / load_LxE.mean(axis=1, keepdims=True)
    mean_LxE = experts.load_decay * mean_LxE + (1 - experts.load_decay) * relative_LxE
    means.append(mean_LxE)
  return choose_slots(experts, jnp.asarray(np.concatenate(means), jnp.float32), devices)


def leaves(workdir, step: int) -> dict[str, np.ndarray]:
  """Parameters and moments after a step, by path, without the mean loads of experts."""
  flat = jax.tree_util.tree_leaves_with_path(final_state(workdir, step))
  named = {jax.tree_util.keystr(path): leaf for path, leaf in flat}
  return {name: leaf for name, leaf in named.items() if "expert_load" not in name}


def largest_deviation(name: str, one: np.ndarray, other: np.ndarray) -> float:
  """As a multiple of the largest element; of each expert alone where experts have weights."""
  axes = (2, 3) if "'expert_" in name else None
  return np.max(np.max(np.abs(one - other), axis=axes) / np.max(np.abs(other), axis=axes))


@pytest.mark.slow
def test_killed_between_placements_and_resumed_on_other_devices(prepared, train, tmp_path):
  """Another mesh adds up in another order, so two runs are compared with the killed one.

  One is told to stop where the killed one resumes, and resumes on the same devices: its updates are
  the same, bit for bit. The other is never disturbed, and computes experts at home: its updates are
  the same but for the order of sums, by the largest deviation of any expert.
  """
  killed, stopped, at_home = (tmp_path / name for name in ("killed", "stopped", "home"))
  config = f"--config={CONFIG}:{prepared}"
  process = programs.Program(
    "experiments.train", config, f"--workdir={killed}", environment=dict(os.environ)
  )
  # A checkpoint is complete, and later steps are on record.
  kill_when(process, lambda: 0 < max(complete(killed), default=0) < steps_done(killed)[-1])
  resumed, lost = complete(killed)[-1], steps_done(killed)[-1]
  last = lost + 4
  lost_TxLxE = loads(killed)

  elsewhere = dict(devices=4, expert=2, ulysses=2)
  experts = train(last, killed, **elsewhere)
  train(resumed, stopped, devices=8, expert=8)
  train(last, stopped, **elsewhere)
  assert what_was_learnt(killed) == what_was_learnt(stopped)
  assert steps_done(killed) == list(range(1, last + 1))
  states = [jax.tree.leaves(final_state(workdir, last)) for workdir in (killed, stopped)]
  for one, other in zip(*states, strict=True):
    np.testing.assert_array_equal(one, other)

  at_home_experts = train(last, at_home, devices=8, placement="home", expert=8)
  ours, theirs = leaves(killed, last), leaves(at_home, last)
  assert ours.keys() == theirs.keys()
  assert sum("'expert_" in name for name in ours) == 9  # Three weights, with two moments each.
  deviations = {name: largest_deviation(name, ours[name], theirs[name]) for name in ours}
  assert max(deviations.values()) < 1e-5, deviations

  # All runs had the same loads, also in the steps that were lost.
  load_TxLxE = loads(killed)
  np.testing.assert_array_equal(load_TxLxE, loads(at_home))
  np.testing.assert_array_equal(load_TxLxE[:lost], lost_TxLxE)
  # The kill came between two placements, and loads from before it placed experts after it.
  before_P, after_P = slots(experts, load_TxLxE, 8).expert_P[resumed - 2 : resumed]
  assert (before_P != after_P).any()
  placed = jax.tree.map(lambda array: array[resumed - 1 :], slots(experts, load_TxLxE, 4))
  assert (placed.expert_P[1:] != placed.expert_P[:-1]).any()
  load_Txn = jax.vmap(lambda load_E, own: device_loads(load_E, own, 4))(
    load_TxLxE[resumed:, 0], placed
  )
  home_T, placed_T = recorded(killed, "expert_imbalance")[resumed:, 0].T
  np.testing.assert_allclose(load_Txn.max(axis=1) / load_Txn.mean(axis=1), placed_T, rtol=1e-5)
  assert placed_T.mean() < 0.8 * home_T.mean()

  # The planner replays what was recorded.
  sizes = MeshConfig(fsdp=1, expert=8).axis_sizes()
  for workdir, own, steps in ((killed, experts, resumed), (at_home, at_home_experts, last)):
    imbalance = RecordedLoads(own, load_TxLxE[:steps]).imbalance(sizes)
    recorded_T = recorded(workdir, "expert_imbalance")[1:steps, 0, 1]
    assert imbalance == pytest.approx(recorded_T.mean(), rel=1e-5)
