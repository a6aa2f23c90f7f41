"""What VQGAN training minimises, as pure functions of parameters, frames and step.

The generator (encoder and decoder) minimises L1 + L2 of the pixels, a perceptual distance, the
commitment of the encoder to its codes, and the judgement of a patch discriminator, whose weight
adapts to the gradients (Esser et al., arXiv 2012.09841). The discriminator minimises its hinge
loss. The quantizer changes the codebook, by gradients or by moving averages.

All means run over the global batch, however it is divided over devices. Parameters are whole on
every device while they are used, however they are stored.

Legend: B frames; H, W height and width in pixels; L latents; V codes; E codebook width.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util
from jax.sharding import PartitionSpec

from lwm.config.vqgan import VQGANConfig, VQGANLossConfig
from lwm.parallel.sharding import require_explicit_mesh
from lwm.vision import perceptual
from lwm.vision.codec import to_frames, to_pixels
from lwm.vision.discriminator import Discriminator, adaptive_weight, hinge_loss
from lwm.vision.modules import Params, plain, with_values
from lwm.vision.quantizers import Quantizer, count_wins, make_quantizer
from lwm.vision.similarity import structural_similarity
from lwm.vision.vqgan import VQGAN, Codebook, nearest_codes

# Nested dicts of arrays by module and parameter name.
Metrics = dict[str, jax.Array]
Axes = tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class VQGANObjective:
  """The losses of a VQGAN, and what else a step changes.

  Parameters are nested dicts of float32 arrays:

      generator      encoder, decoder and the 1x1 convolutions around the codebook
      discriminator  if losses.adversarial_weight > 0
      codebook       the quantizer's arrays; empty for "fsq"
      average        moving averages of the trained parameters that a saved VQGAN needs, if
                     losses.average_decay > 0
      perceptual     the network of losses.perceptual_file, which never changes, if one is named

  Call `gradients` and `evaluate` inside `jax.jit`, under `jax.set_mesh` with a mesh of
  `lwm.parallel.mesh`. The first axis of the frames may be divided over any axes of the mesh.

  Attributes:
    config: sizes of the VQGAN.
    losses: the quantizer and the weights of the losses.
  """

  config: VQGANConfig
  losses: VQGANLossConfig

  @functools.cached_property
  def quantizer(self) -> Quantizer:
    return make_quantizer(self.config, self.losses)

  @property
  def trained(self) -> list[str]:
    """Globs over the dotted names of the parameters that gradients train.

    `gradients` gives new values of all others.
    """
    names = ["generator.*"] + [f"codebook.{name}" for name in self.quantizer.trained]
    return [*names, "discriminator.*"] if self.losses.adversarial_weight else names

  def init(self, key: jax.Array) -> Params:
    """Random parameters; the same numbers on any mesh.

    Raises:
      UserError: the perceptual file does not exist or has another layout.
    """
    generator_key, codebook_key, discriminator_key = jax.random.split(key, 3)
    model = VQGAN(self.config, rngs=nnx.Rngs(params=generator_key))
    params: Params = {
      "generator": plain(nnx.state(model, nnx.Param)),
      "codebook": self.quantizer.init(codebook_key),
    }
    params = _without_empty(params)
    if self.losses.adversarial_weight:
      rngs = nnx.Rngs(params=discriminator_key)
      params["discriminator"] = plain(nnx.state(self._new_discriminator(rngs)))
    if self.losses.average_decay:
      params["average"] = self._trained_leaves(params)
    if self.losses.perceptual_file:
      params["perceptual"] = traverse_util.unflatten_dict(
        perceptual.load_network(self.losses.perceptual_file), sep="."
      )
    return params

  def abstract(self) -> Params:
    """Shapes and dtypes of the parameters."""
    return jax.eval_shape(self.init, jax.random.key(0))

  def gradients(
    self, params: Params, frames_BxHxWx3: jax.Array, step: jax.Array, key: jax.Array
  ) -> tuple[Params, Params, Metrics]:
    """One step's gradients, and everything that the step changes without gradients.

    Args:
      params: as `init` returns them, stored in any shards.
      frames_BxHxWx3: uint8, the global batch.
      step: int32 scalar, from 0.
      key: for what is random; another one in each step.

    Returns:
      The gradients of the trained parameters; the next values of all others; and metrics, float32
      scalars: loss (what the generator and the codebook minimise), pixel, commitment, usage (the
      share of codes that win a latent of this batch), codebook_perplexity and psnr (of this batch,
      decibels); and, as configured, codebook, perceptual, adversarial, adversarial_weight (which
      adapts to the gradients) and discriminator.
    """
    local = functools.partial(self._gradients, axes=_batch_axes(frames_BxHxWx3))
    gradients, frozen, metrics = _over_devices(local, params, frames_BxHxWx3, step, key)
    return _stored_like(gradients, params), _stored_like(frozen, params), metrics

  def evaluate(self, params: Params, frames_BxHxWx3: jax.Array) -> Metrics:
    """Sums over frames of the reconstruction errors of the VQGAN that would be saved now.

    Args:
      params: as `init` returns them, stored in any shards.
      frames_BxHxWx3: uint8, the global batch.

    Returns:
      float32: frames, their number; squared_error and ssim, sums over the frames of the mean
      squared error of 8-bit values and of the structural similarity; and wins [V], how often each
      code occurs.
    """
    local = functools.partial(self._evaluate, axes=_batch_axes(frames_BxHxWx3))
    return _over_devices(local, params, frames_BxHxWx3)

  def variables(self, params: Params) -> nnx.State:
    """All variables of the VQGAN, for `lwm.vision.codec.save_vqgan`: averages where they exist."""
    saved = params.get("average", params)
    leaves = params.get("codebook", {}) | saved.get("codebook", {})
    model = self._model(saved["generator"], self.quantizer.table(leaves))
    return nnx.state(model)

  def _gradients(
    self, params: Params, frames_BxHxWx3: jax.Array, step: jax.Array, key: jax.Array, *, axes: Axes
  ) -> tuple[Params, Params, Metrics]:
    """`gradients` on one device's frames, with whole parameters."""
    losses, quantizer = self.losses, self.quantizer
    pixels_BxHxWx3 = to_pixels(frames_BxHxWx3, self.config.pixel_range)
    leaves = params.get("codebook", {})
    quantizing = step >= self._continuous_steps

    def generate(trained: Params):
      model = self._model(trained["generator"])
      latents_BxhxwxE = model.latents(pixels_BxHxWx3)
      latents_LxE = latents_BxhxwxE.reshape(-1, self.config.codebook_width)
      quantized = quantizer.quantize(leaves | trained.get("codebook", {}), latents_LxE, axes)
      vectors_LxE = jnp.where(quantizing, quantized.vectors_LxE, latents_LxE)
      features = model.decoder.features(
        model.post_quant_conv(vectors_LxE.reshape(latents_BxhxwxE.shape))
      )
      commitment = jnp.where(quantizing, quantized.commitment, 0.0)
      bottleneck = losses.commitment_weight * commitment + quantized.codebook
      metrics = {"commitment": commitment} | (
        {"codebook": quantized.codebook} if quantizer.trained else {}
      )
      rest = features, latents_LxE, quantized.codes_L, metrics
      return (model.decoder.head(features), bottleneck), rest

    trained = self._trained_leaves(params)
    (output_BxHxWx3, bottleneck), pull, rest = jax.vjp(generate, trained, has_aux=True)
    features, latents_LxE, codes_L, metrics = rest
    pixel_loss, pixel_metrics, pixel_gradient = self._pixels(
      params, output_BxHxWx3, pixels_BxHxWx3, axes
    )
    loss, output_gradient = pixel_loss + bottleneck, pixel_gradient
    metrics |= pixel_metrics

    gradients: Params = {}
    if losses.adversarial_weight:
      kernel = trained["generator"]["decoder"]["head"]["kernel"]
      judge = _Judge(self._discriminator, params["discriminator"], axes)
      adversarial, adversarial_gradient = judge.generator(output_BxHxWx3)
      weight = losses.adversarial_weight * adaptive_weight(
        _kernel_gradient(features, kernel, pixel_gradient),
        _kernel_gradient(features, kernel, adversarial_gradient),
      )
      # Off before its first step.
      started = step >= losses.adversarial_start
      weight = jnp.where(started, weight, 0.0)
      discriminator_loss, gradient = judge.discriminator(pixels_BxHxWx3, output_BxHxWx3)
      gradients["discriminator"] = jax.tree.map(
        lambda leaf: jnp.where(started, leaf, 0.0), gradient
      )
      loss += weight * adversarial
      output_gradient += weight * adversarial_gradient
      metrics |= {
        "adversarial": adversarial,
        "adversarial_weight": weight,
        "discriminator": discriminator_loss,
      }
    (trained_gradients,) = pull((output_gradient, jnp.ones(())))
    gradients |= trained_gradients

    latents_LxE = jax.lax.stop_gradient(latents_LxE)
    # Before that, every step draws all codes again, so that they start where the latents are.
    leaves = jax.tree.map(lambda leaf: jnp.where(quantizing, leaf, 0.0), leaves)
    frozen = {"codebook": quantizer.update(leaves, latents_LxE, codes_L, key, axes)}
    if losses.average_decay:
      # Short at first, when the parameters change fast.
      decay = jnp.minimum(losses.average_decay, (1.0 + step) / (10.0 + step))
      frozen["average"] = jax.tree.map(
        lambda average, now: average + (1.0 - decay) * (now - average), params["average"], trained
      )
    if "perceptual" in params:
      frozen["perceptual"] = params["perceptual"]
    metrics |= {"loss": loss} | _code_metrics(codes_L, self.config.codebook_size, axes)
    return gradients, _without_empty(frozen), metrics

  def _pixels(
    self, params: Params, output_BxHxWx3: jax.Array, pixels_BxHxWx3: jax.Array, axes: Axes
  ) -> tuple[jax.Array, Metrics, jax.Array]:
    """The pixel and perceptual loss, its metrics, and its gradient by the output."""
    low, high = self.config.pixel_range

    def pixel_loss(output_BxHxWx3: jax.Array) -> tuple[jax.Array, Metrics]:
      error = output_BxHxWx3 - pixels_BxHxWx3
      pixel = jax.lax.pmean(jnp.abs(error).mean() + jnp.square(error).mean(), axes)
      clipped = jnp.clip(output_BxHxWx3, low, high) - pixels_BxHxWx3
      square = jax.lax.pmean(jnp.square(clipped).mean(), axes)
      metrics = {"pixel": pixel, "psnr": 10.0 * jnp.log10((high - low) ** 2 / square)}
      if not self.losses.perceptual_weight:
        return pixel, metrics
      distance = self._perceptual_distance(params, output_BxHxWx3, pixels_BxHxWx3)
      distance = jax.lax.pmean(distance, axes)
      metrics["perceptual"] = distance
      return pixel + self.losses.perceptual_weight * distance, metrics

    (loss, metrics), gradient = jax.value_and_grad(pixel_loss, has_aux=True)(output_BxHxWx3)
    return loss, metrics, gradient

  def _perceptual_distance(
    self, params: Params, output_BxHxWx3: jax.Array, pixels_BxHxWx3: jax.Array
  ) -> jax.Array:
    if not self.losses.perceptual_file:
      judge = self._discriminator(params["discriminator"])
      ours, theirs = judge.features(output_BxHxWx3), judge.features(pixels_BxHxWx3)
      return perceptual.feature_distance(ours, theirs, [None] * len(ours))
    weights = traverse_util.flatten_dict(params["perceptual"], sep=".")
    ours, theirs = (
      perceptual.network_features(weights, pixels, self.config.pixel_range)
      for pixels in (output_BxHxWx3, pixels_BxHxWx3)
    )
    return perceptual.feature_distance(ours, theirs, perceptual.channel_weights(weights, len(ours)))

  def _evaluate(self, params: Params, frames_BxHxWx3: jax.Array, *, axes: Axes) -> Metrics:
    saved = params.get("average", params)
    leaves = params.get("codebook", {}) | saved.get("codebook", {})
    model = self._model(saved["generator"])
    table_VxE = self.quantizer.table(leaves)
    codes = nearest_codes(
      model.latents(to_pixels(frames_BxHxWx3, self.config.pixel_range)), table_VxE
    )
    output = to_frames(model.reconstruct(table_VxE[codes]), self.config.pixel_range)
    error = output.astype(jnp.float32) - frames_BxHxWx3.astype(jnp.float32)
    sums = {
      "frames": jnp.ones(len(frames_BxHxWx3)).sum(),
      "squared_error": jnp.square(error).mean((1, 2, 3)).sum(),
      "ssim": structural_similarity(output, frames_BxHxWx3).sum(),
    }
    wins = {"wins": count_wins(codes.reshape(-1), self.config.codebook_size, axes)}
    return jax.lax.psum(sums, axes) | wins

  @property
  def _continuous_steps(self) -> int:
    # Other code vectors than moving averages would not find latents that nothing keeps near them.
    return self.losses.continuous_steps if self.losses.quantizer == "moving_average" else 0

  def _trained_leaves(self, params: Params) -> Params:
    """The parameters of the generator and the codebook that gradients train."""
    trained = {name: params["codebook"][name] for name in self.quantizer.trained}
    return _without_empty({"generator": params["generator"], "codebook": trained})

  @functools.cached_property
  def _graph(self) -> tuple[Any, nnx.State, nnx.State]:
    model = nnx.eval_shape(lambda: VQGAN(self.config, rngs=nnx.Rngs(0)))
    return nnx.graphdef(model), nnx.state(model, nnx.Param), nnx.state(model, Codebook)

  def _model(self, generator: Params, table_VxE: jax.Array | None = None) -> VQGAN:
    """The network of these parameters; without a table, it can only compute with latents."""
    graph, state, codebook = self._graph
    if table_VxE is not None:
      codebook = jax.tree.map(lambda _: table_VxE, codebook)
    return nnx.merge(graph, with_values(state, generator), codebook)

  def _new_discriminator(self, rngs: nnx.Rngs) -> Discriminator:
    losses = self.losses
    return Discriminator(losses.discriminator_channels, losses.discriminator_layers, rngs=rngs)

  def _discriminator(self, params: Params) -> Discriminator:
    graph, state = nnx.split(nnx.eval_shape(lambda: self._new_discriminator(nnx.Rngs(0))))
    return nnx.merge(graph, with_values(state, params))


@dataclasses.dataclass(frozen=True)
class _Judge:
  """The losses of the discriminator `network(params)`, each with its gradient."""

  network: Callable[[Params], Discriminator]
  params: Params
  axes: Axes

  def generator(self, output_BxHxWx3: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How fake the reconstructions look, and the gradient by them."""
    network = self.network(self.params)
    return jax.value_and_grad(lambda output: -jax.lax.pmean(network(output).mean(), self.axes))(
      output_BxHxWx3
    )

  def discriminator(
    self, real_BxHxWx3: jax.Array, fake_BxHxWx3: jax.Array
  ) -> tuple[jax.Array, Params]:
    """The hinge loss, and the gradient by the discriminator's parameters."""

    def loss(params: Params) -> jax.Array:
      network = self.network(params)
      return jax.lax.pmean(hinge_loss(network(real_BxHxWx3), network(fake_BxHxWx3)), self.axes)

    return jax.value_and_grad(loss)(self.params)


def _kernel_gradient(
  features_BxHxWxC: jax.Array, kernel: jax.Array, output_gradient_BxHxWx3: jax.Array
) -> jax.Array:
  """The gradient by the kernel of the decoder's last convolution, given that by its output."""

  def convolve(kernel: jax.Array) -> jax.Array:
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
      features_BxHxWxC, kernel, (1, 1), "SAME", dimension_numbers=layout
    )

  return jax.vjp(convolve, kernel)[1](output_gradient_BxHxWx3)[0]


def _code_metrics(codes_L: jax.Array, num_codes: int, axes: Axes) -> Metrics:
  wins_V = count_wins(codes_L, num_codes, axes)
  share_V = wins_V / wins_V.sum()
  entropy = -(share_V * jnp.log(jnp.where(share_V > 0, share_V, 1.0))).sum()
  return {"usage": (wins_V > 0).astype(jnp.float32).mean(), "codebook_perplexity": jnp.exp(entropy)}


def _over_devices(
  function: Callable[..., Any], params: Params, frames_BxHxWx3: jax.Array, *arguments: jax.Array
) -> Any:
  """Calls a function on every device, with whole parameters and the device's frames.

  Its results must be the same on all devices.
  """
  require_explicit_mesh()
  whole = jax.tree.map(lambda leaf: jax.reshard(leaf, PartitionSpec()), params)
  specs = (
    PartitionSpec(),
    PartitionSpec(_batch_axes(frames_BxHxWx3)),
    *[PartitionSpec()] * len(arguments),
  )
  return jax.shard_map(function, in_specs=specs, out_specs=PartitionSpec())(
    whole, frames_BxHxWx3, *arguments
  )


def _batch_axes(frames_BxHxWx3: jax.Array) -> Axes:
  """The mesh axes that the frames are divided over."""
  axes = jax.typeof(frames_BxHxWx3).sharding.spec[0]
  return axes if isinstance(axes, tuple) else () if axes is None else (axes,)


def _stored_like(tree: Params, params: Params) -> Params:
  """`tree`, some of the leaves of `params` with other values, in the shards of `params`."""
  stored = traverse_util.flatten_dict(params)
  leaves = traverse_util.flatten_dict(tree)
  return traverse_util.unflatten_dict(
    {
      path: jax.reshard(leaf, jax.typeof(stored[path]).sharding.spec)
      for path, leaf in leaves.items()
    }
  )


def _without_empty(tree: Params) -> Params:
  return {name: branch for name, branch in tree.items() if branch}
