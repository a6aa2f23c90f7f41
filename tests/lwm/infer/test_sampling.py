"""The decode loop against the model's forward pass, and how tokens are sampled.

B batch, P prompt tokens, T new tokens, V vocabulary.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from kernels.attention import KeyIntervals
from kernels.ring import Layout
from lwm import model as model_lib
from lwm.infer import SAMPLED, Choice, sample
from lwm.infer.sampling import draw
from lwm.model import ModelConfig
from lwm.parallel.mesh import make_mesh
from lwm.parallel.sharding import MeshConfig, ShardingRules

CONFIG = ModelConfig(text_vocab_size=24, vision_vocab_size=40, compute_dtype="float32")
THETA = 1e4
GREEDY = Choice(0, 64, temperature=0)
PROMPT_BxP = jnp.asarray([[1, 5, 9, 30, 2], [1, 7, 7, 50, 60]], jnp.int32)


@pytest.fixture(params=[dict(fsdp=1), dict(fsdp=2, tensor=2)], ids=["one", "sharded"])
def mesh(request):
  config = MeshConfig(**request.param)
  devices = jax.devices()[: config.fsdp * config.tensor]
  with jax.set_mesh(make_mesh(config, devices)) as mesh:
    yield mesh


def build():
  model = model_lib.build(CONFIG, ShardingRules(sequence=None))
  # Large weights: logits far apart, so that rounding decides nothing.
  params = jax.jit(
    lambda: jax.tree.map(lambda w: w * 20 if w.ndim > 1 else w, model.init(jax.random.key(1)))
  )()
  return model, params


def run(model, params, num_tokens=7, choice=GREEDY, seed=0, forced_T=None):
  forced_T = jnp.full(num_tokens, SAMPLED, jnp.int32) if forced_T is None else forced_T
  return np.asarray(
    sample(
      model, params, PROMPT_BxP, forced_T, jax.random.key(seed), choice=choice, rope_theta=THETA
    )  # fmt: skip
  )


def test_greedy_tokens_are_those_of_the_full_forward_pass(mesh):
  model, params = build()
  tokens_BxT = run(model, params)
  whole_BxS = jnp.concatenate([PROMPT_BxP, tokens_BxT], axis=1)
  model = model_lib.build(CONFIG)

  @jax.jit
  def all_logits(params, tokens_BxS):
    positions_BxS = jnp.broadcast_to(jnp.arange(tokens_BxS.shape[1]), tokens_BxS.shape)
    inputs = tokens_BxS, positions_BxS, jnp.zeros_like(positions_BxS), positions_BxS + 1
    spec = model.rules.spec("batch", "sequence")
    tokens_BxS, positions_BxS, *intervals = (jax.reshard(x, spec) for x in inputs)
    hidden_BxSxM = model.hidden(
        params, tokens_BxS, positions_BxS, KeyIntervals(*intervals), rope_theta=THETA,
        layout=Layout("contiguous", 1),
    )  # fmt: skip
    return model.logits(params, hidden_BxSxM)

  likeliest_BxS = np.asarray(all_logits(params, whole_BxS)).argmax(-1)
  np.testing.assert_array_equal(tokens_BxT, likeliest_BxS[:, PROMPT_BxP.shape[1] - 1 : -1])


def test_forced_tokens_come_and_are_read(mesh):
  model, params = build()
  forced_T = jnp.full(7, SAMPLED, jnp.int32).at[2].set(33)
  tokens_BxT = run(model, params, forced_T=forced_T)
  free_BxT = run(model, params)
  assert (tokens_BxT[:, 2] == 33).all()
  np.testing.assert_array_equal(tokens_BxT[:, :2], free_BxT[:, :2])
  assert (tokens_BxT[:, 3:] != free_BxT[:, 3:]).any()


def test_same_seed_same_tokens_and_only_ids_of_the_choice():
  with jax.set_mesh(make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])):
    model, params = build()
    choice = Choice(24, 56, temperature=5.0)
    first, again, other = (run(model, params, 12, choice, seed) for seed in (3, 3, 4))
  np.testing.assert_array_equal(first, again)
  assert (first != other).any()
  assert first.min() >= 24 and first.max() < 56


def test_draws_follow_the_softmax_of_the_likeliest():
  logits_V = np.array([9.0, 1.0, 0.5, 3.0, 2.0, -1.0, 8.0])
  choice = Choice(1, 6, temperature=0.5, top_k=3)
  logits_BxV = jnp.broadcast_to(jnp.asarray(logits_V, jnp.float32), (20000, 7))
  drawn_B = np.asarray(draw(logits_BxV, jax.random.key(0), choice))
  expected_V = np.zeros(7)
  expected_V[[3, 4, 1]] = scipy.special.softmax(logits_V[[3, 4, 1]] / 0.5)
  frequency_V = np.bincount(drawn_B, minlength=7) / len(drawn_B)
  np.testing.assert_allclose(frequency_V, expected_V, atol=0.012)
  assert not frequency_V[expected_V == 0].any()


def test_temperature_zero_takes_the_likeliest():
  logits_BxV = jnp.asarray([[9.0, 1.0, 2.0], [0.0, 4.0, 3.0]])
  drawn_B = draw(logits_BxV, jax.random.key(0), Choice(1, 3, temperature=0))
  np.testing.assert_array_equal(drawn_B, [2, 1])
