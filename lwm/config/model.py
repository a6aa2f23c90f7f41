"""Hyper-parameters of the decoder."""

import dataclasses

REMAT_POLICIES = ("none", "dots", "attention", "full", "offload", "offload_attention")
COMPUTE_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass
class RopeScaling:
  """Llama-3 frequency scaling (Llama 3.1 model card; transformers `rope_type="llama3"`)."""

  factor: float = 8.0
  low_frequency_factor: float = 1.0
  high_frequency_factor: float = 4.0
  original_context: int = 8192


@dataclasses.dataclass
class ModelConfig:
  """A decoder of the Llama family over one id space: text ids, then vision ids.

  Text ids are [0, text_vocab_size); vision code c is id text_vocab_size + c, c in
  [0, vision_vocab_size). Parameters are float32; `compute_dtype` is what matrix products run in.
  """

  num_layers: int = 2
  width: int = 64
  num_heads: int = 4
  num_kv_heads: int = 2
  head_dim: int = 16
  feed_forward_width: int = 128
  text_vocab_size: int = 256
  vision_vocab_size: int = 0
  norm_epsilon: float = 1e-5
  tied_head: bool = False
  rope_scaling: RopeScaling | None = None
  initializer_std: float = 0.02
  compute_dtype: str = "bfloat16"
  # What the backward pass finds of a block beside its input: everything, matrix products, attention
  # outputs, nothing. "offload" keeps the input in the host's memory and nothing else,
  # "offload_attention" the input and attention outputs.
  remat: str = "full"
  # Heads attend in so many groups, one after the other, each in that part of the memory.
  head_groups: int = 1
  # Tokens per chunk of the blockwise feed-forward and of the cross-entropy.
  feed_forward_chunk: int = 2048
  loss_chunk: int = 1024

  @property
  def vocab_size(self) -> int:
    return self.text_vocab_size + self.vision_vocab_size
