"""The documents, texts and frames of a packed row."""

import numpy as np
import pytest

from lwm.config.experiment import DatasetConfig
from lwm.config.vqgan import VisionLayout
from lwm.data import Dataset, DatasetWriter, DocumentBuilder, frame_tokens
from lwm.data.row_contents import row_slices, whole_frames
from lwm.data.rows import Rows

LAYOUT = VisionLayout(codes_per_frame=4, end_of_frame=8192)


@pytest.fixture(scope="module")
def split(tokenizer, tmp_path_factory):
  path = tmp_path_factory.mktemp("rows") / "dataset"
  with DatasetWriter(path, tokenizer, layout=LAYOUT) as writer:
    for clip in range(3):
      builder = DocumentBuilder(tokenizer, LAYOUT).bos().text("a fox", loss=False)
      builder.vision(np.arange(20).reshape(5, 4) + 100 * clip, marks_loss=False)
      writer.write("train", builder.text("it jumps").eos().build())
  return Dataset(path).split("train")


def test_segments_are_the_row_and_its_weights(split, tokenizer):
  length = int(split.lengths.sum()) + 3
  rows = Rows(split, tokenizer.vocab_size, length, DatasetConfig(), 0)
  slices, fields = row_slices(rows, 0, length, tokenizer.vocab_size)
  assert sorted(part.document for part in slices) == [0, 1, 2]
  column = 0
  for part in slices:
    assert (part.offset, part.length) == (0, part.document_length)
    context, film, mark, text = part.segments
    assert tokenizer.decode(context.tokens.tolist()).startswith("a fox")
    assert [segment.is_vision for segment in part.segments] == [False, True, False, False]
    assert [segment.weight for segment in part.segments] == [0, 1, 0, 1]
    assert "it jumps" in tokenizer.decode(text.tokens.tolist())
    frames = whole_frames(film.tokens, tokenizer.vocab_size, LAYOUT)
    np.testing.assert_array_equal(frames, np.arange(20).reshape(5, 4) + 100 * part.document)
    for segment in part.segments:
      assert segment.column == column
      column += len(segment.tokens)
  targets = sum(
    len(segment.tokens) * segment.weight for part in slices for segment in part.segments
  )
  assert targets == fields["loss_weights"].sum()
  assert column == length - 3


def test_frames_that_a_row_cuts_are_left_out(split, tokenizer):
  codes = np.arange(40).reshape(10, 4)
  tokens = tokenizer.vocab_size + frame_tokens(codes, LAYOUT)
  for start, stop, first, last in ((0, 50, 0, 10), (1, 49, 1, 9), (5, 14, 1, 2), (6, 9, 2, 2)):
    frames = whole_frames(tokens[start:stop], tokenizer.vocab_size, LAYOUT)
    np.testing.assert_array_equal(frames, codes[first:last])
