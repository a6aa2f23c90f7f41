"""Flags and steps that the programs for generation and evaluation share."""

import dataclasses
import os
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments import flags as experiment_flags
from experiments.runtime import devices, use_compilation_cache
from lwm import infer
from lwm.checkpoint.reader import StoredCheckpoint, newest
from lwm.data import Dataset, Tokenizer, load_tokenizer
from lwm.data.tokenizer import end_ids
from lwm.errors import UserError
from lwm.infer.films import read_codes, vision_ids
from lwm.parallel.mesh import make_mesh
from lwm.parallel.sharding import MeshConfig
from lwm.vision.codec import Codec

# LWM draws each code of a film from this many of the likeliest.
FILM_TOP_K = 1000
# Text is shown after the first token, and then after each block of this many tokens.
_BLOCK = 8


class Flags:
  """Defines the flags of programs that read prompts and generate.

  Attributes:
    mesh: --mesh.
  """

  def __init__(self) -> None:
    self._workdir = flags.DEFINE_string(
      "workdir", None, "The --workdir of experiments.train, or the --output of import_weights."
    )
    self._weights = flags.DEFINE_enum("weights", "float32", infer.FORMS, "The form of the weights.")
    self._cache = flags.DEFINE_enum(
      "cache", "dense", infer.CACHE_FORMS, "The form of the cached keys and values."
    )
    self.mesh = MeshConfig(fsdp=1)
    experiment_flags.define_settings("mesh", self.mesh)
    self._chunk = flags.DEFINE_integer(
      "chunk", 2048, "Prompt tokens that the model reads at a time.", lower_bound=1
    )
    self._num_tokens = flags.DEFINE_integer(
      "num_tokens", 256, "Maximum number of text tokens to generate.", lower_bound=1
    )
    self._temperature = flags.DEFINE_float(
      "temperature", 0.8, "Temperature for text; 0 takes the likeliest token.", lower_bound=0
    )
    self._top_k = flags.DEFINE_integer(
      "top_k", 50, "Draw each text token from this many of the likeliest.", lower_bound=1
    )
    self._top_p = flags.DEFINE_float(
      "top_p", 1.0, "Draw it from the likeliest tokens with this total probability.", 0, 1
    )
    self._min_p = flags.DEFINE_float(
      "min_p",
      0.0,
      "Draw it from tokens at least this probable, relative to the likeliest token.",
      0,
      1,
    )
    self._repetition_penalty = flags.DEFINE_float(
      "repetition_penalty",
      1.0,
      "Lowers the logits of text tokens that already occurred; 1: no penalty.",
      lower_bound=1,
    )
    self._frames_per_second = flags.DEFINE_float(
      "frames_per_second", 4.0, "Frames to take per second of film; LWM takes 4.", lower_bound=1e-6
    )
    self._vqgan = flags.DEFINE_string(
      "vqgan", None, "The VQGAN's file. Default: vqgan.npz beside the run's tokenizer."
    )
    self._seed = flags.DEFINE_integer(
      "seed", 0, "The same seed gives the same samples.", lower_bound=0
    )
    flags.mark_flag_as_required("workdir")

  @property
  def workdir(self) -> pathlib.Path:
    """--workdir."""
    return pathlib.Path(self._workdir.value or "")

  @property
  def weights(self) -> str:
    """--weights."""
    return self._weights.value or ""

  @property
  def cache(self) -> str:
    """--cache."""
    return self._cache.value or ""

  @property
  def chunk(self) -> int:
    """--chunk."""
    return self._chunk.value or 1

  @property
  def num_tokens(self) -> int:
    """--num_tokens."""
    return self._num_tokens.value or 1

  @property
  def seed(self) -> int:
    """--seed."""
    return self._seed.value or 0

  @property
  def frames_per_second(self) -> float:
    """--frames_per_second."""
    return self._frames_per_second.value or 0.0

  @property
  def vqgan(self) -> str | None:
    """--vqgan."""
    return self._vqgan.value

  @property
  def text(self) -> infer.Choice:
    """How text is drawn."""
    return infer.Choice(
      self._repetition_penalty.value or 1.0,
      self._temperature.value or 0.0,
      self._top_k.value,
      1.0 if self._top_p.value is None else self._top_p.value,
      self._min_p.value or 0.0,
    )


class Checkpoint:
  """The checkpoint that --workdir names, before its weights are read.

  Attributes:
    flags: of the program.
    workdir: of the flags.
    stored: the checkpoint.
    tokenizer: of the checkpoint.
    text_vocab_size: ids of text; vision ids follow them.
  """

  def __init__(self, program_flags: Flags):
    """Raises UserError if no checkpoint exists, or the flags do not fit the devices."""
    self.flags, self.workdir = program_flags, program_flags.workdir
    available = devices()
    sizes = self.flags.mesh.axis_sizes().values()
    # Without --mesh, one device; a mesh with -1 takes all.
    count = len(available) if -1 in sizes else int(np.prod(list(sizes)))
    if count > len(available):
      raise UserError(f"--mesh needs {count} devices, and only {len(available)} exist.")
    self._mesh = make_mesh(self.flags.mesh, available[:count])
    use_compilation_cache()
    self.stored: StoredCheckpoint = newest(self.workdir)
    # This line rejects the checkpoint of a VQGAN, which has no tokenizer to load.
    self.text_vocab_size = self.stored.experiment.model.text_vocab_size
    self.tokenizer: Tokenizer = load_tokenizer(self.stored.tokenizer_path)

  def codec(self, dataset: Dataset | None = None) -> Codec:
    """The VQGAN that the model's vision ids come from, as the dataset says.

    Raises:
      UserError: the file does not exist, or is another VQGAN than the dataset's.
    """
    experiment = self.stored.experiment
    path = pathlib.Path(
      self.flags.vqgan or pathlib.Path(experiment.tokenizer).with_name("vqgan.npz")
    )
    codec = Codec(path)
    if dataset is not None and codec.sha256 != dataset.manifest["vqgan_sha256"]:
      raise UserError(
        f"{dataset.path} was not made with the VQGAN {path}: name the right file with --vqgan."
      )
    if codec.config.layout.vocab_size > experiment.model.vision_vocab_size:
      raise UserError(
        f"The model in {self.workdir} has {experiment.model.vision_vocab_size} vision ids, fewer "
        f"than the VQGAN {path} needs: take a model that was trained on films."
      )
    return codec

  def films(
    self, paths: Sequence[str], capacity: int | None = None, open_end: bool = False
  ) -> np.ndarray | None:
    """Films and images as ids, with <vision> and </vision>; None without paths.

    Args:
      paths: of the files.
      capacity: most tokens of a prompt; a longer film is an error as soon as it is known.
      open_end: whether the model continues the last film.
    """
    if not paths:
      return None
    codec = self.codec()
    most = (capacity or 1 << 30) // codec.config.layout.tokens_per_frame
    films = read_codes(
      paths,
      codec,
      jax.local_devices(),
      frames_per_second=self.flags.frames_per_second,
      max_frames=max(1, most),
    )
    layout = codec.config.layout
    return vision_ids(self.tokenizer, self.text_vocab_size, layout, films, open_end)

  def check_cache(self, num_rows: int, capacity: int) -> None:
    """Raises UserError if the devices have no memory for a cache of this size."""
    per_token = infer.cache_bytes_per_token(self.stored.experiment.model, self.flags.cache)
    total = infer.padded_rows(num_rows, self._mesh.shape) * capacity * per_token
    # Rows are divided over replicas of the model, and each row over the other devices.
    needed = total / self._mesh.size
    available = _memory(self._mesh.local_devices[0])
    if needed > available:
      raise UserError(
        f"The cache of {num_rows:,} x {capacity:,} tokens needs {needed / 2**30:,.1f} GiB per "
        f"device, which has {available / 2**30:,.1f} GiB: use fewer rows or a shorter context, "
        "divide the cache over more devices with --mesh, or add --cache=int8."
      )

  def load(self) -> infer.TrainedModel:
    """Reads the weights, says what they are, and sets the mesh that they are on."""
    # Not before: films are encoded on a mesh of their own.
    jax.set_mesh(self._mesh)
    trained = infer.load_stored(self.stored, self.flags.weights)
    print(f"{self.workdir}: step {trained.total_steps}, stage {trained.stage.name}")
    print(
      f"weights: {self.flags.weights}, {infer.num_bytes(trained.params) / 2**20:.1f} MiB",
      flush=True,
    )
    return trained

  def engine(self, trained: infer.TrainedModel) -> infer.Engine:
    """The engine with the settings of the flags."""
    return infer.Engine(
      trained.model,
      trained.params,
      rope_theta=trained.rope_theta,
      chunk=self.flags.chunk,
      cache=self.flags.cache,
    )

  def text(self) -> infer.Grammar:
    """Text that an end-of-text id ends, drawn as the flags say."""
    ends = tuple(sorted(end_ids(self.tokenizer)))
    return infer.Grammar(self.tokenizer.vocab_size, ends, self.flags.text)

  def pictures(
    self, codec: Codec, frames: int | None, vision: infer.Choice, **changes: Any
  ) -> infer.Grammar:
    """Text with pictures of the VQGAN.

    Args:
      codec: the VQGAN.
      frames: of each picture; None: as many as the model chooses.
      vision: how codes are drawn.
      changes: other fields of `infer.Pictures`.
    """
    config = codec.config
    pictures = infer.Pictures.of(
      self.tokenizer, self.text_vocab_size, config.codebook_size, config.layout
    )
    pictures = dataclasses.replace(pictures, frames=frames, **changes)
    return dataclasses.replace(self.text(), pictures=pictures, vision=vision)

  def text_sampling(self) -> infer.Sampling:
    """Text of at most --num_tokens, in blocks for the terminal."""
    return infer.Sampling(self.text(), self.flags.num_tokens, block=_BLOCK)


def _memory(device: jax.Device) -> int:
  """Bytes that programs may use on a device; virtual CPU devices share the machine's."""
  if device.platform == "cpu":
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // jax.local_device_count("cpu")
  return device.memory_stats()["bytes_limit"]


def decode_after(tokenizer: Tokenizer, prompt: Sequence[int], tokens: Sequence[int]) -> str:
  """The text of the tokens after a prompt.

  Llama's tokenizer would drop a space at the beginning of the tokens if it decoded them alone.
  """
  return tokenizer.decode([*prompt, *tokens])[len(tokenizer.decode(prompt)) :]


def stream(
  checkpoint: Checkpoint, session: infer.Session, sampling: infer.Sampling, started: float
) -> str:
  """Generates text after the session's only row, and prints it while it comes.

  Args:
    checkpoint: has the tokenizer.
    session: has read the prompt.
    sampling: text.
    started: when the prompt was given, by `time.perf_counter`.

  Returns:
    The text, without the token that ended it.
  """
  # Decoded after a few ids of the prompt, so that spaces come out as in the whole text.
  vocab_size = checkpoint.tokenizer.vocab_size
  before = [token for token in session.tokens[0][-64:] if token < vocab_size]
  tokens: list[int] = []
  shown, first = "", 0.0
  for (new,) in session.generate(sampling, [checkpoint.flags.seed]):
    first = first or time.perf_counter()
    tokens += new
    text = decode_after(
      checkpoint.tokenizer, before, [t for t in tokens if t not in sampling.grammar.stop_ids]
    )
    # An incomplete UTF-8 character decodes to U+FFFD: hold it back until its last byte arrives.
    whole = text.rstrip("\ufffd")
    print(whole[len(shown) :], end="", flush=True)
    shown = whole
  seconds = time.perf_counter() - first
  print(text[len(shown) :])
  rate = f", {(len(tokens) - 1) / seconds:,.1f} tokens/s" if len(tokens) > 1 else ""
  print(
    f"[{len(tokens):,} tokens after {len(session.tokens[0]) - len(tokens):,}; the first after "
    f"{first - started:.2f} s{rate}]",
    file=sys.stderr,
    flush=True,
  )
  return text


def generate_all(session: infer.Session, sampling: infer.Sampling, seed: int) -> list[list[int]]:
  """The tokens that follow each row; the rows' seeds count from `seed` on."""
  num_rows = len(session.tokens) // (1 if sampling.guidance is None else 2)
  rows: list[list[int]] = [[] for _ in range(num_rows)]
  for block in session.generate(sampling, range(seed, seed + num_rows)):
    for row, new in zip(rows, block):
      row += new
  return rows
