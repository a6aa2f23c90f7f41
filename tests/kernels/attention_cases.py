"""Attention cases and an independent float64 judge, shared by the tests of every backend and ring.

B batch, Q/K query/key length, H query heads, G key/value heads, D head_dim.
"""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np


def causal(B, Q, K):
  return np.zeros((B, Q), np.int32), np.tile(np.arange(1, Q + 1, dtype=np.int32), (B, 1))


def bidirectional(B, Q, K):
  return np.zeros((B, Q), np.int32), np.full((B, Q), K, np.int32)


def segment_ids(B, S):
  """Documents of uneven lengths, more of them in later rows, and some padding at the end."""
  rows = []
  for b in range(B):
    bounds = np.linspace(0, S - 3 * b, 3 + 2 * b, dtype=int) ** 2 // max(S - 3 * b, 1)
    rows.append(np.searchsorted(bounds, np.arange(S), side="right"))
    rows[-1][S - 3 * b :] = 0
  return np.stack(rows).astype(np.int32)


def packed(B, Q, K):
  ids = segment_ids(B, Q)
  start = np.array([[np.argmax(row == i) for i in row] for row in ids])
  is_token = ids > 0
  stop = np.arange(1, Q + 1) * is_token
  return (start * is_token).astype(np.int32), stop.astype(np.int32)


def sliding_window(B, Q, K):
  start, stop = packed(B, Q, K)
  return np.maximum(start, stop - 5), stop


def frames(B, Q, K):
  """Causal over frames of six tokens, bidirectional inside a frame."""
  start, _ = causal(B, Q, K)
  stop = np.minimum((np.arange(Q) // 6 + 1) * 6, K)
  return start, np.tile(stop.astype(np.int32), (B, 1))


def decode(B, Q, K):
  """Rows of different lengths; the cache beyond a row's length is not seen."""
  stop = np.linspace(K, K // 3, B, dtype=np.int32)[:, None] - np.arange(Q, dtype=np.int32)[::-1]
  return np.full((B, Q), 2, np.int32), stop


def empty_rows(B, Q, K):
  """Single empty query rows, an empty block, and an empty batch row."""
  start, stop = causal(B, Q, K)
  stop[:, ::3] = 0
  stop[0, Q // 2 :] = 0
  stop[-1] = 0
  return start, stop


@dataclasses.dataclass(frozen=True)
class Case:
  """A shape and a mask. Cases of one shape share a compiled program, because the mask is data."""

  name: str
  mask: Callable[[int, int, int], tuple[np.ndarray, np.ndarray]]
  B: int = 3
  Q: int = 37
  K: int = 37
  H: int = 4
  G: int = 2
  D: int = 8
  soft_cap: float | None = None

  def arrays(self, seed=0):
    """Returns query, key, value, (start, stop), and the cotangents of both results, in float64."""
    random = np.random.default_rng(seed)
    shapes = dict(q=(self.Q, self.H), k=(self.K, self.G), v=(self.K, self.G), do=(self.Q, self.H))
    query, key, value, out_cotangent = (
      random.standard_normal((self.B, *shape, self.D)) for shape in shapes.values()
    )
    log_sum_exp_cotangent = random.standard_normal((self.B, self.Q, self.H))
    intervals = self.mask(self.B, self.Q, self.K)
    return query, key, value, intervals, out_cotangent, log_sum_exp_cotangent


CASES = (
  Case("causal", causal),
  Case("packed", packed),
  Case("sliding_window", sliding_window),
  Case("frames", frames),
  Case("bidirectional", bidirectional),
  Case("empty_rows", empty_rows),
  Case("soft_cap", packed, soft_cap=1.5),
  Case("sizes_divide_blocks", packed, B=2, Q=48, K=48),
  Case("multi_head", causal, B=1, H=3, G=3),
  Case("multi_query", packed, B=1, H=4, G=1),
  Case("fewer_queries_than_keys", bidirectional, Q=7, K=45),
  Case("decode_one", decode, Q=1, K=50),
  Case("decode_few", decode, Q=4, K=50),
  Case("one_token", causal, Q=1, K=1),
)


def judge(query, key, value, intervals, out_cotangent, log_sum_exp_cotangent, *, soft_cap=None):
  """Computes out, log-sum-exp and three gradients in float64, head by head and row by row."""
  B, Q, H, D = query.shape
  start, stop = intervals
  scale = D**-0.5
  out, log_sum_exp = np.zeros_like(query), np.full((B, Q, H), -np.inf)
  grads = tuple(np.zeros_like(array) for array in (query, key, value))
  for b, i, h in np.ndindex(B, Q, H):
    if stop[b, i] <= start[b, i]:
      continue
    g = h // (H // key.shape[2])
    keys, values = (array[b, start[b, i] : stop[b, i], g] for array in (key, value))
    raw = scale * keys @ query[b, i, h]
    scores = raw if soft_cap is None else soft_cap * np.tanh(raw / soft_cap)
    maximum = scores.max()
    log_sum_exp[b, i, h] = maximum + np.log(np.exp(scores - maximum).sum())
    weights = np.exp(scores - log_sum_exp[b, i, h])
    out[b, i, h] = weights @ values

    cotangent = out_cotangent[b, i, h]
    scores_grad = weights * (
      values @ cotangent - out[b, i, h] @ cotangent + log_sum_exp_cotangent[b, i, h]
    )
    if soft_cap is not None:
      scores_grad *= 1 - np.tanh(raw / soft_cap) ** 2
    grads[0][b, i, h] = scale * scores_grad @ keys
    grads[1][b, start[b, i] : stop[b, i], g] += scale * np.outer(scores_grad, query[b, i, h])
    grads[2][b, start[b, i] : stop[b, i], g] += np.outer(weights, cotangent)
  return out, log_sum_exp, *grads


def exponentials(jaxpr) -> int:
  """Counts `exp` in a program: a forward pass has two or more, a backward pass has one."""
  count = 0
  for equation in jaxpr.eqns:
    count += equation.primitive.name == "exp"
    for leaf in jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, "jaxpr")):
      inner = getattr(leaf, "jaxpr", leaf)
      count += exponentials(inner) if hasattr(inner, "eqns") else 0
  return count
