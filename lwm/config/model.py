"""Hyper-parameters of the decoder."""

import dataclasses
import itertools
from collections.abc import Sequence

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
class Stretch:
  """Consecutive layers of one kind, a key of `lwm.model.block.KINDS`."""

  kind: str = "dense"
  num_layers: int = 1


# The kind of layers whose feed-forward network is `ModelConfig.experts`.
EXPERTS = "experts"
ROUTERS = ("softmax", "sigmoid")
PLACEMENTS = ("home", "move", "replicate")


@dataclasses.dataclass
class ExpertsConfig:
  """A mixture of experts in place of a dense feed-forward network (docs/experts.md)."""

  num_experts: int = 8
  experts_per_token: int = 2
  # Feed-forward width of one expert.
  width: int = 128
  # Experts that every token goes through, in addition.
  shared_experts: int = 0
  # How the scores of experts come from the router's logits. "softmax": over all experts (Mixtral,
  # arXiv 2401.04088); "sigmoid": of each alone, and experts are chosen by score + bias, where the
  # bias follows the loads (DeepSeek-V3, arXiv 2412.19437).
  router: str = "softmax"
  # The scores of a token's experts are divided by their sum, then multiplied by `scale`.
  renormalise: bool = True
  scale: float = 1.0
  # Coefficients of the losses, per layer: load balance (arXiv 2101.03961) and mean squared
  # log-sum-exp of the router's logits (arXiv 2202.08906).
  balance_loss: float = 0.01
  router_z_loss: float = 0.001
  # Each step changes the bias of a sigmoid router by this much.
  bias_rate: float = 0.001
  # The most rows of an expert from one device and chunk of tokens (half a chunk where tokens travel
  # while others are computed: docs/expert_parallelism.md), as a multiple of their mean;
  # further tokens skip the expert. None: no token does.
  capacity_factor: float | None = None
  # Where experts are computed on a mesh that divides them. "home": where they are stored. Or each
  # device has spare slots, in which hot experts of others are computed: instead of there ("move"),
  # or as well, each copy for a part of the tokens ("replicate").
  placement: str = "home"
  # Slots per device and layer, unless placement is "home".
  spare_slots: int = 1
  # The loads that placement follows are means over steps. Each step multiplies the weights of the
  # steps before by this number.
  load_decay: float = 0.9


# Projections that can have a low-rank addition.
PROJECTIONS = ("query", "key", "value", "out", "gate", "up", "down")


@dataclasses.dataclass
class LoraConfig:
  """Low-rank additions to projections: x W becomes x W + alpha / rank x A B (arXiv 2106.09685).

  Only A and B are trained, unless `optimizer.trainable` names other parameters.
  """

  rank: int = 8
  alpha: float = 16.0
  targets: list[str] = dataclasses.field(default_factory=lambda: list(PROJECTIONS))

  @property
  def scale(self) -> float:
    return self.alpha / self.rank


@dataclasses.dataclass
class AdapterConfig:
  """Two adapters per block, mixed by the modality of the prompt (LaVIN, arXiv 2305.15023).

  Only they are trained, unless `optimizer.trainable` names other parameters.
  """

  # Width of the bottleneck of each adapter.
  width: int = 8
  # Factor of what the adapters add.
  scale: float = 1.0
  # Temperature of the router's softmax over the two adapters.
  temperature: float = 10.0


@dataclasses.dataclass
class ModelConfig:
  """A decoder of the Llama family over one id space: text ids, then vision ids.

  Text ids are [0, text_vocab_size); vision code c is id text_vocab_size + c, c in
  [0, vision_vocab_size). Parameters are float32; matrix products run in `compute_dtype`.
  """

  num_layers: int = 2
  # From the first layer to the last; their sizes add up to num_layers. Empty: all layers are dense,
  # or all have experts if `experts` is set.
  stretches: list[Stretch] = dataclasses.field(default_factory=list)
  width: int = 64
  num_heads: int = 4
  num_kv_heads: int = 2
  head_dim: int = 16
  feed_forward_width: int = 128
  text_vocab_size: int = 256
  vision_vocab_size: int = 0
  # The embedding and the head are padded with ids to a multiple of this number, so that they divide
  # over the mesh's tensor axis. Padding is never a target, never sampled and never exported.
  # 0: the multiple that the meshes of all stages need.
  vocab_multiple: int = 0
  norm_epsilon: float = 1e-5
  tied_head: bool = False
  # Biases of the query, key and value projections (Qwen2, arXiv 2407.10671).
  attention_bias: bool = False
  # RMSNorm of each head's query and key, with a learned scale, before RoPE (Qwen3, arXiv
  # 2505.09388).
  query_key_norm: bool = False
  # The experts of the layers of kind "experts".
  experts: ExpertsConfig | None = None
  # Low-rank additions to a base model, trained in its place. None: there are none.
  lora: LoraConfig | None = None
  # Adapters of the blocks of a base model, trained in its place. None: there are none.
  adapter: AdapterConfig | None = None
  rope_scaling: RopeScaling | None = None
  # A token attends to itself and the `sliding_window` - 1 tokens before it (Mistral 7B, arXiv
  # 2310.06825). None: to all earlier tokens of its document.
  sliding_window: int | None = None
  # Attention scores become cap * tanh(score / cap) (Gemma 2, arXiv 2408.00118). None: no cap.
  attention_soft_cap: float | None = None
  # One of the backends in kernels/attention/api.py. None: the best for the device.
  attention_backend: str | None = None
  initializer_std: float = 0.02
  compute_dtype: str = "bfloat16"
  # Activations of a block that are kept for the backward pass in addition to its input. "none":
  # all; "dots": results of matrix products and of attention; "attention": results of attention;
  # "full": none. "offload" keeps only the input, in host memory; "offload_attention" keeps the
  # input and the results of attention there. Everything else is recomputed.
  remat: str = "full"
  # Number of head groups processed in turn; each group needs 1/head_groups of the attention memory.
  head_groups: int = 1
  # Tokens per chunk of the blockwise feed-forward and of the cross-entropy.
  feed_forward_chunk: int = 2048
  loss_chunk: int = 1024

  @property
  def vocab_size(self) -> int:
    return self.text_vocab_size + self.vision_vocab_size

  @property
  def padded_vocab_size(self) -> int:
    """Number of ids including padding, which comes after the vision ids."""
    multiple = max(self.vocab_multiple, 1)
    return -(-self.vocab_size // multiple) * multiple

  @property
  def table_shapes(self) -> dict[str, tuple[int, int]]:
    """Shapes of the parameters with one row or column per id, by name.

    "embedding", and "output" unless the head is tied to the embedding.
    """
    shapes = {"embedding": (self.padded_vocab_size, self.width)}
    if not self.tied_head:
      shapes["output"] = (self.width, self.padded_vocab_size)
    return shapes

  @property
  def resolved_stretches(self) -> list[Stretch]:
    """`stretches`, or the one stretch of all layers that an empty list stands for."""
    return self.stretches or [Stretch(EXPERTS if self.experts else "dense", self.num_layers)]


def expert_stretches(num_layers: int, first: int = 0, every: int = 1) -> list[Stretch]:
  """Stretches with experts in every `every`-th layer from layer `first` on, and dense others."""
  return stretches_of(
    [layer >= first and (layer - first) % every == 0 for layer in range(num_layers)]
  )


def stretches_of(has_experts: Sequence[bool]) -> list[Stretch]:
  """Stretches of layers with experts and of dense ones, from whether each layer has experts."""
  groups = [(own, len(list(layers))) for own, layers in itertools.groupby(has_experts)]
  return [Stretch(EXPERTS if own else "dense", number) for own, number in groups]
