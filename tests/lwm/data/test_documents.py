import numpy as np
import pytest

from lwm.data import BadDocument, frame_tokens, text_document, video_document
from lwm.data.documents import choose, record_document

CODES = list(range(512))


def _joined(*parts):
  """Ids and mask of (ids, loss) parts."""
  ids = np.concatenate([np.asarray(ids) for ids, _ in parts])
  mask = np.concatenate([np.full(len(ids), loss) for ids, loss in parts])
  return ids, mask


def _check(document, *parts):
  ids, mask = _joined(*parts)
  assert document.tokens.dtype == np.int32 and document.loss_mask.dtype == bool
  np.testing.assert_array_equal(document.tokens, ids)
  np.testing.assert_array_equal(document.loss_mask, mask)


def test_text(tokenizer):
  _check(
    text_document(tokenizer, "a fox"), ([1], False), (tokenizer.encode("a fox"), True), ([2], True)
  )


def test_fields_as_in_lwm(tokenizer):
  record = {"question": "the fox", "context": "a barn", "answer": "42"}
  _check(
    record_document(tokenizer, record, "[question+context],answer,<|eos|>,[<|bos|>],answer"),
    ([1], False),
    (tokenizer.encode("the fox a barn"), False),
    (tokenizer.encode("42"), True),
    ([2], True),
    ([1], False),
    (tokenizer.encode("42"), True),
    ([2], True),
  )


@pytest.mark.parametrize("codes", [CODES, np.reshape(CODES, (2, 256)).tolist()])
def test_vision_fields(tokenizer, codes):
  vision = tokenizer.vocab_size + frame_tokens(np.reshape(CODES, (2, 256)))
  start, end = [tokenizer.marks["<vision>"]], [tokenizer.marks["</vision>"]]
  record = {"instruction": "watch", "vision": codes, "output": "a dog"}
  _check(
    record_document(tokenizer, record, "[instruction+vision],output"),
    ([1], False),
    (tokenizer.encode("watch"), False),
    (start, False),
    (vision, False),
    (end, False),
    (tokenizer.encode("a dog"), True),
    ([2], True),
  )
  _check(
    record_document(tokenizer, record, "[output],vision"),
    ([1], False),
    (tokenizer.encode("a dog"), False),
    (start, True),
    (vision, True),
    (end, True),
    ([2], True),
  )
  _check(
    video_document(tokenizer, np.reshape(CODES, (2, 256)), "watch"),
    ([1], False),
    (tokenizer.encode("watch"), False),
    (start, False),
    (vision, True),
    (end, False),
    ([2], False),
  )


@pytest.mark.parametrize(
  "record, fields, reason",
  [
    ({"a": "x"}, "a,b", "no field 'b'"),
    ({"a": 3}, "a", "'a' is int, not text"),
    ({"a": ""}, "a", "empty"),
    ({"a": " \n"}, "[a],<|eos|>", "empty"),
    ({"a": "\ud800"}, "a", "not text that can be encoded"),
    ({"a": "x"}, "a+vision", "no field 'vision'"),
    ({"vision": []}, "vision", "not a list of vision codes"),
    ({"vision": "x"}, "vision", "not a list of vision codes"),
    ({"vision": [0.5] * 256}, "vision", "not a list of vision codes"),
    ({"vision": [2**70] * 256}, "vision", "not a list of vision codes"),
    ({"vision": [[1], [1, 2]]}, "vision", "ragged"),
    ({"vision": [1] * 255}, "vision", "frames of 256"),
    ({"vision": [8192] * 256}, "vision", "code 8192 is not in"),
  ],
)
def test_bad_records(tokenizer, record, fields, reason):
  with pytest.raises(BadDocument, match=reason):
    record_document(tokenizer, record, fields)


def test_alternatives_are_chosen_evenly_and_the_same_each_time():
  chosen = [choose("ab", 0, f"file:{line}") for line in range(1000)]
  assert chosen == [choose("ab", 0, f"file:{line}") for line in range(1000)]
  assert 400 < chosen.count("a") < 600
  assert chosen != [choose("ab", 1, f"file:{line}") for line in range(1000)]
