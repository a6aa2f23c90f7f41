"""A checkpoint in lm-evaluation-harness and lmms-eval, offline.

The first needs the extra `eval`. Where lmms-eval is not installed, a stand-in has the part of its
protocol (version 0.7.3) that the adapter meets.
"""

import abc
import dataclasses
import importlib.util
import json
import sys
import types

import jax
import pytest

from configs import models
from lwm import data, infer, model as model_lib
from lwm.errors import UserError
from lwm.evals.answers import Answerer
from lwm.evals.likelihood import likelihoods
from lwm.evals.prompts import PromptWriter
from lwm.evals.requests import Job, Requests
from lwm.parallel.mesh import make_mesh
from lwm.parallel.sharding import MeshConfig, ShardingRules

SENTENCE = "The cat sees a red house, and the old dog runs."
TASK = """
task: cats
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def test_nothing_imports_the_harness_by_itself():
  import experiments.evaluate  # noqa: F401

  assert not {"lwm.evals.harness", "lwm.evals.lmms"} & set(sys.modules)


@pytest.fixture
def answerer(tmp_path, monkeypatch):
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
  data.train_sentencepiece([SENTENCE], tmp_path / "tokenizer.model", 300)
  tokenizer = data.load_tokenizer(tmp_path / "tokenizer.model")
  model = model_lib.build(
    models.debug(text_vocab_size=300), ShardingRules.inference(few_tokens=True)
  )
  with jax.set_mesh(make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])):
    params = jax.jit(model.init)(jax.random.key(0))
    engine = infer.Engine(model, params, rope_theta=1e4)
    grammar = infer.Grammar(300, (tokenizer.eos_id,), infer.Choice(temperature=0))
    yield Answerer(engine, tokenizer, grammar, rows=2)


@pytest.mark.slow
def test_requests_and_a_local_task(answerer, tmp_path):
  pytest.importorskip("lm_eval")
  from lm_eval.api.instance import Instance

  from lwm.evals.harness import HarnessModel, evaluate_tasks

  def requests(kind, *arguments):
    return [Instance(kind, {}, own, index) for index, own in enumerate(arguments)]

  model, tokenizer = HarnessModel(Requests(answerer, 100)), answerer.tokenizer
  pairs = [("The cat", " sees"), ("", "The old dog runs"), ("The cat sees a red", " house")]
  found = model.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
  for (context, continuation), (total, is_greedy) in zip(pairs, found):
    row = [tokenizer.bos_id, *tokenizer.encode(context + continuation)]
    (own,) = likelihoods(answerer.engine, [row])
    count = len(row) - 1 - len(tokenizer.encode(context))
    assert total == pytest.approx(-own.loss[-count:].sum(), rel=1e-4) and not is_greedy
  (rolling,) = model.loglikelihood_rolling(requests("loglikelihood_rolling", (pairs[1][1],)))
  assert rolling == pytest.approx(found[1][0], rel=1e-5)

  settings = {"until": [], "max_gen_toks": 6}
  prompts = [("The cat", settings), ("The old dog", settings), ("A red", settings)]
  texts = model.generate_until(requests("generate_until", *prompts))
  assert len(texts) == 3
  end = texts[0][2:4]
  (shorter,) = model.generate_until(
    requests("generate_until", ("The cat", {"until": [end], "max_gen_toks": 6}))
  )
  assert shorter == texts[0].partition(end)[0]
  # What greedy decoding has chosen is likeliest.
  ids = [tokenizer.bos_id, *tokenizer.encode("The cat")]
  session = answerer.engine.open([ids], len(ids) + 6)
  sampling = infer.Sampling(answerer.grammar, 6)
  chosen = [token for (block,) in session.generate(sampling, [0]) for token in block]
  ((_, is_greedy),) = model._loglikelihood_tokens([(("", ""), ids, chosen)])
  assert is_greedy
  with pytest.raises(UserError, match="prompts are never cut"):
    model.generate_until(requests("generate_until", ("The cat", {"max_gen_toks": 99})))
  with pytest.raises(UserError, match="asks for sampled answers"):
    model.generate_until(requests("generate_until", ("The cat", {"do_sample": True})))

  questions = [
    {"question": "The cat sees a", "choices": ["red house", "dog"], "answer": index % 2}
    for index in range(4)
  ]
  (tmp_path / "cats.jsonl").write_text("\n".join(map(json.dumps, questions)))
  task = TASK.format(data=tmp_path / "cats.jsonl", kind="multiple_choice")
  (tmp_path / "cats.yaml").write_text(task)
  job = Job(["cats"], str(tmp_path), None, tmp_path / "out" / "harness.json")
  table = evaluate_tasks(job, lambda: HarnessModel(Requests(answerer, 100)))
  results = json.loads((tmp_path / "out" / "harness.json").read_text())
  # The same question four times, with either answer twice.
  assert results["results"]["cats"]["acc,none"] == 0.5 and "cats" in table
  with pytest.raises(UserError, match="The harness has no task dogs"):
    evaluate_tasks(dataclasses.replace(job, tasks=["dogs"]), lambda: pytest.fail("read weights"))


@dataclasses.dataclass
class GenerationResult:
  """As lmms-eval's."""

  text: object


@dataclasses.dataclass
class Instance:
  """As lmms-eval's, without what it does not need here."""

  request_type: str
  arguments: tuple
  idx: int
  metadata: dict

  @property
  def args(self):
    return self.arguments


class Lmms(abc.ABC):
  """As lmms-eval's `lmms`."""

  def __init__(self):
    self.task_dict = {}

  @abc.abstractmethod
  def loglikelihood(self, requests): ...

  @abc.abstractmethod
  def generate_until(self, requests): ...

  @abc.abstractmethod
  def generate_until_multi_round(self, requests): ...


@pytest.fixture
def lmms_eval(monkeypatch):
  if importlib.util.find_spec("lmms_eval"):
    return
  parts = {
    "api": {},
    "api.instance": {"GenerationResult": GenerationResult, "Instance": Instance},
    "api.model": {"lmms": Lmms},
    "evaluator": {"simple_evaluate": None},
    "tasks": {"TaskManager": None},
    "utils": {"make_table": None},
  }
  monkeypatch.setitem(sys.modules, "lmms_eval", types.ModuleType("lmms_eval"))
  for name, content in parts.items():
    module = types.ModuleType(f"lmms_eval.{name}")
    module.__dict__.update(content)
    monkeypatch.setitem(sys.modules, f"lmms_eval.{name}", module)


@pytest.mark.slow
def test_requests_of_lmms_eval(answerer, lmms_eval):
  from lmms_eval.api import instance

  from lwm.evals.lmms import LmmsModel

  shown = []

  def encode(visuals):
    shown.append(visuals)
    return [300, 301, 302]

  writer = PromptWriter(answerer.tokenizer, chat=False)
  model = LmmsModel(Requests(answerer, 60), writer, encode)
  model.task_dict = {"cats": {"test": [{"image": "cat.png"}, {"image": None}]}}

  def visual(record):
    return [record["image"]] if record["image"] else []

  def requests(kind, *arguments):
    metadata = {"task": "cats", "doc_id": 0, "repeats": 1}
    return [
      instance.Instance(kind, (*own, visual, document, "cats", "test"), number, metadata)
      for number, (own, document) in enumerate(arguments)
    ]

  pairs = [(("The cat", " sees"), 0), (("The cat", " a red house"), 0), (("The cat", " sees"), 1)]
  found = model.loglikelihood(requests("loglikelihood", *pairs))
  # A document's image is encoded once, and comes before its text.
  assert shown == [["cat.png"]]
  bos, encoded = answerer.tokenizer.bos_id, answerer.tokenizer.encode
  prompts = [[bos, 300, 301, 302, *encoded("\nThe cat")]] * 2 + [[bos, *encoded("The cat")]]
  for result, prompt, ((_, continuation), _) in zip(found, prompts, pairs):
    count = len(encoded(continuation))
    (own,) = likelihoods(answerer.engine, [[*prompt, *encoded(continuation)]])
    assert result.text == (pytest.approx(own.loss[-count:].mean(), rel=1e-4), False)
  settings = {"max_new_tokens": 6, "temperature": 0, "do_sample": False, "until": []}
  asked = ("The cat", settings)
  texts = model.generate_until(requests("generate_until", (asked, 0), (asked, 1)))
  assert texts == answerer.answer([prompts[0], prompts[2]], 6)
  with pytest.raises(UserError, match="prompts are never cut"):
    model.generate_until(requests("generate_until", (("The cat" * 40, settings), 0)))
  with pytest.raises(UserError, match="asks for sampled answers"):
    model.generate_until(requests("generate_until", (("The cat", settings | {"num_beams": 2}), 0)))
