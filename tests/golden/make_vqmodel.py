"""Writes tests/golden/vqmodel.npz: a tiny random VQModel of diffusers, its codes and its pixels.

Run it by hand from the root of the repository, in an environment with torch and diffusers:

  python tests/golden/make_vqmodel.py

The file was written with Python 3.11, torch 2.13.0 (CPU) and diffusers 0.42.1. Weights are rounded
to float16, so that the file is half as large and exact; everything is computed in float32.
"""

import json
import pathlib

import diffusers
import numpy as np
import torch


def main():
  torch.manual_seed(0)
  model = diffusers.VQModel(
    down_block_types=["DownEncoderBlock2D"] * 3,
    up_block_types=["UpDecoderBlock2D"] * 3,
    block_out_channels=[4, 8, 8],
    layers_per_block=1,
    latent_channels=8,
    num_vq_embeddings=32,
    vq_embed_dim=4,
    norm_num_groups=2,
    mid_block_add_attention=False,
    lookup_from_codebook=True,
  ).eval()
  frames = torch.rand(2, 3, 16, 24)
  with torch.no_grad():
    for name, weight in model.named_parameters():
      # Larger than at initialisation, so that no part is near the identity and codes differ.
      noise = torch.randn_like(weight) * (1.0 if "embedding" in name else 0.2)
      weight.copy_((noise + ("norm" in name and "weight" in name)).half().float())
    latents = model.encode(frames).latents
    codes = model.quantize(latents)[2][2].reshape(2, 4, 6)
    shape = (2, 4, 6, 4)
    pixels = model.decode(codes, force_not_quantize=True, shape=shape).sample
  print("codes in use", len(codes.unique()), "pixels", pixels.mean(), pixels.std())
  path = pathlib.Path(__file__).parent / "vqmodel.npz"
  np.savez_compressed(
    path,
    config=json.dumps(dict(model.config), default=str),
    frames=frames.permute(0, 2, 3, 1).numpy(),
    latents=latents.permute(0, 2, 3, 1).numpy(),
    codes=codes.numpy().astype(np.int32),
    pixels=pixels.permute(0, 2, 3, 1).numpy(),
    **{f"weights/{name}": value.half().numpy() for name, value in model.state_dict().items()},
  )
  print(path, path.stat().st_size)


if __name__ == "__main__":
  main()
