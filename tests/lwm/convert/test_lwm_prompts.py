"""LWM's released weights saw one <s> in a text, at its beginning; see docs/lwm_weights.md."""

import json

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from lwm.data import load_tokenizer
from lwm.data.chat import ChatFormat
from lwm.data.documents import record_document, text_document, video_document
from lwm.data.tokenizer import Tokenizer

CODES = np.zeros((1, 256), np.int32)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
  """A tokenizer that puts <s> before every text, as LWM-Text-1M's does in LWM's present code."""
  bpe = tokenizers.Tokenizer(models.BPE())
  bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  bpe.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
  )
  bpe.train_from_iterator(["a fox"], trainer)
  bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
  path = tmp_path_factory.mktemp("lwm") / "tokenizer.json"
  bpe.save(str(path))
  settings = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
  path.with_name("tokenizer_config.json").write_text(json.dumps(settings))
  return path


def only_first(ids, tokenizer: Tokenizer) -> bool:
  return np.flatnonzero(np.asarray(ids) == tokenizer.bos_id).tolist() == [0]


def test_the_trap(path):
  """What LWM's present code does: each piece of a prompt is encoded apart."""
  lwm = tokenizers.Tokenizer.from_file(str(path))
  ids = [index for piece in ("a fox", "<vision>", " ASSISTANT:") for index in lwm.encode(piece).ids]
  assert ids.count(lwm.token_to_id("<s>")) == 3


def test_documents_and_prompts_have_one(path):
  tokenizer = load_tokenizer(path)
  record = {"question": "a fox", "tail": " ASSISTANT:", "vision": CODES.tolist(), "answer": "yes"}
  for document in (
    text_document(tokenizer, "a fox"),
    video_document(tokenizer, CODES, "a fox"),
    record_document(tokenizer, record, "[question],[vision],[tail],answer"),
    record_document(tokenizer, record, "[question+vision+tail],answer"),
    ChatFormat(tokenizer).document(
      [{"role": "user", "content": "a fox"}, {"role": "assistant", "content": "yes"}]
    ),
  ):
    assert only_first(document.tokens, tokenizer)
  assert only_first(ChatFormat(tokenizer).prompt([{"role": "user", "content": "a"}]), tokenizer)
