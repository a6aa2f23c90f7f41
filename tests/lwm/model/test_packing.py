"""Documents packed in one row do not influence each other."""

import jax
import numpy as np
import pytest

from kernels.attention import KeyIntervals
from kernels.ring import Layout
from lwm.model import build

LENGTHS = (13, 7, 8)
MODALITIES = (0, 1, 0)


def documents_of(tiny):
  rng = np.random.default_rng(3)
  return [tiny.document(rng, length, m) for length, m in zip(LENGTHS, MODALITIES)]


@pytest.mark.parametrize(
  "sizes,kind",
  [
    (dict(), "contiguous"),
    (dict(ring=8), "contiguous"),
    (dict(ring=8), "zigzag"),
    (dict(ring=4, tensor=2), "contiguous"),
    (dict(fsdp=2, ring=2, tensor=2), "zigzag"),
    (dict(data=2, fsdp=2, tensor=2), "contiguous"),
  ],
  ids=str,
)
def test_a_token_changes_nothing_outside_its_document_or_before_it(tiny, sizes, kind):
  config = tiny.config()
  model, mesh = build(config), tiny.mesh(**sizes)
  layout = Layout(kind, mesh.shape["ring"])
  original = tiny.pack([documents_of(tiny)] * 4, 32)
  changed = original | {"tokens": original["tokens"].copy()}
  begin, at, end = LENGTHS[0], LENGTHS[0] + 2, LENGTHS[0] + LENGTHS[1]
  changed["tokens"][0, at] = 63 - changed["tokens"][0, at]

  @tiny.jit
  def hidden(params, batch):
    intervals = KeyIntervals(batch["key_start"], batch["key_stop"])
    return model.hidden(
      params,
      batch["tokens"],
      batch["positions"],
      intervals,
      rope_theta=tiny.rope_theta,
      layout=layout,
    )

  with jax.set_mesh(mesh):
    params = tiny.init(model, mesh)
    before, after = (
      np.asarray(hidden(params, tiny.place(batch, layout, mesh, model.rules)))
      for batch in (original, changed)
    )
  # Whether the hidden state of each token, in global order, is the same bit for bit.
  same = np.empty((4, 32), bool)
  same[:, layout.permutation(32)] = (before == after).all(axis=-1)
  expected = np.ones((4, 32), bool)
  expected[0, at:end] = False
  assert begin < at < end
  np.testing.assert_array_equal(same, expected)


@pytest.mark.slow
@pytest.mark.parametrize("weighting", ["token", "example"])
def test_packed_equals_padded(tiny, weighting):
  """Documents in shared rows give the loss and gradients of one document per row."""
  documents = []
  for tokens, targets, weights, modality in documents_of(tiny):
    if weighting == "example":
      of_modality = [n for n, m in zip(LENGTHS, MODALITIES) if m == modality[0]]
      weights = weights * np.mean(of_modality) / len(tokens)
    documents.append((tokens, targets, weights, modality))
  config = tiny.config()
  packed = tiny.pack([documents, []], 32)
  padded = tiny.pack([[document] for document in documents], 16)
  actual = tiny.loss_and_gradients(config, tiny.mesh(), "contiguous", packed)
  expected = tiny.loss_and_gradients(config, tiny.mesh(), "contiguous", padded)
  tiny.assert_close(actual, expected, 1e-5)
  if weighting == "example":
    # All text documents count alike: the text loss is the mean over its two documents.
    run = tiny.losses_program(config, tiny.mesh(), "contiguous", combine=lambda sums: sums.loss[0])
    alone = [run(tiny.pack([[documents[n]]], 16))[0] for n in (0, 2)]
    mean = np.mean([sums.nll[0] / sums.weight[0] for sums in alone])
    np.testing.assert_allclose(actual[0].nll[0] / actual[0].weight[0], mean, rtol=1e-5)
