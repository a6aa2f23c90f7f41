"""Candidates, the bound that excludes some of them, and search and longest with a fake compiler."""

import collections
import dataclasses
import importlib
import itertools
import math
import types

import pytest

from configs import lwm_text_7b
from lwm.config.model import REMAT_POLICIES, ExpertsConfig
from lwm.cost.chips import GIB
from lwm.errors import UserError
from lwm.parallel.mesh import make_mesh
from lwm.parallel.sharding import MeshConfig
from lwm.plan import load, longest, plan_stage, pool, search
from lwm.plan.bound import least_memory
from lwm.plan.candidates import candidates, length_text, single_row
from lwm.plan.roofline import estimate
from tests.lwm.plan import planned

# The package exports the function of that name.
search_module = importlib.import_module("lwm.plan.search")


@pytest.fixture(scope="module")
def v5e():
  return load("v5e:2x2")


def ignore(*_):
  pass


def test_candidates_are_all_meshes_that_divide_the_model():
  experiment = planned.get_config()
  found = list(candidates(experiment, experiment.stages[0], 8))
  sizes = [candidate.stage.mesh.axis_sizes() for candidate in found]
  assert all(math.prod(mesh.values()) == 8 for mesh in sizes)
  # One row is not divided over data and fsdp; two key/value heads: tensor is 2 at most; four heads.
  meshes = {(mesh["ring"], mesh["ulysses"], mesh["tensor"]) for mesh in sizes}
  assert meshes == {(8, 1, 1), (4, 2, 1), (2, 4, 1), (4, 1, 2), (2, 2, 2)}
  assert all(math.prod(mesh) == 8 for mesh in meshes)
  policies = {(c.experiment.model.remat, c.experiment.optimizer.offload) for c in found}
  assert len(policies) * len(meshes) == len(found)
  assert ("full", True) in policies and ("none", False) in policies
  # The given experiment has not changed.
  assert experiment.stages[0].mesh == planned.get_config().stages[0].mesh


@pytest.mark.slow
@pytest.mark.parametrize("remat", ("none", "offload"))
def test_the_bound_is_below_what_is_compiled(v5e, remat):
  experiment = planned.get_config()
  experiment.model.remat = remat
  stage = experiment.stages[0]
  plan = plan_stage(experiment, stage, v5e)[0]
  least = least_memory(experiment, stage, plan.mesh)
  assert plan.memory.total / 4 < least < plan.memory.total


@pytest.mark.parametrize(
  "sizes, compiled",
  [(dict(ulysses=4), 5030), (dict(ulysses=2, tensor=2), 5470), (dict(ring=4), 11316)],
  ids=("ulysses", "ulysses and tensor", "ring"),
)
def test_the_bound_is_below_what_was_compiled_of_a_larger_model(sizes, compiled):
  """MiB on v5e:2x2, compiled once with libtpu 0.0.48, which took minutes each.

  These models don't fit into a vector memory.
  """
  experiment = planned.get_config()
  model = experiment.model
  model.width = model.text_vocab_size = 2048
  model.feed_forward_width, model.head_dim = 4096, 128
  model.num_heads = model.num_kv_heads = 16
  stage = single_row(experiment, 2**18)
  least = least_memory(experiment, stage, MeshConfig(fsdp=1, **sizes).axis_sizes()) / 2**20
  assert compiled / 2 < least < compiled


def test_the_bound_of_a_7b_step_by_hand():
  experiment = lwm_text_7b.get_config()
  experiment.model.remat = "full"
  stage = single_row(experiment, 2**25)
  sizes = MeshConfig(fsdp=1, ring=512).axis_sizes()
  full = least_memory(experiment, stage, sizes)
  # Saved inputs of 32 blocks, 65536 tokens per device in bfloat16.
  experiment.model.remat = "offload"
  assert full - least_memory(experiment, stage, sizes) == 32 * 65536 * 4096 * 2
  # Two moments of 1/512 of the parameters.
  with_moments = least_memory(experiment, stage, sizes)
  experiment.optimizer.offload = True
  parameters = 6_738_149_376  # Without the norms.
  assert with_moments - least_memory(experiment, stage, sizes) == pytest.approx(
    8 * parameters / 512, rel=1e-3
  )


@dataclasses.dataclass
class FakeCompiler:
  """Returns plans that fit if `fits` says so, refuses if `refuses` says so, and records calls."""

  fits: object
  refuses: object = lambda experiment: False
  total: int = 0
  asked: list = dataclasses.field(default_factory=list)

  def __call__(self, experiment, stage, topology):
    self.asked.append(experiment)
    if self.refuses(experiment):
      raise UserError("XLA cannot compile this")
    mesh = stage.mesh.axis_sizes()
    plan = types.SimpleNamespace(
      stage=stage,
      mesh=mesh,
      remat=experiment.model.remat,
      memory=types.SimpleNamespace(fits=self.fits(experiment), total=self.total),
      roofline=estimate(experiment, stage, make_mesh(stage.mesh, topology.devices), topology),
    )
    return plan, None, None


def compiler(monkeypatch, **settings):
  fake = FakeCompiler(**settings)
  monkeypatch.setattr(search_module, "plan_stage", fake)
  return fake


def test_search_compiles_the_fastest_first_and_yields_what_fits(monkeypatch, v5e):
  fake = compiler(
    monkeypatch,
    fits=lambda experiment: experiment.model.remat == "full",
    refuses=lambda experiment: experiment.model.remat == "dots",
  )
  experiment, told = planned.get_config(), []
  plans = list(
    search(experiment, experiment.stages[0], v5e, lambda *what: told.append(what), tries=100)
  )
  assert plans and all(plan.remat == "full" for plan in plans)
  assert len(fake.asked) == len(told) > len(plans)
  order = [
    (search_module._step_seconds(candidate, v5e), candidate.least_memory)
    for candidate, _, _ in told
  ]
  assert order == sorted(order)
  refused = [reason for candidate, plan, reason in told if plan is None]
  assert refused and set(refused) == {"XLA cannot compile this"}


def test_search_ends_after_its_tries_and_compiles_nothing_that_cannot_fit(monkeypatch, v5e):
  fake = compiler(monkeypatch, fits=lambda experiment: False)
  experiment = planned.get_config()
  assert not list(search(experiment, experiment.stages[0], v5e, ignore, tries=3))
  assert len(fake.asked) == 3
  tiny = dataclasses.replace(v5e, chip=dataclasses.replace(v5e.chip, memory=1000))
  assert not list(search(experiment, experiment.stages[0], tiny, ignore, tries=3))
  assert len(fake.asked) == 3
  no_host = dataclasses.replace(v5e, chip=dataclasses.replace(v5e.chip, host_memory=0))
  assert not list(search(experiment, experiment.stages[0], no_host, ignore, tries=100))
  for asked in fake.asked[3:]:
    assert not asked.optimizer.offload and "offload" not in asked.model.remat


def test_search_learns_from_what_did_not_fit(monkeypatch, v5e):
  """One candidate per remat policy with a ring, and one without, need far more than was counted."""
  fake = compiler(monkeypatch, fits=lambda experiment: False, total=1000 * GIB)
  experiment = planned.get_config()
  assert not list(search(experiment, experiment.stages[0], v5e, ignore, tries=100))
  asked = {(e.model.remat, e.stages[0].mesh.ring > 1) for e in fake.asked}
  assert len(fake.asked) == len(asked)
  assert asked == set(itertools.product(REMAT_POLICIES, (False, True)))


def test_a_pool_has_the_fastest_mesh_for_each_number_of_devices_of_experts(monkeypatch, v5e):
  """Of 1, 2 and 4 devices that divide the experts; then no mesh with two of them fits."""
  experiment = planned.get_config()
  experiment.model.experts = ExpertsConfig(8, 1, width=4096)
  stage = experiment.stages[0]
  stage.tokens_per_batch = 4 * stage.sequence_length
  number = lambda mesh: mesh["expert"] * mesh["ulysses"]
  seconds = collections.defaultdict(list)
  for candidate in candidates(experiment, stage, 4, own_policies=True):
    model, optimizer = candidate.experiment.model, candidate.experiment.optimizer
    assert (model.remat, model.head_groups, optimizer.offload) == ("full", 1, False)
    mesh = candidate.stage.mesh.axis_sizes()
    seconds[number(mesh)].append(search_module._step_seconds(candidate, v5e))
  fastest = {n: min(times) for n, times in seconds.items()}
  assert fastest[1] > fastest[2] > fastest[4] and max(seconds[2]) > fastest[1]
  for left_out in (None, 2):
    fake = compiler(monkeypatch, fits=lambda e: number(e.stages[0].mesh.axis_sizes()) != left_out)
    plans = list(pool(experiment, stage, v5e, ignore, tries=3))
    found = {number(plan.mesh): plan.roofline.step_seconds for plan in plans}
    assert list(found) == [n for n in (1, 2, 4) if n != left_out]
    assert found == {n: fastest[n] for n in found}
    # Meshes that are slower than one with fewer devices are not compiled.
    assert [number(e.stages[0].mesh.axis_sizes()) for e in fake.asked] == [1, 2, 4]


@pytest.mark.parametrize("limit", (2**12, 2**21, 2**30), ids=("low", "middle", "high"))
def test_longest_finds_the_last_power_of_two_from_either_side(monkeypatch, v5e, limit):
  """The lower bound may allow longer or shorter rows than the compiler."""
  chip = dataclasses.replace(v5e.chip, memory=GIB)
  fake = compiler(
    monkeypatch, fits=lambda experiment: experiment.stages[0].sequence_length <= limit
  )
  machine = dataclasses.replace(v5e, chip=chip)
  plan = longest(planned.get_config(), machine, ignore, tries=2)
  assert plan.stage.sequence_length == plan.stage.tokens_per_batch == limit
  assert plan.mesh["data"] == plan.mesh["fsdp"] == 1
  # Twice the length was tried and does not fit.
  lengths = [experiment.stages[0].sequence_length for experiment in fake.asked]
  assert lengths.count(2 * limit) == 2


def test_longest_of_nothing(monkeypatch, v5e):
  compiler(monkeypatch, fits=lambda experiment: False)
  assert longest(planned.get_config(), v5e, ignore, tries=1) is None


@pytest.mark.slow
def test_longest_of_a_real_compiler():
  """With 12 MiB per chip."""
  machine = load("cpu:4")
  machine = dataclasses.replace(machine, chip=dataclasses.replace(machine.chip, memory=12 << 20))
  plan = longest(planned.get_config(), machine, ignore, tries=1)
  assert plan.memory.fits and plan.memory.capacity == 12 << 20
  assert plan.stage.sequence_length >= 2**12
  assert plan.stage.name == length_text(plan.stage.sequence_length)


@pytest.mark.parametrize(
  "length, expected", [(512, "512"), (2**15, "32K"), (3 << 19, "1.5M"), (2**25, "32M")]
)
def test_lengths_in_usual_units(length, expected):
  assert length_text(length) == expected
