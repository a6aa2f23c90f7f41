"""Logits against transformers' LlamaForCausalLM, on files of tests/golden/make_llama.py."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

from kernels.attention import causal
from kernels.ring import Layout
from lwm.convert import config_from_hugging_face, from_hugging_face, to_hugging_face
from lwm.errors import UserError
from lwm.model import build
from lwm.parallel.mesh import make_mesh
from lwm.parallel.sharding import MeshConfig

GOLDEN = pathlib.Path(__file__).parents[2] / "golden"
CASES = ("multi_head", "grouped_query", "llama3_scaling", "tied")


def load(case):
  with np.load(GOLDEN / f"llama_{case}.npz") as arrays:
    names = [name for name in arrays if name.startswith("weights/")]
    weights = {name.removeprefix("weights/"): arrays[name] for name in names}
    return json.loads(str(arrays["config"])), weights, arrays["ids"], arrays["logits"]


def our_logits(config, params, rope_theta, ids):
  model = build(dataclasses.replace(config, compute_dtype="float32"))

  @jax.jit
  def logits(params, ids):
    positions = jax.numpy.arange(ids.shape[1], dtype=jax.numpy.int32)[None]
    hidden = model.hidden(
      params,
      ids,
      positions,
      causal(*ids.shape),
      rope_theta=rope_theta,
      layout=Layout("contiguous", 1),
    )
    return model.logits(params, hidden)

  with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
    return np.asarray(logits(params, ids))


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case):
  hugging_face_config, weights, ids, expected = load(case)
  config, rope_theta = config_from_hugging_face(hugging_face_config)
  actual = our_logits(config, from_hugging_face(weights, config), rope_theta, ids)
  assert np.std(expected) > 0.5
  np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_llama3_scaling_matters():
  hugging_face_config, weights, ids, expected = load("llama3_scaling")
  config, rope_theta = config_from_hugging_face(hugging_face_config)
  params = from_hugging_face(weights, config)
  unscaled = dataclasses.replace(config, rope_scaling=None)
  assert np.abs(our_logits(unscaled, params, rope_theta, ids) - expected).max() > 1e-2


@pytest.mark.parametrize("case", CASES)
def test_there_and_back_is_exact(case):
  hugging_face_config, weights, _, _ = load(case)
  config, _ = config_from_hugging_face(hugging_face_config)
  params = from_hugging_face(weights, config)
  shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params)
  assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), build(config).abstract())
  back = to_hugging_face(params, config)
  assert back.keys() == weights.keys()
  for name, weight in weights.items():
    np.testing.assert_array_equal(back[name], weight.astype(np.float32), err_msg=name)


def test_errors_name_the_weight_and_the_setting():
  hugging_face_config, weights, _, _ = load("grouped_query")
  config, _ = config_from_hugging_face(hugging_face_config)
  with pytest.raises(UserError, match="lacks 'model.norm.weight'"):
    from_hugging_face({k: v for k, v in weights.items() if k != "model.norm.weight"}, config)
  with pytest.raises(UserError, match=r"'model.layers.0.self_attn.k_proj.weight' has shape \(24"):
    from_hugging_face(weights, dataclasses.replace(config, num_kv_heads=4))
  with pytest.raises(UserError, match="rope_type 'yarn'"):
    config_from_hugging_face(hugging_face_config | {"rope_parameters": {"rope_type": "yarn"}})
  with pytest.raises(UserError, match="rope_type 'linear'"):
    # As transformers 4.31 wrote it.
    old = {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 8.0}}
    config_from_hugging_face(hugging_face_config | old)
  for bias in ("attention_bias", "mlp_bias"):
    with pytest.raises(UserError, match=f"Llama with {bias} is not supported"):
      config_from_hugging_face(hugging_face_config | {bias: True})
  with pytest.raises(UserError, match="'mixtral'"):
    config_from_hugging_face(hugging_face_config | {"model_type": "mixtral"})
