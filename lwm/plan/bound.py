"""A lower bound on the memory of a train step, by counting: what exceeds it need not be compiled.

Only arrays that certainly exist at one of two moments are counted: the backward pass of a block and
the backward pass of the head. So the bound never excludes a step that fits. A compiled step takes
up to twice as much.
"""

from collections.abc import Mapping

from lwm.config.experiment import Experiment, Stage
from lwm.cost.layer import FLOAT32_BYTES, KEPT, Division, dtype_bytes, weights_in_use
from lwm.model.flops import body_cost, vocabulary_weights
from lwm.plan.traffic import moment_bytes
from lwm.program.trainable import trained_shares


def least_memory(experiment: Experiment, stage: Stage, sizes: Mapping[str, int]) -> float:
  """Bytes per device that a step of `stage` needs at least.

  Args:
    experiment: validated.
    stage: one of its stages.
    sizes: devices along each mesh axis.
  """
  model, division = experiment.model, Division.of(stage, sizes)
  cost, kept = body_cost(model, division), KEPT[model.remat]
  number, tensor = dtype_bytes(model.compute_dtype), division.tensor
  tokens = division.tokens / stage.accumulation_steps
  shard = (cost.weights + vocabulary_weights(model)) / tensor / division.storage
  shares, tables = trained_shares(experiment, stage), vocabulary_weights(model)
  trained = shares.body * cost.weights + shares.tables * tables
  trained_shard = trained / tensor / division.storage
  moments = 0 if experiment.optimizer.offload else moment_bytes(experiment.optimizer)
  state = shard * FLOAT32_BYTES + trained_shard * moments
  gradients = trained_shard * FLOAT32_BYTES * (1 if stage.accumulation_steps == 1 else 2)

  saved = 0 if kept.on_host else tokens * cost.kept
  if kept.everything:
    # Gathered weights.
    saved += weights_in_use(cost, division) * number
  residual = tokens / tensor * model.width * number
  # The gradient of the residual stream, which goes past the layer.
  block = gradients + tokens * cost.backward + residual
  # The head as matrix products take it, and its gradient if it certainly has one.
  gradient = FLOAT32_BYTES if shares.tables == 1 else 0
  head = model.vocab_size * model.width * (gradient + number) + 2 * residual
  return state + saved + max(block, head)
