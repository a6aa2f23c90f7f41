"""The speed of the engine, compared with the limits of the devices and with a plain loop.

S tokens of a row, V vocabulary.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels.attention import KeyIntervals
from kernels.benchmarks.timing import seconds
from kernels.ring import Layout
from lwm import model as model_lib
from lwm.cost.chips import of_kind
from lwm.cost.peak import peak_flops
from lwm.infer.engine import CACHE_FORMS, Engine, Sampling
from lwm.infer.grammar import Grammar
from lwm.infer.sampling import Choice
from lwm.infer.weights import abstract_params, num_bytes
from lwm.model import Model
from lwm.model.flops import body_cost
from lwm.plan.roofline import attended_pairs

# Tokens per chunk of a prompt, tokens to generate, and tokens per block of generation.
_CHUNK, _NEW_TOKENS, _BLOCK = {"cpu": 2048}, 33, 16
_CHUNK_ELSEWHERE = 16384
# Elements of the array that is copied to measure a CPU's memory bandwidth.
_COPIED = 1 << 26


def random_params(model: Model, form: str) -> Any:
  """Parameters of seed 0, in a form that is not quantized, on the mesh that is set."""
  wanted = abstract_params(model, form, jax.sharding.get_mesh())

  @jax.jit
  def init(key):
    return jax.tree.map(lambda leaf, want: leaf.astype(want.dtype), model.init(key), wanted)

  return init(jax.random.key(0))


def measure_generation(
  model: Model, params: Any, rope_theta: float, contexts: Sequence[int]
) -> Iterator[dict[str, Any]]:
  """Measures prefill and decode of one row. Call it under `jax.set_mesh`.

  Args:
    model: built with `ShardingRules.inference(few_tokens=True)`.
    params: the model's parameters, in any form.
    rope_theta: base of RoPE.
    contexts: tokens of the prompts.

  Yields:
    For each context and form of the cache, a record of prefill and one of decode, with the shares
    of the peak (lwm/cost/peak.py) and of the memory bandwidth: the chip's, or on a CPU a copy's.
    The last record of a context is a loop without a cache, which computes all tokens again for each
    new one. A share is None if the device is unknown.
  """
  devices = jax.sharding.get_mesh().devices.flat
  peak = peak_flops(devices[0], model.config.compute_dtype)
  bandwidth = _memory_bandwidth(devices[0])
  for context in contexts:
    row = np.random.default_rng(0).integers(0, model.config.text_vocab_size, context).tolist()
    for cache in CACHE_FORMS:
      chunk = min(context, _CHUNK.get(devices[0].platform, _CHUNK_ELSEWHERE))
      engine = Engine(model, params, rope_theta=rope_theta, chunk=chunk, cache=cache)
      same = {"context": context, "cache": cache}
      for _ in range(2):  # The first time, programs are compiled.
        prefill, first, decode = _times(engine, row)
      cost = body_cost(model.config)
      flops = cost.flops * context + cost.pair_flops * attended_pairs(model.config, context)
      yield {
        "phase": "prefill",
        **same,
        "tokens_per_second": context / prefill,
        "first_token_seconds": first,
        "gigaflops_per_second": flops / prefill / 1e9,
        "share_of_peak": peak and flops / prefill / peak / len(devices),
      }
      moved = _bytes_read(engine, context)
      yield {
        "phase": "decode",
        **same,
        "tokens_per_second": 1 / decode,
        "gigabytes_per_second": moved / decode / 1e9,
        "share_of_bandwidth": bandwidth and moved / decode / bandwidth / len(devices),
      }
    taken = _plain_seconds(model, params, rope_theta, row)
    yield {"phase": "loop without a cache", "context": context, "tokens_per_second": 1 / taken}


def _times(engine: Engine, row: list[int]) -> tuple[float, float, float]:
  """Seconds of prefill, until the first token, and per further token."""
  grammar = Grammar(engine.few.config.text_vocab_size, text=Choice(temperature=0))
  sampling = Sampling(grammar, _NEW_TOKENS, block=_BLOCK)
  started = time.perf_counter()
  session = engine.open([row], len(row) + _NEW_TOKENS)
  jax.block_until_ready(session.state)
  read = time.perf_counter()
  blocks = session.generate(sampling, [0])
  next(blocks)
  first = time.perf_counter()
  count = sum(len(new) for (new,) in blocks)
  return read - started, first - started, (time.perf_counter() - first) / count


def _bytes_read(engine: Engine, context: int) -> float:
  """Bytes of weights and cache that a step reads on all devices.

  A step reads only a few rows of an embedding that is not also the head, so it does not count.
  """
  moved = num_bytes(engine.params) + engine.cache_bytes(1, context)
  if not engine.few.config.tied_head:
    moved -= num_bytes(engine.params["embedding"])
  return moved


def _plain_seconds(model: Model, params: Any, rope_theta: float, row: list[int]) -> float:
  """Seconds to compute the logits after a row without a cache."""
  whole = model_lib.build(model.config)
  ring = jax.sharding.get_mesh().shape[whole.rules.ring]
  position_1xS = jnp.arange(len(row), dtype=jnp.int32)[None]
  intervals = KeyIntervals(jnp.zeros_like(position_1xS), position_1xS + 1)

  def logits(params, tokens_1xS):
    hidden_1xSxM = whole.hidden(
      params,
      tokens_1xS,
      position_1xS,
      intervals,
      rope_theta=rope_theta,
      layout=Layout("contiguous", ring),
    )
    return whole.logits(params, hidden_1xSxM[:, -1:])

  return seconds(logits, params, np.asarray([row], np.int32))


def _memory_bandwidth(device: jax.Device) -> float | None:
  """Bytes/s of a device, measured by a copy on a CPU, or None if its chip is unknown."""
  if device.platform == "cpu":
    source = jnp.ones(_COPIED)
    return 2 * source.nbytes / seconds(jnp.copy, source) / jax.local_device_count()
  chip = of_kind(device.device_kind)
  return chip.memory_bandwidth if chip else None
