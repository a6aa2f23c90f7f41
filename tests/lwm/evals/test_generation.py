"""Distances between sets of frames, against their definitions."""

import numpy as np
import pytest
import scipy.linalg

from lwm.evals.generation import code_divergence, frechet_distance


def test_frechet_distance_is_that_of_the_paper():
  random = np.random.default_rng(0)
  ours, theirs = random.normal(size=(40, 5)), random.normal(1, 2, size=(30, 5))
  covariances = np.cov(ours, rowvar=False), np.cov(theirs, rowvar=False)
  root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
  means = np.square(ours.mean(0) - theirs.mean(0)).sum()
  expected = means + np.trace(covariances[0] + covariances[1] - 2 * root)
  assert frechet_distance(ours, theirs) == pytest.approx(expected)
  assert frechet_distance(theirs, ours) == pytest.approx(expected)
  assert frechet_distance(ours, ours[::-1]) == pytest.approx(0, abs=1e-9)
  # Fewer frames than features: the covariance has no full rank.
  assert frechet_distance(ours[:3], ours[:3] + 1) == pytest.approx(5)


def test_divergence_of_codes_is_between_0_and_1_bit():
  assert code_divergence(np.array([0, 1]), np.array([[1, 0, 0, 1]]), 4) == pytest.approx(0)
  assert code_divergence(np.array([0, 1]), np.array([2, 3]), 4) == pytest.approx(1)
  assert code_divergence(np.array([0]), np.array([0, 1]), 4) == pytest.approx(
    0.5 * np.log2(1 / 0.75) + 0.5 * (0.5 * np.log2(0.5 / 0.75) + 0.5 * np.log2(0.5 / 0.25))
  )
