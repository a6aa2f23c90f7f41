"""Frames to vision ids inside a compiled step, on the mesh of the run.

Where raw frames enter a step (on-line tokenising, evaluation, chat), two stages need different
shardings, as in LongVILA (arXiv 2408.10188): the encoder wants frames spread evenly over all
devices, and the decoder wants tokens spread evenly over the axes of the sequence. Between the two,
the codes travel once around the devices of a row, a block per hop, and each device keeps those that
its columns need. So no device ever holds all frames, codes or tokens of a row, wherever in the row
the frames are and in whatever order its columns are laid out.

Legend: B rows, N frames per row, H and W height and width in pixels, S columns of a row, P codes
per frame; b, n, s: of these, what one device holds; F frames per call, C calls of the encoder.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from lwm.parallel.sharding import ShardingRules
from lwm.vision.codec import Codec


def fill_in_codes(
  codec: Codec,
  state: nnx.State,
  frames_BxNxHxWx3: jax.Array,
  tokens_BxS: jax.Array,
  code_index_BxS: jax.Array,
  *,
  text_vocab_size: int,
  frames_per_call: int = 32,
  rules: ShardingRules = ShardingRules(),
) -> jax.Array:
  """Puts the codes of frames into rows. Call it under `jax.set_mesh`, inside or outside of jit.

  Args:
    codec: the VQGAN.
    state: `codec.state`, on all devices; an argument, so that it is no constant of the program.
    frames_BxNxHxWx3: uint8. N is a multiple of the number of devices along the axes of the sequence
      and `tensor`; fill up with any frames.
    tokens_BxS: int32 ids, sharded by batch and sequence; text and end marks are in place.
    code_index_BxS: int32, sharded alike. n P + p where a column takes code p of frame n of its row,
      and -1 elsewhere.
    text_vocab_size: id of the first code.
    frames_per_call: F, which bounds the memory of the encoder.
    rules: which mesh axes carry rows, sequences and `tensor`.

  Returns:
    int32 [B, S], sharded like `tokens_BxS`.
  """
  frames_axes = rules.residual
  assert frames_axes is not None
  mesh = jax.sharding.get_abstract_mesh()
  num_blocks = math.prod(mesh.shape[axis] for axis in frames_axes)
  frames_spec, tokens_spec = rules.spec("batch", "residual"), rules.spec("batch", "sequence")

  def fill(state, frames_bxnxHxWx3, tokens_bxs, code_index_bxs):
    codes_bxnP = _encode(codec, state, frames_bxnxHxWx3, frames_per_call)
    block = codes_bxnP.shape[1]
    rank = jax.lax.axis_index(frames_axes)

    def take(hop, tokens_bxs, codes_bxnP):
      # After `hop` hops, this device holds the block of the device so many ranks before it.
      index_bxs = code_index_bxs - (rank - hop) % num_blocks * block
      is_here_bxs = (code_index_bxs >= 0) & (index_bxs >= 0) & (index_bxs < block)
      codes_bxs = jnp.take_along_axis(codes_bxnP, jnp.clip(index_bxs, 0, block - 1), axis=1)
      return jnp.where(is_here_bxs, text_vocab_size + codes_bxs, tokens_bxs)

    def hop(number, carry):
      tokens_bxs, codes_bxnP = carry
      tokens_bxs = take(number, tokens_bxs, codes_bxnP)
      ring = [(source, (source + 1) % num_blocks) for source in range(num_blocks)]
      return tokens_bxs, jax.lax.ppermute(codes_bxnP, frames_axes, ring)

    last = num_blocks - 1
    return take(last, *jax.lax.fori_loop(0, last, hop, (tokens_bxs, codes_bxnP)))

  filled = jax.shard_map(
    fill,
    in_specs=(jax.sharding.PartitionSpec(), frames_spec, tokens_spec, tokens_spec),
    out_specs=tokens_spec,
    # All devices along `tensor` take the same codes, from blocks that arrive in different orders.
    check_vma=False,
  )
  return filled(state, jax.reshard(frames_BxNxHxWx3, frames_spec), tokens_BxS, code_index_BxS)


def _encode(
  codec: Codec, state: nnx.State, frames_bxnxHxWx3: jax.Array, frames_per_call: int
) -> jax.Array:
  """Codes int32 [b, n P] of a device's frames, `frames_per_call` at a time."""
  b, n, *frame = frames_bxnxHxWx3.shape
  calls = -(-b * n // frames_per_call)
  padding = [(0, calls * frames_per_call - b * n)] + [(0, 0)] * len(frame)
  frames = jnp.pad(frames_bxnxHxWx3.reshape(b * n, *frame), padding)
  frames_CxFxHxWx3 = frames.reshape(calls, frames_per_call, *frame)
  codes_CxFxhxw = jax.lax.map(lambda batch: codec.encode_frames(state, batch), frames_CxFxHxWx3)
  return codes_CxFxhxw.reshape(calls * frames_per_call, -1)[: b * n].reshape(b, -1)
