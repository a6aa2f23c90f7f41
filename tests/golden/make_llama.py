"""Writes tests/golden/llama_*.npz: tiny random LlamaForCausalLM models and their logits.

Run it by hand from the root of the repository, in an environment with torch and transformers:

  python tests/golden/make_llama.py

The files were written with Python 3.11, torch 2.13.0 (CPU) and transformers 5.23.0. Weights are
rounded to float16, so that the files are half as large and exact; logits are computed in float32.
"""

import json
import pathlib

import numpy as np
import torch
import transformers

COMMON = dict(hidden_size=32, num_hidden_layers=2, intermediate_size=48, vocab_size=64)
CASES = {
  "multi_head": dict(num_attention_heads=4, num_key_value_heads=4),
  "grouped_query": dict(
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    rms_norm_eps=1e-5,
    rope_parameters=dict(rope_type="default", rope_theta=500000.0),
  ),
  # 48 tokens against an original context of 8: every branch of the scaling is taken.
  "llama3_scaling": dict(
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=16,
    rope_parameters=dict(
      rope_type="llama3",
      rope_theta=1000.0,
      factor=8.0,
      low_freq_factor=1.0,
      high_freq_factor=4.0,
      original_max_position_embeddings=8,
    ),
  ),
  "tied": dict(num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True),
}


def main():
  for name, options in CASES.items():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**COMMON, **options, attn_implementation="eager")
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
      for weight in model.parameters():
        # Larger than at initialisation, so that attention is far from uniform and norms are not 1.
        noise = torch.randn_like(weight) * 0.2
        weight.copy_((noise + (weight.ndim == 1)).half().float())
      ids = torch.randint(0, config.vocab_size, (1, 48))
      logits = model(ids).logits
    weights = {f"weights/{key}": value.half().numpy() for key, value in model.state_dict().items()}
    if config.tie_word_embeddings:
      del weights["weights/lm_head.weight"]  # A saved model lacks it too.
    path = pathlib.Path(__file__).parent / f"llama_{name}.npz"
    np.savez_compressed(
      path,
      ids=ids.numpy().astype(np.int32),
      logits=logits.numpy(),
      config=json.dumps(config.to_dict(), default=str),
      **weights,
    )
    print(path, path.stat().st_size)


if __name__ == "__main__":
  main()
