"""Each quantizer against a readable one with a one-hot matrix, on one device and on eight.

L latents; V codes; E codebook width.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from lwm.config.vqgan import FSQ_LEVELS, QUANTIZERS, VQGANConfig, VQGANLossConfig
from lwm.parallel.mesh import make_mesh
from lwm.parallel.sharding import MeshConfig
from lwm.vision.quantizers import FiniteScalar, MovingAverage, make_quantizer, soft_assignment
from lwm.vision.vqgan import nearest_codes

LEVELS = (5, 4, 3)
CODES, WIDTH = 60, 3
TEMPERATURE, ENTROPY_WEIGHT = 0.3, 0.2
AXES = ("data", "fsdp")


def quantizer_named(name):
  config = VQGANConfig(codebook_size=CODES, codebook_width=WIDTH)
  losses = VQGANLossConfig(
    quantizer=name, levels=LEVELS, temperature=TEMPERATURE, entropy_weight=ENTROPY_WEIGHT
  )
  losses.validate(config)
  return make_quantizer(config, losses)


def random_leaves(quantizer):
  """Leaves as they are in the middle of training."""
  leaves = quantizer.init(jax.random.key(0))
  if isinstance(quantizer, MovingAverage):
    # Some codes are dead.
    counts = jnp.where(jnp.arange(CODES) < 10, 1e-3, 2.0)
    return {
      "counts": counts,
      "sums": counts[:, None] * jax.random.normal(jax.random.key(1), (CODES, WIDTH)),
    }
  if "projection" in leaves:
    noise = jax.random.normal(jax.random.key(1), (WIDTH, WIDTH + 1))
    leaves |= {"projection": leaves["projection"] + 0.3 * noise[:, :-1], "bias": noise[:, -1]}
  return leaves


def reference(name, leaves, latents_LxE):
  """Code vectors, codes, commitment and codebook losses; everything is a matrix."""
  fixed = jax.lax.stop_gradient
  if name == "moving_average":
    table = fixed(leaves["sums"] / leaves["counts"][:, None])
  elif name == "simvq":
    table = leaves["table"] @ leaves["projection"] + leaves["bias"]
  elif name == "ibq":
    table = leaves["table"]
  else:
    values = [np.linspace(-1, 1, level) for level in reversed(LEVELS)]
    table = jnp.array(np.stack(np.meshgrid(*values, indexing="ij"), -1).reshape(-1, WIDTH)[:, ::-1])
  distances = jnp.square(latents_LxE[:, None] - table).sum(-1)
  codes = distances.argmin(-1)
  one_hot = jax.nn.one_hot(codes, CODES)
  hard = one_hot @ table
  commitment = jnp.square(latents_LxE - fixed(hard)).mean()
  codebook = jnp.square(fixed(latents_LxE) - hard).mean()
  vectors = latents_LxE + fixed(hard - latents_LxE)
  if name == "moving_average":
    codebook = 0.0
  if name == "fsq":
    outside = jax.nn.relu(jnp.abs(latents_LxE) - 1)
    commitment, codebook = jnp.square(outside).mean(), 0.0
  if name == "ibq":
    soft = jax.nn.softmax(-distances / TEMPERATURE, axis=-1)
    vectors = (one_hot + soft - fixed(soft)) @ table
    mean = soft.mean(0)
    entropies = -(soft * jnp.log(soft)).sum(-1).mean(), -(mean * jnp.log(mean)).sum()
    codebook += ENTROPY_WEIGHT * (entropies[0] - entropies[1])
  return vectors, codes, commitment, codebook


@pytest.fixture(scope="module")
def latents():
  return jax.random.normal(jax.random.key(2), (96, WIDTH))


@pytest.mark.parametrize("name", QUANTIZERS)
def test_values_and_gradients_are_the_references(name, latents):
  quantizer = quantizer_named(name)
  leaves = random_leaves(quantizer)
  pull = jax.random.normal(jax.random.key(3), latents.shape)

  def loss(function, leaves, latents):
    vectors, codes, commitment, codebook = function(leaves, latents)
    return (vectors * pull).sum() + 3.0 * commitment + 5.0 * codebook, (vectors, codes)

  def gradients(function):
    differentiated = functools.partial(loss, function)
    return jax.jit(jax.value_and_grad(differentiated, argnums=(0, 1), has_aux=True))(
      leaves, latents
    )

  ours = gradients(functools.partial(quantizer.quantize, axes=()))
  expected = gradients(functools.partial(reference, name))
  for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
  # The reference's gradients are not all 0.
  for leaf in quantizer.trained:
    assert jnp.abs(expected[1][0][leaf]).max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", QUANTIZERS)
def test_eight_devices_give_what_one_gives(name, latents):
  quantizer = quantizer_named(name)
  leaves = random_leaves(quantizer)
  key = jax.random.key(4)

  def step(leaves, latents, axes):
    def loss(leaves):
      result = quantizer.quantize(leaves, latents, axes)
      return 3.0 * result.commitment + 5.0 * result.codebook, result.codes_L

    gradients, codes = jax.grad(loss, has_aux=True)(leaves)
    return gradients, quantizer.update(leaves, latents, codes, key, axes)

  alone = step(leaves, latents, ())
  with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=4))):
    whole, parts = PartitionSpec(), PartitionSpec(AXES)
    together = jax.jit(
      jax.shard_map(functools.partial(step, axes=AXES), in_specs=(whole, parts), out_specs=whole)
    )(leaves, jax.reshard(latents, parts))
  for one, other in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_moving_averages_and_the_replacement_of_dead_codes(latents):
  quantizer = quantizer_named("moving_average")
  leaves = jax.tree.map(np.asarray, random_leaves(quantizer))
  codes = np.asarray(quantizer.quantize(leaves, latents, ()).codes_L)
  one_hot = np.eye(CODES)[codes]
  counts = 0.97 * leaves["counts"] + 0.03 * one_hot.sum(0)
  sums = 0.97 * leaves["sums"] + 0.03 * one_hot.T @ latents
  even = len(latents) / CODES
  dead = counts < 0.02 * even
  assert 0 < dead.sum() < 10
  new = quantizer.update(leaves, latents, codes, jax.random.key(0), ())
  np.testing.assert_allclose(new["counts"], np.where(dead, even, counts), rtol=1e-5)
  np.testing.assert_allclose(new["sums"][~dead], sums[~dead], rtol=1e-5, atol=1e-6)
  fresh = quantizer.table(new)[dead]
  assert np.isclose(fresh[:, None], latents, atol=1e-6).all(-1).any(-1).all()


@pytest.mark.parametrize("restart_share, alive", [(0.02, True), (0.0, False)])
def test_revival_brings_a_dead_codebook_back(restart_share, alive):
  """All codes but one are far from all latents."""
  quantizer = MovingAverage(64, 4, 0.9, restart_share)
  latents = jax.random.normal(jax.random.key(0), (2048, 4))
  vectors = jnp.full((64, 4), 100.0).at[0].set(0.0)
  leaves = {"counts": jnp.full(64, 32.0), "sums": 32.0 * vectors}

  def step(number, leaves):
    codes = nearest_codes(latents[None, None], quantizer.table(leaves))[0, 0]
    return quantizer.update(
      leaves, latents, codes, jax.random.fold_in(jax.random.key(1), number), ()
    )

  leaves = jax.lax.fori_loop(0, 100, step, leaves)
  codes = nearest_codes(latents[None, None], quantizer.table(leaves))
  used = len(np.unique(codes))
  assert used > 0.9 * 64 if alive else used == 1


def test_the_first_batch_fills_the_codebook(latents):
  for restart_share in (0.02, 0.0):
    quantizer = MovingAverage(CODES, WIDTH, 0.97, restart_share)
    leaves = quantizer.init(jax.random.key(0))
    codes = quantizer.quantize(leaves, latents, ()).codes_L
    table = quantizer.table(quantizer.update(leaves, latents, codes, jax.random.key(1), ()))
    assert np.isclose(table[:, None], latents, atol=1e-6).all(-1).any(-1).all()
    assert len(np.unique(table[:, 0])) > CODES // 2


def test_rounding_is_the_search_in_the_table():
  quantizer = FiniteScalar(FSQ_LEVELS)
  latents = 1.5 * jax.random.normal(jax.random.key(0), (4096, len(FSQ_LEVELS)))
  table = quantizer.table({})
  assert table.shape == (8192, 5) and len(np.unique(table, axis=0)) == 8192
  vectors, codes, _, _ = quantizer.quantize({}, latents, ())
  np.testing.assert_array_equal(codes, nearest_codes(latents[None, None], table)[0, 0])
  np.testing.assert_allclose(vectors, table[codes], atol=1e-6)


def test_soft_assignment_over_several_blocks_of_codes():
  random = np.random.default_rng(0)
  latents = jnp.array(random.normal(size=(40, 3)), jnp.float32)
  table = jnp.array(random.normal(size=(2500, 3)), jnp.float32)
  pulls = [random.normal(size=shape) for shape in ((40, 3), (40,), (2500,))]

  def matrix(latents, table):
    share = jax.nn.softmax(-jnp.square(latents[:, None] - table).sum(-1) / 0.5, axis=-1)
    vectors = share @ jax.lax.stop_gradient(table)
    return vectors, -(share * jnp.log(share)).sum(-1), share.mean(0)

  def blocks(latents, table):
    return soft_assignment(latents, table, 0.5)

  def loss(function, *arguments):
    return sum((pull * part).sum() for pull, part in zip(pulls, function(*arguments)))

  @functools.partial(jax.jit, static_argnums=0)
  def results(function, *arguments):
    gradient = jax.grad(functools.partial(loss, function), argnums=(0, 1))
    return (*function(*arguments), *gradient(*arguments))

  ours, theirs = (results(function, latents, table) for function in (blocks, matrix))
  for one, other in zip(ours, theirs, strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["moving_average", "simvq", "ibq"])
def test_no_matrix_of_latents_and_codes(name):
  """4096 latents, of 16 frames of LWM's: 128 MiB as one matrix, backwards too."""
  config = VQGANConfig()
  quantizer = make_quantizer(config, VQGANLossConfig(quantizer=name))

  def step(leaves, latents, key):
    def loss(leaves, latents):
      vectors, codes, commitment, codebook = quantizer.quantize(leaves, latents, ())
      return jnp.square(vectors).sum() + commitment + codebook, codes

    gradients, codes = jax.grad(loss, argnums=(0, 1), has_aux=True)(leaves, latents)
    return gradients, quantizer.update(leaves, latents, codes, key, ())

  leaves = jax.eval_shape(quantizer.init, jax.random.key(0))
  latents = jax.ShapeDtypeStruct((4096, 64), jnp.float32)
  key = jax.eval_shape(lambda: jax.random.key(0))
  memory = jax.jit(step).lower(leaves, latents, key).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 4 * 4096 * config.codebook_size
