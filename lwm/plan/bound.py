"""The least memory that a train step can take, by counting: what need not be compiled.

Only what is certain to live at one of two moments is counted, the backward pass of a block and that
of the head, so that a step which fits is never left out; a compiled step takes up to twice as
much. Letters, of one device: T tokens of attention and feed-forward, R tokens of the residual
stream (T / tensor), M width, L layers.
"""

import math
from collections.abc import Mapping

from lwm.config.experiment import Experiment, Stage
from lwm.config.model import ModelConfig
from lwm.model.flops import layer_parameters
from lwm.parallel.sharding import ShardingRules
from lwm.plan.traffic import OFFLOADED, feed_forward_in_chunks, moment_bytes

_FLOAT32 = 4


def least_memory(
  experiment: Experiment,
  stage: Stage,
  sizes: Mapping[str, int],
  rules: ShardingRules = ShardingRules(),
) -> float:
  """Bytes of one device that a step of `stage` takes at least.

  Args:
    experiment: validated.
    stage: one of its stages.
    sizes: devices along each mesh axis.
    rules: which axis carries which dimension.
  """
  model, tensor = experiment.model, sizes["tensor"]
  number = 4 if model.compute_dtype == "float32" else 2
  group = math.prod(sizes[axis] for axis in rules.model)
  tokens = stage.tokens_per_batch / stage.accumulation_steps
  tokens /= math.prod(sizes[axis] for axis in rules.token_axes)
  layer = layer_parameters(model) / tensor
  tables = model.vocab_size * model.width * (1 if model.tied_head else 2)
  shard = (model.num_layers * layer + tables / tensor) / group
  moments = 0 if experiment.optimizer.offload else moment_bytes(experiment.optimizer)
  state = shard * (_FLOAT32 + moments)
  gradients = shard * _FLOAT32 * (1 if stage.accumulation_steps == 1 else 2)

  residual = tokens / tensor * model.width * number
  saved = _saved(model, stage, sizes, tokens, number)
  query = tokens * model.num_heads * model.head_dim / tensor
  key = tokens * model.num_kv_heads * model.head_dim / tensor
  # Query, key and value, their gradients: the query's is made alone, and has been rounded by then.
  attention = number * 2 * (query + key) + _FLOAT32 * 2 * key
  if sizes["ring"] > 1:
    # The next key and value; the gradients in float32, and those of a hop.
    attention += number * (2 * key - query) + _FLOAT32 * (2 * query + 2 * key)
  # Of all heads: the result's cotangent; the result as well where groups come one after the other.
  attention /= model.head_groups
  attention += number * query * (1 if model.head_groups == 1 else 2)
  if tensor > 1:
    # The three gradients, and their products that are not added up yet.
    products = number * ((query + 2 * key) / model.head_groups + tokens * model.width)
    attention = max(attention, products)
  # The cotangent of what goes past attention.
  block = gradients + attention + residual
  # The head as products take it, and its gradient.
  head = model.vocab_size * model.width * (_FLOAT32 + number) + 2 * residual
  return state + saved + max(block, head)


def _saved(model: ModelConfig, stage: Stage, sizes, tokens: float, number: int) -> float:
  """What the blocks keep for the backward pass."""
  tensor = sizes["tensor"]
  if model.remat in OFFLOADED:
    return 0
  kept = tokens / tensor * model.width * number
  query = tokens * model.num_heads * model.head_dim / tensor * number
  key = tokens * model.num_kv_heads * model.head_dim / tensor * number
  if model.remat != "full":
    kept += query + tokens * model.num_heads / tensor * _FLOAT32
  if model.remat in ("dots", "none"):
    kept += query + 2 * key + tokens * model.width * number
    if not feed_forward_in_chunks(model, stage, sizes):
      kept += tokens * (2 * model.feed_forward_width / tensor + model.width) * number
  if model.remat == "none":
    # An input of products; gathered weights.
    kept += tokens * model.width * number + layer_parameters(model) / tensor * number
  return model.num_layers * kept
