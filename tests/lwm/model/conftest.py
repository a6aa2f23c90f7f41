"""A tiny model, packed batches for it, and its losses and gradients on any mesh."""

import dataclasses
import math
import types
from typing import Any

import jax
import numpy as np
import pytest

from kernels.ring import Layout
from lwm.config.batch import FIELDS
from lwm.config.experiment import LossConfig
from lwm.model import ModelConfig, build
from lwm.parallel.mesh import make_mesh
from lwm.parallel.sharding import MeshConfig

ROPE_THETA = 1e4


@pytest.fixture(autouse=True)
def no_implicit_rank_promotion():
  with jax.numpy_rank_promotion("raise"):
    yield


def tiny_config(**changes) -> ModelConfig:
  # Chunk sizes that divide no length, so that ragged ends are covered.
  return ModelConfig(
    **{
      **dict(
        num_layers=2,
        width=32,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        feed_forward_width=48,
        text_vocab_size=40,
        vision_vocab_size=24,
        compute_dtype="float32",
        initializer_std=0.2,
        feed_forward_chunk=3,
        loss_chunk=5,
      ),
      **changes,
    }
  )


def mesh_of(**sizes):
  config = MeshConfig(**{"fsdp": 1, **sizes})
  return make_mesh(config, jax.devices()[: math.prod(config.axis_sizes().values())])


def document(rng, length, modality, config=tiny_config()):
  """(tokens, targets, weights, modality) of a document whose targets are of one modality."""
  first = config.text_vocab_size if modality else 0
  size = config.vision_vocab_size if modality else config.text_vocab_size
  ids = first + rng.integers(0, size, length + 1)
  return ids[:-1], ids[1:], np.ones(length), np.full(length, modality)


def pack(rows, sequence_length):
  """A batch, in global order, of rows given as lists of documents; the rest is padding."""
  shape = len(rows), sequence_length
  batch = {name: np.zeros(shape, dtype) for name, dtype in FIELDS.items()}
  for r, documents in enumerate(rows):
    begin = 0
    for tokens, targets, weights, modality in documents:
      own = slice(begin, begin + len(tokens))
      batch["tokens"][r, own] = tokens
      batch["targets"][r, own] = targets
      batch["loss_weights"][r, own] = weights
      batch["modality"][r, own] = modality
      batch["positions"][r, own] = np.arange(len(tokens))
      batch["key_start"][r, own] = begin
      batch["key_stop"][r, own] = np.arange(begin, own.stop) + 1
      begin = own.stop
  return batch


def place(batch, layout, mesh, rules):
  """The batch in the order of the layout, on the mesh."""
  sharding = jax.NamedSharding(mesh, rules.spec("batch", "sequence"))
  order = layout.permutation(batch["tokens"].shape[1])
  return {name: jax.device_put(array[:, order], sharding) for name, array in batch.items()}


def compile_quickly(function, **options):
  """`jax.jit` for programs that run once, without LLVM's optimisations, which take longest."""
  return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0}, **options)


_params_on_one_device: dict[str, Any] = {}


def _drawn_too(path, value):
  """Draws the parameters whose initial values would hide mistakes."""
  parts = ("_bias", "query_norm", "key_norm", "_lora_b", "bottleneck_out")
  if not any(part in jax.tree_util.keystr(path) for part in parts):
    return value
  rng = np.random.default_rng(len(jax.tree_util.keystr(path)))
  return np.asarray(value + rng.normal(0, 0.3, value.shape), np.float32)


def init(model, mesh):
  """The parameters of seed 0 on the mesh."""
  # Settings that do not change the parameters share one initialisation.
  config = dataclasses.replace(model.config, remat="full", compute_dtype="float32")
  if repr(config) not in _params_on_one_device:
    with jax.set_mesh(mesh_of()):
      drawn = compile_quickly(build(config).init)(jax.random.key(0))
    drawn = jax.tree.map(np.asarray, drawn)
    _params_on_one_device[repr(config)] = jax.tree_util.tree_map_with_path(_drawn_too, drawn)
  params = _params_on_one_device[repr(config)]
  return jax.device_put(params, model.rules.tree_shardings(model.logical_axes, mesh))


def half_each(sums):
  """The loss that training minimises when both modalities have weight one half."""
  return 0.5 * (sums.loss / sums.weight).sum()


def losses_program(config, mesh, kind, loss=LossConfig(), combine=half_each):
  """`run(batch, params)`, which is compiled once per shape of the batch.

  It returns LossSums and the gradients of `combine` of them as NumPy arrays. The parameters are
  those of seed 0 unless given.
  """
  model = build(config)
  layout = Layout(kind, mesh.shape["ring"])

  def objective(params, batch):
    sums = model.losses(params, batch, rope_theta=ROPE_THETA, layout=layout, loss=loss)
    return combine(sums), sums

  program = compile_quickly(jax.grad(objective, has_aux=True))

  def run(batch, params=None):
    with jax.set_mesh(mesh):
      if params is None:
        params = init(model, mesh)
      else:
        params = jax.device_put(params, model.rules.tree_shardings(model.logical_axes, mesh))
      gradients, sums = program(params, place(batch, layout, mesh, model.rules))
    same = jax.tree.map(
      lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim), gradients, params
    )
    assert all(jax.tree.leaves(same)), "a gradient is sharded unlike its parameter"
    return jax.tree.map(np.asarray, (sums, gradients))

  return run


def loss_and_gradients(config, mesh, kind, batch, params=None, **options):
  """What a program that runs once returns."""
  return losses_program(config, mesh, kind, **options)(batch, params)


def assert_trees_close(actual, expected, tolerance):
  """Largest difference of each array relative to its largest element."""

  def check(path, a, b):
    error = np.abs(a - b).max() / np.abs(b).max()
    assert error <= tolerance, f"{jax.tree_util.keystr(path)}: {error:.2e} > {tolerance:.0e}"

  jax.tree_util.tree_map_with_path(check, actual, expected)


@pytest.fixture(scope="session")
def tiny():
  """The functions above under one name, because test modules cannot import each other."""
  return types.SimpleNamespace(
    config=tiny_config,
    mesh=mesh_of,
    document=document,
    pack=pack,
    place=place,
    init=init,
    jit=compile_quickly,
    losses_program=losses_program,
    loss_and_gradients=loss_and_gradients,
    assert_close=assert_trees_close,
    rope_theta=ROPE_THETA,
  )
