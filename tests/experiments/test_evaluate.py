"""The program that evaluates, from the command line to its files, with a tiny model."""

import dataclasses
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from configs import models
from lwm import data, infer, model as model_lib
from lwm.checkpoint.checkpoints import Checkpoints, Identity
from lwm.checkpoint.position import Position
from lwm.config.experiment import DatasetConfig, Experiment, MixtureEntry, Stage
from lwm.config.vqgan import VQGANConfig
from lwm.data.tokenizer import tokenizer_files
from lwm.evals import perplexity
from lwm.evals.films import Films, clips_of, count, film_and_events, order
from lwm.evals.likelihood import likelihoods
from lwm.evals.losses import by_position, position_edges
from lwm.evals.prompts import PromptWriter
from lwm.evals.questions import Case
from lwm.parallel.mesh import make_mesh
from lwm.parallel.sharding import MeshConfig, ShardingRules
from lwm.program.state import TrainState
from lwm.vision.codec import Codec, save_vqgan
from lwm.vision.vqgan import VQGAN
from tests import programs

SENTENCE = "The cat sees a red house, and the old dog runs. "
VISION = VQGANConfig(
  resolution=16, hidden_channels=4, channel_multipliers=(1, 1, 1, 1), num_res_blocks=0,
  latent_channels=4, codebook_size=16, codebook_width=4, norm_groups=2,
)  # fmt: skip
LAYOUT = VISION.layout
CAPTIONS = ("a cat", "a dog", "a red house")


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> pathlib.Path:
  """A tokenizer, a text, films, and a run of one checkpoint with random weights."""
  directory = tmp_path_factory.mktemp("evaluate")
  path = directory / "tokenizer.model"
  data.train_sentencepiece(
    [SENTENCE, "The special magic number is: What in the document?"], path, 330
  )
  tokenizer = data.load_tokenizer(path)
  (directory / "novel.txt").write_text(SENTENCE * 40)
  events = [{"file": str(directory / "novel.txt"), "name": name} for name in ("a cat", "a dog")]
  (directory / "events.jsonl").write_text("\n".join(map(json.dumps, events)))
  Image.new("RGB", (20, 16), (200, 0, 0)).save(directory / "red.png")
  save_vqgan(directory / "vqgan.npz", VISION, nnx.state(VQGAN(VISION, rngs=nnx.Rngs(0))))
  sha256 = Codec(directory / "vqgan.npz").sha256
  codes = np.random.default_rng(0).integers(0, 16, (4, 30, 4))
  with data.DatasetWriter(
    directory / "films", tokenizer, layout=LAYOUT, vqgan_sha256=sha256
  ) as writer:
    for caption, codes_NxP in zip(("a cat", *CAPTIONS), codes):
      document = data.video_document(tokenizer, codes_NxP, caption, LAYOUT)
      writer.write("validation", document)
      writer.write("train", document)
  experiment = Experiment(
    tokenizer=str(path),
    model=models.debug(text_vocab_size=340, vision_vocab_size=LAYOUT.vocab_size),
    datasets=[DatasetConfig(name="films", path=str(directory / "films"))],
    stages=[Stage(name="only", mixture=[MixtureEntry("films")])],
  )
  with jax.set_mesh(make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])):
    params = jax.jit(model_lib.build(experiment.model).init)(jax.random.key(0))
    checkpoints = Checkpoints(directory / "run" / "checkpoints", keep=1)
    identity = Identity(experiment, tokenizer_files(path), {})
    checkpoints.save(
      TrainState(params, {"m": jnp.zeros(3)}, jnp.int32(5)), Position(0, 5, 5), identity
    )
    checkpoints.close()
  return directory


def run(directory, name, *arguments):
  common = f"--workdir={directory / 'run'}", f"--output={directory / 'results'}"
  return programs.run("experiments.evaluate", name, *common, *arguments)


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_needle_resumes_and_reports(directory):
  arguments = (
    f"--haystack={directory / 'novel.txt'}", "--contexts=320,400", "--depths=0:100:50",
    "--rows=2", "--num_tokens=4",
  )  # fmt: skip
  done = run(directory, "needle", *arguments)
  assert done.returncode == 0, done.stderr
  folder = directory / "results" / "needle"
  header, *records = lines(folder / "answers.jsonl")
  assert header["evaluation"] == "needle" and header["seed"] == 0
  assert [record["case"] for record in records] == [
    f"{context}/{depth}/0" for context in (320, 400) for depth in (0, 50, 100)
  ]
  assert all(record["prompt_tokens"] == record["context"] - 4 for record in records)
  assert all(record["score"] == (record["answers"][0] in record["text"]) for record in records)
  assert "needle: context 400: 0.0%" in done.stdout
  page = (folder / "report.html").read_text()
  assert "data:image/png;base64," in page and records[0]["answers"][0] in page
  assert (folder / "heatmap.png").read_bytes().startswith(b"\x89PNG")

  # As after a kill: the second batch is missing, and part of a line is left.
  whole = (folder / "answers.jsonl").read_text().splitlines(keepends=True)
  kept = json.loads(whole[1]) | {"text": "kept"}
  (folder / "answers.jsonl").write_text(
    "".join([whole[0], json.dumps(kept) + "\n", *whole[2:4], whole[4][:9]])
  )
  done = run(directory, "needle", *arguments)
  assert done.returncode == 0, done.stderr
  assert "3 of 6 answers exist" in done.stdout
  assert lines(folder / "answers.jsonl")[1:] == [kept, *records[1:]]
  done = run(directory, "needle", *arguments, "--seed=1")
  assert done.returncode == 1 and "answers with another seed" in done.stderr


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["needle"], "name files with --haystack"),
    (["needle", "--haystack={}/novel.txt", "--contexts=99999"], "novel.txt has"),
    (["needles"], "Name one evaluation: needle"),
    (["film_clip", "--contexts=4096"], "The film has 60 frames, fewer than"),
    (["harness"], "Name tasks of the harness"),
    (["film_clip", "--film={}/novel.txt", "--events={}/events.jsonl"], "novel.txt cannot be used"),
    (["key_value", "--contexts=1000000000"], "The cache of 1 x 1,000,000,000 tokens needs"),
    (["key_value", "--contexts=100"], "leaves no room for a text in a prompt of"),
    (["multiple_choice", "--questions={}/novel.txt"], "novel.txt, line 1, is not a question"),
    (["generation", "--frames=40"], "has 0 held-out clips of 4 + 40 frames"),
  ],
  ids=[
    "haystack",
    "short",
    "name",
    "film",
    "tasks",
    "unreadable",
    "cache",
    "room",
    "questions",
    "clips",
  ],
)
def test_mistakes_end_in_one_sentence(directory, arguments, message):
  name, *arguments = (argument.format(directory) for argument in arguments)
  done = run(directory, name, *arguments)
  assert done.returncode == 1
  assert done.stderr.strip().splitlines()[-1].startswith("error: ") and message in done.stderr
  assert "Traceback" not in done.stderr and "weights: " not in done.stdout


@pytest.mark.slow
def test_films_and_losses(directory):
  done = run(directory, "film_clip", "--contexts=300", "--depths=0,100", "--clip_frames=3")
  assert done.returncode == 0, done.stderr
  _, *records = lines(directory / "results" / "film_clip" / "answers.jsonl")
  assert [record["place"] for record in records] == [0, 100]
  assert records[0]["frames"] == [0] and records[1]["frames"][0] > 3
  done = run(directory, "held_out_loss", "--contexts=40", "--samples=3")
  assert done.returncode == 0, done.stderr
  _, *records = lines(directory / "results" / "held_out_loss" / "losses.jsonl")
  assert len(records) == 3 and all(record["vision_targets"] > 0 for record in records)
  # Random weights know nothing, so the loss is near that of equal probabilities.
  loss = sum(r["vision_loss"] for r in records) / sum(r["vision_targets"] for r in records)
  assert loss == pytest.approx(np.log(LAYOUT.vocab_size), rel=0.2)


@pytest.mark.slow
def test_questions_about_images_and_generated_clips(directory):
  options = {"options": ["red", "blue"], "answer": "A"}
  records = [
    {"question": "Which colour?", "file": "red.png", **options},
    {"question": "What is it?", "answer": "a cat"},
    {"question": "Which colour?", "file": ["red.png", "red.png"], **options},
  ]
  path = directory / "questions.jsonl"
  path.write_text("\n".join(map(json.dumps, records)))
  arguments = f"--questions={path}", "--num_tokens=3", "--rows=2"
  done = run(directory, "multiple_choice", *arguments)
  assert done.returncode == 0, done.stderr
  _, *records = lines(directory / "results" / "multiple_choice" / "answers.jsonl")
  assert sorted(record["case"] for record in records) == ["1", "2", "3"]
  by_line = {record["line"]: record for record in records}
  # The second image has <vision>, a frame and </vision>.
  marks = infer.picture_marks(data.load_tokenizer(directory / "tokenizer.model"))
  image = LAYOUT.tokens_per_frame + sum(map(len, marks))
  assert by_line[3]["prompt_tokens"] == by_line[1]["prompt_tokens"] + image
  letters = by_line[1]["letters"]
  assert sum(letters.values()) == pytest.approx(1)
  assert by_line[1]["likeliest_score"] == float(letters["A"] > letters["B"])
  assert "option's letter: 2 questions" in done.stdout and "chance 50.0%" in done.stdout
  done = run(directory, "multiple_choice", *arguments, "--contexts=50")
  assert done.returncode == 1 and "The question of line 1 has" in done.stderr

  sizes = "--given_frames=2", "--frames=3"
  done = run(directory, "generation", "--samples=3", "--rows=2", "--seed=3", *sizes)
  assert done.returncode == 0, done.stderr
  folder = directory / "results" / "generation"
  _, *records = lines(folder / "clips.jsonl")
  assert len(records) == 3 and np.shape(records[0]["codes"]) == (3, LAYOUT.codes_per_frame)
  split = data.Dataset(directory / "films", 340).split("validation")
  tokens, _ = split.read(int(records[0]["case"]), 0, 200)
  clip = infer.cut_clip(tokens, 340, LAYOUT, 2, 3)
  codec = Codec(directory / "vqgan.npz")
  truth, found, still = (
    codec.decode(codes).astype(float)
    for codes in (clip.codes_NxP[2:], np.array(records[0]["codes"]), clip.codes_NxP[1:2])
  )
  for name, frames in (("squared_error", found), ("still_squared_error", still)):
    expected = np.square(truth - frames).mean((1, 2, 3))
    np.testing.assert_allclose(records[0][name], expected)
  # Both sets have the same clips; rounding leaves about 6e-18.
  distance = re.search("training clips: frechet distance ([^,]*),", done.stdout)
  assert distance and float(distance[1]) == pytest.approx(0, abs=1e-9)
  assert "generation: frame 3: PSNR" in done.stdout
  assert (folder / "report.html").read_text().count("data:image/png;base64,") == 1


def test_events_of_a_film_come_in_their_order_and_number(directory):
  tokenizer = data.load_tokenizer(directory / "tokenizer.model")
  split = data.Dataset(directory / "films", 340).split("validation")
  film_NxP, events = film_and_events(clips_of(split, tokenizer, 340, LAYOUT), 3)
  assert len(film_NxP) == 60 and [event.name for event in events] == list(CAPTIONS[1:])
  films = Films(PromptWriter(tokenizer, chat=False), film_NxP, events, LAYOUT, 340, hidden=4)
  for make in (order, count):
    question = make(films, Case(300, None, 0).random(0, "film"), Case(300, None, 0), 280)
    assert 280 - LAYOUT.tokens_per_frame < len(question.prompt) <= 280
    vision = np.array([token - 340 for token in question.prompt if token >= 340])
    frames = vision.reshape(-1, LAYOUT.tokens_per_frame)[:, :-1]
    names = [
      next(e.name for e in events if np.array_equal(e.codes_NxP, frames[start : start + 3]))
      for start in question.facts["frames"]
    ]
    if make is order:
      assert names == question.answers and question.score(", ".join(names)) == 1
    else:
      assert set(names) == {question.facts["event"]} and question.answers == [str(len(names))]
      assert question.score(f"{len(names)} times") == 1 and question.score("0") == 0


@pytest.mark.slow
def test_likelihoods_equal_the_perplexity():
  config = dataclasses.replace(models.debug(), num_layers=1)
  model = model_lib.build(config, ShardingRules.inference(few_tokens=True))
  with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=1), jax.devices()[:2])):
    params = jax.jit(model.init)(jax.random.key(0))
    engine = infer.Engine(model, params, rope_theta=1e4)
    row = np.random.default_rng(0).integers(0, 256, 150)
    # The beginnings of a row have the losses of its beginning.
    found = likelihoods(engine, [row[:length].tolist() for length in (150, 60, 2)])
  with jax.set_mesh(make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])):
    one = model_lib.build(config, ShardingRules(sequence=None))
    params = jax.jit(one.init)(jax.random.key(0))
    expected = perplexity(one, params, jnp.asarray(row, jnp.int32), rope_theta=1e4)
  assert np.exp(found[0].loss.mean()) == pytest.approx(expected, rel=1e-4)
  for own, length in zip(found, (150, 60, 2)):
    np.testing.assert_allclose(own.loss, found[0].loss[: length - 1], rtol=1e-4)
    np.testing.assert_array_equal(own.is_likeliest, found[0].is_likeliest[: length - 1])
  assert position_edges(200) == [0, 64, 128, 200]
  assert by_position(np.arange(200.0), [0, 64, 200]) == [31.5, 131.5]
