"""The README's tables, of an experiment small enough to be compiled in seconds."""

import dataclasses
import functools
import json

import pytest

from experiments import plan_tables
from lwm.plan import load, plan_stage
from tests.lwm.plan import planned


@pytest.fixture(autouse=True)
def small_chips(monkeypatch):
  """Chips of 20 MiB."""

  def load_small(name):
    machine = load(name)
    return dataclasses.replace(machine, chip=dataclasses.replace(machine.chip, memory=20 << 20))

  monkeypatch.setattr(plan_tables, "load", load_small)


@pytest.mark.slow
def test_recipes_search_where_the_own_mesh_does_not_fit():
  def too_large():
    experiment = planned.get_config()
    # Keeps everything: more than the chips have.
    experiment.model.remat = "none"
    return experiment

  cases = ((planned.get_config, ("cpu:4",)), (too_large, ("cpu:4",)))
  tried = []
  head, own, found = plan_tables.recipes(lambda *what: tried.append(what), 4, False, cases)
  assert head.split()[:2] == ["config", "stage"]
  assert own.split()[:2] == found.split()[:2] == ["planned", "long"]
  assert "ring 2 x tensor 2" in own and " yes " in own
  assert " yes " in found and "none" not in found
  assert tried


@pytest.mark.slow
def test_longest_against_the_paper(monkeypatch):
  @functools.cache
  def compiled(topology):
    small = planned.get_config()
    return plan_stage(small, small.stages[0], topology)[0]

  def found(experiment, topology, report_try, tries):
    assert experiment.model.num_layers == 4 and tries == 1
    return compiled(topology)

  monkeypatch.setattr(plan_tables, "longest", found)
  case = plan_tables.Contest("tiny", lambda: planned.get_config().model, "cpu:4", 2048)
  (line,) = plan_tables.longest_contexts(lambda *what: None, 1, True, (case,))
  row = json.loads(line)
  assert (row["longest"], row["paper"], row["ratio"]) == (8192, 2048, 4)
  assert row["plan"]["fits"] and row["plan"]["sequence_length"] == 8192
  _, line = plan_tables.longest_contexts(lambda *what: None, 1, False, (case,))
  assert line.split()[:4] == ["tiny", "8K", "2K", "4x"]
