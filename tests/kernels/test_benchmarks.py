"""The benchmarks' records, at small sizes."""

import dataclasses

import jax
import numpy as np
import pytest

from kernels import benchmarks
from kernels.attention import attention, packed, xla
from kernels.benchmarks import timing
from kernels.benchmarks.attention import splash

ONE = benchmarks.Shape(64, 4, 4, 8, "float32")
DOCUMENTS = benchmarks.Shape(64, 4, 4, 8, "float32", 16)


@pytest.fixture(autouse=True)
def short_rounds(monkeypatch):
  monkeypatch.setattr(timing, "SECONDS_PER_ROUND", 0.0)
  monkeypatch.setattr(timing, "ROUNDS", 1)
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
  ours, *_, theirs = benchmarks.measure_attention(ONE)
  assert "forward_ms" in ours and theirs["error"] == "MemoryError: no more"


def test_splash_attention_takes_our_arguments():
  """Splash attention runs only on TPUs. Here JAX checks the shapes of forward and backward."""
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


@pytest.mark.slow
def test_ring_cases_count_what_they_skip():
  every, contiguous, zigzag, documents = benchmarks.measure_ring(8192, head_dim=8)
  assert every["ratio"] is None and every["ring"] == 8
  assert zigzag["busiest_blocks"] <= 0.57 * contiguous["busiest_blocks"]
  assert zigzag["busiest_blocks"] <= 0.55 * every["busiest_blocks"]
  assert documents["busiest_blocks"] <= 0.2 * zigzag["busiest_blocks"]
  assert documents["of"] == zigzag["case"] and documents["ratio"] > 0


def test_decode_names_its_backend_and_counts_the_bytes_of_its_cache():
  cache = benchmarks.Cache(128, 4, 2, 8, "float32")
  for kind, num_bytes in ((cache, 4), (dataclasses.replace(cache, is_int8=True), 1 + 4 / 8)):
    (record,) = benchmarks.measure_decode(kind)
    assert record["backend"] == "xla" and record["is_int8"] == kind.is_int8
    read = record["gigabytes_per_second"] * record["ms"] * 1e6
    assert read == pytest.approx(2 * 128 * 2 * 8 * num_bytes)


def test_quantised_products_count_the_bytes_of_their_weights():
  floats, *others = benchmarks.measure_quantised(benchmarks.Product(1, 128, 256, "float32"))
  assert (floats["weights"], floats["speed_ratio"]) == ("float32", 1)
  sizes = {"int8": 8 + 32 / 128, "int8_32": 8.5, "int4": 5, "int4_64": 4.5, "int4_128": 4.25}
  sizes["int4_symmetric"] = 4.5
  assert [record["weights"] for record in others] == list(sizes)
  for record, bits in zip(others, sizes.values()):
    read = record["gigabytes_per_second"] * record["ms"] * 1e6
    assert read == pytest.approx(128 * 256 * bits / 8)


def test_sizes_are_timed_and_those_that_do_not_fit_are_named():
  """On the backend that runs here. A block without keys stands in for one that does not compile."""
  sizes = [(16, 16), (32, 0), (64, 64)]
  candidates = {("attention", "xla"): {"forward": sizes, "backward": sizes}}
  records = list(benchmarks.measure_sizes([ONE], [], candidates=candidates))
  assert [record["kernel"] for record in records] == ["forward", "backward"]
  for record in records:
    assert set(record["ms"]) == {"(16, 16)", "(64, 64)"}
    assert record["row"] == f'"{record["kernel"]}": {next(iter(record["ms"]))}'
    assert "ZeroDivisionError" in record["failed"]["(32, 0)"]


def test_sizes_reach_the_kernels(monkeypatch):
  """Every XLA candidate compiles its own program, despite the cache of compiled functions."""
  seen = []
  monkeypatch.setattr(xla, "_block", lambda length, most: seen.append(most) or length)
  candidates = {("attention", "xla"): {"forward": [(8, 16), (24, 32)], "backward": [(40, 48)]}}
  list(benchmarks.measure_sizes([ONE], [], candidates=candidates))
  assert [size for size in (8, 16, 24, 32, 40, 48) if size not in seen] == []
