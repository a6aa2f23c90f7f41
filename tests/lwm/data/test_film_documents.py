"""Films with captions, dialogues and texts between them, as documents and as rows."""

import functools

import numpy as np
import pytest

from lwm.config.batch import FIELDS
from lwm.config.experiment import DatasetConfig
from lwm.config.vqgan import LWM_LAYOUT
from lwm.data import Dataset, frame_codes
from lwm.data.dataset import TRAIN
from lwm.data.documents import Document
from lwm.data.film_documents import FilmCodes, FilmDocuments, RowSettings
from lwm.data.films import Film
from lwm.data.parts import Vocabulary
from lwm.data.rows import Rows
from lwm.data.vision_tokens import VISION_END, VISION_START
from lwm.data.writer import DatasetParts
from lwm.vision.decoder_process import Clip

RNG = np.random.default_rng(0)


@functools.cache
def documents_of(tokenizer, settings: RowSettings) -> FilmDocuments:
  return FilmDocuments(tokenizer, LWM_LAYOUT, settings)


def make(tokenizer, film: Film, settings=RowSettings(), frames=(3,), block=2) -> Document:
  """The document of a film whose codes count up from zero, in blocks."""
  documents = documents_of(tokenizer, settings)
  clips = []
  for number, count in enumerate(frames):
    codes = codes_of(number, count)
    clips.append(FilmCodes(count, [codes[i : i + block] for i in range(0, count, block)]))
  pieces = list(documents.pieces(documents.template(film), clips))
  return Document(*(np.concatenate(arrays) for arrays in zip(*pieces)))


def codes_of(clip: int, count: int) -> np.ndarray:
  return (np.arange(count)[:, None] + 100 * clip + np.zeros(256)).astype(np.int32)


def as_text(tokenizer, document: Document) -> str:
  """The document, with its frames as the codes that they begin with, and [ ] around targets."""
  out, start = "", 0
  tokens, loss_mask = document
  while start < len(tokens):
    is_vision = tokens[start] >= tokenizer.vocab_size
    same = ((tokens >= tokenizer.vocab_size) == is_vision) & (loss_mask == loss_mask[start])
    stop = start + (np.flatnonzero(~same[start:]).tolist() or [len(tokens) - start])[0]
    if is_vision:
      codes = frame_codes(tokens[start:stop] - tokenizer.vocab_size, LWM_LAYOUT)
      assert (codes == codes[:, :1]).all()
      text = " ".join(map(str, codes[:, 0]))
    else:
      names = {tokenizer.bos_id: "<s>", tokenizer.eos_id: "</s>"}
      ids = [i for i in tokens[start:stop].tolist() if i not in names]
      first, last = names.get(tokens[start], ""), names.get(tokens[stop - 1], "")
      text = first + tokenizer.decode(ids) + (last if last == "</s>" else "")
    out += f"[{text}]" if loss_mask[start] else text
    start = stop
  return out


def test_orders_of_a_pair(tokenizer):
  film = Film("a.mp4", "a.mp4", "a.mp4", captions=("a fox",))
  last, dropped = RowSettings(caption_last=1), RowSettings(caption_dropout=1)
  marked = f"{VISION_START}[0 1 2]{VISION_END}"
  assert as_text(tokenizer, make(tokenizer, film)) == f"<s>a fox{marked}</s>"
  expected = f"<s>{VISION_START}0 1 2{VISION_END}[a fox</s>]"
  assert as_text(tokenizer, make(tokenizer, film, last)) == expected
  # The prompt without a caption is LWM's: <s><vision>.
  assert as_text(tokenizer, make(tokenizer, film, dropped)) == f"<s>{marked}</s>"


def test_draws_depend_on_the_film_and_the_seed_alone(tokenizer):
  films = [Film(f"{i}.mp4", "", "", captions=("a fox", "an owl")) for i in range(400)]

  def draws(order, seed: int) -> list[str]:
    settings = RowSettings(seed, caption_last=0.5, caption_dropout=0.2)
    found = {film: as_text(tokenizer, make(tokenizer, film, settings, (1,))) for film in order}
    return [found[film] for film in films]

  first = draws(films, 0)
  assert draws(films[::-1], 0) == first != draws(films, 1)
  counts = {text: first.count(text) for text in first}
  without = f"<s>{VISION_START}[0]{VISION_END}</s>"
  assert 20 <= counts.pop(without) <= 60
  # Both captions in both orders.
  assert len(counts) == 4 and min(counts.values()) >= 50
  captions_last = sum(n for text, n in counts.items() if text.startswith(f"<s>{VISION_START}"))
  assert 160 <= captions_last <= 240


def test_interleaved_documents(tokenizer):
  content = ("a fox", Clip("1.mp4"), "an owl", Clip("2.jpg"), Clip("3.mp4"))
  film = Film("1.mp4", "", "", content=content)
  # All of it counts.
  assert as_text(tokenizer, make(tokenizer, film, frames=(2, 1, 3))) == (
    f"<s>[a fox{VISION_START}][0 1][{VISION_END}an owl{VISION_START}][100]"
    f"[{VISION_END}{VISION_START}][200 201 202][{VISION_END}</s>]"
  )


def test_dialogues_over_a_film_and_films_as_answers(tokenizer):
  def dialogue(*messages):
    turns = [{"role": role, "content": content} for role, content in messages]
    return as_text(tokenizer, make(tokenizer, Film("1.mp4", "", "", turns=turns)))

  understood = dialogue(("user", "a fox"), ("assistant", "the owl"), ("user", "a dog"))
  assert f"{VISION_START}0 1 2{VISION_END}" in understood and "owl</s>]" in understood
  drawn = dialogue(("user", "a fox"), ("assistant", VISION_START))
  assert "[0 1 2]" in drawn


@pytest.mark.parametrize("block", [1, 3, 100])
def test_frames_are_spread_evenly_to_a_maximum(tokenizer, block):
  film = Film("1.mp4", "", "")
  for max_frames, count in ((4, 100), (1, 5), (7, 8), (8, 8), (100, 3)):
    settings = RowSettings(max_frames=max_frames)
    text = as_text(tokenizer, make(tokenizer, film, settings, (count,), block))
    # As in LWM's `_read_process_vision` (lwm/vision_chat.py).
    kept = range(count)
    if count > max_frames:
      kept = np.linspace(0, count - 1, max_frames, dtype=int)
    assert f"[{' '.join(map(str, kept))}]" in text


def test_a_film_of_4000_frames_alone_in_a_row_of_a_million(tokenizer, tmp_path):
  codes = RNG.integers(0, 8192, (4000, 256), np.int32)
  film = Film("1.mp4", "", "", captions=("a fox",))
  documents = FilmDocuments(tokenizer, LWM_LAYOUT, RowSettings())
  parts = DatasetParts(tmp_path / "films", Vocabulary(tokenizer), {"seed": 0})
  with parts.part(0) as writer:
    blocks = (codes[i : i + 32] for i in range(0, 4000, 32))
    template = documents.template(film)
    writer.write_pieces(TRAIN, documents.pieces(template, [FilmCodes(4000, blocks)]))
    short = documents.pieces(template, [FilmCodes(1, [codes[:1]])])
    writer.write_pieces(TRAIN, short)
  parts.join(1)

  dataset = Dataset(tmp_path / "films")
  assert dataset.manifest["settings"] == {"seed": 0}
  length = 1_028_096  # A multiple of 4096 with room for 4000 x 257 tokens and little more.
  split = dataset.split(TRAIN)
  rows = Rows(split, dataset.text_vocab_size, length, DatasetConfig(), seed=0)
  assert len(rows) == 2
  [row] = [i for i in range(2) if 0 in rows.plan.row(i)[0]]
  assert rows.plan.row(row)[0].tolist() == [0]
  fields = {name: np.zeros(length, dtype) for name, dtype in FIELDS.items()}
  rows.read(row, [(0, length)], fields)
  is_vision = fields["tokens"] >= dataset.text_vocab_size
  found = frame_codes(fields["tokens"][is_vision] - dataset.text_vocab_size, LWM_LAYOUT)
  np.testing.assert_array_equal(found, codes)
  assert fields["loss_weights"].sum() == 4000 * 257 == (fields["modality"] == 1).sum()
  inside = fields["key_stop"] > 0
  assert (fields["key_start"][inside] == 0).all()
  assert fields["positions"].max() == inside.sum() - 1 == split.lengths[0] - 1
