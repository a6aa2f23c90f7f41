"""Prompts of exact lengths, needles where they should be, and scores."""

import json
import random
import re

import pytest

from lwm import data
from lwm.errors import UserError
from lwm.evals import words
from lwm.evals.answers import AnswerFile
from lwm.evals.evaluations import EVALUATIONS, FILMS, RULER
from lwm.evals.needles import Sources, needle_conversation, needle_frame, needle_text
from lwm.evals.prompts import Haystack, PromptWriter
from lwm.evals.questions import Case, Question, cases, parse_range
from lwm.evals.report import by_context, context_name, heat_map
from lwm.evals.ruler import effective_length

SENTENCE = "The cat sees a red house, and the old dog runs after the small bird in the garden. "


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  path = tmp_path_factory.mktemp("questions") / "tokenizer.model"
  listed = [SENTENCE, *words.CITIES, *words.NOUNS, *words.ADJECTIVES, "0123456789abcdef"]
  data.train_sentencepiece(listed * 3, path, 900)
  return data.load_tokenizer(path)


def test_there_are_words_for_a_million_tokens():
  found = words.sample_words(random.Random(0), 200_000)
  assert len(set(found)) == 200_000


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "chat"])
def sources(request, tokenizer):
  haystack = tokenizer.encode(SENTENCE * 250)
  return Sources(PromptWriter(tokenizer, chat=request.param), haystack, hidden=4, asked=2)


def made(name, sources, case, seed=0):
  evaluation = EVALUATIONS[name]
  size = case.context - evaluation.answer_tokens
  question = evaluation.make(sources, case.random(seed, name), case, size)
  assert len(question.prompt) == size
  return question, sources.writer.tokenizer.decode(question.prompt)


@pytest.mark.parametrize("name", [name for name in EVALUATIONS if name not in FILMS])
def test_prompts_have_the_exact_length_and_hide_the_answers(sources, name):
  place = {"depth": 50, "number": 2, "": None}[EVALUATIONS[name].varies]
  case = Case(8192 if name == "common_words" else 4096, place, 0)
  question, text = made(name, sources, case)
  again, _ = made(name, sources, case)
  other, _ = made(name, sources, case, seed=1)
  assert question == again and question.prompt != other.prompt
  assert all(answer in text for answer in (*question.answers, *question.decoys))
  assert question.score(" and ".join(question.answers)) == 1
  assert question.score("nothing") == 0


@pytest.mark.parametrize("depth", (0, 30, 100))
def test_a_needle_stands_after_the_sentence_at_its_depth(sources, depth):
  question, text = made("needle", sources, Case(1024, depth, 0))
  (number,) = question.answers
  context = text[text.index("The cat") if depth else text.index("\nThe special magic") :]
  context = context[: context.rindex("What is the special magic")]
  before, after = context.split(number)
  hidden = f"\nThe special magic {question.facts['city']} number is: "
  assert before.endswith(hidden)
  before = before.removesuffix(hidden)
  # At most one sentence before the depth.
  length = len(before) + len(after)
  assert depth / 100 * length - len(SENTENCE) - 40 <= len(before) <= depth / 100 * length + 1
  assert not before or depth == 100 or before.endswith(".")


def test_documents_to_learn_from_are_prompts_with_their_answers(tokenizer):
  writer = PromptWriter(tokenizer, chat=False)
  sources = Sources(writer, tokenizer.encode(SENTENCE * 100))
  depths = set()
  for seed in range(100):
    ids, is_answer = needle_conversation(sources, random.Random(seed), 1200)
    assert len(ids) == len(is_answer) == 1200
    start = is_answer.index(True)
    assert all(is_answer[start:])
    text = tokenizer.decode(ids[:start])
    ((city, number),) = re.findall(r"\nThe special magic (.+) number is: (\d+)\n", text)
    question = writer.encode(needle_frame(city).after)
    assert ids[start - len(question) : start] == question
    assert ids[start:] == [*writer.encode(f" {number}"), tokenizer.eos_id]
    before, after = text.removesuffix(needle_frame(city).after).split(needle_text(city, number))
    depths.add(round(10 * len(before) / len(before + after)))
  assert depths == set(range(11))


def test_needles_and_their_numbers_come_in_order(sources):
  question, text = made("nth_needle", sources, Case(1024, 3, 0))
  numbers = re.findall(r"number is: (\d{7})", text)
  assert len(numbers) == 4 and question.answers == [numbers[2]]
  assert question.score(f"It is {numbers[2]}, not {numbers[0]}.") == 1
  assert question.score(f"{numbers[0]}, {numbers[2]}") == 0
  question, text = made("several_needles", sources, Case(1024, None, 0))
  hidden = dict(re.findall(r"\nThe special magic (.+) number is: (\d{7})\n", text))
  assert hidden == question.facts["hidden"]
  assert question.answers == [hidden[city] for city in question.facts["cities"]]
  assert question.score(question.answers[0]) == 0.5


def test_a_latent_needle_shares_no_word_with_its_question(sources):
  question, text = made("latent_needle", sources, Case(1024, 50, 0))
  landmark = question.facts["landmark"]
  needle = f"Actually, {question.answers[0]} lives next to {landmark}."
  assert needle in text
  asked = re.search(r"been to (.+)\? Answer", text)[1]
  assert (landmark, asked) in words.LANDMARKS
  assert not set(re.findall(r"\w+", needle.lower())) & set(re.findall(r"\w+", asked.lower())) - {
    "the",
    "of",
  }


def test_the_pairs_of_a_key_and_its_value(sources):
  question, text = made("key_value", sources, Case(4096, 100, 0))
  pairs = re.findall(r'"([0-9a-f-]{36})": "([0-9a-f-]{36})",', text)
  assert len(pairs) == question.facts["pairs"] == len(dict(pairs))
  assert pairs[-1] == (question.facts["key"], question.answers[0])
  assert f'Key: "{pairs[-1][0]}"' in text


def test_ruler_hides_what_it_defines(sources):
  counts = {
    "niah_single_1": (1, 1), "niah_single_2": (1, 1), "niah_single_3": (1, 1),
    "niah_multikey_1": (4, 1), "niah_multivalue": (4, 4), "niah_multiquery": (4, 4),
  }  # fmt: skip
  for name, (hidden, asked) in counts.items():
    question, text = made(name, sources, Case(2048, None, 0))
    needles = re.findall(r"One of the special magic (?:\w+) for (\S+) is: (\S+)\.", text)
    assert (len(needles), len(question.answers)) == (hidden, asked), name
    asked_for = [value for key, value in needles if key in question.facts["keys"]]
    assert sorted(asked_for) == sorted(question.answers)
    assert ("What are all the" in text) == (asked > 1)
  for name in ("niah_multikey_2", "niah_multikey_3"):
    question, text = made(name, sources, Case(2048, None, 0))
    needles = re.findall(r"One of the special magic (?:\w+) for (\S+) is: (\S+)\.\n", text)
    assert len(needles) > 10 and dict(needles)[question.facts["keys"][0]] == question.answers[0]

  question, text = made("variable_tracking", sources, Case(2048, None, 0))
  task = text[text.rindex("Memorize and track") :]
  value = question.facts["value"]
  assigned = dict(re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", task))
  chain = [value]
  while following := [name for name, source in assigned.items() if source == chain[-1]]:
    chain += following
  assert chain[1:] == question.answers and len(question.answers) == 5

  for context, repeats in ((3072, (6, 1)), (8192, (30, 3))):
    question, text = made("common_words", sources, Case(context, None, 0))
    task = text[text.rindex("Memorize the ones") :]
    listed = [word for _, word in re.findall(r"(\d+)\. ([a-z-]+)", task)]
    counts = {word: listed.count(word) for word in listed}
    assert sorted(set(counts.values())) == sorted(set(repeats))
    assert {word for word, count in counts.items() if count == repeats[0]} == set(question.answers)
    assert len(question.answers) == 10

  question, text = made("frequent_words", sources, Case(2048, None, 0))
  coded = re.findall(r"\b[a-z]{6}\b", text[text.index("words. ") : text.index("Question")])
  counts = {word: coded.count(word) for word in coded}
  assert sorted(counts, key=counts.get, reverse=True)[:3] == list(question.answers)


def test_the_effective_length_ends_at_the_first_failure():
  assert effective_length({1024: 0.9, 2048: 0.86, 4096: 0.85, 8192: 0.99}) == 2048
  assert effective_length({1024: 0.1}) == 0
  assert len(RULER) == 11


def test_an_order_counts_only_if_all_come_in_it():
  question = Question([], ["cat", "dog", "bird"], in_order=True)
  assert question.score("Cat, then dog, then bird") == 1
  assert question.score("dog, cat, bird") == 0
  assert question.score("dog, bird") == 0


@pytest.mark.parametrize(
  "name, context, message",
  [
    ("needle", 64, "leaves no room for a text"),
    ("key_value", 180, "A key and its value do not fit"),
    ("niah_multivalue", 260, "make --contexts longer"),
    ("common_words", 200, "leaves no room for a text"),
  ],
)
def test_what_does_not_fit_is_never_cut(tokenizer, name, context, message):
  sources = Sources(PromptWriter(tokenizer, chat=False), tokenizer.encode(SENTENCE * 20))
  with pytest.raises(UserError, match=message):
    made(name, sources, Case(context, 50, 0))


def test_a_short_haystack_and_a_wrong_range_are_errors(tokenizer, tmp_path):
  (tmp_path / "short.txt").write_text(SENTENCE)
  with pytest.raises(UserError, match=r"short.txt has \d+ tokens, fewer than the 1,000"):
    Haystack([tmp_path / "short.txt"], tokenizer, 1000)
  assert parse_range("0:100:25", "depths") == [0, 25, 50, 75, 100]
  for text in ("1:2", "a", "5:1:1"):
    with pytest.raises(UserError, match="--depths"):
      parse_range(text, "depths")


def test_answers_survive_a_kill_and_are_not_mixed(tmp_path):
  path, settings = tmp_path / "needle" / "answers.jsonl", {"seed": 0, "haystack": ["a"]}
  AnswerFile(path, settings).add([{"case": "1024/0/0", "score": 1.0}])
  with path.open("a") as file:
    file.write('{"case": "1024/50/0", "sco')
  file = AnswerFile(path, settings)
  assert [case.name for case in file.missing(cases([1024], [0, 50], 1))] == ["1024/50/0"]
  file.add([{"case": "1024/50/0", "score": 0.0}])
  assert [json.loads(line) for line in path.read_text().splitlines()[1:]] == file.records
  with pytest.raises(UserError, match="another seed"):
    AnswerFile(path, settings | {"seed": 1})


def test_a_heat_map_of_means(tmp_path):
  records = [
    {"context": context, "place": place, "score": score}
    for context in (1024, 3000)
    for place, score in ((0, 1.0), (0, 0.0), (50, 1.0))
  ]
  heat_map(records, "needle", "depth", tmp_path / "map.png")
  assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
  assert by_context(records) == {1024: pytest.approx(2 / 3), 3000: pytest.approx(2 / 3)}
  assert [context_name(n) for n in (1024, 3000, 1 << 20)] == ["1K", "3,000", "1M"]
