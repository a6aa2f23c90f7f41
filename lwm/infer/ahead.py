"""The programs of an engine, traced for machines that you don't have.

B = R rows of the cache, all of which are generated; Q tokens to read.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels.decode import whole_length
from lwm import model as model_lib
from lwm.config.model import ModelConfig
from lwm.infer import programs
from lwm.infer.grammar import Grammar
from lwm.infer.weights import abstract_params
from lwm.parallel.sharding import ShardingRules


class Programs(NamedTuple):
  """Programs for the devices of a mesh, and their arguments without values.

  Lower the programs under `jax.set_mesh` with that mesh.

  Attributes:
    prefill: reads a chunk of a prompt.
    decode: generates tokens one after another.
    params: shapes, dtypes and shardings.
    cache: likewise.
    context: tokens of a row.
    chunk: tokens that are read at a time.
    num_rows: rows of the cache.
  """

  prefill: jax.stages.Traced
  decode: jax.stages.Traced
  params: Any
  cache: Any
  context: int
  chunk: int
  num_rows: int


def trace(
  config: ModelConfig,
  mesh: jax.sharding.Mesh,
  *,
  context: int,
  chunk: int,
  num_rows: int = 1,
  cache: str = "dense",
  rope_theta: float = 1e4,
) -> Programs:
  """The programs of an `Engine`, with weights in bfloat16.

  Args:
    config: of the model.
    mesh: the devices.
    context: tokens of a row.
    chunk: tokens that are read at a time.
    num_rows: rows of the cache.
    cache: form of the cache, one of `CACHE_FORMS`.
    rope_theta: base of RoPE.
  """
  few_rules, many_rules = (ShardingRules.inference(few_tokens=few) for few in (True, False))
  few, many = (model_lib.build(config, rules) for rules in (few_rules, many_rules))
  shards = math.prod(mesh.shape[axis] for axis in few_rules.cache)
  # As in the engine, each device has the same number of a chunk's tokens.
  parts = math.prod(mesh.shape[axis] for axis in many_rules.residual or ())
  chunk = -(-chunk // parts) * parts

  def placed(leaf: Any, spec: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=jax.NamedSharding(mesh, spec))

  params = abstract_params(few, "bfloat16", mesh)
  with jax.set_mesh(mesh):
    state = jax.eval_shape(
      functools.partial(
        programs.empty,
        few,
        num_rows,
        whole_length(context, shards),
        "int8" if cache == "int8" else None,
      )
    )
    state = jax.tree.map(lambda leaf: placed(leaf, leaf.sharding.spec), state)
    grammar = Grammar(config.text_vocab_size)
    place = jax.eval_shape(lambda: grammar.place_after([[]] * num_rows))
    left_B = jax.ShapeDtypeStruct((num_rows,), jnp.int32)
    place, left_B = jax.tree.map(lambda leaf: placed(leaf, jax.P()), (place, left_B))
    seed_B = placed(jax.ShapeDtypeStruct((num_rows,), jnp.uint32), jax.P())
    prefill = programs.read.trace(
      many,
      few,
      params,
      state,
      jax.ShapeDtypeStruct((num_rows, chunk), jnp.int32),
      jax.ShapeDtypeStruct((num_rows,), jnp.int32),
      rope_theta=rope_theta,
    )
    decode = programs.generate.trace(
      few,
      params,
      state,
      programs.Progress(place, left_B, None),
      seed_B,
      jax.ShapeDtypeStruct((), jnp.int32),
      grammar=grammar,
      guidance=None,
      block=16,
      rope_theta=rope_theta,
    )
  return Programs(prefill, decode, params, state.cache, context, chunk, num_rows)
