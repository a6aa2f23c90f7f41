"""PEFT's adapters in and out, on the directory of tests/golden/make_peft.py."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import tokenizers

from kernels.attention import causal
from kernels.ring import Layout
from lwm import convert, model as model_lib
from lwm.checkpoint.reader import StoredCheckpoint, newest
from lwm.config.model import AdapterConfig
from lwm.convert.peft import CONFIG, STEM, export_adapter, import_adapter
from lwm.convert.safetensors import SafetensorsSource
from lwm.errors import UserError
from lwm.parallel.mesh import make_mesh
from lwm.parallel.sharding import MeshConfig

GOLDEN = pathlib.Path(__file__).parents[2] / "golden"
ADAPTER = GOLDEN / "peft"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> StoredCheckpoint:
  directory = tmp_path_factory.mktemp("base")
  tokenizer = directory / "tokenizer.json"
  words = {"<unk>": 0, "<s>": 1, "</s>": 2}
  tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>")).save(str(tokenizer))
  weights = convert.read_hugging_face(GOLDEN / "hugging_face" / "llama_multi_head", tokenizer)
  convert.import_weights(weights, directory / "base")
  return newest(directory / "base")


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory) -> StoredCheckpoint:
  output = tmp_path_factory.mktemp("tuned") / "tuned"
  import_adapter(ADAPTER, base, output)
  return newest(output)


def logits(stored: StoredCheckpoint, ids: np.ndarray) -> np.ndarray:
  stage, config = stored.experiment.stages[0], stored.experiment.model
  config.compute_dtype = "float32"
  model, reader = model_lib.build(config), stored.reader()
  structure = model.abstract()
  paths = jax.tree_util.tree_flatten_with_path(structure)[0]
  names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]
  params = jax.tree.unflatten(
    jax.tree.structure(structure), [reader.read(name).astype(np.float32) for name in names]
  )
  with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):

    @jax.jit
    def run(params, ids):
      positions = jax.numpy.arange(ids.shape[1], dtype=jax.numpy.int32)[None]
      options = dict(rope_theta=stage.rope_theta, layout=Layout("contiguous", 1))
      hidden = model.hidden(params, ids, positions, causal(*ids.shape), **options)
      return model.logits(params, hidden)

    return np.asarray(run(params, ids))


def tensors(directory: pathlib.Path) -> dict[str, np.ndarray]:
  source = SafetensorsSource(directory, STEM)
  return {name: source.read(name) for name in source.tensors}


def test_logits_equal_peft_merged_and_not(tuned):
  with np.load(ADAPTER / "logits.npz") as golden:
    ids, expected = golden["ids"], golden["logits"]
  unmerged = logits(tuned, ids)
  np.testing.assert_allclose(unmerged, expected, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(logits(convert.merged(tuned), ids), unmerged, rtol=1e-5, atol=1e-5)


def test_there_and_back_is_exact(tuned, tmp_path):
  export_adapter(tuned, tmp_path / "adapter", base="some/base")
  theirs, ours = tensors(ADAPTER), tensors(tmp_path / "adapter")
  assert ours.keys() == theirs.keys()
  for name, array in theirs.items():
    np.testing.assert_array_equal(ours[name], array, err_msg=name)
  theirs, ours = (
    json.loads((path / CONFIG).read_text()) for path in (ADAPTER, tmp_path / "adapter")
  )
  assert ours["base_model_name_or_path"] == "some/base"
  assert {*ours["target_modules"]} == {*theirs["target_modules"]}
  assert all(ours[name] == theirs[name] for name in ("r", "lora_alpha", "peft_type", "bias"))


@pytest.mark.parametrize(
  "settings, message",
  [
    ({"use_dora": True}, "adapter_config.json: use_dora=True is not supported; merge the adapter"),
    ({"r": 0}, "adapter_config.json: r=0 and lora_alpha=5 must be positive numbers"),
    ({"r": 4}, r"down_proj.lora_A.weight has shape \(3, 32\), but for .* its shape is \(4, 32\)"),
  ],
)
def test_what_does_not_fit_is_one_sentence(settings, message, base, tmp_path):
  shutil.copytree(ADAPTER, tmp_path / "adapter")
  path = tmp_path / "adapter" / CONFIG
  path.write_text(json.dumps(json.loads(path.read_text()) | settings))
  with pytest.raises(UserError, match=message):
    import_adapter(tmp_path / "adapter", base, tmp_path / "out")
  assert not (tmp_path / "out").exists()


def test_a_model_without_lora_has_no_adapter(base, tmp_path):
  with pytest.raises(UserError, match="holds a model without LoRA"):
    export_adapter(base, tmp_path / "adapter")


@pytest.mark.parametrize(
  "export",
  [
    lambda stored, output: convert.export_hugging_face(stored, output, "float32"),
    lambda stored, output: convert.export_release(stored, output, None),
  ],
  ids=["hugging_face", "lwm"],
)
def test_modality_adapters_are_in_no_format_of_others(base, tmp_path, export):
  stored = StoredCheckpoint(base.path)
  stored.experiment.model.adapter = AdapterConfig()
  with pytest.raises(UserError, match="config.model.adapter, which|differ in adapter_modalities"):
    export(stored, tmp_path / "out")
  assert not list(tmp_path.iterdir())
