"""How settings affect losses and gradients: remat not at all, bfloat16 little, ranges a lot."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.attention import KeyIntervals
from kernels.ring import Layout
from lwm.config.experiment import LossConfig
from lwm.model import build

LAYOUT = Layout("contiguous", 1)


@pytest.fixture(scope="module")
def batch(tiny):
  rng = np.random.default_rng(1)
  return tiny.pack([[tiny.document(rng, 9, 0), tiny.document(rng, 11, 1)] for _ in range(2)], 24)


@pytest.fixture(scope="module")
def full_remat(tiny, batch):
  return tiny.loss_and_gradients(tiny.config(), tiny.mesh(), "contiguous", batch)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "dots", "attention", "offload", "offload_attention"])
def test_remat_policies_give_the_same_gradients(tiny, batch, full_remat, remat):
  actual = tiny.loss_and_gradients(tiny.config(remat=remat), tiny.mesh(), "contiguous", batch)
  tiny.assert_close(actual, full_remat, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
  "remat,sizes",
  [("full", dict(ring=2, ulysses=2)), ("offload_attention", dict(fsdp=2, ring=2)), ("none", {})],
  ids=str,
)
def test_groups_of_heads_in_turn_give_the_same_gradients(tiny, batch, full_remat, remat, sizes):
  config = tiny.config(remat=remat, head_groups=2)
  kind = "zigzag" if sizes else "contiguous"
  actual = tiny.loss_and_gradients(config, tiny.mesh(**sizes), kind, batch)
  tiny.assert_close(actual, full_remat, 1e-5)


@pytest.mark.slow
def test_groups_of_heads_over_tensor(tiny, batch):
  config = tiny.config(num_kv_heads=4)
  expected = tiny.loss_and_gradients(config, tiny.mesh(), "contiguous", batch)
  config = tiny.config(num_kv_heads=4, head_groups=2)
  actual = tiny.loss_and_gradients(config, tiny.mesh(tensor=2, ring=2), "zigzag", batch)
  tiny.assert_close(actual, expected, 1e-5)


@pytest.mark.slow
def test_bfloat16_follows_float32_on_a_mesh(tiny, batch, full_remat):
  config = tiny.config(compute_dtype="bfloat16")
  mesh = tiny.mesh(fsdp=2, ring=2, tensor=2)
  sums, gradients = tiny.loss_and_gradients(config, mesh, "zigzag", batch)
  tiny.assert_close(sums, full_remat[0], 1e-2)
  tiny.assert_close(gradients, full_remat[1], 5e-2)


@pytest.mark.slow
def test_tied_head_on_a_mesh(tiny, batch):
  config = tiny.config(tied_head=True)
  expected = tiny.loss_and_gradients(config, tiny.mesh(), "contiguous", batch)
  assert "output" not in expected[1]
  mesh = tiny.mesh(fsdp=2, ring=2, tensor=2)
  tiny.assert_close(tiny.loss_and_gradients(config, mesh, "zigzag", batch), expected, 1e-5)


@pytest.mark.parametrize("softmax_range", ["modality", "all"])
def test_losses_by_hand_from_logits(tiny, batch, softmax_range):
  """The softmax and z-loss of a target run over the ids of its own modality, or over all ids."""
  config = tiny.config()
  model, mesh = build(config), tiny.mesh()
  with jax.set_mesh(mesh):
    params = tiny.init(model, mesh)
    rows = tiny.place(batch, LAYOUT, mesh, model.rules)

    @tiny.jit
    def both(params, rows):
      loss = LossConfig(z_loss=1e-2, softmax_range=softmax_range)
      sums = model.losses(params, rows, rope_theta=tiny.rope_theta, layout=LAYOUT, loss=loss)
      intervals = KeyIntervals(rows["key_start"], rows["key_stop"])
      hidden = model.hidden(
        params,
        rows["tokens"],
        rows["positions"],
        intervals,
        rope_theta=tiny.rope_theta,
        layout=LAYOUT,
      )
      return sums, model.logits(params, hidden)

    sums, logits = jax.tree.map(np.asarray, both(params, rows))
  ranges = ((0, 40), (40, 64)) if softmax_range == "modality" else ((0, 64), (0, 64))
  for modality, (start, stop) in enumerate(ranges):
    own = (batch["modality"] == modality) & (batch["loss_weights"] > 0)
    log_sum_exp = np.log(np.exp(logits[own].astype(np.float64))[:, start:stop].sum(1))
    nll = log_sum_exp - logits[own, batch["targets"][own]]
    assert sums.weight[modality] == own.sum() > 0
    np.testing.assert_allclose(sums.nll[modality], nll.sum(), rtol=1e-5)
    np.testing.assert_allclose(sums.loss[modality], (nll + 1e-2 * log_sum_exp**2).sum(), rtol=1e-5)


@pytest.mark.slow
def test_text_only_model(tiny):
  rng = np.random.default_rng(2)
  config = tiny.config(vision_vocab_size=0)
  batch = tiny.pack([[tiny.document(rng, 9, 0)]], 12)
  sums, _ = tiny.loss_and_gradients(
    config, tiny.mesh(), "contiguous", batch, combine=lambda sums: sums.loss[0]
  )
  assert sums.weight.tolist() == [9, 0] and sums.loss[1] == 0
  assert np.log(40) / 2 < sums.nll[0] / 9 < 2 * np.log(40)


def test_needs_a_mesh(tiny):
  model = build(tiny.config())
  rows = jnp.zeros((1, 4), jnp.int32)
  with pytest.raises(ValueError, match="jax.set_mesh"):
    model.hidden({}, rows, rows, KeyIntervals(rows, rows), rope_theta=1e4, layout=LAYOUT)
