"""The benchmarks measure what they say, at sizes that take no time."""

import jax
import numpy as np
import pytest

from kernels import benchmarks
from kernels.attention import attention
from kernels.attention import packed
from kernels.benchmarks import timing
from kernels.benchmarks.attention import splash

ONE = benchmarks.Shape(64, 4, 4, 8, "float32")
DOCUMENTS = benchmarks.Shape(64, 4, 4, 8, "float32", 16)


@pytest.fixture(autouse=True)
def short_rounds(monkeypatch):
  monkeypatch.setattr(timing, "SECONDS_A_ROUND", 0.0)
  monkeypatch.setattr(timing, "ROUNDS", 1)


@pytest.mark.parametrize("shape, pairs", ((ONE, 64 * 65 / 2), (DOCUMENTS, None)))
def test_peers_agree_and_speed_is_of_the_pairs_seen(shape, pairs):
  if pairs is None:
    lengths = np.unique(shape.segment_ids(), return_counts=True)[1]
    assert len(lengths) > 2 and lengths.sum() == 64
    pairs = (lengths * (lengths + 1) / 2).sum()
  records = benchmarks.measure_attention(shape)
  assert [record["peer"] for record in records] == ["ours xla", "jax.nn xla"]
  for record in records:
    assert "error" not in record and record["difference"] < 1e-5
    for direction, products in (("forward", 2), ("backward", 5)):
      flops = record[f"{direction}_tflops"] * record[f"{direction}_ms"] * 1e9
      assert flops == pytest.approx(products * 2 * pairs * 4 * 8)


def test_a_peer_that_fails_does_not_end_the_run(monkeypatch):
  def fail(*_, **options):
    raise MemoryError("no more\nat all")

  monkeypatch.setattr(jax.nn, "dot_product_attention", fail)
  ours, theirs = benchmarks.measure_attention(ONE)
  assert "forward_ms" in ours and theirs["error"] == "MemoryError: no more"


def test_splash_attention_is_called_as_it_wants_to_be():
  """It runs on TPUs alone; here JAX checks the shapes of its forward and backward."""
  shape = benchmarks.Shape(256, 2, 2, 128, "bfloat16", 64)
  *arrays, cotangent = shape.arrays()
  peer = splash(shape)

  def with_grads(*arrays):
    out, pull_back = jax.vjp(peer, *arrays)
    return out, *pull_back(cotangent)

  results = jax.eval_shape(with_grads, *arrays)
  ours = jax.eval_shape(lambda *qkv: attention(*qkv, packed(shape.segment_ids()[None]))[0], *arrays)
  assert results[0].shape == ours.shape
  assert [r.shape for r in results[1:]] == [a.shape for a in arrays]


def test_ring_cases_count_what_they_skip():
  every, contiguous, zigzag, documents = benchmarks.measure_ring(16384, head_dim=8)
  assert every["ratio"] is None and every["ring"] == 8
  assert zigzag["busiest_blocks"] <= 0.57 * contiguous["busiest_blocks"]
  assert zigzag["busiest_blocks"] <= 0.55 * every["busiest_blocks"]
  assert documents["busiest_blocks"] <= 0.2 * zigzag["busiest_blocks"]
  assert documents["of"] == zigzag["case"] and documents["ratio"] > 0
