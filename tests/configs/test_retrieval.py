"""The variants of configs/retrieval.py differ only in what they compare."""

import dataclasses

import pytest

from configs import retrieval
from lwm.config.experiment import Experiment
from lwm.model.flops import train_flops


def flops(experiment: Experiment) -> float:
  """Model FLOPs of all steps; a document fills a row and has nine targets per answer."""
  total = 0.0
  for stage in experiment.stages:
    length = stage.sequence_length
    # One to four answers, as many as there is room for.
    answers = {64: 1.0, 128: 1.5}.get(length, 2.5)
    row = train_flops(
      experiment.model,
      tokens=length,
      attended_pairs=length * (length + 1) / 2,
      text_targets=9 * answers,
    )
    total += stage.steps * stage.rows_per_batch * row
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
