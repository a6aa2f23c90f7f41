"""Writes tests/golden/hugging_face/: tiny random models that transformers saved, and their logits.

Run it by hand from the root of the repository, in an environment with torch and transformers:

  python tests/golden/make_hugging_face.py [CASE ...]

The files were written with Python 3.11, torch 2.13.0 (CPU) and transformers 5.24.0. Each directory
is what `save_pretrained` wrote, and `logits.npz`: ids [1, S] and logits [1, S, V], computed in
float32 from the rounded weights of the files.
"""

import pathlib
import shutil
import sys

import numpy as np
import torch
import transformers

GOLDEN = pathlib.Path(__file__).parent / "hugging_face"
COMMON = dict(hidden_size=24, num_hidden_layers=2, intermediate_size=32, vocab_size=64)
GROUPED = dict(num_attention_heads=4, num_key_value_heads=2)
NUM_TOKENS = 32


def rope(theta, **scaling):
  return dict(rope_type="llama3" if scaling else "default", rope_theta=theta, **scaling)


# The model type, its settings, and how its weights are stored.
CASES = {
  "llama": ("llama", dict(**GROUPED, head_dim=12, rms_norm_eps=1e-5, rope_parameters=rope(5e5))),
  "llama_multi_head": ("llama", dict(num_attention_heads=4, num_key_value_heads=4)),
  # 32 tokens against an original context of 8: every branch of the scaling is taken.
  "llama_scaled": (
    "llama",
    dict(
      num_attention_heads=3,
      num_key_value_heads=1,
      head_dim=16,
      rope_parameters=rope(
        1000.0,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8,
      ),
    ),
  ),
  "llama_tied": ("llama", dict(**GROUPED, tie_word_embeddings=True)),
  "mistral": ("mistral", dict(**GROUPED, head_dim=8, sliding_window=9)),
  "phi3": ("phi3", dict(**GROUPED, sliding_window=7, pad_token_id=0)),
  "qwen2": ("qwen2", dict(**GROUPED, tie_word_embeddings=True, rope_parameters=rope(1e6))),
  # All layers slide, because max_window_layers is the first layer that does.
  "qwen2_sliding": (
    "qwen2",
    dict(
      num_attention_heads=4,
      num_key_value_heads=4,
      use_sliding_window=True,
      sliding_window=10,
      max_window_layers=0,
    ),
  ),
  "mixtral": (
    "mixtral",
    dict(**GROUPED, intermediate_size=16, num_local_experts=5, num_experts_per_tok=2, head_dim=6),
  ),
  # The first layer is dense.
  "qwen3_moe": (
    "qwen3_moe",
    dict(
      **GROUPED,
      head_dim=12,
      num_experts=6,
      num_experts_per_tok=3,
      moe_intermediate_size=12,
      norm_topk_prob=True,
      mlp_only_layers=[0],
    ),
  ),
  "qwen3": ("qwen3", dict(**GROUPED, head_dim=12, rope_parameters=rope(1e6))),
}
# Stored in float32 or float16 instead of bfloat16.
DTYPES = {"llama_multi_head": torch.float32, "mistral": torch.float16}
SHARDED = "llama"


def main():
  for name in sys.argv[1:] or CASES:
    model_type, options = CASES[name]
    shutil.rmtree(GOLDEN / name, ignore_errors=True)
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
      model_type, **{**COMMON, **options}, attn_implementation="eager"
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    dtype = DTYPES.get(name, torch.bfloat16)
    with torch.no_grad():
      for weight_name, weight in model.named_parameters():
        # Larger than at initialisation, so that attention is far from uniform and norms are not 1.
        noise = torch.randn_like(weight) * 0.3
        weight.copy_((noise + weight_name.endswith("norm.weight")).to(dtype).float())
      ids = torch.randint(0, config.vocab_size, (1, NUM_TOKENS))
      logits = model(ids).logits
    directory = GOLDEN / name
    shard_size = "10KB" if name == SHARDED else "1GB"
    model.to(dtype).save_pretrained(directory, max_shard_size=shard_size)
    np.savez_compressed(
      directory / "logits.npz", ids=ids.numpy().astype(np.int32), logits=logits.numpy()
    )
    print(name, sum(path.stat().st_size for path in directory.iterdir()), float(logits.std()))


if __name__ == "__main__":
  main()
