"""The decoder as plain functions of plain trees: what training and sampling call.

Shapes: B batch, S sequence, Q new tokens, M model width, V vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from kernels.attention import KeyIntervals
from kernels.decode import Cached, Quantized
from kernels.ring import Layout
from kernels.varying import vary_trees_alike
from lwm.config.experiment import LossConfig
from lwm.config.model import ModelConfig
from lwm.model.attention import attended
from lwm.model.cache import Cache
from lwm.model.decoder import Decoder
from lwm.model.loss import LossSums, sums_by_modality, token_losses
from lwm.model.projection import product
from lwm.parallel.sharding import ShardingRules, require_explicit_mesh

# Nested dicts of arrays by module and parameter name.
Params = dict[str, Any]


class Model:
  """Functions of parameters for one configuration. Build it once; it holds no arrays.

  Call all methods except `abstract` and `intervals` inside `jax.jit`, under `jax.set_mesh` with a
  mesh of `lwm.parallel.mesh`.
  """

  def __init__(self, config: ModelConfig, rules: ShardingRules):
    self.config = config
    self.rules = rules
    module = nnx.eval_shape(lambda: Decoder(config, rules, nnx.Rngs(0)))
    self._graph, state = nnx.split(module)
    # A tree like the parameters, whose leaves are tuples of logical axis names.
    self.logical_axes = nnx.to_pure_dict(
      jax.tree.map(
        lambda variable: variable.get_metadata("logical_axes"),
        state,
        is_leaf=lambda node: isinstance(node, nnx.Variable),
      )
    )

  def init(self, key: jax.Array) -> Params:
    """Random float32 parameters, sharded by `rules` under a mesh; the same numbers on any mesh."""
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
      params: as `init` returns them.
      tokens_BxS: int32 ids. The columns of all arrays are in the order of `layout`.
      positions_BxS: int32, for RoPE; they restart at every document.
      intervals: global indices of the keys that each token may attend to; the model cuts them to
        its sliding window.
      rope_theta: base of RoPE; a Python number is the most exact.
      layout: how the columns are laid out over the ring.
    """
    decoder = self._decoder(params)
    tokens_BxS, positions_BxS, intervals = self._place((tokens_BxS, positions_BxS, intervals))
    return decoder.hidden(tokens_BxS, positions_BxS, intervals, rope_theta, layout)[0]

  def intervals(self, batch: dict[str, jax.Array]) -> KeyIntervals:
    """The keys that each token of a batch attends to, in global columns, for counting them."""
    return attended(self.config, KeyIntervals(batch["key_start"], batch["key_stop"]))

  def losses(
    self,
    params: Params,
    batch: dict[str, jax.Array],
    *,
    rope_theta: float | jax.Array,
    layout: Layout,
    loss: LossConfig,
  ) -> LossSums:
    """Sums over a batch by modality; the caller divides them by the weights of the whole batch.

    Args:
      params: as `init` returns them.
      batch: [B, S] arrays in the order of `layout`: int32 tokens, targets, positions, modality,
        key_start, key_stop; float32 loss_weights.
      rope_theta: base of RoPE.
      layout: how the columns are laid out over the ring.
      loss: its z_loss and softmax_range are used; the caller applies its modality weights.
    """
    decoder = self._decoder(params)
    batch = self._place(batch)
    intervals = KeyIntervals(batch["key_start"], batch["key_stop"])
    hidden_BxSxM, extras = decoder.hidden(
      batch["tokens"], batch["positions"], intervals, rope_theta, layout
    )
    weight_BxS, targets_BxS, modality_BxS = (
      jax.reshard(batch[name], self.rules.spec("batch", "residual"))
      for name in ("loss_weights", "targets", "modality")
    )
    loss_BxS, nll_BxS = token_losses(
      hidden_BxSxM,
      decoder.head(jnp.float32, whole=True).kernel,
      # The target -1 costs nothing.
      jnp.where(weight_BxS > 0, targets_BxS, -1),
      config=self.config,
      loss=loss,
      rules=self.rules,
    )
    return LossSums(
      sums_by_modality(weight_BxS * loss_BxS, modality_BxS),
      sums_by_modality(weight_BxS * jax.lax.stop_gradient(nll_BxS), modality_BxS),
      sums_by_modality(weight_BxS, modality_BxS),
      extras,
    )

  def logits(self, params: Params, hidden_BxSxM: jax.Array) -> jax.Array:
    """Float32 logits over all ids, [B, S, V], sharded over `tensor`; meant for few tokens."""
    decoder = self._decoder(params)
    rules, spec = self.rules, self.rules.spec("batch", "sequence", "vocab")
    rows = rules.spec("batch", "sequence", None)

    def local(hidden_BxSxM, weights):
      hidden_BxSxM, weights = vary_trees_alike(hidden_BxSxM, weights)
      return product("bsm,mv->bsv", hidden_BxSxM, weights, jnp.float32)

    logits_BxSxV = jax.shard_map(local, in_specs=(rows, decoder.head_specs()), out_specs=spec)(
      jax.reshard(hidden_BxSxM, rows), decoder.head(hidden_BxSxM.dtype)
    )
    if self.config.padded_vocab_size == self.config.vocab_size:
      return logits_BxSxV
    id_BxSxV = jax.lax.broadcasted_iota(jnp.int32, logits_BxSxV.shape, 2, out_sharding=spec)
    return jnp.where(id_BxSxV < self.config.vocab_size, logits_BxSxV, -jnp.inf)

  def init_cache(
    self,
    batch_size: int,
    max_length: int,
    start_B: jax.Array | None = None,
    *,
    dtype: DTypeLike | None = None,
    row_lengths: bool = False,
  ) -> Cache:
    """An empty cache.

    Args:
      batch_size: number of rows.
      max_length: capacity of a row in tokens, padding included.
      start_B: int32, tokens of padding before each row's first token; default: 0.
      dtype: of keys and values: int8, or by default the compute dtype.
      row_lengths: whether each row has its own `length`.
    """
    require_explicit_mesh()
    config = self.config
    shape = config.num_layers, batch_size, max_length, config.num_kv_heads, config.head_dim
    spec = self.rules.spec("layers", "batch", "cache", "kv_heads", "head_dim")
    dtype = jnp.dtype(dtype or config.compute_dtype)

    def empty() -> Cached:
      zeros = jnp.zeros(shape, dtype, out_sharding=spec)
      if dtype != jnp.int8:
        return zeros
      return Quantized(zeros, jnp.zeros(shape[:-1], jnp.float32, out_sharding=jax.P(*spec[:-1])))

    start_B = jnp.zeros(batch_size, jnp.int32) if start_B is None else start_B
    start_B = jax.reshard(start_B, self.rules.spec("batch"))
    last_vision_B = jnp.full_like(start_B, -1) if config.adapter else None
    length = jnp.zeros_like(start_B) if row_lengths else jnp.int32(0)
    return Cache(empty(), empty(), start_B, length, last_vision_B)

  def decode(
    self, params: Params, tokens_BxQ: jax.Array, cache: Cache, *, rope_theta: float | jax.Array
  ) -> tuple[jax.Array, Cache]:
    """Reads tokens that follow the cached ones; Q may be a whole prompt or one token.

    On a mesh with a ring, build the model with `ShardingRules(sequence=None)`, because one token
    does not divide over a ring. If `cache` of those rules names the axes of the sequence, each
    device holds its part of the cached positions. With `sequence=None`, the parameters may also be
    quantized (lwm/infer/weights.py).

    The caller makes sure that the cache has room for the tokens.

    Returns:
      Logits after the last token, float32 [B, V], and the extended cache.
    """
    hidden_BxQxM, cache = self.read(params, tokens_BxQ, cache, rope_theta=rope_theta)
    return self.logits(params, hidden_BxQxM[:, -1:])[:, 0], cache

  def read(
    self,
    params: Params,
    tokens_BxQ: jax.Array,
    cache: Cache,
    *,
    rope_theta: float | jax.Array,
    count_B: jax.Array | None = None,
  ) -> tuple[jax.Array, Cache]:
    """Like `decode`, but returns hidden states after all tokens, [B, Q, M], for `logits`.

    If the rules divide sequences, Q must divide over the axes of `rules.residual`.

    Args:
      params: as `init` returns them.
      tokens_BxQ: int32 ids.
      cache: has room for the tokens.
      rope_theta: base of RoPE.
      count_B: int32; only the first count_B[b] tokens of row b are read. It needs a cache whose
        rows have their own lengths. The other tokens must be text ids. None: all tokens are read.
    """
    rows = self.rules.spec("batch", None)
    return self._decoder(params).decode(jax.reshard(tokens_BxQ, rows), cache, rope_theta, count_B)

  def _decoder(self, params: Params) -> Decoder:
    require_explicit_mesh()
    return nnx.merge(self._graph, params)

  def _place(self, rows_BxS: Any) -> Any:
    """Shards a tree of arrays [B, S] as the model needs them; what is in place does not move."""
    spec = self.rules.spec("batch", "sequence")
    return jax.tree.map(lambda array: jax.reshard(array, spec), rows_BxS)


def build(config: ModelConfig, rules: ShardingRules = ShardingRules()) -> Model:
  """The functions of a decoder of this configuration; allocates nothing.

  Raises:
    ConfigError: a stretch names a kind of layers that does not exist.
  """
  return Model(config, rules)
