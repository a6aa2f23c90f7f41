"""Model sizes. A config picks one and changes what it needs to."""

from lwm.config.model import ExpertsConfig, ModelConfig, RopeScaling, expert_stretches
from lwm.config.vqgan import VQGANConfig

VISION_VOCAB_SIZE = VQGANConfig().layout.vocab_size


def lwm_7b(vision: bool = False) -> ModelConfig:
  """Llama-2 7B, the base of LWM (arXiv 2307.09288, 2402.08268)."""
  return ModelConfig(
    num_layers=32,
    width=4096,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    feed_forward_width=11008,
    text_vocab_size=32000,
    vision_vocab_size=VISION_VOCAB_SIZE if vision else 0,
  )


def lwm_1b(vision: bool = False) -> ModelConfig:
  """1.2 billion parameters, with Llama's ratios; one of the sizes in LWM's code."""
  model = lwm_7b(vision)
  model.num_layers = 22
  model.width = 2048
  model.num_heads = model.num_kv_heads = 16
  model.feed_forward_width = 5504
  return model


def lwm_13b(vision: bool = False) -> ModelConfig:
  """Llama-2 13B."""
  model = lwm_7b(vision)
  model.num_layers = 40
  model.width = 5120
  model.num_heads = model.num_kv_heads = 40
  model.feed_forward_width = 13824
  return model


def llama3_8b(vision: bool = False, scaled_rope: bool = True) -> ModelConfig:
  """Llama 3.1 8B, or 3.0 without the scaled RoPE; both use rope_theta 5e5 (arXiv 2407.21783)."""
  model = lwm_7b(vision)
  model.num_kv_heads = 8
  model.feed_forward_width = 14336
  model.text_vocab_size = 128256
  model.rope_scaling = RopeScaling() if scaled_rope else None
  return model


def qwen3_8b() -> ModelConfig:
  """Qwen3 8B, which uses rope_theta 1e6 (arXiv 2505.09388)."""
  model = lwm_7b()
  model.num_layers = 36
  model.num_kv_heads = 8
  model.feed_forward_width = 12288
  model.text_vocab_size = 151936
  model.norm_epsilon = 1e-6
  model.query_key_norm = True
  return model


def mixtral_8x7b() -> ModelConfig:
  """Mixtral 8x7B, 46.7 billion parameters, which uses rope_theta 1e6 (arXiv 2401.04088)."""
  model = lwm_7b()
  model.num_kv_heads = 8
  model.experts = ExpertsConfig(num_experts=8, experts_per_token=2, width=14336)
  return model


def fine_grained_16b() -> ModelConfig:
  """DeepSeekMoE 16B (arXiv 2401.06066): 64 experts of which 6 are chosen, and 2 shared ones.

  The first layer is dense. Routing is DeepSeek-V3's, balanced by biases (arXiv 2412.19437).
  """
  model = lwm_7b()
  model.num_layers = 28
  model.width = 2048
  model.num_heads = model.num_kv_heads = 16
  model.feed_forward_width = 10944
  model.text_vocab_size = 102400
  model.norm_epsilon = 1e-6
  model.experts = ExpertsConfig(
    num_experts=64,
    experts_per_token=6,
    width=1408,
    shared_experts=2,
    router="sigmoid",
    placement="replicate",
    # The losses that remain when biases balance the loads (arXiv 2412.19437, section 4.2).
    balance_loss=1e-4,
  )
  model.stretches = expert_stretches(model.num_layers, first=1)
  return model


def laptop(text_vocab_size: int) -> ModelConfig:
  """3.5 million parameters, for two CPU cores: float32, without recompute."""
  return ModelConfig(
    num_layers=4,
    width=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    feed_forward_width=384,
    text_vocab_size=text_vocab_size,
    vision_vocab_size=VISION_VOCAB_SIZE,
    # About 1 / sqrt(width). With 0.02, a model this narrow takes long to learn to attend.
    initializer_std=0.08,
    compute_dtype="float32",
    remat="none",
  )


def debug(text_vocab_size: int = 256, vision_vocab_size: int = VISION_VOCAB_SIZE) -> ModelConfig:
  """As small as every code path allows, for tests."""
  return ModelConfig(
    num_layers=2,
    width=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    feed_forward_width=64,
    text_vocab_size=text_vocab_size,
    vision_vocab_size=vision_vocab_size,
    compute_dtype="float32",
    remat="none",
  )


def laptop_vqgan() -> VQGANConfig:
  """Small enough to train in minutes on two cores; 16x16 codes per frame, like LWM's."""
  return VQGANConfig(
    resolution=64,
    hidden_channels=16,
    channel_multipliers=(1, 2, 4),
    num_res_blocks=1,
    latent_channels=32,
    codebook_size=512,
    codebook_width=16,
    norm_groups=8,
  )
