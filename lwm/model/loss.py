"""Cross-entropy of a batch over the mesh, summed by modality.

B batch, S sequence, M model width, V vocabulary; a trailing 2 is (text, vision), as in MODALITIES.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.cross_entropy import linear_cross_entropy
from lwm.config.batch import MODALITIES
from lwm.config.experiment import LossConfig
from lwm.config.model import ModelConfig
from lwm.model.extras import Extras
from lwm.parallel.sharding import ShardingRules


class LossSums(NamedTuple):
  """Sums over the targets of a batch, float32 [2] each, and what the layers report.

  Attributes:
    loss: of weight x (negative log-likelihood + z_loss x log-sum-exp squared), in nats; the one to
      differentiate.
    nll: of weight x negative log-likelihood.
    weight: of weights.
    extras: of the decoder; its losses are not part of `loss`.
  """

  loss: jax.Array
  nll: jax.Array
  weight: jax.Array
  extras: Extras


def sums_by_modality(values_BxS: jax.Array, modality_BxS: jax.Array) -> jax.Array:
  """Sums over the targets of each modality, [2]."""
  return jnp.stack(
    [jnp.sum(jnp.where(modality_BxS == m, values_BxS, 0)) for m in range(len(MODALITIES))]
  )


def token_losses(
  hidden_BxSxM: jax.Array,
  head_MxV: jax.Array,
  targets_BxS: jax.Array,
  *,
  config: ModelConfig,
  loss: LossConfig,
  rules: ShardingRules,
) -> tuple[jax.Array, jax.Array]:
  """Loss and negative log-likelihood of each token, float32 [B, S] each, 0 for the target -1.

  Logits exist for one chunk of tokens at a time. Hidden states are never gathered: each device
  computes the losses of its own tokens with the whole head.

  Args:
    hidden_BxSxM: hidden states, divided over the mesh like the residual stream.
    head_MxV: the whole head on every device.
    targets_BxS: int32 ids, divided like the hidden states.
    config: chunk size and vocabulary ranges.
    loss: z_loss and softmax_range.
    rules: which mesh axes carry the dimensions.
  """
  rows = rules.spec("batch", "residual")
  cross_entropy = functools.partial(
    linear_cross_entropy,
    ranges=_softmax_ranges(config, loss),
    chunk=config.loss_chunk,
    z_loss=loss.z_loss,
  )

  def local(hidden_BxSxM, head_MxV, targets_BxS):
    losses = cross_entropy(
      hidden_BxSxM.reshape(-1, hidden_BxSxM.shape[-1]), head_MxV, targets_BxS.reshape(-1)
    )
    shape = targets_BxS.shape
    return losses.loss_N.reshape(shape), -losses.log_probability_N.reshape(shape)

  return jax.shard_map(
    local,
    in_specs=(
      rules.spec("batch", "residual", None),
      rules.gathered("model", "vocab", whole=True),
      rows,
    ),
    out_specs=(rows, rows),
  )(hidden_BxSxM, head_MxV, targets_BxS)


def _softmax_ranges(config: ModelConfig, loss: LossConfig) -> tuple[tuple[int, int], ...]:
  text, both = config.text_vocab_size, config.vocab_size
  if loss.softmax_range == "all" or text == both:
    return ((0, both),)
  return ((0, text), (text, both))
