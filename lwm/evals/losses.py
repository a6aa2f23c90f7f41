"""Losses by position and by modality, from the likelihoods of tokens.

S tokens.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lwm.config.batch import MODALITIES
from lwm.evals.likelihood import Likelihood

_FIRST_EDGE = 64


def position_edges(context: int) -> list[int]:
  """0, powers of two from 64 on, and the context: between each two, a mean loss is reported."""
  edges = [0]
  edge = _FIRST_EDGE
  while edge < context:
    edges.append(edge)
    edge *= 2
  return [*edges, context]


def by_position(loss_S: np.ndarray, edges: Sequence[int]) -> list[float]:
  """The mean loss between each two positions.

  Args:
    loss_S: of the tokens at positions 0, 1, ..., as many as the last edge.
    edges: ascending, from 0.
  """
  return [float(loss_S[first:stop].mean()) for first, stop in zip(edges, edges[1:])]


def by_modality(
  likelihood: Likelihood, tokens: np.ndarray, loss_mask: np.ndarray, text_vocab_size: int
) -> dict[str, Any]:
  """NAME_loss, a sum in nats, and NAME_targets, for each modality of a document.

  Args:
    likelihood: of the document.
    tokens: int32 [S].
    loss_mask: bool [S], which tokens are targets.
    text_vocab_size: vision ids follow the text ids.
  """
  sums: dict[str, Any] = {}
  is_vision = tokens[1:] >= text_vocab_size
  for name, is_own in zip(MODALITIES, (~is_vision, is_vision)):
    counts = is_own & loss_mask[1:]
    sums[f"{name}_loss"] = float(likelihood.loss[counts].sum())
    sums[f"{name}_targets"] = int(counts.sum())
  return sums
