"""Generates text, pictures and films from a run or imported weights.

    python -m experiments.generate --workdir=runs/laptop
    python -m experiments.generate --workdir=weights/smollm2 --chat \\
        --prompt="What is the capital of France?"
    python -m experiments.generate --workdir=runs/vision --make=image --prompt="a red house"
    python -m experiments.generate --workdir=runs/vision --make=film --frames=8 --film=cat.mp4
    python -m experiments.generate --workdir=runs/vision --chat --image=cat.png --prompt="What?"
    python -m experiments.generate --workdir=runs/vision --prompts=prompts.jsonl

Everything except the sampling comes from the newest checkpoint of the run. Without --make, it
continues the prompt as text, and a held-out clip if the run's datasets have one. Texts go to
WORKDIR/samples/text.txt or, with --prompts, texts.jsonl; pictures to PNG files beside it.
docs/generate.md describes the rest.
"""

import itertools
import json
import pathlib
import time

import numpy as np
from absl import flags

from experiments import flags as experiment_flags, inference
from lwm import infer
from lwm.config.batch import MODALITIES
from lwm.config.experiment import Experiment
from lwm.config.vqgan import VisionLayout
from lwm.data import VALIDATION, Dataset
from lwm.data.chat import ChatFormat
from lwm.data.dataset import Split
from lwm.data.documents import BadDocument, as_text
from lwm.data.lines import read_lines
from lwm.errors import UserError
from lwm.infer.films import check_films
from lwm.vision.codec import Codec
from lwm.vision.pictures import save_contact_sheet

_FLAGS = inference.Flags()
flags.adopt_module_key_flags(inference)
_PROMPT = flags.DEFINE_string("prompt", "def main(", "Text to continue.")
_PROMPTS = flags.DEFINE_string(
  "prompts", None, "File of prompts: lines of text, or of JSON with a field prompt if *.jsonl."
)
_CHAT = flags.DEFINE_bool(
  "chat", False, "Treat the prompt as a user message, in the tokenizer's chat template."
)
_MAKE = flags.DEFINE_enum("make", None, ["text", "image", "film", "mixed"], "What to generate.")
_FILM = flags.DEFINE_multi_string("film", [], "A film before the prompt; --make=film continues it.")
_IMAGE = flags.DEFINE_multi_string("image", [], "An image before the prompt.")
_CLIP = flags.DEFINE_integer(
  "clip", 0, "Index of the clip to continue, among validation documents with clips.", lower_bound=0
)
_GIVEN_FRAMES = flags.DEFINE_integer("given_frames", 4, "Frames given to the model.", lower_bound=1)
_FRAMES = flags.DEFINE_integer("frames", 4, "Frames to generate.", lower_bound=1)
_VISION_TEMPERATURE = flags.DEFINE_float(
  "vision_temperature", 1.0, "Temperature for codes; 0 takes the likeliest code.", lower_bound=0
)
_VISION_TOP_K = flags.DEFINE_integer(
  "vision_top_k",
  None,
  "Draw each code from this many of the likeliest. Default: LWM's 8192 for images, 1000 for films.",
  lower_bound=1,
)
_GUIDANCE = flags.DEFINE_float(
  "guidance",
  None,
  "Scale of classifier-free guidance. Default: LWM's 5 for images, 1 (none) for films.",
  lower_bound=0,
)

_IMAGE_TOP_K, _IMAGE_GUIDANCE = 8192, 5.0
_FILM_GUIDANCE = 1.0
_BORDER = np.array([40, 120, 255], np.uint8)


def read_prompts() -> list[str]:
  """The texts of --prompts. Raises UserError for a line without a prompt."""
  path = pathlib.Path(_PROMPTS.value or "")
  prompts = []
  for number, line in read_lines(path, "prompts"):
    if path.suffix == ".jsonl":
      try:
        line = as_text(json.loads(line)["prompt"], "the prompt")
      except (ValueError, TypeError, KeyError, BadDocument) as error:
        raise UserError(f"{path}, line {number}, is not JSON with a text prompt.") from error
    prompts.append(line)
  return prompts


def prompt_ids(checkpoint: inference.Checkpoint, text: str, vision: np.ndarray | None) -> list[int]:
  """A prompt as ids; films and images come before its text, or where a message says <vision>."""
  tokenizer = checkpoint.tokenizer
  if not _CHAT.value:
    ids = [] if vision is None else vision.tolist()
    return [tokenizer.bos_id, *ids, *tokenizer.encode(text)]
  try:
    return ChatFormat(tokenizer).prompt([{"role": "user", "content": text}], vision)
  except BadDocument as error:
    raise UserError(f"The prompt {text!r} cannot be used: {error}.") from error


def make_text(
  checkpoint: inference.Checkpoint, engine: infer.Engine, rows: list[list[int]], prompts: list[str]
) -> None:
  """Continues or answers prompts until a token ends each text."""
  sampling = checkpoint.text_sampling()
  folder = samples(checkpoint)
  capacity = max(map(len, rows)) + sampling.max_tokens
  started = time.perf_counter()
  session = engine.open(rows, capacity)
  if _PROMPTS.value is None:
    (prompt,) = prompts
    shown = "" if _CHAT.value else prompt
    print(shown, end="", flush=True)
    text = shown + inference.stream(checkpoint, session, sampling, started)
    (folder / "text.txt").write_text(text + "\n")
    print(f"text: {folder / 'text.txt'}")
    return
  answers = inference.generate_all(session, sampling, _FLAGS.seed)
  seconds = time.perf_counter() - started
  stop_ids = sampling.grammar.stop_ids
  with (folder / "texts.jsonl").open("w") as file:
    for prompt, row, tokens in zip(prompts, rows, answers):
      kept = [token for token in tokens if token not in stop_ids]
      text = inference.decode_after(checkpoint.tokenizer, row, kept)
      file.write(json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False) + "\n")
  count = sum(map(len, answers))
  print(f"{len(rows):,} texts, {count:,} tokens, {count / seconds:,.1f} tokens/s")
  print(f"texts: {folder / 'texts.jsonl'}")


def vision_choice(is_image: bool) -> infer.Choice:
  """How codes are drawn."""
  top_k = _VISION_TOP_K.value or (_IMAGE_TOP_K if is_image else inference.FILM_TOP_K)
  return infer.Choice(temperature=_VISION_TEMPERATURE.value or 0.0, top_k=top_k)


def frames_to_make() -> int:
  """Frames of each picture or film."""
  return 1 if _MAKE.value == "image" else _FRAMES.value or 1


def guidance_scale() -> float:
  """The scale of classifier-free guidance; 1 is none."""
  default = _IMAGE_GUIDANCE if frames_to_make() == 1 else _FILM_GUIDANCE
  return default if _GUIDANCE.value is None else _GUIDANCE.value


def make_pictures(
  checkpoint: inference.Checkpoint, engine: infer.Engine, codec: Codec, rows: list[list[int]]
) -> None:
  """Generates an image or a film for each prompt, and writes it as a PNG."""
  frames = frames_to_make()
  grammar = checkpoint.pictures(codec, frames, vision_choice(frames == 1))
  films = generate_frames(checkpoint, engine, codec, rows, grammar, guidance_scale())
  for number, codes_NxP in enumerate(films):
    path = samples(checkpoint) / f"{_MAKE.value}_{number}.png"
    save_contact_sheet(path, [codec.decode(codes_NxP)])
    print(f"{_MAKE.value}: {path}")


def make_mixed(
  checkpoint: inference.Checkpoint, engine: infer.Engine, codec: Codec, rows: list[list[int]]
) -> None:
  """Continues each prompt as text in which pictures may come, and writes these as PNG files."""
  choice = vision_choice(is_image=False)
  grammar = checkpoint.pictures(codec, None, choice, are_opened=True, then_text=True)
  layout, folder = codec.config.layout, samples(checkpoint)
  session = engine.open(rows, max(map(len, rows)) + _FLAGS.num_tokens)
  sampling = infer.Sampling(grammar, _FLAGS.num_tokens, block=layout.tokens_per_frame)
  pictures = 0
  for tokens in inference.generate_all(session, sampling, _FLAGS.seed):
    runs = itertools.groupby(tokens, lambda token: token >= checkpoint.text_vocab_size)
    for is_vision, run in runs:
      ids = np.array(list(run))
      whole = len(ids) // layout.tokens_per_frame * layout.tokens_per_frame
      if not is_vision:
        print(checkpoint.tokenizer.decode(ids.tolist()))
      elif whole:
        path = folder / f"mixed_{pictures}.png"
        codes_NxP = infer.sampled_codes(ids[:whole], checkpoint.text_vocab_size, layout)
        save_contact_sheet(path, [codec.decode(codes_NxP)])
        print(f"picture: {path}")
        pictures += 1


def generate_frames(
  checkpoint: inference.Checkpoint,
  engine: infer.Engine,
  codec: Codec,
  rows: list[list[int]],
  grammar: infer.Grammar,
  scale: float,
) -> list[np.ndarray]:
  """The codes [N, P] of the frames that follow each prompt.

  Args:
    checkpoint: of the flags.
    engine: generates.
    codec: the VQGAN.
    rows: prompts that end in <vision>, or after a frame.
    grammar: of pictures.
    scale: of classifier-free guidance; 1 is none.
  """
  assert grammar.pictures is not None and grammar.pictures.frames is not None
  layout = codec.config.layout
  count = grammar.pictures.frames * layout.tokens_per_frame
  guidance = None if scale == 1 else scale
  if guidance is not None:
    # The unconditional prompt, which has no text, as in LWM.
    without = [checkpoint.tokenizer.bos_id, *grammar.pictures.start]
    rows = [row for prompt in rows for row in (prompt, without)]
  session = engine.open(rows, max(map(len, rows)) + count)
  sampling = infer.Sampling(grammar, count, guidance, block=layout.tokens_per_frame)
  return [
    infer.sampled_codes(np.array(tokens), checkpoint.text_vocab_size, layout)
    for tokens in inference.generate_all(session, sampling, _FLAGS.seed)
  ]


def continue_clip(
  checkpoint: inference.Checkpoint, engine: infer.Engine, clip: infer.Clip, codec: Codec
) -> None:
  """Continues a held-out clip, and writes ground truth and prediction as a PNG."""
  path, given = samples(checkpoint) / "video.png", _GIVEN_FRAMES.value or 1
  grammar = checkpoint.pictures(codec, _FRAMES.value or 1, vision_choice(is_image=False))
  rows = [clip.prompt.tolist()]
  (codes_NxP,) = generate_frames(checkpoint, engine, codec, rows, grammar, _FILM_GUIDANCE)
  truth, predicted = codec.decode(clip.codes_NxP), codec.decode(codes_NxP)
  border = [with_border(frame) for frame in truth[:given]]
  save_contact_sheet(path, [[*border, *truth[given:]], [*border, *predicted]])
  print(f"video: {path}")


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
  """The frame with a coloured border, which marks it as given to the model."""
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


def samples(checkpoint: inference.Checkpoint) -> pathlib.Path:
  """The folder for generated files, which is created if needed."""
  folder = checkpoint.workdir / "samples"
  folder.mkdir(exist_ok=True)
  return folder


def main(argv: list[str]) -> None:
  del argv
  check_films([*_IMAGE.value, *_FILM.value])
  checkpoint = inference.Checkpoint(_FLAGS)
  makes_pictures, is_mixed = _MAKE.value in ("image", "film"), _MAKE.value == "mixed"
  prompts = read_prompts() if _PROMPTS.value else [_PROMPT.value or ""]
  clip_codec = None
  if _MAKE.value is None and _PROMPTS.value is None and not (_FILM.value or _IMAGE.value):
    if dataset := video_dataset(checkpoint.stored.experiment):
      codec = checkpoint.codec(dataset)
      clip_codec = held_out_clip(dataset, codec.config.layout), codec
  picture_codec = checkpoint.codec() if makes_pictures or is_mixed else None
  is_continued = _MAKE.value == "film" and bool(_FILM.value)
  vision = checkpoint.films([*_IMAGE.value, *_FILM.value], open_end=is_continued)
  if is_continued and vision is not None:
    rows = [[checkpoint.tokenizer.bos_id, *vision.tolist()]]
  else:
    rows = [prompt_ids(checkpoint, prompt, vision) for prompt in prompts]
    if makes_pictures:
      start, _ = infer.picture_marks(checkpoint.tokenizer)
      rows = [[*row, *start] for row in rows]
  num_rows, new_tokens = len(rows), _FLAGS.num_tokens
  if makes_pictures and picture_codec is not None:
    new_tokens = frames_to_make() * picture_codec.config.layout.tokens_per_frame
    num_rows *= 1 if guidance_scale() == 1 else 2
  checkpoint.check_cache(num_rows, max(map(len, rows)) + new_tokens)
  if clip_codec is not None:
    clip, codec = clip_codec
    new_tokens = frames_to_make() * codec.config.layout.tokens_per_frame
    checkpoint.check_cache(1, len(clip.prompt) + new_tokens)
  engine = checkpoint.engine(checkpoint.load())
  if picture_codec is not None:
    make = make_mixed if is_mixed else make_pictures
    make(checkpoint, engine, picture_codec, rows)
    return
  make_text(checkpoint, engine, rows, prompts)
  if clip_codec is not None:
    continue_clip(checkpoint, engine, *clip_codec)


if __name__ == "__main__":
  experiment_flags.run(main)
