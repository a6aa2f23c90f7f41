"""The decoder as plain functions of plain trees: what training and sampling call.

Shapes: B batch, S sequence, Q new tokens, M model width, V vocabulary.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from kernels.attention import KeyIntervals
from kernels.cross_entropy import linear_cross_entropy
from kernels.ring import Layout
from lwm.config.experiment import LossConfig
from lwm.config.model import ModelConfig
from lwm.model.cache import Cache
from lwm.model.decoder import Decoder
from lwm.parallel.sharding import ShardingRules, require_explicit_mesh

Params = dict[str, "Params | jax.Array"]


class LossSums(NamedTuple):
  """Sums over the targets of a batch, float32 [2] each: text, vision.

  Attributes:
    loss: of weight x (negative log-likelihood + z_loss x log-sum-exp squared), in nats; the one to
      differentiate.
    nll: of weight x negative log-likelihood.
    weight: of weights.
  """

  loss: jax.Array
  nll: jax.Array
  weight: jax.Array


class Model:
  """Functions of parameters for one configuration. Build it once; it holds no arrays.

  All but `logical_axes` and `abstract` run under `jax.set_mesh` with a mesh of
  `lwm.parallel.mesh`, and are to be called inside `jax.jit`.
  """

  def __init__(self, config: ModelConfig, rules: ShardingRules):
    self.config = config
    self.rules = rules
    module = nnx.eval_shape(lambda: Decoder(config, rules, nnx.Rngs(0)))
    self._graph, state = nnx.split(module)
    # A tree like the parameters' whose leaves are tuples of logical axis names.
    self.logical_axes = nnx.to_pure_dict(
      jax.tree.map(
        lambda variable: variable.get_metadata("logical_axes"),
        state,
        is_leaf=lambda node: isinstance(node, nnx.Variable),
      )
    )

  def init(self, key: jax.Array) -> Params:
    """Float32 parameters; under a mesh sharded by `rules`, and the same numbers on any mesh."""
    decoder = Decoder(self.config, self.rules, nnx.Rngs(params=key))
    return nnx.to_pure_dict(nnx.state(decoder))

  def abstract(self) -> Params:
    """Shapes and dtypes of the parameters."""
    return jax.eval_shape(lambda: self.init(jax.random.key(0)))

  def hidden(
    self,
    params: Params,
    tokens_BxS: jax.Array,
    positions_BxS: jax.Array,
    intervals: KeyIntervals,
    *,
    rope_theta: float | jax.Array,
    layout: Layout,
  ) -> jax.Array:
    """Hidden states after the final norm, [B, S, M] in the compute dtype.

    Args:
      params: of `init`.
      tokens_BxS: int32 ids, columns in the order of `layout`, as for all that follow.
      positions_BxS: int32, for RoPE; they restart at every document.
      intervals: global indices of the keys that each token sees.
      rope_theta: base of RoPE; a Python number is the most exact.
      layout: how the columns lie over the ring.
    """
    decoder = self._decoder(params)
    rows = self._place((tokens_BxS, positions_BxS, intervals))
    return decoder.hidden(*rows, rope_theta, layout)

  def losses(
    self,
    params: Params,
    batch: dict[str, jax.Array],
    *,
    rope_theta: float | jax.Array,
    layout: Layout,
    loss: LossConfig,
  ) -> LossSums:
    """Sums over a batch by modality; dividing by the weights of the whole batch is the caller's.

    Logits exist for a chunk of tokens at a time, and hidden states are never gathered: each device
    has the whole head for its own part of the tokens.

    Args:
      params: of `init`.
      batch: [B, S] arrays in the order of `layout`: int32 tokens, targets, positions, modality,
        key_start, key_stop; float32 loss_weights.
      rope_theta: base of RoPE.
      layout: how the columns lie over the ring.
      loss: its z_loss and softmax_range; modality weights are the caller's.
    """
    decoder = self._decoder(params)
    batch = self._place(batch)
    intervals = KeyIntervals(batch["key_start"], batch["key_stop"])
    hidden_BxSxM = decoder.hidden(
      batch["tokens"], batch["positions"], intervals, rope_theta, layout
    )
    weight_BxS, targets_BxS, modality_BxS = (
      jax.reshard(batch[name], self.rules.spec("batch", "residual"))
      for name in ("loss_weights", "targets", "modality")
    )
    # Targets without weight cost nothing as -1.
    targets_BxS = jnp.where(weight_BxS > 0, targets_BxS, -1)
    cross_entropy = functools.partial(
      linear_cross_entropy,
      ranges=self._softmax_ranges(loss.softmax_range),
      chunk=self.config.loss_chunk,
      z_loss=loss.z_loss,
    )
    loss_BxS, nll_BxS = self._per_token(
      cross_entropy, hidden_BxSxM, decoder.head(whole=True), targets_BxS
    )

    def by_modality(value_BxS):
      weighted_BxS = weight_BxS * value_BxS
      return jnp.stack([jnp.sum(jnp.where(modality_BxS == m, weighted_BxS, 0.0)) for m in (0, 1)])

    return LossSums(
      by_modality(loss_BxS),
      by_modality(jax.lax.stop_gradient(nll_BxS)),
      by_modality(jnp.ones_like(weight_BxS)),
    )

  def logits(self, params: Params, hidden_BxSxM: jax.Array) -> jax.Array:
    """Float32 logits over all ids, [B, S, V], sharded over `tensor`: for few tokens only."""
    return self._logits(self._decoder(params), hidden_BxSxM)

  def init_cache(self, batch_size: int, max_length: int, start_B: jax.Array | None = None) -> Cache:
    """An empty cache.

    Args:
      batch_size: rows.
      max_length: tokens that a row can take, padding included.
      start_B: int32, tokens of padding before each row's first token; none unless given.
    """
    require_explicit_mesh()
    config = self.config
    shape = config.num_layers, batch_size, max_length, config.num_kv_heads, config.head_dim
    spec = self.rules.spec("layers", "batch", "cache", "kv_heads", "head_dim")
    empty = functools.partial(jnp.zeros, shape, jnp.dtype(config.compute_dtype), out_sharding=spec)
    start_B = jnp.zeros(batch_size, jnp.int32) if start_B is None else start_B
    start_B = jax.reshard(start_B, self.rules.spec("batch"))
    return Cache(empty(), empty(), start_B, jnp.int32(0))

  def decode(
    self, params: Params, tokens_BxQ: jax.Array, cache: Cache, *, rope_theta: float | jax.Array
  ) -> tuple[jax.Array, Cache]:
    """Logits after the last of some tokens that follow the cache's, float32 [B, V], and the cache.

    Q may be a whole prompt or one token. Nothing checks that the cache has room for them. On a
    mesh with a ring, build the model with `ShardingRules(sequence=None)`, since one token does not
    divide over a ring; with `cache=("ring", "ulysses")` as well, each device holds its part of the
    cached positions.
    """
    decoder = self._decoder(params)
    hidden_BxQxM, cache = decoder.decode(self._place(tokens_BxQ), cache, rope_theta)
    return self._logits(decoder, hidden_BxQxM[:, -1:])[:, 0], cache

  def _decoder(self, params: Params) -> Decoder:
    require_explicit_mesh()
    return nnx.merge(self._graph, params)

  def _place(self, rows_BxS):
    """Arrays [B, S] as the model shards them; nothing moves if they already are."""
    spec = self.rules.spec("batch", "sequence")
    return jax.tree.map(lambda array: jax.reshard(array, spec), rows_BxS)

  def _logits(self, decoder: Decoder, hidden_BxSxM: jax.Array) -> jax.Array:
    return jnp.einsum(
      "bsm,mv->bsv",
      jax.reshard(hidden_BxSxM, self.rules.spec("batch", "sequence", None)),
      decoder.head().astype(hidden_BxSxM.dtype),
      preferred_element_type=jnp.float32,
      out_sharding=self.rules.spec("batch", "sequence", "vocab"),
    )

  def _softmax_ranges(self, softmax_range: str) -> tuple[tuple[int, int], ...]:
    text, both = self.config.text_vocab_size, self.config.vocab_size
    if softmax_range == "all" or text == both:
      return ((0, both),)
    return ((0, text), (text, both))

  def _per_token(self, cross_entropy, hidden_BxSxM, head_MxV, targets_BxS):
    """Loss and negative log-likelihood of each token, [B, S], each shard its own tokens."""
    rows = self.rules.spec("batch", "residual")

    def local(hidden_BxSxM, head_MxV, targets_BxS):
      losses = cross_entropy(
        hidden_BxSxM.reshape(-1, hidden_BxSxM.shape[-1]), head_MxV, targets_BxS.reshape(-1)
      )
      shape = targets_BxS.shape
      return losses.loss_N.reshape(shape), -losses.log_probability_N.reshape(shape)

    return jax.shard_map(
      local,
      in_specs=(
        self.rules.spec("batch", "residual", None),
        self.rules.gathered("model", "vocab", whole=True),
        rows,
      ),
      out_specs=(rows, rows),
    )(hidden_BxSxM, head_MxV, targets_BxS)


def build(config: ModelConfig, rules: ShardingRules = ShardingRules()) -> Model:
  """The functions of a decoder of this configuration; allocates nothing."""
  return Model(config, rules)
