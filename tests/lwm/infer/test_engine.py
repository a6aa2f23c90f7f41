"""The engine against a plain loop without a cache, on one device and eight.

B rows, S tokens, V vocabulary.
"""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.attention import KeyIntervals
from kernels.ring import Layout
from lwm.config.model import ExpertsConfig
from lwm.config.vqgan import VisionLayout
from lwm.errors import UserError
from lwm.infer import Choice, Engine, Grammar, Pictures, Sampling, padded_rows
from lwm.infer.prefix import SavedPrefix, save_prefix
from lwm.infer.sampling import row_keys
from lwm.model import ModelConfig, build
from lwm.parallel.mesh import make_mesh
from lwm.parallel.sharding import MeshConfig, ShardingRules

# Large weights: logits far apart, so that rounding decides nothing.
CONFIG = ModelConfig(
  num_layers=2,
  width=32,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  feed_forward_width=48,
  text_vocab_size=40,
  vision_vocab_size=24,
  compute_dtype="float32",
  initializer_std=0.4,
)
THETA, LONGEST = 1e4, 128
ONE, RING, ULYSSES = dict(), dict(ring=8), dict(data=2, ulysses=2, fsdp=2)
MIXTURE = dict(ring=2, ulysses=2, tensor=2)
SEEDED = Grammar(40, (39,), Choice(1.3, 0.9, top_k=30, top_p=0.98, min_p=1e-4))
# Frames of three codes out of eight. <vision> is 30 31, and </vision> is 32 33.
PICTURES = Pictures(40, 8, VisionLayout(3, 8), (30, 31), (32, 33), frames=2)
FILM = Grammar(40, (), pictures=PICTURES, vision=Choice(temperature=1.5))
RNG = np.random.default_rng(0)
ROWS = [RNG.integers(0, 39, length).tolist() for length in (47, 22)]


@pytest.fixture(autouse=True)
def no_implicit_rank_promotion():
  with jax.numpy_rank_promotion("raise"):
    yield


def mesh_of(sizes):
  config = MeshConfig(**{"fsdp": 1, **sizes})
  return make_mesh(config, jax.devices()[: math.prod(config.axis_sizes().values())])


@functools.cache
def model_on(mesh, num_experts=0):
  """A model and the parameters of seed 0. Programs are compiled once per model."""
  config = dataclasses.replace(CONFIG)
  if num_experts:
    config.experts = ExpertsConfig(num_experts, experts_per_token=2, width=16)
  model = build(config, ShardingRules.inference(few_tokens=True))
  many = build(config, ShardingRules.inference(few_tokens=False))
  return model, many, jax.jit(model.init)(jax.random.key(0))


def engine_here(num_experts=0, **options):
  """An engine on the mesh that is set."""
  model, many, params = model_on(jax.sharding.get_mesh(), num_experts)
  engine = Engine(model, params, rope_theta=THETA, **options)
  engine.many = many if engine.many else None
  return engine


@pytest.fixture(scope="module")
def last_logits():
  """A function from a row's tokens to the logits after the last, by the training program."""
  with jax.set_mesh(mesh_of(ONE)):
    model = build(CONFIG)
    params = jax.jit(model.init)(jax.random.key(0))

  @jax.jit
  def logits(tokens_BxS):
    position_BxS = jnp.arange(LONGEST, dtype=jnp.int32)[None]
    intervals = KeyIntervals(jnp.zeros_like(position_BxS), position_BxS + 1)
    hidden = model.hidden(
      params, tokens_BxS, position_BxS, intervals, rope_theta=THETA, layout=Layout("contiguous", 1)
    )
    return model.logits(params, hidden)

  def last(tokens):
    padded = np.zeros((1, LONGEST), np.int32)
    padded[0, : len(tokens)] = tokens
    with jax.set_mesh(mesh_of(ONE)):
      return np.asarray(logits(padded))[0, len(tokens) - 1]

  return last


@functools.partial(jax.jit, static_argnames="grammar")
def step(grammar, place, logits_BxV, seed_B, position_B, seen_BxV=None):
  token_B = grammar.choose(place, logits_BxV, row_keys(seed_B, position_B), seen_BxV)
  return token_B, *grammar.advance(place, token_B)


def plain_loop(last_logits, prompt, sampling, seed, without=None):
  """The tokens that follow a prompt, with all of them computed anew for each."""
  grammar, new = sampling.grammar, []
  place = grammar.place_after([prompt])
  while len(new) < sampling.max_tokens:
    logits_V = last_logits([*prompt, *new])
    if sampling.guidance is not None and bool(grammar.is_vision(place)[0]):
      without_V = last_logits([*without, *new])
      logits_V = without_V + np.float32(sampling.guidance) * (logits_V - without_V)
    seen_1xV = np.zeros((1, len(logits_V)), bool)
    seen_1xV[0, [*prompt, *new]] = True
    seed_1, position_1 = np.uint32([seed]), np.int32([len(prompt) + len(new)])
    token_1, place, is_end_1 = step(grammar, place, logits_V[None], seed_1, position_1, seen_1xV)
    new.append(int(token_1[0]))
    if bool(is_end_1[0]):
      break
  return new


def generated(session, sampling, seeds):
  rows = [[] for _ in seeds]
  for block in session.generate(sampling, seeds):
    for row, new in zip(rows, block):
      row += new
  return rows


@pytest.fixture(scope="module")
def expected(last_logits):
  """What follows each of ROWS."""
  sampling = Sampling(SEEDED, 12)
  rows = [plain_loop(last_logits, row, sampling, 7 + i) for i, row in enumerate(ROWS)]
  assert min(map(len, rows)) > 8
  return rows


# Chunks that divide the prompt and the devices, and chunks that do not.
@pytest.mark.parametrize("sizes, chunk", [(ONE, 5), (ULYSSES, 16), (MIXTURE, 13)], ids=str)
def test_tokens_are_those_of_a_plain_loop(sizes, chunk, expected, last_logits):
  """Rows of different lengths, which end at different times."""
  with jax.set_mesh(mesh_of(sizes)):
    engine = engine_here(chunk=chunk)
    session = engine.open(ROWS, 100)
    assert engine.num_read == sum(map(len, ROWS))
    for row, logits_V in zip(ROWS, np.asarray(session.state.logits_RxV)):
      np.testing.assert_allclose(logits_V, last_logits(row), atol=1e-4)
    assert generated(session, Sampling(SEEDED, 12, block=5), [7, 8]) == expected
    assert session.tokens == [row + new for row, new in zip(ROWS, expected)]
    # Each device holds an equal part of the keys, and, with those that have other rows, of the
    # weights.
    devices = math.prod(sizes.values())
    for leaf in session.state.cache[:2]:
      assert leaf.nbytes == devices * leaf.addressable_shards[0].data.nbytes
    for leaf in jax.tree.leaves(engine.params["blocks"]["feed_forward"]):
      copies = sizes.get("data", 1)
      assert copies * leaf.nbytes == devices * leaf.addressable_shards[0].data.nbytes


@pytest.mark.slow
def test_questions_read_a_prefix_once(last_logits, tmp_path):
  """On eight devices; then the saved prefix on one."""
  prefix, questions = ROWS[0], [[5, 6, 7], [8, 9]]
  sampling = Sampling(SEEDED, 4, block=5)
  answers = [plain_loop(last_logits, prefix + question, sampling, 7) for question in questions]
  assert answers[0] != answers[1]
  with jax.set_mesh(mesh_of(MIXTURE)):
    engine = engine_here(chunk=13)
    session = engine.open([prefix], 100)
    save_prefix(session, tmp_path / "prefix", "model")
    for question, answer in zip(questions, answers):
      session.follow([prefix + question])
      assert generated(session, sampling, [7]) == [answer]
    assert engine.num_read == len(prefix) + sum(map(len, questions))
    # Both questions at once.
    rows = engine.open([prefix + question for question in questions], 100)
    assert engine.num_read == 2 * (len(prefix) + sum(map(len, questions)))
    assert generated(rows, sampling, [7, 7]) == answers
  with jax.set_mesh(mesh_of(ONE)):
    engine = engine_here()
    session = SavedPrefix(tmp_path / "prefix", "model", "dense").open(engine, 100)
    session.follow([prefix + questions[1]])
    assert generated(session, sampling, [7]) == [answers[1]]
    assert engine.num_read == len(questions[1])
  with pytest.raises(UserError, match="was made by another model"):
    SavedPrefix(tmp_path / "prefix", "another", "dense")
  with pytest.raises(UserError, match="was made with --cache=dense"):
    SavedPrefix(tmp_path / "prefix", "model", "int8")


@pytest.mark.slow
@pytest.mark.parametrize("shared", (0, 9))
def test_guidance_is_that_of_two_plain_rows(shared, last_logits):
  """Both rows of a pair have the same new tokens; what they begin with is read once."""
  common = ROWS[0][:shared]
  prompts = [[*common, 1, 17, 21, 30, 31], [*common, 1, 8, 30, 31]]
  without = [*common, 1, 30, 31]
  sampling = Sampling(FILM, 8, guidance=3.0, block=8)
  pairs = [row for prompt in prompts for row in (prompt, without)]
  with jax.set_mesh(mesh_of(ONE)):
    engine = engine_here()
    session = engine.open(pairs, 64)
    # The shared tokens and the 1 after them are read once, the rest in every row.
    assert engine.num_read == sum(map(len, pairs)) - 3 * (shared + 1)
    films = generated(session, sampling, [3, 4])
  assert films == [
    plain_loop(last_logits, row, sampling, 3 + i, without) for i, row in enumerate(prompts)
  ]
  unguided = [plain_loop(last_logits, row, Sampling(FILM, 8), 3) for row in prompts[:1]]
  assert films[:1] != unguided
  for film in films:
    assert film[3::4] == [PICTURES.end_of_frame, PICTURES.end_of_vision]


def test_pictures_and_text_alternate():
  """Whatever the logits, pictures are whole, and are closed."""
  pictures = dataclasses.replace(PICTURES, frames=None, are_opened=True, then_text=True)
  grammar = Grammar(40, (39,), pictures=pictures)
  rng = np.random.default_rng(0)
  rows, place = [[30, 31], [4]], grammar.place_after([[30, 31], [4]])
  for position in range(400):
    # Text likes <vision>, and frames like to be the last.
    logits_BxV = rng.normal(size=(2, 64)).astype(np.float32)
    logits_BxV[:, 30:32] += 4
    logits_BxV[:, 39] = -np.inf
    seed_B, position_B = np.uint32([0, 1]), np.full(2, position, np.int32)
    token_B, place, is_end_B = step(grammar, place, logits_BxV, seed_B, position_B)
    assert not is_end_B.any()
    for row, token in zip(rows, token_B.tolist()):
      row.append(token)
    fresh = grammar.place_after(rows)
    np.testing.assert_array_equal(fresh.code_B, place.code_B)
  for row in rows:
    text = "".join(chr(token) for token in row)
    start, end = chr(30) + chr(31), chr(32) + chr(33)
    frame = "[\x28-\x2f]{3}"
    film = f"({frame}{chr(48)})*{frame}{chr(49)}"
    parts = re.split(f"{start}({film}){end}", text)
    assert len(parts) > 20
    # All complete films have been taken out; the last one may be unfinished.
    assert not re.search("[\x28-\x3f]", "".join(parts[:-1:3]))


def test_what_does_not_fit_is_one_sentence():
  with jax.set_mesh(mesh_of(ONE)):
    engine = engine_here()
    with pytest.raises(UserError, match="The prompt has 47 tokens, more than the 46 of the cache"):
      engine.open(ROWS, 46)
    assert engine.num_read == 0


@pytest.mark.slow
def test_an_int8_cache_is_near_the_dense_one(last_logits):
  with jax.set_mesh(mesh_of(RING)):
    engine = engine_here(chunk=16, cache="int8")
    session = engine.open(ROWS, 100)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(session.state.cache[:2])} == {
      "int8",
      "float32",
    }
    for row, logits_V in zip(ROWS, np.asarray(session.state.logits_RxV)):
      exact_V = last_logits(row)
      error = np.abs(logits_V - exact_V).max() / np.abs(exact_V).max()
      assert 1e-5 < error < 0.05


@pytest.mark.slow
def test_experts_are_divided_over_axes_that_divide_tokens_and_others():
  logits = []
  for sizes in ONE, dict(expert=2, ulysses=2):
    with jax.set_mesh(mesh_of(sizes)):
      session = engine_here(num_experts=4, chunk=16).open(ROWS, LONGEST)
      list(session.generate(Sampling(Grammar(40, (), Choice(0.0)), 2, block=2), [0, 1]))
      logits.append(np.asarray(session.state.logits_RxV))
  np.testing.assert_allclose(*logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_rows, expected", [(1, 3), (2, 6), (3, 3), (4, 6)])
def test_every_replica_has_the_same_number_of_rows(num_rows, expected):
  sizes = MeshConfig(data=3, fsdp=1, ring=4).axis_sizes()
  assert padded_rows(num_rows, sizes) == expected
