"""A checkpoint in lm-evaluation-harness, offline; needs the extra `eval`."""

import json
import sys

import jax
import pytest

from configs import models
from lwm import data, infer, model as model_lib
from lwm.errors import UserError
from lwm.evals.answers import Answerer
from lwm.evals.likelihood import likelihoods
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

  assert not [name for name in sys.modules if name.startswith("lwm.evals.harness")]


@pytest.fixture
def answerer(tmp_path, monkeypatch):
  pytest.importorskip("lm_eval")
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
  from lm_eval.api.instance import Instance

  from lwm.evals.harness import HarnessModel, evaluate_tasks

  def requests(kind, *arguments):
    return [Instance(kind, {}, own, index) for index, own in enumerate(arguments)]

  model, tokenizer = HarnessModel(answerer, 100), answerer.tokenizer
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
  table = evaluate_tasks(
    answerer, ["cats"], max_length=100, include_path=str(tmp_path), limit=None,
    path=tmp_path / "out" / "harness.json",
  )  # fmt: skip
  results = json.loads((tmp_path / "out" / "harness.json").read_text())
  # The same question four times, with either answer twice.
  assert results["results"]["cats"]["acc,none"] == 0.5 and "cats" in table
  with pytest.raises(UserError, match="The harness has no task dogs"):
    evaluate_tasks(
      answerer, ["dogs"], max_length=100, include_path=str(tmp_path), limit=None,
      path=tmp_path / "dogs.json",
    )  # fmt: skip
