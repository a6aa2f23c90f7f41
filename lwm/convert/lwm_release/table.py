"""Names and settings of LWM's models.

The layers of `transformer/h` are scanned, which means stacked in one array per weight, or apart,
under their numbers. LWM's kernels are [in, out]. Its RoPE rotates elements 2i and 2i + 1 of a head,
where ours rotates i and i + D/2, so the columns of queries and keys change places. Text and vision
have a table and a head each, which are ranges of rows and columns of ours.

M model width, H heads, D head_dim.
"""

import math
from typing import NamedTuple

import numpy as np

from lwm.config.model import ModelConfig
from lwm.convert.table import SAME, LayerRow, Part, Shape, Tensor, Transform, layer_rows

# Under transformer/h, instead of the number of a layer.
SCANNED = "scan_decoder"


class Preset(NamedTuple):
  """What a release was trained with and does not say."""

  rope_theta: float
  context: int
  has_vision: bool = False


# LWM's README has the table of the text models; its chat models have the values of their base
# models. The vision models keep the theta of LWM-Text-1M at every context (LWM's scripts).
PRESETS = {
  "lwm-text-128k": Preset(1e7, 2**17),
  "lwm-text-256k": Preset(1e7, 2**18),
  "lwm-text-512k": Preset(2.5e7, 2**19),
  "lwm-text-1m": Preset(5e7, 2**20),
  "lwm-32k": Preset(5e7, 2**15, has_vision=True),
  "lwm-128k": Preset(5e7, 2**17, has_vision=True),
  "lwm-1m": Preset(5e7, 2**20, has_vision=True),
}


class Size(NamedTuple):
  """Settings of one of LWM's sizes that the shapes of its weights do not say."""

  num_heads: int
  norm_epsilon: float = 1e-6


# By (layers, width, feed-forward width): LLAMA_STANDARD_CONFIGS in LWM's lwm/llama.py. The releases
# are 7B.
SIZES = {
  (2, 256, 256): Size(2),
  (14, 1024, 2048): Size(8),
  (22, 2048, 5504): Size(16),
  (26, 3200, 8640): Size(32),
  (32, 4096, 11008): Size(32),
  (40, 5120, 13824): Size(40),
  (60, 6656, 17920): Size(52),
  (80, 8192, 22016): Size(64, 1e-5),
}


def _kernel(out_axes: int = 1) -> Transform:
  """flax's linear layers: ours is [in..., out...], theirs [prod(in), prod(out)]."""

  def their_shape(shape: Shape) -> Shape:
    return math.prod(shape[:-out_axes]), math.prod(shape[-out_axes:])

  return Transform(
    their_shape=their_shape,
    to_theirs=lambda array: array.reshape(their_shape(array.shape)),
    to_ours=lambda array, shape: array.reshape(shape),
  )


def _interleaved() -> Transform:
  """Queries and keys, [M, H, D]: theirs are [M, H D], with the two elements of a pair adjacent."""
  kernel = _kernel(2)

  def to_theirs(array: np.ndarray) -> np.ndarray:
    M, H, D = array.shape
    return array.reshape(M, H, 2, D // 2).swapaxes(2, 3).reshape(M, H * D)

  def to_ours(array: np.ndarray, shape: Shape) -> np.ndarray:
    M, H, D = shape
    return array.reshape(M, H, D // 2, 2).swapaxes(2, 3).reshape(shape)

  return Transform(kernel.their_shape, to_theirs, to_ours)


def _stacked(transform: Transform) -> Transform:
  """The same for one layer of a scanned array, whose first axis is the layer."""
  return Transform(
    their_shape=lambda shape: (1, *transform.their_shape(shape)),
    to_theirs=lambda array: transform.to_theirs(array)[None],
    to_ours=lambda array, shape: transform.to_ours(array[0], shape),
  )


_BLOCK: tuple[LayerRow, ...] = (
  ("attention_norm/kernel", ("attention_norm.scale",), SAME),
  ("attention/wq/kernel", ("attention.query",), _interleaved()),
  ("attention/wk/kernel", ("attention.key",), _interleaved()),
  ("attention/wv/kernel", ("attention.value",), _kernel(2)),
  ("attention/wo/kernel", ("attention.out",), _kernel()),
  ("ffn_norm/kernel", ("feed_forward_norm.scale",), SAME),
  ("feed_forward/w1/kernel", ("feed_forward.gate",), SAME),
  ("feed_forward/w3/kernel", ("feed_forward.up",), SAME),
  ("feed_forward/w2/kernel", ("feed_forward.down",), SAME),
)


def table(config: ModelConfig, scanned: bool) -> list[Tensor]:
  """The tensors of a release, without a prefix, by their keys joined with "/"."""
  text, end = config.text_vocab_size, config.vocab_size
  rows = [Tensor("transformer/wte/embedding", (Part("embedding", where=(slice(0, text),)),))]
  if scanned:
    for name, (path,), transform in _BLOCK:
      parts = [
        Part(f"blocks.{path}", _stacked(transform), (layer,)) for layer in range(config.num_layers)
      ]
      rows.append(Tensor(f"transformer/h/{SCANNED}/{name}", tuple(parts)))
  else:
    rows += layer_rows(
      config, [(f"transformer/h/{{layer}}/{name}", ours, how) for name, ours, how in _BLOCK]
    )
  rows.append(Tensor("transformer/ln_f/kernel", (Part("norm.scale"),)))
  columns = slice(None)
  rows.append(Tensor("lm_head/kernel", (Part("output", where=(columns, slice(0, text))),)))
  if config.vision_vocab_size:
    vision = slice(text, end)
    rows.append(Tensor("transformer/vte/embedding", (Part("embedding", where=(vision,)),)))
    rows.append(Tensor("vision_head/kernel", (Part("output", where=(columns, vision)),)))
  return rows
