"""Shows what a packed row of a dataset holds: documents, masks, weights, text, and frames.

    python -m experiments.show_data --dataset=data/laptop/video --row=0 --output=shown \\
        --tokenizer=data/laptop/tokenizer.model --vqgan=data/laptop/vqgan.npz

Prints one line for each stretch of tokens with the same modality and weight, and writes the frames
(OUTPUT/DOCUMENT-FRAME.png, as the VQGAN decodes them), films (OUTPUT/DOCUMENT-FIRST_FRAME.mp4) and
everything on one page (OUTPUT/index.html).
"""

import html
import pathlib

import numpy as np
from absl import flags
from PIL import Image

from experiments import flags as experiment_flags
from experiments.runtime import use_compilation_cache
from lwm.config.experiment import DatasetConfig
from lwm.data.dataset import TRAIN, Dataset
from lwm.data.row_contents import Segment, Slice, row_slices, whole_frames
from lwm.data.rows import Rows
from lwm.data.tokenizer import Tokenizer, load_tokenizer
from lwm.errors import UserError
from lwm.vision.codec import Codec
from lwm.vision.pictures import save_clip

_DATASET = flags.DEFINE_string("dataset", None, "Directory of a prepared dataset.", required=True)
_ROW = flags.DEFINE_integer("row", 0, "Index of the row.", lower_bound=0)
_OUTPUT = flags.DEFINE_string("output", None, "Directory to make.", required=True)
_TOKENIZER = flags.DEFINE_string(
  "tokenizer", None, "The dataset's tokenizer. Default: where it was when the dataset was made."
)
_VQGAN = flags.DEFINE_string(
  "vqgan", None, "The dataset's VQGAN. Default: vqgan.npz beside the tokenizer."
)
_SPLIT = flags.DEFINE_string("split", TRAIN, "The split to take the row from.")
_SEQUENCE_LENGTH = flags.DEFINE_integer("sequence_length", 4096, "Tokens per row.", lower_bound=1)
_WEIGHTING = flags.DEFINE_enum(
  "weighting", "token", ["token", "example"], "As in `DatasetConfig` of lwm/config/experiment.py."
)
_LONG_DOCUMENTS = flags.DEFINE_enum(
  "long_documents", "cut", ["cut", "leave_out", "keep_end"], "As in `DatasetConfig`."
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the packing.")

_MOST_CHARACTERS = 300
# LWM's rate, for datasets that do not record theirs.
_FRAMES_PER_SECOND = 4.0
_PAGE = """<!doctype html>
<meta charset="utf-8">
<title>{title}</title>
<style>
  body {{ font-family: sans-serif; max-width: 80em; margin: 2em auto; }}
  pre {{ white-space: pre-wrap; display: inline; }}
  .target {{ background: #cfe8ff; }}
  img, video {{ image-rendering: pixelated; width: 128px; margin: 2px; }}
</style>
<h1>{title}</h1>
<p>Tokens on a blue background count in the loss; a tooltip gives column and weight.</p>
{body}
"""


def _codec(dataset: Dataset, tokenizer: Tokenizer) -> Codec:
  path = pathlib.Path(_VQGAN.value or tokenizer.path.with_name("vqgan.npz"))
  codec = Codec(path)
  if dataset.manifest["vqgan_sha256"] not in (None, codec.sha256):
    raise UserError(
      f"{dataset.path} was not made with the VQGAN {path}: name the right file with --vqgan."
    )
  return codec


class _Page:
  """Prints segments, and collects them as HTML."""

  def __init__(self, dataset: Dataset, tokenizer: Tokenizer, output: pathlib.Path):
    self._text_vocab_size = dataset.text_vocab_size
    self._layout = dataset.vision_layout
    self._tokenizer = tokenizer
    self._codec = _codec(dataset, tokenizer) if dataset.has_vision else None
    self._output = output
    settings = dataset.manifest.get("settings", {})
    self._frames_per_second = settings.get("frames_per_second", _FRAMES_PER_SECOND)
    self._html: list[str] = []
    self._frames = 0

  def slice(self, part: Slice) -> None:
    """Shows a document, or the part of it that is in the row."""
    end = part.offset + part.length
    line = f"document {part.document}: tokens {part.offset} to {end} of {part.document_length}"
    print(line)
    self._html.append(f"<h2>{line}</h2>")
    self._frames = 0
    for segment in part.segments:
      if segment.is_vision:
        self._show_frames(part.document, segment)
      else:
        self._show_text(segment)

  def _show_text(self, segment: Segment) -> None:
    text = self._tokenizer.decode(segment.tokens.tolist())
    short = text if len(text) <= _MOST_CHARACTERS else text[:_MOST_CHARACTERS] + "..."
    print(f"  {_place(segment)}, text: {short!r}")
    self._add(segment, f"<pre>{html.escape(text)}</pre>")

  def _show_frames(self, document: int, segment: Segment) -> None:
    assert self._codec and self._layout
    codes_NxP = whole_frames(segment.tokens, self._text_vocab_size, self._layout)
    print(f"  {_place(segment)}, vision: {len(codes_NxP)} whole frames")
    images = []
    if len(codes_NxP):
      frames_NxHxWx3 = self._codec.decode(codes_NxP)
      if len(codes_NxP) > 1:
        name = f"{document}-{self._frames}.mp4"
        save_clip(self._output / name, frames_NxHxWx3, self._frames_per_second)
        images.append(f'<video controls loop src="{name}"></video>')
      for frame_HxWx3 in frames_NxHxWx3:
        name = f"{document}-{self._frames}.png"
        Image.fromarray(frame_HxWx3).save(self._output / name)
        images.append(f'<img loading="lazy" src="{name}">')
        self._frames += 1
    self._add(segment, f"<div>{''.join(images)}</div>")

  def _add(self, segment: Segment, content: str) -> None:
    kind = "target" if segment.weight else "context"
    self._html.append(f'<span class="{kind}" title="{_place(segment)}">{content}</span>')

  def save(self, title: str) -> None:
    page = _PAGE.format(title=html.escape(title), body="\n".join(self._html))
    (self._output / "index.html").write_text(page)


def _place(segment: Segment) -> str:
  last = segment.column + len(segment.tokens)
  return f"columns {segment.column} to {last}, weight {segment.weight:.4g}"


def main(argv: list[str]) -> None:
  del argv
  use_compilation_cache()
  dataset = Dataset(_DATASET.value)
  tokenizer = load_tokenizer(_TOKENIZER.value or dataset.manifest["tokenizer"]["path"])
  dataset.check_tokenizer(tokenizer)
  config = DatasetConfig(weighting=_WEIGHTING.value, long_documents=_LONG_DOCUMENTS.value)
  length = _SEQUENCE_LENGTH.value
  rows = Rows(dataset.split(_SPLIT.value), dataset.text_vocab_size, length, config, _SEED.value)
  if _ROW.value >= len(rows):
    raise UserError(f"--row={_ROW.value}: there are {len(rows)} rows, counted from 0.")
  output = pathlib.Path(_OUTPUT.value)
  if output.exists():
    raise UserError(f"{output} exists already: delete it, or name another --output.")
  slices, fields = row_slices(rows, _ROW.value, length, dataset.text_vocab_size)
  output.mkdir(parents=True)
  title = f"{dataset.path}, {_SPLIT.value}, row {_ROW.value} of {len(rows)}"
  weights = fields["loss_weights"]
  padding = int((fields["key_stop"] == 0).sum())
  summary = (
    f"{len(slices)} documents, {length - padding} tokens, {padding} padding, "
    f"{np.count_nonzero(weights)} targets, sum of weights {weights.sum():.6g}"
  )
  print(f"{title}: {summary}")
  page = _Page(dataset, tokenizer, output)
  for part in slices:
    page.slice(part)
  page.save(f"{title}: {summary}")
  print(f"page: {output / 'index.html'}")


if __name__ == "__main__":
  experiment_flags.run(main)
