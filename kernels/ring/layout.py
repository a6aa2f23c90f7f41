"""How a sequence is divided into chunks and laid out over a ring of devices.

S sequence length, C chunks per shard.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Layout:
  """Which tokens of a sequence each of `ring_size` shards holds.

  contiguous: shard i holds chunk i of ring_size equal chunks. Under a causal mask the first shard
    has almost no work and the last has the most.
  zigzag: shard i holds chunks i and 2 * ring_size - 1 - i of 2 * ring_size equal chunks, so that
    every shard has the same causal work (as in Llama 3, arXiv 2407.21783 section 3.3.2).

  The laid-out sequence concatenates the shards. With a ring size of 1 it is unpermuted.
  """

  kind: str
  ring_size: int

  def __post_init__(self):
    if self.kind not in ("contiguous", "zigzag"):
      raise ValueError(f"There is no layout {self.kind!r}: use 'contiguous' or 'zigzag'.")

  @property
  def chunks_per_shard(self) -> int:
    return 2 if self.kind == "zigzag" and self.ring_size > 1 else 1

  def chunk_length(self, sequence_length: int) -> int:
    """Tokens per chunk.

    Raises:
      ValueError: the sequence length is not divisible by the number of chunks.
    """
    num_chunks = self.ring_size * self.chunks_per_shard
    if sequence_length % num_chunks:
      raise ValueError(
        f"A sequence of {sequence_length} tokens does not divide into the {num_chunks} chunks of "
        f"a {self.kind} layout over a ring of {self.ring_size}: use a multiple of {num_chunks}."
      )
    return sequence_length // num_chunks

  def chunk_offsets(self, shard_index: jax.Array | int, sequence_length: int) -> jax.Array:
    """Global index of the first token of each chunk of a shard, int32 [C]."""
    length = self.chunk_length(sequence_length)
    chunks = [shard_index]
    if self.chunks_per_shard == 2:
      chunks.append(2 * self.ring_size - 1 - shard_index)
    return jnp.stack([jnp.asarray(chunk, jnp.int32) * length for chunk in chunks])

  def permutation(self, sequence_length: int) -> np.ndarray:
    """Global index of each laid-out column, int64 [S]: `laid_out = tokens[..., permutation]`."""
    length = self.chunk_length(sequence_length)
    chunks = np.arange(self.ring_size)
    if self.chunks_per_shard == 2:
      chunks = np.stack([chunks, 2 * self.ring_size - 1 - chunks], axis=1).reshape(-1)
    return (chunks[:, None] * length + np.arange(length)).reshape(-1)
