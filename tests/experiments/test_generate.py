"""The program that samples, from the command line to its files."""

import io
import json
import pathlib
import re
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
from flax import nnx
from PIL import Image

from experiments.inference import decode_after
from lwm import data, model as model_lib
from lwm.checkpoint.checkpoints import Checkpoints, Identity
from lwm.checkpoint.position import Position
from lwm.config.vqgan import VQGANConfig
from lwm.data.tokenizer import tokenizer_files
from lwm.parallel.mesh import make_mesh
from lwm.parallel.sharding import MeshConfig
from lwm.program.state import TrainState
from lwm.vision.codec import Codec, save_vqgan
from lwm.vision.vqgan import VQGAN
from tests import programs

VISION = VQGANConfig(
    resolution=32, hidden_channels=8, channel_multipliers=(1, 1), num_res_blocks=1,
    latent_channels=8, codebook_size=16, codebook_width=4, norm_groups=4,
)  # fmt: skip
CODES_NxP = np.random.default_rng(0).integers(0, VISION.codebook_size, (3, 256))
CONFIG = """
from configs import models
from lwm.config.experiment import DatasetConfig
from lwm.config.experiment import Experiment
from lwm.config.experiment import MixtureEntry
from lwm.config.experiment import Stage

def get_config(directory):
  return Experiment(
      tokenizer=f"{directory}/tokenizer.model",
      model=models.debug(text_vocab_size=300),
      datasets=[
          DatasetConfig(name="text", path=f"{directory}/text"),
          DatasetConfig(name="images", path=f"{directory}/images"),
          DatasetConfig(name="codes", path=f"{directory}/codes"),
          DatasetConfig(name="video", path=f"{directory}/video"),
      ],
      stages=[Stage(name="only", mixture=[MixtureEntry("text")])],
  )
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> pathlib.Path:
  """Config, tokenizer, VQGAN, datasets, and a run of one checkpoint: all of random weights."""
  directory = tmp_path_factory.mktemp("generate")
  (directory / "config.py").write_text(CONFIG)
  (directory / "bad.jsonl").write_text('{"prompt": "the cat"}\n{"prompt": 5}\n')
  tokenizer_path = directory / "tokenizer.model"
  data.train_sentencepiece(["the cat sees a red house and runs"] * 9, tokenizer_path, 300)
  tokenizer = data.load_tokenizer(tokenizer_path)
  save_vqgan(directory / "vqgan.npz", VISION, nnx.state(VQGAN(VISION, rngs=nnx.Rngs(0))))
  with data.DatasetWriter(directory / "text", tokenizer) as writer:
    writer.write("train", data.text_document(tokenizer, "the cat runs"))
  # What has no clip, or codes of a VQGAN that nobody named, stands before what can be shown.
  codec = Codec(directory / "vqgan.npz")
  sha256, frames = codec.sha256, [Image.fromarray(frame) for frame in codec.decode(CODES_NxP)]
  frames[0].save(directory / "cat.png")
  frames[0].save(directory / "film.gif", save_all=True, append_images=frames[1:], duration=500)
  with data.DatasetWriter(directory / "images", tokenizer, vqgan_sha256=sha256) as writer:
    writer.write("validation", data.video_document(tokenizer, CODES_NxP[:1], "a cat"))
  with data.DatasetWriter(directory / "codes", tokenizer) as writer:
    writer.write("validation", data.video_document(tokenizer, CODES_NxP, "a cat"))
  with data.DatasetWriter(directory / "video", tokenizer, vqgan_sha256=sha256) as writer:
    writer.write("validation", data.text_document(tokenizer, "the cat runs"))
    writer.write("validation", data.video_document(tokenizer, CODES_NxP, "a cat"))

  experiment = runpy.run_path(str(directory / "config.py"))["get_config"](str(directory))
  with jax.set_mesh(make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])):
    params = jax.jit(model_lib.build(experiment.model).init)(jax.random.key(0))
    checkpoints = Checkpoints(directory / "run" / "checkpoints", keep=1)
    identity = Identity(experiment, tokenizer_files(tokenizer_path), {})
    state = TrainState(params, {"moments": jnp.zeros(3)}, jnp.int32(5))
    checkpoints.save(state, Position(0, 5, 5), identity)
    checkpoints.close()
  return directory


def run(directory: pathlib.Path, *arguments: str, workdir="run", several_devices=False):
  command = [
      "experiments.generate", f"--workdir={directory / workdir}",
      f"--vqgan={directory / 'vqgan.npz'}", "--num_tokens=5", "--given_frames=1", "--frames=2",
  ]  # fmt: skip
  return programs.run(*command, *arguments, several_devices=several_devices)


@pytest.mark.slow
def test_text_and_frames(directory):
  done = run(directory, "--prompt=the cat", several_devices=True)
  assert done.returncode == 0, done.stderr
  samples = directory / "run" / "samples"
  text = (samples / "text.txt").read_text()
  assert text.startswith("the cat") and text.strip() in done.stdout
  assert str(samples / "text.txt") in done.stdout and str(samples / "video.png") in done.stdout

  picture = np.asarray(Image.open(samples / "video.png").convert("RGB"))
  # Three columns and two rows of 32 pixels, doubled, with gaps of four.
  assert picture.shape == (2 * 64 + 4, 3 * 64 + 2 * 4, 3)
  truth, prediction = picture[:64], picture[68:]
  frames = Codec(directory / "vqgan.npz").decode(CODES_NxP).repeat(2, 1).repeat(2, 2)
  np.testing.assert_array_equal(truth[:, 68:132], frames[1])
  np.testing.assert_array_equal(truth[:, 136:], frames[2])
  # The given frame has a border in both rows.
  np.testing.assert_array_equal(truth[:, :64], prediction[:, :64])
  np.testing.assert_array_equal(truth[2:-2, 2:62], frames[0][2:-2, 2:-2])
  assert (truth[:2, :64] == truth[0, 0]).all() and (truth[0, 0] != frames[0][0, 0]).any()

  assert run(directory, "--prompt=the cat", "--seed=4").returncode == 0
  other = np.asarray(Image.open(samples / "video.png").convert("RGB"))
  np.testing.assert_array_equal(other[:64], truth)
  assert (other[68:] != prediction).any()


@pytest.mark.parametrize(
  "arguments, workdir, message",
  [
    ([], "nowhere", "There is no checkpoint in"),
    (["--frames=3"], "run", "The clip has 3 frames, fewer than 1 given + 3 predicted"),
    (["--clip=1"], "run", "has 1 validation documents with clips"),
    (["--vqgan=config.py"], "run", "There is no VQGAN file config.py"),
    (["--prompts={}/bad.jsonl"], "run", "bad.jsonl, line 2, is not JSON"),
    (["--num_tokens=1000000000"], "run", "The cache of 1 x 1,000,000,"),
  ],
  ids=["checkpoint", "frames", "clip", "vqgan", "prompts", "cache"],
)
def test_mistakes_end_in_one_sentence(directory, arguments, workdir, message):
  arguments = [argument.format(directory) for argument in arguments]
  assert_one_sentence_before_weights(run(directory, *arguments, workdir=workdir), message)


def assert_one_sentence_before_weights(done, message):
  assert done.returncode == 1
  assert done.stderr.strip().splitlines()[-1].startswith("error: ") and message in done.stderr
  assert "Traceback" not in done.stderr and "weights: " not in done.stdout


def chat(directory, *arguments):
  done = programs.run(
    "experiments.chat",
    f"--workdir={directory / 'run'}",
    f"--vqgan={directory / 'vqgan.npz'}",
    "--num_tokens=5",
    *arguments,
  )
  answers = [line for line in done.stdout.splitlines() if not re.match(r"\S+: ", line)]
  return done, answers


@pytest.mark.slow
def test_chat_about_an_image_and_with_its_saved_prefix(directory, tmp_path):
  questions = "--question=the cat runs?", "--question=a house?"
  film = f"--image={directory / 'cat.png'}"
  done, answers = chat(directory, film, *questions, f"--save_prefix={tmp_path / 'prefix'}")
  assert done.returncode == 0, done.stderr
  assert [line for line in answers if line.startswith(">")] == ["> the cat runs?", "> a house?"]
  again, same = chat(directory, f"--load_prefix={tmp_path / 'prefix'}", *questions)
  assert again.returncode == 0, again.stderr
  assert same == answers
  # The image and its marks, read once.
  assert done.stderr.count("; the first after") == 2
  done, _ = chat(directory, film, f"--save_prefix={tmp_path / 'prefix'}")
  assert done.returncode == 1 and "exists: name another directory" in done.stderr


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["--film={}/config.py"], "config.py cannot be used"),
    (["--image={}/nothing.png"], "nothing.png cannot be used"),
    (["--load_prefix={}/video"], "video is not a prefix"),
    (["--question=the cat", "--context=9"], "more than --context=9"),
    (
      ["--image={}/cat.png", "--question=a", "--question=" + "the cat " * 199, "--context=700"],
      "more than --context=700",
    ),
    (["--film={}/film.gif", "--context=300"], "film.gif has more than 1 frames"),
    (["--context=1000000000"], "The cache of 1 x 1,000,000,000 tokens needs"),
  ],
  ids=["film", "image", "prefix", "context", "later question", "frames", "cache"],
)
def test_mistakes_in_chat_end_in_one_sentence(directory, arguments, message):
  done, _ = chat(directory, *(argument.format(directory) for argument in arguments))
  assert_one_sentence_before_weights(done, message)


@pytest.mark.parametrize(
  "program, arguments, message",
  [
    ("plan_inference", ["--topology=v5p:2x2x1"], "Only language models generate"),
    ("benchmark", ["generate"], "generate: this measures language models"),
  ],
)
def test_the_config_of_a_vqgan_is_one_sentence(program, arguments, message):
  done = programs.run(f"experiments.{program}", "--config=configs/vqgan_laptop.py", *arguments)
  assert done.returncode == 1
  assert done.stderr.strip().startswith("error: ") and message in done.stderr


@pytest.mark.slow
def test_prompts_of_a_file_and_pictures(directory, tmp_path):
  lines = [json.dumps({"prompt": prompt}) for prompt in ("the cat", "a red house and")]
  (tmp_path / "prompts.jsonl").write_text("\n".join(lines) + "\n")
  done = run(directory, f"--prompts={tmp_path / 'prompts.jsonl'}")
  assert done.returncode == 0, done.stderr
  texts = (directory / "run" / "samples" / "texts.jsonl").read_text().splitlines()
  assert [json.loads(line)["prompt"] for line in texts] == ["the cat", "a red house and"]
  done = run(directory, "--make=image", "--prompt=a cat")
  assert done.returncode == 0, done.stderr
  picture = np.asarray(Image.open(directory / "run" / "samples" / "image_0.png"))
  assert picture.shape == (64, 64, 3)
  done = run(directory, "--make=mixed", "--prompt=a cat <vision>")
  assert done.returncode == 0, done.stderr


def test_a_space_between_prompt_and_continuation_stays(tmp_path):
  # As Llama's tokenizer was trained: a space is put before every text, and taken away again.
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(["the cat sees a red house and runs"] * 9),
    model_writer=model,
    vocab_size=300,
    model_type="bpe",
    byte_fallback=True,
    minloglevel=2,
  )
  (tmp_path / "llama.model").write_bytes(model.getvalue())
  tokenizer = data.load_tokenizer(tmp_path / "llama.model")
  prompt, tokens = [tokenizer.bos_id, *tokenizer.encode("the cat")], tokenizer.encode("sees a")
  assert tokenizer.decode(tokens) == "sees a"
  assert decode_after(tokenizer, prompt, tokens) == " sees a"
