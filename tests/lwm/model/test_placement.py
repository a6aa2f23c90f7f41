"""Where experts are placed, from recorded loads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.experts.slots import WHOLE, at_home
from lwm.config.model import ExpertsConfig
from lwm.model.placement import choose_slots, device_loads

E = 64


def recorded_loads():
  """Two layers: a router whose hottest expert has more than ten times the mean, and an idle one."""
  rng = np.random.default_rng(0)
  logits_TxE = rng.standard_normal((4096, E)) - np.log(1 + rng.permutation(E))[None]
  chosen_Tx4 = np.argsort(-logits_TxE, axis=1)[:, :4]
  load_E = np.bincount(chosen_Tx4.reshape(-1), minlength=E)
  assert load_E.max() > 10 * load_E.mean()
  return jnp.asarray(np.stack([load_E, np.zeros(E)]), jnp.float32)


@pytest.mark.slow
@pytest.mark.parametrize(
  "policy, n, most", [("replicate", 8, 1.001), ("replicate", 16, 1.001), ("move", 8, 1.7)]
)
def test_slots_even_out_the_loads_of_devices(policy, n, most):
  config, load_LxE = ExpertsConfig(E, 4, placement=policy, spare_slots=2), recorded_loads()
  slots = choose_slots(config, load_LxE, n)
  home_nxe = np.arange(E).reshape(n, -1)
  skewed_nxs, idle_nxs = np.asarray(slots.expert_P).reshape(2, n, -1)
  # Without loads all experts stay at home.
  np.testing.assert_array_equal(idle_nxs[:, : E // n], home_nxe)
  assert (idle_nxs[:, E // n :] == E).all()

  own_nxe = skewed_nxs[:, : E // n]
  assert ((own_nxe == home_nxe) | ((own_nxe == E) & (policy == "move"))).all()
  assert set(range(E)) <= set(skewed_nxs.reshape(-1))
  for own in skewed_nxs:
    used = own[own < E]
    assert len(set(used)) == len(used)
  if policy == "move":
    assert (np.bincount(skewed_nxs.reshape(-1))[:E] == 1).all()

  placed = jax.tree.map(lambda array_LxP: array_LxP[0], slots)
  before, after = (device_loads(load_LxE[0], own, n) for own in (at_home(E), placed))
  np.testing.assert_allclose(after.sum(), before.sum(), rtol=1e-6)
  assert before.max() > 1.9 * before.mean()
  assert after.max() <= most * after.mean()


@pytest.mark.parametrize("policy", ("replicate", "move"))
@pytest.mark.parametrize(
  "n, spare_slots, most", [(4, 1, 1.3), (8, 1, 1.3), (8, 2, 1.1), (16, 2, 1.1)]
)
def test_any_loads_are_divided_among_different_devices(policy, n, spare_slots, most):
  rng = np.random.default_rng(0)
  kinds = (
    rng.exponential(size=(8, E)),
    np.exp(4 * rng.standard_normal((8, E))),
    rng.integers(0, 3, (8, E)),
    1e9 * np.eye(E)[:8],
    np.zeros((1, E)),
    np.ones((1, E)),
  )
  load_LxE = np.concatenate(kinds).astype(np.float32)
  config = ExpertsConfig(E, 4, placement=policy, spare_slots=spare_slots)
  slots = choose_slots(config, jnp.asarray(load_LxE), n)
  for layer, load_E in enumerate(load_LxE):
    own = jax.tree.map(lambda array_LxP: array_LxP[layer], slots)
    expert_P, begin_P, end_P = map(np.asarray, own)
    for expert in range(E):
      is_own_P = expert_P == expert
      assert [*begin_P[is_own_P], WHOLE] == [0, *end_P[is_own_P]]
    assert (begin_P <= end_P)[expert_P < E].all()
    for experts in expert_P.reshape(n, -1):
      assert len(set(experts) - {E}) == np.sum(experts < E)
    before_n, after_n = (device_loads(jnp.asarray(load_E), each, n) for each in (at_home(E), own))
    np.testing.assert_allclose(after_n.sum(), before_n.sum(), rtol=1e-4)
    assert after_n.max() <= 1.0002 * before_n.max()
    if policy == "replicate":
      assert after_n.max() <= most * after_n.mean()
