"""The choice among a pool of meshes by recorded loads."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from lwm.config.experiment import Stage
from lwm.config.model import ExpertsConfig
from lwm.errors import UserError
from lwm.parallel.sharding import MeshConfig
from lwm.train.mesh_choice import PooledMesh, RecordedLoads, ranked, with_chosen_meshes
from tests.lwm.plan import planned

LOAD_E = [8, 1, 1, 1, 1, 1, 1, 2]


def sizes(**mesh) -> dict[str, int]:
  return MeshConfig(**{"fsdp": 1, **mesh}).axis_sizes()


@pytest.mark.parametrize(
  "mesh, largest",
  [
    (sizes(fsdp=8), 1),
    (sizes(expert=2, data=2), 11 / 8),
    (sizes(expert=2, ulysses=2), 9 / 4),
    (sizes(expert=8), 8 / 2),
  ],
)
def test_largest_load_of_a_device_by_hand(mesh, largest):
  """Two layers, of which the second one is balanced, and padding in the first step."""
  load_TxLxE = np.array([[[0] * 8] * 2, [LOAD_E, [3] * 8], [LOAD_E, [5] * 8]])
  loads = RecordedLoads(ExpertsConfig(8, 2), load_TxLxE)
  assert loads.imbalance(mesh) == pytest.approx((largest + 1) / 2)


def test_copies_follow_the_steps_before():
  """The hottest expert has a copy if it was the hottest before."""
  experts = ExpertsConfig(8, 2, placement="replicate", load_decay=0.0)
  steady, turned = [[LOAD_E], [LOAD_E]], [[LOAD_E[::-1]], [LOAD_E]]
  largest = [
    RecordedLoads(experts, np.array(load)).imbalance(sizes(expert=8)) for load in (steady, turned)
  ]
  assert largest[0] < 2 and largest[1] >= 4


def plan_of(seconds: float, expert_seconds: float, stage: str = "long", **mesh) -> dict:
  roofline = {"step_seconds": seconds, "expert_seconds": expert_seconds}
  return {"stage": stage, "mesh": sizes(**mesh), "roofline": roofline}


@pytest.fixture
def experiment():
  experiment = planned.get_config()
  experiment.model.experts = ExpertsConfig(8, 2)
  short = dataclasses.replace(experiment.stages[0], name="short")
  return dataclasses.replace(experiment, stages=[short, *experiment.stages])


@pytest.fixture
def pool(tmp_path) -> pathlib.Path:
  path = tmp_path / "pool.jsonl"
  plans = [
    plan_of(2.0, 1.0, fsdp=8),
    plan_of(1.0, 0.5, expert=8),
    plan_of(0.5, 0.5, expert=4),
    plan_of(9.0, 0.5, stage="other", expert=8),
  ]
  path.write_text("".join(json.dumps(plan) + "\n" for plan in plans))
  return path


def record(workdir: pathlib.Path, load_E, layers: int = 4) -> None:
  workdir.mkdir(exist_ok=True)
  step = {"kind": "train", "total_steps": 1, "expert_load": [[load_E, [0] * 8]] * layers}
  (workdir / "metrics.jsonl").write_text(2 * (json.dumps(step) + "\n"))


@pytest.mark.parametrize(
  "load_E, num_devices, mesh",
  [
    # Before the first steps, and with equal loads.
    (None, 8, dict(expert=8)),
    ([2] * 8, 8, dict(expert=8)),
    # 1 + 3 x 0.5 seconds, and 2.
    (LOAD_E, 8, dict(fsdp=8)),
    (LOAD_E, 4, dict(expert=4)),
    # Of no mesh: that of the experiment stays.
    (LOAD_E, 2, dict(ring=2, tensor=2)),
  ],
)
def test_each_stage_takes_the_fastest_mesh(experiment, pool, tmp_path, load_E, num_devices, mesh):
  if load_E:
    record(tmp_path, load_E)
  chosen, notes = with_chosen_meshes(experiment, pool, tmp_path, num_devices)
  short, long = chosen.stages
  assert isinstance(long, Stage) and long.mesh.axis_sizes() == sizes(**mesh)
  assert short == experiment.stages[0] and experiment.stages[1].mesh.ring == 2
  assert len(notes) == (num_devices > 2)
  assert dataclasses.replace(chosen, stages=experiment.stages) == experiment


def test_ranking_is_by_the_loads_of_the_run(experiment):
  loads = RecordedLoads(experiment.model.experts, np.array([[LOAD_E]] * 2))
  meshes = [PooledMesh.of(plan_of(1, 0.5, expert=8)), PooledMesh.of(plan_of(2, 1, fsdp=8))]
  (first, one), (second, four) = ranked(meshes, loads)
  assert first.sizes["fsdp"] == second.sizes["expert"] == 8
  assert (one, four) == (pytest.approx(1), pytest.approx(4))
  assert (first.seconds(one), second.seconds(four)) == (pytest.approx(2), pytest.approx(2.5))
  assert [mesh.step_seconds for mesh, _ in ranked(meshes, None)] == [1, 2]


def test_what_is_wrong_is_one_sentence(experiment, pool, tmp_path):
  with pytest.raises(UserError, match="absent has no plans: write them with"):
    with_chosen_meshes(experiment, tmp_path / "absent", tmp_path, 8)
  with pytest.raises(UserError, match="--pool is for models with experts"):
    with_chosen_meshes(planned.get_config(), pool, tmp_path, 8)
  record(tmp_path, LOAD_E, layers=3)
  with pytest.raises(UserError, match="has the loads of 3 layers of 8 experts, but this model"):
    with_chosen_meshes(experiment, pool, tmp_path, 8)
