"""The variants of configs/retrieval.py differ only in what they compare."""

import dataclasses

import pytest

from configs import retrieval
from lwm.config.experiment import Experiment
from lwm.model.flops import train_flops


def flops(experiment: Experiment) -> float:
  """Model FLOPs of all steps; documents fill a row, and each has nine targets."""
  total = 0.0
  for stage in experiment.stages:
    weights = sum(entry.weight for entry in stage.mixture)
    for entry in stage.mixture:
      length = int(entry.dataset.removeprefix("needles_"))
      documents = stage.sequence_length // length
      row = train_flops(
        experiment.model,
        tokens=stage.sequence_length,
        attended_pairs=documents * length * (length + 1) / 2,
        text_targets=9 * documents,
      )
      total += stage.steps * stage.rows_per_batch * entry.weight / weights * row
  return total


def test_variants_compare_theta_and_context_at_equal_flops():
  stages, fixed, long = map(retrieval.get_config, ("stages", "fixed_theta", "long"))
  assert flops(long) == pytest.approx(flops(stages), rel=0.005)
  assert [stage.sequence_length for stage in long.stages] == [16 * 64]
  assert long.stages[0].rope_theta == stages.stages[-1].rope_theta
  first, *later = stages.stages
  assert stages.stages[-1].sequence_length == 16 * first.sequence_length
  assert fixed.stages == [
    first,
    *(dataclasses.replace(stage, rope_theta=first.rope_theta) for stage in later),
  ]
  for experiment in (fixed, long):
    assert dataclasses.replace(experiment, stages=stages.stages) == stages
