"""Importing and exporting models, from the command line to their files."""

import json
import pathlib

import numpy as np
import pytest
import safetensors.numpy
import tokenizers

from lwm.vision.codec import Codec
from tests import programs

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "hugging_face"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> pathlib.Path:
  """A byte-level tokenizer.json of 64 tokens, with the names of its marks."""
  directory = tmp_path_factory.mktemp("tokenizer")
  model = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=None))
  model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  model.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(vocab_size=60, special_tokens=["<s>", "</s>"])
  model.train_from_iterator(["the cat sees a red house"], trainer)
  model.save(str(directory / "tokenizer.json"))
  marks = {"bos_token": "<s>", "eos_token": "</s>"}
  (directory / "tokenizer_config.json").write_text(json.dumps(marks))
  return directory / "tokenizer.json"


def run(program: str, *arguments: object) -> str:
  done = programs.run(f"experiments.{program}", *arguments)
  assert done.returncode == 0, done.stderr
  return done.stdout


def tensors(directory: pathlib.Path) -> dict[str, str]:
  manifest = json.loads((directory / "manifest.json").read_text())
  return {name: tensor["sha256"] for name, tensor in manifest.items()}


@pytest.mark.slow
def test_a_model_comes_in_answers_and_goes_out_bit_for_bit(tmp_path, tokenizer):
  first, second, back = tmp_path / "first", tmp_path / "second", tmp_path / "back"
  source = GOLDEN / "llama_multi_head"
  said = run("import_weights", f"--input={source}", f"--tokenizer={tokenizer}", f"--output={first}")
  assert str(first) in said
  answer = run("generate", f"--workdir={first}", "--prompt=the cat", "--num_tokens=3")
  assert "stage imported" in answer and "the cat" in answer
  file = tmp_path / "model.gguf"
  run("export_weights", f"--workdir={first}", "--format=gguf", "--type=F32", f"--output={file}")
  run("import_weights", f"--input={file}", f"--output={second}")
  run("export_weights", f"--workdir={second}", "--format=hugging_face", f"--output={back}")
  assert tensors(back) == tensors(first)
  settings = [json.loads((path / "config.json").read_text()) for path in (source, back)]
  names = ("hidden_size", "num_key_value_heads", "rms_norm_eps", "max_position_embeddings")
  for name in names:
    assert settings[0][name] == settings[1][name]


@pytest.mark.parametrize(
  "program, arguments, message",
  [
    ("import_weights", ["--input=nowhere"], "--input=nowhere: there is no such file"),
    ("import_weights", ["--input=README.md"], "neither a Hugging Face directory nor a GGUF file"),
    ("import_weights", ["--input=tests"], "tests/config.json cannot be read"),
    (
      "import_weights",
      [f"--input={GOLDEN / 'phi3'}", "--rope_theta=3"],
      "--rope_theta is only for releases of LWM's",
    ),
    ("export_weights", ["--workdir=nowhere", "--format=gguf"], "There is no checkpoint in nowhere"),
    ("export_weights", ["--workdir=nowhere", "--format=zip"], "--format=zip is not one of"),
    (
      "import_weights",
      [f"--input={GOLDEN.parent / 'peft'}"],
      "peft is an adapter: name the checkpoint of its base with --base",
    ),
  ],
)
def test_mistakes_end_in_one_sentence(tmp_path, program, arguments, message):
  done = programs.run(f"experiments.{program}", *arguments, f"--output={tmp_path / 'out'}")
  assert done.returncode == 1
  assert done.stderr.startswith("error: ") and message in done.stderr
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_vqgan_comes_in(tmp_path):
  with np.load(GOLDEN.with_name("vqmodel.npz")) as golden:
    config = {"_class_name": "VQModel", **json.loads(str(golden["config"]))}
    weights = {name.removeprefix("weights/"): golden[name] for name in golden if "/" in name}
  (tmp_path / "config.json").write_text(json.dumps(config))
  safetensors.numpy.save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors")
  arguments = f"--input={tmp_path}", f"--output={tmp_path / 'vqgan.npz'}"
  done = programs.run("experiments.import_weights", *arguments)
  assert done.returncode == 1 and "give --pixel_range=0,1" in done.stderr
  run("import_weights", *arguments, "--pixel_range=0,1", "--resolution=16")
  config = Codec(tmp_path / "vqgan.npz").config
  assert (config.pixel_range, config.resolution) == ((0, 1), 16)
