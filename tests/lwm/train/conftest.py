"""Runs in one test process share the programs of equal stages, which take seconds to trace."""

import pytest

from lwm.program.stage import build_program
from lwm.train import loop

_programs = {}


@pytest.fixture(autouse=True)
def shared_programs(monkeypatch):
  def build_once(experiment, stage, devices=None):
    settings = experiment.model, experiment.optimizer, experiment.loss, stage, devices
    # The model's tables are padded to what all meshes need.
    key = repr((settings, [other.mesh for other in experiment.stages]))
    if key not in _programs:
      _programs[key] = build_program(experiment, stage, devices)
    return _programs[key]

  monkeypatch.setattr(loop, "build_program", build_once)
