"""The least memory that a train step can take, by counting: what need not be compiled.

Only what is certain to live at one of two moments is counted, the backward pass of a block and that
of the head, so that a step which fits is never left out; a compiled step takes up to half as much
again. Letters, of one device: T tokens of attention and feed-forward, R tokens of the residual
stream (T / tensor), M width, L layers.
"""

from collections.abc import Mapping
import math

from lwm.experiment import Experiment
from lwm.experiment import Stage
from lwm.model.config import ModelConfig
from lwm.parallel.sharding import ShardingRules
from lwm.plan.traffic import OFFLOADED
from lwm.plan.traffic import feed_forward_in_chunks
from lwm.plan.traffic import moment_bytes
from lwm.train.flops import layer_parameters

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
  # Query, key and value; their gradients in float32.
  attention = number * (query + 2 * key) + _FLOAT32 * (query + 2 * key)
  if sizes["ring"] > 1:
    # The next key and value, and the gradients of a hop.
    attention += 2 * key * number + _FLOAT32 * (query + 2 * key)
  # Of all heads: the result and its cotangent.
  attention = attention / model.head_groups + number * 2 * query
  if tensor > 1:
    # Gathered tokens, or products that are not added up yet.
    attention += tokens * model.width * number
  # Of a block's input, its cotangent and the sum after attention.
  block = gradients + attention + 3 * residual
  # The head in float32, its copy for the products, its gradient.
  head = model.vocab_size * model.width * (2 * _FLOAT32 + number) + 2 * residual
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
