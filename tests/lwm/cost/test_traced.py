import jax
import jax.numpy as jnp
import pytest

from lwm.cost.traced import work


def convolution(strides):
  def apply(kernel, images):
    return jax.lax.conv_general_dilated(
      images, kernel, strides, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    ).sum()

  return apply


@pytest.mark.parametrize("strides, pixels", (((1, 1), 64), ((2, 2), 16)))
def test_a_convolution_and_its_gradients(strides, pixels):
  """Each of the two gradients costs what the forward pass does."""
  kernel, images = jnp.zeros((3, 3, 4, 5)), jnp.zeros((2, 8, 8, 4))
  function = convolution(strides)
  forward = 2 * (2 * pixels) * (3 * 3 * 4 * 5)
  traced = work(jax.make_jaxpr(function)(kernel, images).jaxpr)
  assert traced.flops == forward
  assert traced.bytes == 4 * (kernel.size + images.size + 2 * pixels * 5)
  both = jax.make_jaxpr(jax.grad(function, argnums=(0, 1)))(kernel, images)
  # The gradient of a sum by the images alone needs no forward pass, but the trace has it.
  assert work(both.jaxpr).flops == 3 * forward


def test_loops_count_as_often_as_they_run():
  def function(matrix):
    return jax.lax.scan(lambda carry, _: (carry @ matrix, None), matrix, length=7)[0]

  assert work(jax.make_jaxpr(function)(jnp.zeros((4, 4))).jaxpr).flops == 7 * 2 * 4**3
