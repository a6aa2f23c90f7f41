"""What a stage of a language model minimises: one loss of all modalities, over microbatches.

Letters: B rows, S sequence, A microbatches (accumulation_steps); a trailing 2 is (text, vision), as
in MODALITIES.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kernels.ring import Layout
from lwm.config.batch import MODALITIES
from lwm.config.experiment import LossConfig
from lwm.model import LossSums, Model, sums_by_modality
from lwm.model.balance import rebalanced
from lwm.parallel.sharding import ShardingRules
from lwm.program.step import Batch, Metrics
from lwm.program.trainable import Trainable


@dataclasses.dataclass(frozen=True)
class Objective:
  """The loss of a batch.

  The loss is sum_m share_m x (sum of w x nll over targets of m) / (sum of w over targets of m),
  plus the auxiliary losses of the layers. The sums run over the whole batch; share_m is the weight
  of the modality relative to those present.

  Attributes:
    model: computes the sums and knows what its layers report.
    loss: weights of the modalities, z_loss and softmax_range.
    rope_theta: base of RoPE.
    layout: how the columns are laid out over the ring.
    accumulation_steps: microbatches of a batch, processed in turn.
    trainable: the parameters whose gradients are computed.
  """

  model: Model
  loss: LossConfig
  rope_theta: float
  layout: Layout
  accumulation_steps: int = 1
  trainable: Trainable = Trainable()

  def init(self, key: jax.Array) -> Any:
    """Random parameters."""
    return self.model.init(key)

  def sums(self, params: Any, batch: Batch) -> LossSums:
    """Sums over the targets of a batch or a microbatch."""
    return self.model.losses(
      params, batch, rope_theta=self.rope_theta, layout=self.layout, loss=self.loss
    )

  def gradients(self, params: Any, batch: Batch, step: jax.Array) -> tuple[Any, Any, Metrics]:
    """Gradients of the loss, and the metrics that come with it.

    The divisors of both modalities are known before the first microbatch, so the gradients of
    microbatches simply add up: accumulation changes only the order of float32 sums. Auxiliary
    losses and statistics are means over microbatches.

    Args:
      params: all parameters.
      batch: see `train_step`.
      step: int32 scalar, the stage's updates so far. This objective does not depend on it.

    Returns:
      The gradients of the trained parameters, float32, sharded like them; the values that the
      frozen parameters have after the step, which only `lwm.model.balance` changes; and metrics:
      loss, which is what is minimised, NAME_loss of each modality, nats per target (0 without
      targets), and what the layers report (`lwm.model.extras.Extras`), by its name.
    """
    del step
    weights_2 = sums_by_modality(batch["loss_weights"], batch["modality"])
    normaliser_2 = jnp.where(weights_2 > 0, 1 / jnp.where(weights_2 > 0, weights_2, 1), 0)
    configured_2 = jnp.array([getattr(self.loss, f"{name}_weight") for name in MODALITIES])
    share_2 = jnp.where(weights_2 > 0, configured_2, 0)
    # A batch whose only modality has weight 0 trains nothing, rather than dividing 0 by 0.
    share_2 = share_2 / jnp.where(share_2.sum() > 0, share_2.sum(), 1)
    parts = self.accumulation_steps

    trained, frozen = self.trainable.split(params)

    def microbatch_loss(trained, microbatch):
      sums = self.sums(self.trainable.join(trained, frozen), microbatch)
      loss = jnp.sum(share_2 * normaliser_2 * sums.loss)
      loss = sum((value / parts for value in sums.extras.losses.values()), start=loss)
      return loss, (jnp.stack([sums.loss, sums.nll]), sums.extras)

    gradient = jax.grad(microbatch_loss, has_aux=True)
    if parts == 1:
      gradients, (sums_2x2, extras) = gradient(trained, batch)
    else:

      def accumulate(total, microbatch):
        gradients, (sums_2x2, extras) = gradient(trained, microbatch)
        return jax.tree.map(jnp.add, total, (gradients, sums_2x2)), extras

      zero = (jax.tree.map(jnp.zeros_like, trained), jnp.zeros((2, 2)))
      microbatches = split_rows(batch, parts, self.model.rules)
      (gradients, sums_2x2), extras = jax.lax.scan(accumulate, zero, microbatches)
      extras = jax.tree.map(lambda values: jnp.mean(values, axis=0), extras)

    loss_2, nll_2 = sums_2x2
    loss = jnp.sum(share_2 * normaliser_2 * loss_2)
    metrics = {"loss": sum(extras.losses.values(), start=loss)}
    for m, name in enumerate(MODALITIES):
      metrics[f"{name}_loss"] = normaliser_2[m] * nll_2[m]
    frozen = rebalanced(self.model.config, frozen, extras.statistics)
    return gradients, frozen, metrics | extras.losses | extras.statistics

  def evaluate(self, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Sums of weighted negative log-likelihoods, and of weights, by modality: float32 [2] each."""
    sums = self.sums(params, batch)
    return sums.nll, sums.weight

  def counts(self, batch: Batch) -> Metrics:
    """What `lwm.model.flops.train_flops` takes, float32 scalars.

    Returns:
      tokens, padding not counted; attended_pairs of queries and keys; and NAME_targets of each
      modality, targets with a weight above 0.
    """
    has_loss = (batch["loss_weights"] > 0).astype(jnp.float32)
    targets_2 = sums_by_modality(has_loss, batch["modality"])
    start_BxS, stop_BxS = self.model.intervals(batch)
    return {
      "tokens": jnp.sum(stop_BxS > start_BxS).astype(jnp.float32),
      "attended_pairs": jnp.sum((stop_BxS - start_BxS).astype(jnp.float32)),
    } | {f"{name}_targets": targets_2[m] for m, name in enumerate(MODALITIES)}


def split_rows(batch: Batch, parts: int, rules: ShardingRules) -> Batch:
  """[B, S] -> [A, B/A, S] such that every device keeps its rows and has some in each part."""

  def split(array_BxS):
    rows, length = array_BxS.shape
    # The rows of a device are neighbours, so the part must be the minor axis of the split.
    grouped_BxAxS = jnp.reshape(
      array_BxS, (rows // parts, parts, length), out_sharding=rules.spec("batch", None, "sequence")
    )
    return jnp.moveaxis(grouped_BxAxS, 1, 0)

  return jax.tree.map(split, batch)
