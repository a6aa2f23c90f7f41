"""Model FLOPs of a training step, for MFU (PaLM, arXiv 2204.02311, appendix B).

The convention here: a multiply-add is two operations; the backward pass costs twice the forward;
recompute is not counted; attention is counted for the (query, key) pairs that the causal, packed
mask lets through and no others; padding is not counted; the head is counted for the targets that
carry loss, over the ids that their softmax runs over.
"""

from lwm.config.model import ModelConfig


def layer_parameters(model: ModelConfig) -> int:
  """Number of weights in one block's matrix products."""
  query_and_out = 2 * model.width * model.num_heads * model.head_dim
  key_and_value = 2 * model.width * model.num_kv_heads * model.head_dim
  return query_and_out + key_and_value + 3 * model.width * model.feed_forward_width


def train_flops(
  model: ModelConfig,
  *,
  tokens: float,
  attended_pairs: float,
  text_targets: float,
  vision_targets: float,
  softmax_range: str = "modality",
) -> float:
  """Model FLOPs of a forward and backward pass.

  Args:
    model: the decoder.
    tokens: tokens that are not padding.
    attended_pairs: (query, key) pairs inside the mask, summed over rows (of one head and layer).
    text_targets: targets of text with a loss weight above 0.
    vision_targets: the same of vision.
    softmax_range: `lwm.config.experiment.LossConfig.softmax_range`.
  """
  text_ids, vision_ids = model.text_vocab_size, model.vision_vocab_size
  if softmax_range == "all":
    text_ids = vision_ids = model.vocab_size
  body = 6 * model.num_layers * layer_parameters(model) * tokens
  head = 6 * model.width * (text_ids * text_targets + vision_ids * vision_targets)
  # Query x key and weights x value: 2 x 2 x head_dim forward, and three times that in all.
  attention = 12 * model.num_layers * model.num_heads * model.head_dim * attended_pairs
  return body + head + attention
