import jax
import pytest

from configs import models
from lwm.infer import benchmark
from lwm.model import build
from lwm.parallel.mesh import make_mesh
from lwm.parallel.sharding import MeshConfig, ShardingRules


@pytest.mark.slow
def test_bytes_and_flops_of_the_measured_phases(monkeypatch):
  monkeypatch.setattr(benchmark, "peak_flops", lambda device, dtype: 1e12)
  monkeypatch.setattr(benchmark, "_memory_bandwidth", lambda device: 1e10)
  monkeypatch.setattr(benchmark, "CACHE_FORMS", ("int8",))
  config = models.debug()
  model = build(config, ShardingRules.inference(few_tokens=True))
  with jax.set_mesh(make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])):
    params = benchmark.random_params(model, "bfloat16")
    prefill, decode, plain = benchmark.measure_generation(model, params, 1e4, [128])
  assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16", "float32"}
  assert [prefill["phase"], decode["phase"]] == ["prefill", "decode"]
  weights = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
  flops = 2 * weights * 128 + 2 * 4 * 32 * (128 * 129 / 2)
  per_second = prefill["gigaflops_per_second"] * 1e9
  assert per_second / prefill["tokens_per_second"] == pytest.approx(flops / 128)
  assert prefill["share_of_peak"] == pytest.approx(per_second / 1e12)
  # Keys and values of two heads in each of two layers, and their scales.
  cache = 2 * 2 * 2 * 128 * (8 + 4)
  head, norms = config.vocab_size * 32, 5 * 32
  moved = decode["gigabytes_per_second"] * 1e9 / decode["tokens_per_second"]
  assert moved == pytest.approx(2 * (weights + head) + 4 * norms + cache)
  assert decode["share_of_bandwidth"] == pytest.approx(decode["gigabytes_per_second"] / 10)
  assert plain["phase"] == "loop without a cache" and plain["tokens_per_second"] > 0
