"""Models of transformers in and out, on the directories of tests/golden/make_hugging_face.py."""

import contextlib
import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from kernels.attention import causal
from kernels.ring import Layout
from lwm import model as model_lib
from lwm.checkpoint.reader import newest
from lwm.convert import export_hugging_face, import_weights, read_hugging_face
from lwm.convert.hugging_face.config import read_config
from lwm.convert.hugging_face.names import ARCHITECTURES, table
from lwm.convert.safetensors import SafetensorsSource
from lwm.convert.table import convert_out
from lwm.errors import UserError
from lwm.infer import load_trained
from lwm.parallel.mesh import make_mesh
from lwm.parallel.sharding import MeshConfig
from tests.lwm.convert.test_hugging_face_export import parameters, write_words

GOLDEN = pathlib.Path(__file__).parents[2] / "golden" / "hugging_face"
CASES = sorted(path.name for path in GOLDEN.iterdir())
# Exported as Mistral, which computes the same with separate projections.
FUSED = "phi3"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> pathlib.Path:
  return write_words(tmp_path_factory.mktemp("tokenizer") / "words")


@pytest.fixture(scope="module")
def imported(tmp_path_factory, tokenizer) -> dict[str, pathlib.Path]:
  """A checkpoint of each golden model."""
  directory = tmp_path_factory.mktemp("imported")
  for case in CASES:
    import_weights(read_hugging_face(GOLDEN / case, tokenizer), directory / case)
  return {case: directory / case for case in CASES}


@contextlib.contextmanager
def one_device():
  with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
    yield


def our_logits(checkpoint: pathlib.Path, ids: np.ndarray, **changes) -> np.ndarray:
  with one_device():
    trained = load_trained(checkpoint)
    config = dataclasses.replace(trained.experiment.model, compute_dtype="float32", **changes)
    model = model_lib.build(config)

    @jax.jit
    def logits(params, ids):
      hidden = model.hidden(
        params,
        ids,
        jax.numpy.arange(ids.shape[1], dtype=jax.numpy.int32)[None],
        causal(*ids.shape),
        rope_theta=trained.rope_theta,
        layout=Layout("contiguous", 1),
      )
      return model.logits(params, hidden)

    return np.asarray(logits(trained.params, ids))


def tensors(directory: pathlib.Path) -> dict[str, np.ndarray]:
  source = SafetensorsSource(directory)
  return {name: source.read(name) for name in source.tensors}


def assert_equal(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
  """Names, dtypes, shapes and bits."""
  assert ours.keys() == theirs.keys()
  for name, array in theirs.items():
    assert ours[name].dtype == array.dtype, name
    np.testing.assert_array_equal(ours[name], array, err_msg=name)


def edited(case: str, directory: pathlib.Path, **settings) -> pathlib.Path:
  """A copy of a golden model with other settings; those that are None are removed."""
  shutil.copytree(GOLDEN / case, directory)
  config = json.loads((directory / "config.json").read_text()) | settings
  config = {name: value for name, value in config.items() if value is not None}
  (directory / "config.json").write_text(json.dumps(config))
  return directory


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case, imported):
  with np.load(GOLDEN / case / "logits.npz") as golden:
    ids, expected = golden["ids"], golden["logits"]
  assert np.std(expected) > 0.5
  np.testing.assert_allclose(our_logits(imported[case], ids), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
  "case, changes", [("llama_scaled", {"rope_scaling": None}), ("mistral", {"sliding_window": 10})]
)
def test_settings_of_the_golden_models_matter(case, changes, imported):
  with np.load(GOLDEN / case / "logits.npz") as golden:
    ids, expected = golden["ids"], golden["logits"]
  assert np.abs(our_logits(imported[case], ids, **changes) - expected).max() > 1e-2


@pytest.mark.parametrize("case", CASES)
def test_there_and_back_is_exact(case, imported, tokenizer, tmp_path):
  export_hugging_face(newest(imported[case]), tmp_path / "exported", shard_bytes=10_000)
  if case != FUSED:
    assert_equal(tensors(tmp_path / "exported"), tensors(GOLDEN / case))
    theirs = json.loads((GOLDEN / case / "config.json").read_text())
    ours = json.loads((tmp_path / "exported" / "config.json").read_text())
    # The tokenizer says what the marks are, and without a window no layer number matters.
    free = {"bos_token_id", "eos_token_id"}
    free |= {"max_window_layers"} if not theirs.get("use_sliding_window") else set()
    shared = ours.keys() & theirs.keys() - free
    assert {name: ours[name] for name in shared} == {name: theirs[name] for name in shared}
  import_weights(read_hugging_face(tmp_path / "exported"), tmp_path / "back")
  assert_equal(parameters(tmp_path / "back"), parameters(imported[case]))
  there, back = newest(imported[case]).experiment, newest(tmp_path / "back").experiment
  assert dataclasses.replace(there, name="") == dataclasses.replace(back, name="")


def test_fused_projections_in_both_directions(imported):
  class Sink(dict):
    write = dict.__setitem__

  stored, golden, sink = newest(imported[FUSED]), tensors(GOLDEN / FUSED), Sink()
  config = stored.experiment.model
  rows = table(ARCHITECTURES[FUSED], config)
  convert_out(stored.reader().read, rows, config, sink, lambda name: golden[name].dtype)
  assert_equal(sink, golden)


def test_the_files_of_a_tokenizer_travel(imported, tokenizer, tmp_path):
  export_hugging_face(newest(imported["llama"]), tmp_path / "exported")
  for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
    assert (tmp_path / "exported" / name).read_bytes() == tokenizer.with_name(name).read_bytes()
  made = json.loads((tmp_path / "exported" / "tokenizer_config.json").read_text())
  assert (made["bos_token"], made["eos_token"]) == ("<s>", "</s>")
  config = json.loads((tmp_path / "exported" / "config.json").read_text())
  assert (config["bos_token_id"], config["eos_token_id"]) == (1, [2, 4])


def test_older_spellings_of_the_settings(tokenizer, tmp_path):
  new = read_hugging_face(GOLDEN / "llama_scaled", tokenizer)
  rope = json.loads((GOLDEN / "llama_scaled" / "config.json").read_text())["rope_parameters"]
  theta = rope.pop("rope_theta")
  kind = rope.pop("rope_type")
  for key in ("rope_type", "type"):
    scaling = rope | {key: kind}
    directory = edited(
      "llama_scaled", tmp_path / key, rope_parameters=None, rope_scaling=scaling, rope_theta=theta
    )
    old = read_hugging_face(directory, tokenizer)
    assert (old.config, old.rope_theta) == (new.config, new.rope_theta)


def test_xverse_is_read_as_a_llama(imported, tokenizer, tmp_path):
  """transformers has no XVERSE. Its names and its computation are Llama's."""
  directory = edited("llama_multi_head", tmp_path / "xverse", model_type="xverse")
  import_weights(read_hugging_face(directory, tokenizer), tmp_path / "imported")
  assert_equal(parameters(tmp_path / "imported"), parameters(imported["llama_multi_head"]))
  llama = newest(imported["llama_multi_head"]).experiment
  assert newest(tmp_path / "imported").experiment.model == llama.model


@pytest.mark.parametrize("case", CASES)
def test_defaults_of_each_class(case, tokenizer, tmp_path):
  """A missing key has the value that transformers' own class gives it."""
  transformers = pytest.importorskip("transformers")
  content = json.loads((GOLDEN / case / "config.json").read_text())
  optional = ("num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings")
  optional += ("rope_parameters", "sliding_window", "use_sliding_window", "max_window_layers")
  removed = dict.fromkeys((*optional, "layer_types", "max_position_embeddings"))
  peer = transformers.AutoConfig.for_model(
    **{name: value for name, value in content.items() if name not in removed}
  )
  # The sizes are the golden model's, so tensors need not fit: only the settings are read.
  directory = edited(case, tmp_path / "model", **removed)
  ours = read_config(directory / "config.json", json.loads((directory / "config.json").read_text()))
  expected = {
    "num_kv_heads": peer.num_key_value_heads,
    "head_dim": getattr(peer, "head_dim", None) or peer.hidden_size // peer.num_attention_heads,
    "norm_epsilon": peer.rms_norm_eps,
    "tied_head": peer.tie_word_embeddings,
    "sliding_window": getattr(peer, "sliding_window", None),
  }
  assert {name: getattr(ours.model, name) for name in expected} == expected
  assert ours.rope_theta == peer.rope_parameters["rope_theta"]
  assert ours.context == peer.max_position_embeddings


SCALED = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0], "long_factor": [1.0]}


@pytest.mark.parametrize(
  "case, settings, message",
  [
    ("llama", {"model_type": "gpt2"}, "config.json: model_type 'gpt2' is not supported"),
    ("llama", {"hidden_size": None}, "config.json: hidden_size must be a positive integer"),
    ("llama", {"num_key_value_heads": "2"}, "num_key_value_heads must be a positive integer"),
    ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, more than 10000"),
    ("llama", {"vocab_size": 10**30}, "config.json: vocab_size must be a positive integer"),
    ("llama", {"rms_norm_eps": "1e-5"}, "rms_norm_eps='1e-5' must be a positive number"),
    ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps=nan must be a positive number"),
    (
      "llama",
      {"rope_parameters": None, "rope_theta": -1},
      "rope_theta=-1 must be a positive number",
    ),
    ("llama", {"rope_scaling": "llama3"}, "rope_parameters='llama3' is not supported"),
    ("llama", {"tie_word_embeddings": "false"}, "tie_word_embeddings='false' is not supported"),
    ("llama", {"lwm_vision": [1]}, r"lwm_vision=\[1\] is not supported"),
    ("qwen2", {"max_window_layers": "2"}, "max_window_layers='2' is not supported"),
    ("qwen2", {"layer_types": ["chunked_attention"] * 2}, "a sliding window in some layers only"),
    ("llama", {"hidden_act": "gelu"}, "config.json: hidden_act='gelu' is not supported"),
    ("llama", {"mlp_bias": True}, "mlp_bias=True is not supported"),
    ("llama", {"attention_bias": True}, "attention_bias=True is not supported"),
    ("qwen3", {"attention_bias": True}, "attention_bias=True is not supported"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
    (
      "phi3",
      {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.75}},
      "partial_rotary_factor=0.75 is not supported",
    ),
    ("phi3", {"rope_parameters": None, "rope_scaling": SCALED}, "rope_type 'longrope' is not"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 8.0}}, "rope_type 'linear' is not"),
    ("llama", {"rope_scaling": {"rope_type": "llama3"}}, "factor=None must be a positive number"),
    ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0 is not"),
    ("llama", {"quantization_config": {"bits": 4}}, r"quantization_config=\{'bits': 4\} is not"),
    (
      "qwen2_sliding",
      {"max_window_layers": 1, "layer_types": None},
      "a sliding window in some layers only",
    ),
    (
      "mistral",
      {"layer_types": ["full_attention", "sliding_attention"]},
      "a sliding window in some layers only",
    ),
    ("llama", {"lwm_vision": {"text_vocab_size": 8}}, "lwm_vision do not add up to vocab_size 64"),
    ("qwen3", {"head_dim": 10}, r"o_proj.weight has shape \(24, 48\), but .* make it \(24, 40\)"),
    (
      "qwen3",
      {"num_hidden_layers": 3},
      "lacks the tensor model.layers.2.input_layernorm.weight and 10",
    ),
    ("qwen3", {"num_hidden_layers": 1}, "holds the tensor model.layers.1"),
    ("qwen3", {"model_type": "llama"}, "holds the tensor model.layers.0.self_attn.k_norm.weight"),
    ("llama_tied", {"tie_word_embeddings": False}, "lacks the tensor lm_head.weight"),
    ("llama", {"tie_word_embeddings": True}, "lm_head.weight differs from model.embed_tokens"),
    ("llama", {"vocab_size": 7}, "tokenizer.json has 8 tokens, but the model in"),
  ],
)
def test_what_is_not_supported_is_one_sentence(case, settings, message, tokenizer, tmp_path):
  directory = edited(case, tmp_path / "model", **settings)
  with pytest.raises(UserError, match=message):
    import_weights(read_hugging_face(directory, tokenizer), tmp_path / "imported")
  assert not list(tmp_path.glob("imported*"))
