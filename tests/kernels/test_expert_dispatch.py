"""Rows for experts against a loop over choices: places, capacity, and the gradients of both ways.

T tokens, k choices, E experts, M model width.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec as P

from kernels.experts import Settings, expert_feed_forward
from kernels.experts.dispatch import combine, place, spread
from kernels.experts.slots import divided

T, K, E, M = 20, 3, 6, 5


def choices(rng):
  """Distinct experts for each token; every fifth token is padding, and expert 4 is never chosen."""
  expert_TxK = np.stack([rng.permutation([0, 1, 2, 3, 5])[:K] for _ in range(T)])
  expert_TxK[::5] = E
  return expert_TxK.astype(np.int32)


# Three slots per destination: expert 0 has three copies, expert 3 has moved, and one slot is empty.
SLOTS = np.array([0, 1, 3, 2, E, 0, 4, 5, 0], np.int32)
EQUAL, UNEQUAL = np.ones(9), np.array([5, 1, 1, 0, 1, 0, 1, 1, 3])


@pytest.mark.parametrize("capacity", (None, 2))
@pytest.mark.parametrize("destinations, amount_P", ((1, None), (3, None), (3, EQUAL), (3, UNEQUAL)))
def test_rows_are_sorted_and_gradients_come_back(destinations, amount_P, capacity):
  rng = np.random.default_rng(0)
  expert_TxK = choices(rng)
  placement = place(
    jnp.asarray(expert_TxK),
    num_experts=E,
    destinations=destinations,
    capacity=capacity,
    slots=None if amount_P is None else divided(jnp.asarray(SLOTS), jnp.asarray(amount_P), E),
  )
  expert_P, amount_P = (np.arange(E), np.ones(E)) if amount_P is None else (SLOTS, amount_P)
  kept = np.zeros((T, K), bool)
  for expert in range(E):
    kept.reshape(-1)[np.flatnonzero(expert_TxK == expert)[:capacity]] = True
  row_TxK, choice_R = np.asarray(placement.row_Txk), np.asarray(placement.choice_R)
  np.testing.assert_array_equal(row_TxK >= 0, kept)
  np.testing.assert_array_equal(choice_R[row_TxK[kept]], np.flatnonzero(kept))
  assert (choice_R >= 0).sum() == kept.sum() == placement.sizes_nxe.sum()
  experts_of_rows = np.where(choice_R < 0, E, expert_TxK.reshape(-1)[choice_R])
  slots = expert_P.reshape(destinations, -1)
  for rows, own, sizes in zip(
    experts_of_rows.reshape(destinations, -1), slots, placement.sizes_nxe
  ):
    np.testing.assert_array_equal(rows[: sizes.sum()], np.repeat(own, sizes))
    assert (rows[sizes.sum() :] == E).all()
  for expert, number in enumerate(np.bincount(expert_TxK[kept], minlength=E)):
    copies = placement.sizes_nxe.reshape(-1)[expert_P == expert]
    amounts = amount_P[expert_P == expert]
    # An expert with nothing but zeros is in one slot. Both ends of a part are rounded.
    parts = amounts / amounts.sum() if amounts.sum() else np.ones(1)
    assert copies.sum() == number and np.abs(copies - number * parts).max() < 1.001

  x_TxM, share_TxK = rng.normal(size=(T, M)), rng.normal(size=(T, K))
  cotangent_TxM = rng.normal(size=(T, M)).astype(np.float32)
  weight_ExM = rng.normal(size=(E + 1, M)).astype(np.float32)

  def actual(x_TxM, share_TxK):
    x_RxM = spread(x_TxM, placement.row_Txk, placement.choice_R)
    y_RxM = jnp.sin(x_RxM) * weight_ExM[experts_of_rows]
    out_TxM = combine(y_RxM, share_TxK, placement.row_Txk, placement.choice_R)
    return jnp.sum(out_TxM * cotangent_TxM), out_TxM

  def expected(x_TxM, share_TxK):
    factor_TxM = jnp.einsum("tk,tkm->tm", jnp.where(kept, share_TxK, 0), weight_ExM[expert_TxK])
    out_TxM = jnp.sin(x_TxM) * factor_TxM
    return jnp.sum(out_TxM * cotangent_TxM), out_TxM

  arrays = x_TxM.astype(np.float32), share_TxK.astype(np.float32)
  results, wanted = (
    jax.tree.leaves(jax.value_and_grad(function, (0, 1), has_aux=True)(*arrays))
    for function in (actual, expected)
  )
  for result, want in zip(results, wanted, strict=True):
    np.testing.assert_allclose(result, want, rtol=1e-5, atol=1e-5)


def test_capacity_drops_the_last_choices_and_says_how_many():
  rng = np.random.default_rng(0)
  expert_TxK = choices(rng)
  x_TxM, share_TxK = rng.normal(size=(T, M)), rng.random(size=(T, K))
  gate, up = rng.normal(size=(2, E, M, 7))
  down = rng.normal(size=(E, 7, M))
  # The mean is 10 choices per expert.
  out_TxM, dropped = expert_feed_forward(
    *(
      jnp.asarray(x_TxM, jnp.float32),
      jnp.asarray(expert_TxK),
      jnp.asarray(share_TxK, jnp.float32),
    ),
    *(jnp.asarray(weight, jnp.float32) for weight in (gate, up, down)),
    Settings(E, capacity_factor=0.5),
  )
  expected_TxM, taken, num_dropped = np.zeros((T, M)), np.zeros(E + 1), 0
  for token, index in np.ndindex(T, K):
    expert = expert_TxK[token, index]
    if expert == E:
      continue
    taken[expert] += 1
    if taken[expert] > 5:
      num_dropped += 1
      continue
    hidden = x_TxM[token] @ gate[expert]
    hidden = hidden / (1 + np.exp(-hidden)) * (x_TxM[token] @ up[expert])
    expected_TxM[token] += share_TxK[token, index] * (hidden @ down[expert])
  assert dropped == num_dropped > 0
  np.testing.assert_allclose(out_TxM, expected_TxM, rtol=1e-4, atol=1e-4)


# Two devices gather all tokens, because each token chooses three experts; six exchange rows.
@pytest.mark.parametrize("n, expert_P", ((2, np.array([0, 1, 5, 2, E, 5, 3, 4])), (6, None)))
def test_devices_compute_what_each_would_alone(n, expert_P):
  rng, F = np.random.default_rng(0), 7
  expert_TxK = jnp.asarray(np.concatenate([choices(rng) for _ in range(n)]))
  x_TxM, share_TxK = (rng.normal(size=(n * T, size)).astype(np.float32) for size in (M, K))
  shapes = (E, M, F), (E, M, F), (E, F, M)
  weights = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
  tokens = jnp.asarray(x_TxM), expert_TxK, jnp.asarray(share_TxK)
  # Ten choices per half chunk would be the mean of an expert if there were no padding.
  alone = Settings(E, capacity_factor=0.5, chunk=T // 2)
  together = Settings(E, exchange_axes=("expert",), capacity_factor=0.5, chunk=T, overlaps=True)
  own_P = np.arange(E) if expert_P is None else expert_P
  in_slots = [np.concatenate([weight, weight[:1]])[own_P] for weight in weights]
  slots = None
  if expert_P is not None:
    slots = divided(jnp.asarray(expert_P, jnp.int32), 1 + jnp.arange(8), E)

  def local(tokens, weights, slots):
    out_TxM, dropped = expert_feed_forward(*tokens, *weights, together, slots)
    return out_TxM, dropped[None]

  mesh = Mesh(jax.devices()[:n], ("expert",), axis_types=(AxisType.Explicit,))
  with jax.set_mesh(mesh):
    out_TxM, dropped_n = jax.jit(
      jax.shard_map(local, in_specs=(P("expert"), P("expert"), P()), out_specs=P("expert"))
    )(*jax.device_put((tokens, in_slots), jax.NamedSharding(mesh, P("expert"))), slots)
  out_TxM, dropped_n = np.asarray(out_TxM), np.asarray(dropped_n)
  run = jax.jit(lambda tokens: expert_feed_forward(*tokens, *weights, alone))
  for device in range(n):
    own = slice(device * T, (device + 1) * T)
    wanted_TxM, dropped = run(tuple(array[own] for array in tokens))
    assert dropped_n[device] == dropped > 0
    np.testing.assert_allclose(out_TxM[own], wanted_TxM, rtol=1e-4, atol=1e-4)


def ragged_all_to_all(x, out, begin_n, sent_n, arrive_n, received_n, *, axis_name):
  """JAX's, which CPUs lack. What is not received is NaN."""
  del received_n
  n, me = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
  x_nxR = jax.lax.all_gather(x, axis_name)
  begin_n, sent_n, arrive_n = (
    jax.lax.all_gather(table_n, axis_name)[:, me] for table_n in (begin_n, sent_n, arrive_n)
  )
  row_N = jnp.arange(out.shape[0])
  result = jnp.full(out.shape, jnp.nan)
  for source in range(n):
    index_N = row_N - arrive_n[source]
    is_own_N = (index_N >= 0) & (index_N < sent_n[source])
    taken = jnp.take(x_nxR[source], begin_n[source] + index_N, axis=0, mode="clip")
    result = jnp.where(jnp.expand_dims(is_own_N, range(1, x.ndim)), taken, result)
  return result


@pytest.mark.slow
@pytest.mark.parametrize("is_ragged", (False, True))
def test_any_number_of_rows_may_arrive(monkeypatch, is_ragged):
  """Four devices with two experts each: choices are random, or the first device gets all it can.

  Buffers that are large enough for the random choices are too small for the others.
  """
  monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_all_to_all)
  n, E, M, F = 4, 8, 6, 7
  rng = np.random.default_rng(0)
  random_TxK = np.stack([rng.permutation(E)[:K] for _ in range(n * T)])
  random_TxK[::5] = E
  skewed_TxK = np.tile([1, 0, 5], (n * T, 1))
  skewed_TxK[::7, 2] = E
  x_TxM, share_TxK, cotangent_TxM = (
    rng.normal(size=(n * T, size)).astype(np.float32) for size in (M, K, M)
  )
  shapes = (E, M, F), (E, M, F), (E, F, M)
  weights = [rng.normal(size=shape).astype(np.float32) for shape in shapes]

  def values_and_gradients(settings, expert_TxK, x_TxM, share_TxK, weights, cotangent_TxM):
    def network(x_TxM, share_TxK, weights):
      return expert_feed_forward(x_TxM, expert_TxK, share_TxK, *weights, settings)[0]

    out_TxM, pull_back = jax.vjp(network, x_TxM, share_TxK, weights)
    return out_TxM, *pull_back(cotangent_TxM)

  alone = jax.jit(functools.partial(values_and_gradients, Settings(E)))
  settings = Settings(E, exchange_axes=("expert",), chunk=T, is_ragged=is_ragged)
  mesh = Mesh(jax.devices()[:n], ("expert",), axis_types=(AxisType.Explicit,))
  with jax.set_mesh(mesh):
    together = jax.jit(
      jax.shard_map(
        functools.partial(values_and_gradients, settings),
        in_specs=P("expert"),
        out_specs=P("expert"),
      )
    )
    for expert_TxK in (random_TxK, skewed_TxK):
      arrays = expert_TxK.astype(np.int32), x_TxM, share_TxK, weights, cotangent_TxM
      actual = together(*jax.device_put(arrays, jax.NamedSharding(mesh, P("expert"))))
      for result, wanted in zip(jax.tree.leaves(actual), jax.tree.leaves(alone(*arrays))):
        np.testing.assert_allclose(result, wanted, rtol=1e-5, atol=1e-5)
