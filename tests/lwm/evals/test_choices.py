"""Questions in LLaVA's response formats: what is read, asked, and counted as right."""

import json

import numpy as np
import pytest

from lwm.errors import UserError
from lwm.evals.choices import chosen_letter, letter_probabilities, read_questions, summary


def read(folder, *records):
  path = folder / "questions.jsonl"
  path.write_text("\n".join(map(json.dumps, records)))
  return read_questions(path)


def test_questions_are_asked_and_scored_in_the_formats_of_llava(tmp_path):
  options = ["a cat", "a dog", "a house"]
  by_letter, by_text, short = read(
    tmp_path,
    {"question": "What is it?", "options": options, "answer": "B", "file": "film.mp4"},
    {"question": "What is it?", "options": options, "answer": "a house"},
    {"question": "What is it?", "answer": ["a cat", "Cat"], "file": ["a.png", "b.png"]},
  )
  assert by_letter.answers == ("B",) and by_text.answers == ("C",)
  assert by_letter.files == (str(tmp_path / "film.mp4"),) and len(short.files) == 2
  assert by_text.frame.after == (
    "What is it?\nA. a cat\nB. a dog\nC. a house\n"
    "Answer with the option's letter from the given choices directly."
  )
  assert short.frame.after == "\nWhat is it?\nAnswer the question using a single word or phrase."
  texts = [
    "C",
    " C.\n",
    "(C)",
    "C\nA",
    "C. a house",
    "The answer is C.",
    "A",
    "Cats",
    "a house",
    "D",
    "",
  ]
  assert [by_text.score(text) for text in texts] == [1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0]
  assert [short.score(text) for text in ("cat.", " A cat", "a cat runs")] == [1, 1, 0]
  assert chosen_letter("D", 3) is None and chosen_letter("D", 4) == "D"


@pytest.mark.parametrize(
  "record, message",
  [
    ({"question": "What?"}, "no fields question and answer"),
    ({"question": "What?", "options": ["a"], "answer": "A"}, "1 options, not 2 to 26"),
    ({"question": "What?", "options": ["a", "b"], "answer": "C"}, "not one of the letters"),
    ({"question": "What?", "options": ["B", "a"], "answer": "B"}, "not one of the letters"),
    ({"question": 5, "answer": "a"}, "the question is int, not text"),
  ],
)
def test_what_is_not_a_question_is_one_sentence(tmp_path, record, message):
  with pytest.raises(UserError, match=f"questions.jsonl, line 1, is not a question: .*{message}"):
    read(tmp_path, record)


def test_probabilities_of_letters_add_up_over_their_forms():
  logits_V = np.log([0.1, 0.2, 0.3, 0.15, 0.25])
  assert letter_probabilities(logits_V, [[0, 2], [1]]) == pytest.approx([2 / 3, 1 / 3])


def test_kinds_of_questions_are_summed_up_apart():
  lettered = {"options": ["a", "b"], "score": 1.0, "likeliest_score": 0.0}
  exact, short = summary([lettered, lettered | {"score": 0.0}, {"options": [], "score": 1.0}])
  assert exact[1:] == (2, 0.5, 0.0, 0.5) and short[1:] == (1, 1.0, None, None)
