"""Samples from a run or from imported weights: continues a text and a held-out clip.

    python -m experiments.generate --workdir=runs/laptop
    python -m experiments.generate --workdir=weights/smollm2 --chat \\
        --prompt="What is the capital of France?"

Everything but the sampling comes from the newest checkpoint of the run. Writes
WORKDIR/samples/text.txt. Also writes WORKDIR/samples/video.png if a dataset of the run has
validation documents with clips and records which VQGAN its codes come from. The picture shows the
ground truth above, as the VQGAN decodes it, and the prediction below; frames that the model was
given have a border.
"""

import itertools
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import flags as experiment_flags
from experiments.runtime import devices
from lwm import infer
from lwm.config.batch import MODALITIES
from lwm.config.experiment import Experiment
from lwm.config.vqgan import VisionLayout
from lwm.data import VALIDATION, Dataset, Tokenizer, load_tokenizer
from lwm.data.chat import ChatFormat
from lwm.data.dataset import Split
from lwm.data.tokenizer import end_ids
from lwm.errors import UserError
from lwm.parallel.mesh import make_mesh
from lwm.parallel.sharding import MeshConfig
from lwm.vision.codec import Codec
from lwm.vision.pictures import save_contact_sheet

_WORKDIR = flags.DEFINE_string(
  "workdir", None, "The --workdir of experiments.train, or the --output of import_weights."
)
_PROMPT = flags.DEFINE_string("prompt", "def main(", "Text to continue.")
_CHAT = flags.DEFINE_bool(
  "chat", False, "Take the prompt as a user's message, in the tokenizer's chat template."
)
_WEIGHTS = flags.DEFINE_enum("weights", "float32", infer.FORMS, "The form of the weights.")
_NUM_TOKENS = flags.DEFINE_integer("num_tokens", 256, "Text tokens to generate.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float(
  "temperature", 0.8, "Temperature for text; 0 takes the likeliest token.", lower_bound=0
)
_TOP_K = flags.DEFINE_integer(
  "top_k", 50, "Draw each text token from this many of the likeliest.", lower_bound=1
)
_CLIP = flags.DEFINE_integer(
  "clip", 0, "Index of the clip to continue, among validation documents with clips.", lower_bound=0
)
_GIVEN_FRAMES = flags.DEFINE_integer("given_frames", 4, "Frames given to the model.", lower_bound=1)
_FRAMES = flags.DEFINE_integer("frames", 4, "Frames to predict.", lower_bound=1)
_VISION_TEMPERATURE = flags.DEFINE_float(
  "vision_temperature", 1.0, "Temperature for codes; 0 takes the likeliest code.", lower_bound=0
)
# LWM's value for video.
_VISION_TOP_K = flags.DEFINE_integer(
  "vision_top_k", 1000, "Draw each code from this many of the likeliest.", lower_bound=1
)
_VQGAN = flags.DEFINE_string(
  "vqgan", None, "The VQGAN's file. Default: vqgan.npz beside the run's tokenizer."
)
_SEED = flags.DEFINE_integer("seed", 0, "The same seed gives the same samples.")
flags.mark_flag_as_required("workdir")

_BORDER = np.array([40, 120, 255], np.uint8)


def sample(
  trained: infer.TrainedModel,
  prompt: Sequence[int] | np.ndarray,
  forced: np.ndarray,
  choice: infer.Choice,
) -> np.ndarray:
  """The ids that follow one prompt: int32, as many as `forced` has."""
  tokens_BxT = infer.sample(
    trained.model,
    trained.params,
    jnp.asarray(prompt, jnp.int32)[None],
    jnp.asarray(forced, jnp.int32),
    jax.random.key(_SEED.value),
    choice=choice,
    rope_theta=trained.rope_theta,
  )
  return np.asarray(tokens_BxT[0])


def decode_after(tokenizer: Tokenizer, prompt: list[int], tokens: list[int]) -> str:
  """The text of the tokens after a prompt.

  Llama's tokenizer would drop a space at the beginning of the tokens if it decoded them alone.
  """
  return tokenizer.decode([*prompt, *tokens])[len(tokenizer.decode(prompt)) :]


def write_text(trained: infer.TrainedModel, tokenizer: Tokenizer, path: pathlib.Path) -> str:
  """Continues or answers the prompt until a token ends the text, and writes the text to `path`."""
  if _CHAT.value:
    message = {"role": "user", "content": _PROMPT.value}
    prompt = ChatFormat(tokenizer).prompt([message])
  else:
    prompt = [tokenizer.bos_id, *tokenizer.encode(_PROMPT.value)]
  choice = infer.Choice(0, tokenizer.vocab_size, _TEMPERATURE.value, _TOP_K.value)
  tokens = sample(trained, prompt, np.full(_NUM_TOKENS.value, infer.SAMPLED), choice).tolist()
  ends = end_ids(tokenizer)
  tokens = list(itertools.takewhile(lambda token: token not in ends, tokens))
  text = decode_after(tokenizer, prompt, tokens)
  if not _CHAT.value:
    text = _PROMPT.value + text
  path.write_text(text + "\n")
  return text


def write_video(
  trained: infer.TrainedModel, clip: infer.Clip, codec: Codec, path: pathlib.Path
) -> None:
  """Continues the clip, and writes ground truth and prediction to `path`."""
  start = trained.model.config.text_vocab_size
  choice = infer.Choice(
    start, start + codec.config.codebook_size, _VISION_TEMPERATURE.value, _VISION_TOP_K.value
  )
  tokens = sample(trained, clip.prompt, clip.forced, choice)
  truth = codec.decode(clip.codes_NxP)
  predicted = codec.decode(infer.sampled_codes(tokens, start, codec.config.layout))
  given = [with_border(frame) for frame in truth[: _GIVEN_FRAMES.value]]
  save_contact_sheet(path, [[*given, *truth[_GIVEN_FRAMES.value :]], [*given, *predicted]])


def clips(split: Split, layout: VisionLayout) -> np.ndarray:
  """Indices of the documents with more than one frame among their targets."""
  return np.flatnonzero(split.targets[:, MODALITIES.index("vision")] > layout.tokens_per_frame)


def held_out_clip(dataset: Dataset, layout: VisionLayout) -> infer.Clip:
  """The validation document with a clip that --clip names, cut."""
  split = dataset.split(VALIDATION)
  documents = clips(split, layout)
  if _CLIP.value >= len(documents):
    raise UserError(
      f"--clip={_CLIP.value}: {dataset.path} has {len(documents)} validation documents with "
      "clips, counted from 0."
    )
  document = int(documents[_CLIP.value])
  tokens, _ = split.read(document, 0, int(split.lengths[document]))
  return infer.cut_clip(tokens, dataset.text_vocab_size, layout, _GIVEN_FRAMES.value, _FRAMES.value)


def with_border(frame_HxWx3: np.ndarray) -> np.ndarray:
  """The frame with its outermost pixels coloured."""
  marked_HxWx3 = np.broadcast_to(_BORDER, frame_HxWx3.shape).copy()
  marked_HxWx3[1:-1, 1:-1] = frame_HxWx3[1:-1, 1:-1]
  return marked_HxWx3


def video_dataset(experiment: Experiment) -> Dataset | None:
  """The first of the experiment's datasets with held-out clips and a recorded VQGAN."""
  for config in experiment.datasets:
    dataset = Dataset(config.path, experiment.model.text_vocab_size)
    layout = dataset.vision_layout
    if layout and dataset.manifest["vqgan_sha256"] and dataset.has_split(VALIDATION):
      if len(clips(dataset.split(VALIDATION), layout)):
        return dataset
  return None


def load_codec(experiment: Experiment, dataset: Dataset) -> Codec:
  """The VQGAN that the dataset's codes come from."""
  beside_tokenizer = pathlib.Path(experiment.tokenizer).with_name("vqgan.npz")
  codec = Codec(_VQGAN.value or beside_tokenizer)
  if codec.sha256 != dataset.manifest["vqgan_sha256"]:
    raise UserError(
      f"{dataset.path} was not made with the VQGAN {_VQGAN.value or beside_tokenizer}: name the "
      "right file with --vqgan."
    )
  return codec


def main(argv: list[str]) -> None:
  del argv
  workdir = pathlib.Path(_WORKDIR.value or "")
  with jax.set_mesh(make_mesh(MeshConfig(fsdp=1), devices()[:1])):
    trained = infer.load_trained(workdir, _WEIGHTS.value)
    experiment, tokenizer = trained.experiment, load_tokenizer(trained.tokenizer)
    dataset = video_dataset(experiment)
    clip_and_codec = None
    if dataset:
      codec = load_codec(experiment, dataset)
      clip_and_codec = held_out_clip(dataset, codec.config.layout), codec
    print(f"{workdir}: step {trained.total_steps}, stage {trained.stage.name}")
    print(f"weights: {_WEIGHTS.value}, {infer.num_bytes(trained.params) / 2**20:.1f} MiB")
    samples = workdir / "samples"
    samples.mkdir(exist_ok=True)
    print(write_text(trained, tokenizer, samples / "text.txt"))
    print(f"text: {samples / 'text.txt'}")
    if clip_and_codec:
      write_video(trained, *clip_and_codec, samples / "video.png")
      print(f"video: {samples / 'video.png'}")


if __name__ == "__main__":
  experiment_flags.run(main)
