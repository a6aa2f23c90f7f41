"""Makes the data of configs/retrieval.py: texts that hide a needle, a question and its answer.

    python -m experiments.retrieval_data --output=data/retrieval

    tokenizer.model   1024 pieces
    haystack.txt      random sentences, for `experiments.evaluate --haystack`
    needles_64/ ...   a dataset for each context; documents fill it, and only answers have a loss

Needles and questions are those of `experiments.evaluate needle`.
"""

import pathlib
import random

import numpy as np
from absl import flags

from configs.retrieval import STAGES
from experiments import flags as experiment_flags
from lwm.data import DatasetWriter, load_tokenizer, train_sentencepiece
from lwm.data.dataset import TRAIN, VALIDATION
from lwm.data.documents import Document
from lwm.evals import words
from lwm.evals.needles import Sources, needle_conversation, needle_frame, needle_text
from lwm.evals.prompts import PromptWriter

_OUTPUT = flags.DEFINE_string("output", "data/retrieval", "Directory to write everything to.")
_CONTEXTS = flags.DEFINE_list(
  "contexts", [str(context) for context, *_ in STAGES], "Tokens of the documents."
)
_TOKENS = flags.DEFINE_integer("tokens", 3_000_000, "Tokens per context.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "The same seed gives the same data.")

_VOCAB_SIZE = 1024
_HAYSTACK_TOKENS = 200_000
_VALIDATION_DOCUMENTS = 64
_VERBS = ("sees", "finds", "likes", "hears", "keeps", "follows", "paints", "moves", "holds")


def sentence(source: random.Random) -> str:
  """A sentence without numbers or cities."""
  first, second = (
    f"{source.choice(words.ADJECTIVES)} {source.choice(words.NOUNS)}" for _ in range(2)
  )
  return f"The {first} {source.choice(_VERBS)} the {second}. "


def main(argv: list[str]) -> None:
  del argv
  output, source = pathlib.Path(_OUTPUT.value or ""), random.Random(_SEED.value)
  output.mkdir(parents=True, exist_ok=True)
  # A sentence has about nine tokens, so this makes a few more tokens than are needed.
  text = "".join(sentence(source) for _ in range(_HAYSTACK_TOKENS // 8))
  (output / "haystack.txt").write_text(text, "utf-8")
  path = output / "tokenizer.model"
  forms = [
    form
    for city in words.CITIES
    for form in (needle_text(city, words.number(source)), needle_frame(city).after)
  ]
  if not path.exists():
    train_sentencepiece([text[: 1 << 18], *forms * 64], path, _VOCAB_SIZE)
  tokenizer = load_tokenizer(path)
  # New sentences: those in haystack.txt are for the evaluation alone.
  haystack = tokenizer.encode("".join(sentence(source) for _ in range(_HAYSTACK_TOKENS // 8)))
  writer = PromptWriter(tokenizer, chat=False)
  for context in map(int, _CONTEXTS.value or []):
    folder = output / f"needles_{context}"
    if folder.exists():
      print(f"{folder} exists")
      continue
    with DatasetWriter(folder, tokenizer) as dataset:
      for number in range(_VALIDATION_DOCUMENTS + (_TOKENS.value or 1) // context):
        start = source.randrange(len(haystack) - context)
        sources = Sources(writer, haystack[start : start + context])
        ids, is_answer = needle_conversation(sources, source, context)
        document = Document(np.array(ids, np.int32), np.array(is_answer))
        dataset.write(VALIDATION if number < _VALIDATION_DOCUMENTS else TRAIN, document)
    print(f"{folder}: documents of {context:,} tokens", flush=True)


if __name__ == "__main__":
  experiment_flags.run(main)
