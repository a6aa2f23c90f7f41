"""Exports of models that were not imported: paddings, vision ids, faults."""

import dataclasses
import errno
import hashlib
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import tokenizers
from flax import nnx

from lwm.checkpoint.arrays import ArrayInfo
from lwm.checkpoint.parameters import write_parameters
from lwm.checkpoint.reader import newest
from lwm.config.experiment import Experiment, Stage
from lwm.config.model import ModelConfig, RopeScaling
from lwm.config.vqgan import VQGANConfig
from lwm.convert import export_hugging_face, import_weights, read_hugging_face
from lwm.convert.safetensors import SafetensorsSink, SafetensorsSource
from lwm.data.tokenizer import tokenizer_files, train_sentencepiece
from lwm.errors import UserError
from lwm.model import build
from lwm.vision.codec import save_vqgan
from lwm.vision.vqgan import VQGAN

PIECES = 300
VQGAN_CONFIG = VQGANConfig(
  resolution=8,
  hidden_channels=8,
  channel_multipliers=(1, 2),
  num_res_blocks=1,
  latent_channels=8,
  codebook_size=32,
  codebook_width=8,
  norm_groups=4,
)
BASE = ModelConfig(
  num_layers=2,
  width=24,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  feed_forward_width=32,
  text_vocab_size=PIECES,
)
VISION = dataclasses.replace(BASE, vision_vocab_size=VQGAN_CONFIG.layout.vocab_size)
CONFIGS = {
  "padded": dataclasses.replace(BASE, vocab_multiple=64, rope_scaling=RopeScaling()),
  "uneven_heads": dataclasses.replace(BASE, num_heads=5, num_kv_heads=1),
  "vision": dataclasses.replace(VISION, vocab_multiple=512),
}


def write_words(directory: pathlib.Path) -> pathlib.Path:
  """A tokenizer.json of 8 words, and settings beside it."""
  directory.mkdir()
  words = ["<unk>", "<s>", "</s>", "a", "cat", "on", "the", "sofa"]
  vocabulary = {word: index for index, word in enumerate(words)}
  model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
  model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  model.add_special_tokens(words[1:3])
  model.save(str(directory / "tokenizer.json"))
  (directory / "chat_template.jinja").write_text("{{ messages[0].content }}")
  (directory / "generation_config.json").write_text('{"eos_token_id": [2, 4]}')
  return directory / "tokenizer.json"


def write_pieces(directory: pathlib.Path) -> pathlib.Path:
  """A sentencepiece model as we train them."""
  texts = ["a cat on the sofa", "the cat sees two red houses and a sofa", "cats on sofas"]
  train_sentencepiece(texts, directory / "words.model", PIECES)
  return directory / "words.model"


def write_vqgan(path: pathlib.Path) -> pathlib.Path:
  save_vqgan(path, VQGAN_CONFIG, nnx.state(VQGAN(VQGAN_CONFIG, rngs=nnx.Rngs(0))))
  return path


def write_checkpoint(
  directory: pathlib.Path, config: ModelConfig, tokenizer: pathlib.Path
) -> pathlib.Path:
  """A checkpoint of random numbers, in rows of padding too."""
  random = np.random.default_rng(0)
  shapes = jax.tree_util.tree_flatten_with_path(build(config).abstract())[0]
  arrays = {
    jax.tree_util.keystr(path, simple=True, separator="."): random.normal(0, 0.3, leaf.shape)
    for path, leaf in shapes
  }
  arrays = {path: array.astype(np.float32) for path, array in arrays.items()}
  infos = {path: ArrayInfo(array.shape, array.dtype) for path, array in arrays.items()}
  stage = Stage(name="text", sequence_length=64, rope_theta=2e4)
  experiment = Experiment(tokenizer=tokenizer.name, model=config, stages=[stage])
  with write_parameters(directory, experiment, tokenizer_files(tokenizer), infos) as writer:
    for path, array in arrays.items():
      writer.write(path, array)
  return directory


def parameters(checkpoint: pathlib.Path) -> dict[str, np.ndarray]:
  reader = newest(checkpoint).reader()
  return {path: reader.read(path, ()) for path in reader.arrays}


@pytest.fixture(scope="module")
def pieces(tmp_path_factory) -> pathlib.Path:
  return write_pieces(tmp_path_factory.mktemp("pieces"))


@pytest.fixture(scope="module")
def vqgan(tmp_path_factory) -> pathlib.Path:
  return write_vqgan(tmp_path_factory.mktemp("vqgan") / "vqgan.npz")


@pytest.fixture(scope="module")
def llama(tmp_path_factory, pieces) -> pathlib.Path:
  return write_checkpoint(tmp_path_factory.mktemp("llama") / "llama", BASE, pieces)


KINDS = {
  "LlamaForCausalLM": {},
  "MistralForCausalLM": {"sliding_window": 5},
  "Qwen2ForCausalLM": {"attention_bias": True},
  "Qwen3ForCausalLM": {"query_key_norm": True, "sliding_window": 5},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_kv_heads, tied_head", [(4, False), (1, True)])
def test_there_and_back_is_exact(kind, num_kv_heads, tied_head, pieces, tmp_path):
  sizes = {"num_kv_heads": num_kv_heads, "tied_head": tied_head}
  config = dataclasses.replace(BASE, **sizes, **KINDS[kind])
  write_checkpoint(tmp_path / "ours", config, pieces)
  export_hugging_face(newest(tmp_path / "ours"), tmp_path / "theirs")
  settings = json.loads((tmp_path / "theirs" / "config.json").read_text())
  assert settings["architectures"] == [kind]
  import_weights(read_hugging_face(tmp_path / "theirs"), tmp_path / "back")
  back, ours = newest(tmp_path / "back").experiment, parameters(tmp_path / "ours")
  assert back.model == config
  assert (back.stages[0].rope_theta, back.stages[0].sequence_length) == (2e4, 64)
  for path, array in parameters(tmp_path / "back").items():
    np.testing.assert_array_equal(array, ours[path])


@pytest.mark.parametrize("case", CONFIGS)
def test_padding_is_cut_and_vision_ids_stay(case, pieces, vqgan, tmp_path):
  write_checkpoint(tmp_path / "ours", CONFIGS[case], pieces)
  export_hugging_face(newest(tmp_path / "ours"), tmp_path / "theirs", vqgan=vqgan)
  source = SafetensorsSource(tmp_path / "theirs")
  ids = CONFIGS[case].vocab_size
  assert source.tensors["model.embed_tokens.weight"].shape == (ids, 24)
  assert source.tensors["lm_head.weight"].shape == (ids, 24)
  import_weights(read_hugging_face(tmp_path / "theirs"), tmp_path / "back")
  assert newest(tmp_path / "back").experiment.model == dataclasses.replace(
    CONFIGS[case], vocab_multiple=0
  )
  ours, back = parameters(tmp_path / "ours"), parameters(tmp_path / "back")
  np.testing.assert_array_equal(back["embedding"], ours["embedding"][:ids])
  np.testing.assert_array_equal(back["output"], ours["output"][:, :ids])


def test_a_model_with_vision_ids_says_what_they_are(pieces, vqgan, tmp_path):
  checkpoint = write_checkpoint(tmp_path / "ours", VISION, pieces)
  with pytest.raises(UserError, match="has vision ids, which mean nothing .* --vqgan"):
    export_hugging_face(newest(checkpoint), tmp_path / "theirs")
  export_hugging_face(newest(checkpoint), tmp_path / "theirs", vqgan=vqgan)
  settings = json.loads((tmp_path / "theirs" / "config.json").read_text())["lwm_vision"]
  layout = VQGAN_CONFIG.layout
  assert settings == {
    "text_vocab_size": PIECES,
    "vision_vocab_size": layout.vocab_size,
    "codes_per_frame": 16,
    "end_of_frame": PIECES + layout.end_of_frame,
    "end_of_vision": PIECES + layout.end_of_vision,
  }
  text = (tmp_path / "theirs" / "README.md").read_text()
  assert f"| {PIECES} to {PIECES + 31} | codes" in text
  compile(text.split("```python\n")[1].split("```")[0], "README.md", "exec")
  other = dataclasses.replace(VISION, vision_vocab_size=512)
  checkpoint = write_checkpoint(tmp_path / "other", other, pieces)
  with pytest.raises(UserError, match="needs 8448 vision ids, but .* has 512"):
    export_hugging_face(newest(checkpoint), tmp_path / "another", vqgan=vqgan)


def test_numbers_keep_their_bits_or_are_rounded_once(llama, tmp_path):
  export_hugging_face(newest(llama), tmp_path / "exact")
  export_hugging_face(newest(llama), tmp_path / "rounded", "bfloat16")
  exact, rounded = SafetensorsSource(tmp_path / "exact"), SafetensorsSource(tmp_path / "rounded")
  for name, info in rounded.tensors.items():
    assert (info.dtype.name, exact.tensors[name].dtype.name) == ("bfloat16", "float32")
    np.testing.assert_array_equal(rounded.read(name), exact.read(name).astype(info.dtype))
  settings = json.loads((tmp_path / "rounded" / "config.json").read_text())
  assert settings["dtype"] == settings["torch_dtype"] == "bfloat16"


def test_a_parameter_whose_layers_differ_in_dtype_loses_nothing(llama, tmp_path):
  export_hugging_face(newest(llama), tmp_path / "theirs")
  source = SafetensorsSource(tmp_path / "theirs")
  name = "model.layers.0.mlp.up_proj.weight"
  infos = dict(source.tensors)
  infos[name] = ArrayInfo(infos[name].shape, np.dtype(np.float16))
  no_tensors = shutil.ignore_patterns("*.safetensors")
  shutil.copytree(tmp_path / "theirs", tmp_path / "mixed", ignore=no_tensors)
  with SafetensorsSink(tmp_path / "mixed", infos, 10**9) as sink:
    for other, info in infos.items():
      sink.write(other, source.read(other).astype(info.dtype))
  import_weights(read_hugging_face(tmp_path / "mixed"), tmp_path / "back")
  up = parameters(tmp_path / "back")["blocks.feed_forward.up"]
  assert up.dtype == np.float32
  np.testing.assert_array_equal(up[1], parameters(llama)["blocks.feed_forward.up"][1])


def test_the_manifest_has_the_hash_of_every_tensor(llama, tmp_path):
  export_hugging_face(newest(llama), tmp_path / "theirs")
  manifest = json.loads((tmp_path / "theirs" / "manifest.json").read_text())
  source = SafetensorsSource(tmp_path / "theirs")
  assert manifest.keys() == source.tensors.keys()
  for name, entry in manifest.items():
    assert entry["sha256"] == hashlib.sha256(source.read(name).tobytes()).hexdigest()


@pytest.mark.parametrize(
  "setting, message",
  [
    ({"attention_soft_cap": 30.0}, "no class of transformers .* has attention_soft_cap=30.0"),
    ({"attention_bias": True, "query_key_norm": True}, "attention_bias and query_key_norm toge"),
  ],
)
def test_settings_that_no_class_has(setting, message, pieces, tmp_path):
  config = dataclasses.replace(BASE, **setting)
  checkpoint = write_checkpoint(tmp_path / "ours", config, pieces)
  with pytest.raises(UserError, match=message):
    export_hugging_face(newest(checkpoint), tmp_path / "theirs")
  assert not list(tmp_path.glob("theirs*"))


def test_a_full_disk_leaves_nothing_and_the_same_command_ends_it(llama, tmp_path, monkeypatch):
  def full(sink, name, array):
    raise OSError(errno.ENOSPC, "No space left on device")

  (tmp_path / "theirs.unfinished").mkdir()
  with monkeypatch.context() as patch:
    patch.setattr(SafetensorsSink, "write", full)
    with pytest.raises(UserError, match=r"theirs could not be written \(No space left on device\)"):
      export_hugging_face(newest(llama), tmp_path / "theirs")
  assert not list(tmp_path.iterdir())
  export_hugging_face(newest(llama), tmp_path / "theirs")
  assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_a_model_without_a_tokenizer(llama, pieces, tmp_path):
  export_hugging_face(newest(llama), tmp_path / "theirs")
  (tmp_path / "theirs" / "tokenizer.model").unlink()
  with pytest.raises(UserError, match="neither tokenizer.json nor tokenizer.model: .* --tokenizer"):
    read_hugging_face(tmp_path / "theirs")
  assert "words.model" in read_hugging_face(tmp_path / "theirs", pieces).tokenizer_files
