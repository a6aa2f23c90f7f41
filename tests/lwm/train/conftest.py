"""Runs in one test process share the programs of equal stages, which take seconds to trace."""

import pytest

from lwm.program.stage import build_program
from lwm.train import loop

_programs = {}


@pytest.fixture(autouse=True)
def shared_programs(monkeypatch):
  def build_once(experiment, stage, devices=None):
    # The model's tables are padded to what all meshes need.
    meshes = [other.mesh for other in experiment.stages]
    parts = ("model", "loss", "vqgan", "losses", "optimizer")
    settings = [getattr(experiment, part, None) for part in parts]
    key = repr((settings, stage, devices, meshes))
    if key not in _programs:
      _programs[key] = build_program(experiment, stage, devices)
    return _programs[key]

  monkeypatch.setattr(loop, "build_program", build_once)
