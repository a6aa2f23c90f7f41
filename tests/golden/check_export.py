"""Checks exported Hugging Face directories with transformers itself, in two environments.

    python -m tests.golden.check_export write DIRECTORY
    python -m tests.golden.check_export read DIRECTORY

The first step runs in the project's environment. It exports the golden models, and random ones
with a padded vocabulary, a sentencepiece tokenizer and vision ids, and stores our logits beside
them. The second runs in an environment with torch, transformers, sentencepiece, protobuf and
diffusers. It loads each directory with `from_pretrained`, and prints how far the logits and the ids
of a text are from ours; it also runs the program in the README.md of the model with vision ids. It
ends with an error if anything differs.
"""

import pathlib
import re
import subprocess
import sys

import numpy as np

TEXTS = ("a cat on the sofa", " two  spaces, 123\n and é", "<vision></vision>")
VISION = "vision"
TOLERANCE = 1e-4


def write(directory: pathlib.Path) -> None:
  import lwm.convert as convert
  from lwm.checkpoint.reader import newest
  from lwm.data.tokenizer import load_tokenizer
  from tests.lwm.convert import (
    test_hugging_face as golden,
    test_hugging_face_export as random_models,
  )

  directory.mkdir(parents=True)
  checkpoints, vqgan = {}, random_models.write_vqgan(directory / "vqgan.npz")
  words = random_models.write_words(directory / "words")
  for case in golden.CASES:
    checkpoints[case] = directory / "checkpoints" / case
    weights = convert.read_hugging_face(golden.GOLDEN / case, words)
    convert.import_weights(weights, checkpoints[case])
  pieces = random_models.write_pieces(directory / "pieces")
  for case, config in random_models.CONFIGS.items():
    checkpoints[case] = directory / "checkpoints" / case
    random_models.write_checkpoint(checkpoints[case], config, pieces)
  for case, checkpoint in checkpoints.items():
    stored = newest(checkpoint)
    convert.export_hugging_face(stored, directory / "exported" / case, vqgan=vqgan)
    ids = np.random.default_rng(0).integers(0, stored.experiment.model.vocab_size, (1, 40))
    logits = golden.our_logits(checkpoint, ids.astype(np.int32))
    logits = logits[..., : stored.experiment.model.vocab_size]
    tokenizer = load_tokenizer(stored.tokenizer_path)
    texts = [np.array([tokenizer.bos_id, *tokenizer.encode(text)]) for text in TEXTS]
    np.savez(
      directory / f"{case}.npz",
      ids=ids,
      logits=logits,
      **{f"text{number}": text for number, text in enumerate(texts)},
    )
    print(case)


def read(directory: pathlib.Path) -> None:
  import torch
  import transformers

  transformers.logging.set_verbosity_error()
  wrong = []
  for path in sorted((directory / "exported").iterdir()):
    with np.load(directory / f"{path.name}.npz") as file:
      ours = dict(file)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
      path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    with torch.no_grad():
      logits = model.eval()(torch.tensor(ours["ids"])).logits.numpy()
    difference = np.abs(logits - ours["logits"]).max()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    # transformers marks tokens in text, and our tokenizer spells them: the last text may differ.
    different = [
      text
      for number, text in enumerate(TEXTS[:2])
      if [i for i in tokenizer.encode(text) if i != model.config.bos_token_id]
      != [i for i in ours[f"text{number}"].tolist() if i != model.config.bos_token_id]
    ]
    loaded = {name: keys for name, keys in info.items() if keys}
    print(
      f"{path.name:20} {type(model).__name__:20} logits of {np.std(logits):.2f} differ by "
      f"{difference:.1e}; texts that differ: {different}; loading: {loaded or 'complete'}"
    )
    if difference > TOLERANCE or different or loaded or np.std(logits) < 0.1:
      wrong.append(path.name)
  vision = directory / "exported" / VISION
  program = re.search(r"```python\n(.*?)```", (vision / "README.md").read_text(), re.DOTALL)
  assert program
  subprocess.run([sys.executable, "-c", program[1], vision, TEXTS[0], "2"], check=True)
  if wrong:
    sys.exit(f"wrong: {wrong}")


if __name__ == "__main__":
  {"write": write, "read": read}[sys.argv[1]](pathlib.Path(sys.argv[2]))
