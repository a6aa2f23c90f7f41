"""Exports for other runtimes: the Orbax directory and the StableHLO programs."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jaxlib import _jax, xla_client

from configs import models
from kernels.decode import whole_length
from lwm import model as model_lib
from lwm.checkpoint.arrays import ArrayInfo
from lwm.checkpoint.parameters import write_parameters
from lwm.checkpoint.reader import StoredCheckpoint
from lwm.config.experiment import Experiment, Stage
from lwm.config.model import AdapterConfig
from lwm.convert.orbax import export_orbax
from lwm.convert.stablehlo import Sizes, programs
from lwm.parallel.mesh import make_mesh
from lwm.parallel.sharding import MeshConfig, ShardingRules

ADAPTER = AdapterConfig(width=3)
CONFIG = models.debug(text_vocab_size=40, vision_vocab_size=20)
CONFIG.adapter = ADAPTER
# As a run on two devices of `tensor` would store them: 61 rows would not divide.
PADDED = models.debug(text_vocab_size=40, vision_vocab_size=20)
PADDED.vocab_multiple, PADDED.adapter = 64, ADAPTER
EXPERIMENT = Experiment(
  name="small", tokenizer="t.model", model=PADDED, stages=[Stage(rope_theta=100.0)]
)


@pytest.fixture(scope="module")
def params():
  params = jax.device_get(jax.jit(model_lib.build(CONFIG).init)(jax.random.key(0)))
  rng, adapter = np.random.default_rng(0), params["blocks"]["adapter"]
  adapter["bottleneck_out"] = rng.normal(size=adapter["bottleneck_out"].shape).astype(np.float32)
  return params


@pytest.fixture(scope="module")
def stored(params, tmp_path_factory) -> StoredCheckpoint:
  directory = tmp_path_factory.mktemp("stored") / "weights"
  leaves = {
    jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
  }
  leaves["embedding"] = np.pad(leaves["embedding"], [(0, 4), (0, 0)], constant_values=9)
  leaves["output"] = np.pad(leaves["output"], [(0, 0), (0, 4)], constant_values=9)
  arrays = {path: ArrayInfo(leaf.shape, leaf.dtype) for path, leaf in leaves.items()}
  with write_parameters(directory, EXPERIMENT, {"t.model": b"t"}, arrays) as writer:
    for path, leaf in leaves.items():
      writer.write(path, leaf)
  return StoredCheckpoint(directory)


@pytest.mark.slow
def test_orbax_restores_the_parameters_without_padding(stored, params, tmp_path):
  export_orbax(stored, tmp_path / "out", "float32")
  restored = ocp.StandardCheckpointer().restore(tmp_path / "out" / "params")
  jax.tree.map(np.testing.assert_array_equal, restored, params)
  settings = json.loads((tmp_path / "out" / "model.json").read_text())
  assert settings["rope_theta"] == 100.0 and settings["model"]["width"] == 32
  manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
  assert manifest["embedding"]["shape"] == [60, 32]


class Runtime:
  """Runs a StableHLO artifact as a program without JAX would: PJRT compiles its bytes."""

  def __init__(self, artifact: bytes):
    device = jax.devices()[0]
    self._device, self._client = device, device.client
    devices = _jax.DeviceList((device,))
    self._program = self._client.compile_and_load(artifact, devices, xla_client.CompileOptions())

  def __call__(self, *arrays: np.ndarray) -> list[np.ndarray]:
    # The programs drop no argument, and take them in the order of their signature.
    buffers = [jax.device_put(array, self._device) for array in arrays]
    results = self._program.execute_sharded(buffers).disassemble_into_single_device_arrays()
    return [np.asarray(result[0]) for result in results]


@pytest.mark.slow
def test_programs_run_without_our_code(stored, params):
  sizes = Sizes(batch_size=2, prompt_length=8, context=20)
  found = programs(stored, sizes, "float32", ("cpu",))
  prefill, decode = (
    Runtime(found[name].exported.mlir_module_serialized) for name in ("prefill", "decode")
  )
  tokens_BxP = np.random.default_rng(0).integers(0, 60, (2, 8), np.int32)
  start_B = np.array([0, 3], np.int32)
  leaves = jax.tree.leaves(params)
  for program, others in (found["prefill"], [tokens_BxP, start_B]), (found["decode"], []):
    shapes = [tuple(entry["shape"]) for entry in program.inputs]
    given = [array.shape for array in [*leaves, *others]]
    assert shapes[: len(given)] == given

  model = model_lib.build(CONFIG, ShardingRules(sequence=None))
  with jax.set_mesh(make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])):
    step = jax.jit(lambda *arguments: model.decode(*arguments, rope_theta=100.0))
    cache = model.init_cache(2, whole_length(20), jnp.asarray(start_B))
    expected, cache = step(params, jnp.asarray(tokens_BxP), cache)
    logits, *exported_cache = prefill(*leaves, tokens_BxP, start_B)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    for _ in range(2):
      token_Bx1 = np.argmax(logits, axis=-1).astype(np.int32)[:, None]
      expected, cache = step(params, jnp.asarray(token_Bx1), cache)
      logits, *exported_cache = decode(*leaves, token_Bx1, *exported_cache)
      np.testing.assert_allclose(logits, expected, atol=1e-5)
