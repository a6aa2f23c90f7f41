"""What the whole decoder costs, and the model FLOPs of a training step for MFU.

MFU is defined as in PaLM (arXiv 2204.02311, appendix B), with this convention: a multiply-add is
two operations; the backward pass costs twice the forward pass, and once where the weights of a
product are frozen; recompute is not counted; attention is counted for the (query, key) pairs inside
the causal, packed mask only; padding is not counted; the head is counted for the targets that carry
loss, over the ids that their softmax runs over.
"""

from collections.abc import Iterator
from typing import NamedTuple

from lwm.config.model import ModelConfig
from lwm.cost.layer import Division, LayerCost, total
from lwm.model.block import KINDS


class TrainedShares(NamedTuple):
  """Share of the parameters that are trained, by number of elements.

  Attributes:
    body: of the layers between the embedding and the head.
    tables: of the embedding and the head.
  """

  body: float = 1.0
  tables: float = 1.0


def layers(model: ModelConfig, division: Division) -> Iterator[tuple[LayerCost, int]]:
  """For each stretch of equal layers: the cost of one layer, and the number of layers."""
  for stretch in model.resolved_stretches:
    yield KINDS[stretch.kind].cost(model, division), stretch.num_layers


def body_cost(model: ModelConfig, division: Division = Division()) -> LayerCost:
  """The cost of all layers between the embedding and the head."""
  return total(layers(model, division))


def vocabulary_weights(model: ModelConfig) -> int:
  """Elements of the embedding and, unless it is tied, of the head, without padding."""
  return model.vocab_size * model.width * (1 if model.tied_head else 2)


def train_flops(
  model: ModelConfig,
  *,
  tokens: float = 0,
  attended_pairs: float = 0,
  text_targets: float = 0,
  vision_targets: float = 0,
  softmax_range: str = "modality",
  trained: TrainedShares = TrainedShares(),
) -> float:
  """Model FLOPs of a forward and backward pass.

  Args:
    model: the decoder.
    tokens: number of tokens that are not padding.
    attended_pairs: (query, key) pairs inside the mask, summed over rows, for one head of one layer.
    text_targets: number of text targets with a loss weight above 0.
    vision_targets: number of vision targets with a loss weight above 0.
    softmax_range: `lwm.config.experiment.LossConfig.softmax_range`.
    trained: what is trained; gradients of frozen weights are not computed.
  """
  text_ids, vision_ids = model.text_vocab_size, model.vision_vocab_size
  if softmax_range == "all":
    text_ids = vision_ids = model.vocab_size
  body = body_cost(model)
  head = 2 * model.width * (text_ids * text_targets + vision_ids * vision_targets)
  products = (2 + trained.body) * body.flops * tokens + (2 + trained.tables) * head
  return products + 3 * body.pair_flops * attended_pairs
