"""Writes tests/golden/peft/: an adapter that PEFT saved, and the logits of its model.

Run it by hand from the root of the repository, in an environment with torch, transformers and peft:

  python tests/golden/make_peft.py

The files were written with Python 3.11, torch 2.13.0 (CPU), transformers 5.24.0 and peft 0.21.2.
The base is tests/golden/hugging_face/llama_multi_head. `logits.npz` holds ids [1, S] and logits
[1, S, V] in float32.
"""

import pathlib
import shutil

import numpy as np
import peft
import torch
import transformers

BASE = pathlib.Path(__file__).parent / "hugging_face" / "llama_multi_head"
OUTPUT = pathlib.Path(__file__).parent / "peft"


def main():
  torch.manual_seed(0)
  model = transformers.AutoModelForCausalLM.from_pretrained(BASE, attn_implementation="eager")
  settings = peft.LoraConfig(
    task_type="CAUSAL_LM",
    r=3,
    lora_alpha=5,
    target_modules=["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
  )
  model = peft.get_peft_model(model, settings).eval()
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if "lora_" in name:
        parameter.copy_(0.3 * torch.randn_like(parameter))
    ids = torch.randint(0, model.config.vocab_size, (1, 16))
    logits = model(ids).logits
  shutil.rmtree(OUTPUT, ignore_errors=True)
  model.peft_config["default"].base_model_name_or_path = BASE.name
  model.save_pretrained(OUTPUT)
  (OUTPUT / "README.md").unlink(missing_ok=True)
  np.savez(OUTPUT / "logits.npz", ids=ids.numpy().astype(np.int32), logits=logits.numpy())


if __name__ == "__main__":
  main()
