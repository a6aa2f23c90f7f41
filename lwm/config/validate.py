"""The one check of an Experiment, before anything is built from it."""

import math
from collections.abc import Iterable, Mapping, Sequence

from lwm.config import experiment as experiment_lib
from lwm.config.experiment import (
  AnyExperiment,
  AnyStage,
  Experiment,
  LossConfig,
  OptimizerConfig,
  Stage,
  VQGANExperiment,
  VQGANStage,
)
from lwm.config.model import (
  COMPUTE_DTYPES,
  EXPERTS,
  PLACEMENTS,
  PROJECTIONS,
  REMAT_POLICIES,
  ROUTERS,
  ExpertsConfig,
  ModelConfig,
)
from lwm.errors import ConfigError
from lwm.parallel.sharding import ShardingRules

# The logical axis of `ShardingRules` that each setting of the model is the size of.
_DIMENSIONS = {
  "width": "model",
  "num_heads": "heads",
  "num_kv_heads": "kv_heads",
  "feed_forward_width": "feed_forward",
  "padded_vocab_size": "vocab",
}


def validate(experiment: AnyExperiment) -> None:
  """Raises ConfigError, one sentence that names the settings, unless the experiment makes sense.

  This needs no devices; `check_devices` compares the stages with the devices that exist.
  """
  if isinstance(experiment, VQGANExperiment):
    _check_vqgan(experiment)
  else:
    _check_model(experiment.model)
    _check_loss(experiment.loss)
  _check_optimizer(experiment.optimizer)
  for setting in (
    "checkpoint.every_steps",
    "checkpoint.keep",
    "evaluation.every_steps",
    "evaluation.rows",
    "data.threads",
    "data.prefetch_batches",
    "faults.spike_window",
    "faults.max_in_a_row",
  ):
    section, field = setting.split(".")
    _at_least(setting, getattr(getattr(experiment, section), field), 1)
  _one_of("faults.bad_step", experiment.faults.bad_step, experiment_lib.BAD_STEP_POLICIES)
  factor = experiment.faults.spike_factor
  if not (factor == 0 or (factor > 1 and math.isfinite(factor))):
    raise ConfigError(
      f"config.faults.spike_factor={factor} must be more than 1, or 0 for no limit."
    )

  names = [dataset.name for dataset in experiment.datasets]
  _unique("datasets", names)
  if isinstance(experiment, Experiment):
    for index, dataset in enumerate(experiment.datasets):
      _one_of(f"datasets[{index}].weighting", dataset.weighting, experiment_lib.WEIGHTINGS)
      _one_of(
        f"datasets[{index}].long_documents", dataset.long_documents, experiment_lib.LONG_DOCUMENTS
      )
  if not experiment.stages:
    raise ConfigError("config.stages is empty: an experiment needs at least one stage.")
  _unique("stages", [stage.name for stage in experiment.stages])
  stages: Sequence[AnyStage] = experiment.stages
  for index, stage in enumerate(stages):
    _check_stage(f"stages[{index}]", stage, names)


def check_devices(experiment: AnyExperiment, num_devices: int) -> None:
  """Raises ConfigError unless every stage and the model fit `num_devices` devices."""
  rules = ShardingRules()
  stages: Sequence[AnyStage] = experiment.stages
  for index, stage in enumerate(stages):
    where = f"config.stages[{index}]"
    sizes = stage.mesh.resolve(num_devices)
    if isinstance(stage, VQGANStage):
      rows, text = stage.frames_per_batch, f"frames_per_batch={stage.frames_per_batch} does"
    else:
      rows = stage.rows_per_batch // stage.accumulation_steps
      text = (
        f"{rows} rows per microbatch (tokens_per_batch {stage.tokens_per_batch} / "
        f"sequence_length {stage.sequence_length} / accumulation_steps "
        f"{stage.accumulation_steps}) do"
      )
    if rows % _product(rules.batch, sizes):
      raise ConfigError(
        f"{where}: {text} not divide over mesh {_by_axis(rules.batch, sizes)}: change one of them."
      )
    if isinstance(experiment, Experiment):
      assert isinstance(stage, Stage)
      _check_sequence(where, stage, sizes, rules)
      check_model_fits_mesh(experiment.model, sizes, rules)


def check_model_fits_mesh(
  model: ModelConfig, sizes: Mapping[str, int], rules: ShardingRules = ShardingRules()
) -> None:
  """Raises ConfigError, naming setting and axes, if a dimension does not divide over its mesh axes.

  Args:
    model: the decoder.
    sizes: devices along each mesh axis (`MeshConfig.resolve` or `Mesh.shape`).
    rules: which axes carry which dimension.
  """
  for setting, logical_axis in _DIMENSIONS.items():
    axes = getattr(rules, logical_axis) or ()
    axes = (axes,) if isinstance(axes, str) else axes
    # Without a configured multiple, the tables are padded to what the meshes need.
    if setting == "padded_vocab_size" and not model.vocab_multiple:
      continue
    size = getattr(model, setting)
    if size % _product(axes, sizes) == 0:
      continue
    name = f"config.model.{setting}"
    if setting == "padded_vocab_size":
      name = f"the number of ids with config.model.vocab_multiple={model.vocab_multiple}"
    raise ConfigError(
      f"{name} = {size} does not divide over mesh.{_by_axis(axes, sizes)}: change one of them."
    )
  if model.experts is not None:
    for setting, axes in (
      ("num_experts", rules.experts),
      ("width", () if rules.expert_feed_forward is None else (rules.expert_feed_forward,)),
    ):
      size = getattr(model.experts, setting)
      if size % _product(axes, sizes):
        raise ConfigError(
          f"config.model.experts.{setting} = {size} does not divide over "
          f"mesh.{_by_axis(axes, sizes)}: change one of them."
        )
  if rules.sequence is None:
    return
  # Key/value heads are repeated if they do not divide over `ulysses`.
  groups, exchanging = model.head_groups, (rules.tensor, rules.ulysses)
  if model.num_heads // groups % _product(exchanging, sizes):
    raise ConfigError(
      f"config.model.num_heads = {model.num_heads}{_groups(model)} does not divide over "
      f"mesh.{_by_axis(exchanging, sizes)}: change one of them, or use a larger mesh.{rules.ring} "
      "instead."
    )
  if model.num_kv_heads // groups % sizes[rules.tensor]:
    raise ConfigError(
      f"config.model.num_kv_heads = {model.num_kv_heads}{_groups(model)} does not divide over "
      f"mesh.{rules.tensor} = {sizes[rules.tensor]}: change one of them."
    )


def _product(axes: Iterable[str], sizes: Mapping[str, int]) -> int:
  return math.prod(sizes[axis] for axis in axes)


def _by_axis(axes: Iterable[str], sizes: Mapping[str, int]) -> str:
  """Names and sizes of mesh axes, like "data x fsdp = 2 x 4"."""
  return f"{' x '.join(axes)} = {' x '.join(str(sizes[axis]) for axis in axes)}"


def _groups(model: ModelConfig) -> str:
  return f" / head_groups = {model.head_groups}" if model.head_groups > 1 else ""


def _check_model(model: ModelConfig) -> None:
  for field in (
    "num_layers",
    "width",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "feed_forward_width",
    "text_vocab_size",
    "head_groups",
    "feed_forward_chunk",
    "loss_chunk",
  ):
    _at_least(f"model.{field}", getattr(model, field), 1)
  for field in ("vision_vocab_size", "vocab_multiple"):
    _at_least(f"model.{field}", getattr(model, field), 0)
  for index, stretch in enumerate(model.stretches):
    _at_least(f"model.stretches[{index}].num_layers", stretch.num_layers, 1)
    if stretch.kind == EXPERTS and model.experts is None:
      raise ConfigError(
        f"config.model.stretches[{index}].kind={EXPERTS!r} needs config.model.experts."
      )
  layers = sum(stretch.num_layers for stretch in model.resolved_stretches)
  if layers != model.num_layers:
    raise ConfigError(
      f"config.model.stretches have {layers} layers together, but config.model.num_layers="
      f"{model.num_layers}: make them the same."
    )
  if model.sliding_window is not None:
    _at_least("model.sliding_window", model.sliding_window, 1)
  if model.attention_soft_cap is not None:
    _positive("model.attention_soft_cap", model.attention_soft_cap)
  _one_of("model.compute_dtype", model.compute_dtype, COMPUTE_DTYPES)
  _one_of("model.remat", model.remat, REMAT_POLICIES)
  if model.num_heads % model.num_kv_heads:
    raise ConfigError(
      f"config.model.num_heads={model.num_heads} must be a multiple of "
      f"config.model.num_kv_heads={model.num_kv_heads}."
    )
  if model.num_kv_heads % model.head_groups:
    raise ConfigError(
      f"config.model.num_kv_heads={model.num_kv_heads} must be a multiple of "
      f"config.model.head_groups={model.head_groups}."
    )
  if model.experts is not None:
    _check_experts(model.experts)
  if model.lora is not None:
    _at_least("model.lora.rank", model.lora.rank, 1)
    _positive("model.lora.alpha", model.lora.alpha)
    if not model.lora.targets:
      raise ConfigError("config.model.lora.targets is empty: name at least one projection.")
    for index, target in enumerate(model.lora.targets):
      _one_of(f"model.lora.targets[{index}]", target, PROJECTIONS)
  if model.adapter is not None:
    _at_least("model.adapter.width", model.adapter.width, 1)
    for field in ("scale", "temperature"):
      _positive(f"model.adapter.{field}", getattr(model.adapter, field))
  if model.head_dim % 2:
    raise ConfigError(f"config.model.head_dim={model.head_dim} must be even: RoPE rotates pairs.")


def _check_experts(experts: ExpertsConfig) -> None:
  for field in ("num_experts", "experts_per_token", "width"):
    _at_least(f"model.experts.{field}", getattr(experts, field), 1)
  _at_least("model.experts.shared_experts", experts.shared_experts, 0)
  if experts.experts_per_token > experts.num_experts:
    raise ConfigError(
      f"config.model.experts.experts_per_token={experts.experts_per_token} is more than "
      f"config.model.experts.num_experts={experts.num_experts}."
    )
  _one_of("model.experts.router", experts.router, ROUTERS)
  _one_of("model.experts.placement", experts.placement, PLACEMENTS)
  _at_least("model.experts.spare_slots", experts.spare_slots, 1)
  if not 0 <= experts.load_decay < 1:
    raise ConfigError(
      f"config.model.experts.load_decay={experts.load_decay} must be at least 0 and less than 1."
    )
  _positive("model.experts.scale", experts.scale)
  for field in ("balance_loss", "router_z_loss", "bias_rate"):
    _not_negative(f"model.experts.{field}", getattr(experts, field))
  if experts.capacity_factor is not None:
    _positive("model.experts.capacity_factor", experts.capacity_factor)


def _check_loss(loss: LossConfig) -> None:
  _one_of("loss.softmax_range", loss.softmax_range, experiment_lib.SOFTMAX_RANGES)
  for field in ("text_weight", "vision_weight", "z_loss"):
    _not_negative(f"loss.{field}", getattr(loss, field))
  if loss.text_weight + loss.vision_weight <= 0:
    raise ConfigError("config.loss: text_weight and vision_weight are both 0: make one positive.")


def _check_vqgan(experiment: VQGANExperiment) -> None:
  for name, check in (
    ("vqgan", experiment.vqgan.validate),
    ("losses", lambda: experiment.losses.validate(experiment.vqgan)),
  ):
    try:
      check()
    except ValueError as error:
      raise ConfigError(f"config.{name}: {error}") from error
  if experiment.optimizer.trainable:
    raise ConfigError(
      "config.optimizer.trainable must be empty: a VQGAN's losses decide what is trained."
    )


def _check_optimizer(optimizer: OptimizerConfig) -> None:
  _one_of("optimizer.schedule", optimizer.schedule, experiment_lib.SCHEDULES)
  for field in ("peak_learning_rate", "clip_norm", "epsilon"):
    _positive(f"optimizer.{field}", getattr(optimizer, field))
  for field in ("end_learning_rate", "weight_decay"):
    _not_negative(f"optimizer.{field}", getattr(optimizer, field))
  _one_of("optimizer.moment_dtype", optimizer.moment_dtype, experiment_lib.MOMENT_DTYPES)
  for field in ("beta1", "beta2"):
    if not 0 <= getattr(optimizer, field) < 1:
      raise ConfigError(f"config.optimizer.{field}={getattr(optimizer, field)} is not in [0, 1).")


def _check_stage(where: str, stage: AnyStage, datasets: list[str]) -> None:
  _at_least(f"{where}.steps", stage.steps, 1)
  if stage.schedule is not None:
    _one_of(f"{where}.schedule", stage.schedule, experiment_lib.SCHEDULES)
  if stage.peak_learning_rate is not None:
    _positive(f"{where}.peak_learning_rate", stage.peak_learning_rate)
  if stage.end_learning_rate is not None:
    _not_negative(f"{where}.end_learning_rate", stage.end_learning_rate)
  if not 0 <= stage.warmup_steps <= stage.steps:
    raise ConfigError(
      f"config.{where}.warmup_steps={stage.warmup_steps} must be between 0 and steps={stage.steps}."
    )
  if not stage.mixture:
    raise ConfigError(f"config.{where}.mixture is empty; name at least one dataset.")
  for index, entry in enumerate(stage.mixture):
    _one_of(f"{where}.mixture[{index}].dataset", entry.dataset, datasets)
    _not_negative(f"{where}.mixture[{index}].weight", entry.weight)
  if sum(entry.weight for entry in stage.mixture) <= 0:
    raise ConfigError(f"config.{where}.mixture: all weights are 0; make one positive.")
  # The number of devices decides a size of -1, so it counts as 1 until then.
  sizes = {axis: max(n, 1) for axis, n in stage.mesh.axis_sizes().items()}
  if isinstance(stage, Stage):
    _check_batch(where, stage)
    _check_sequence(f"config.{where}", stage, sizes, ShardingRules())
    return
  _at_least(f"{where}.frames_per_batch", stage.frames_per_batch, 1)
  for axis, size in stage.mesh.axis_sizes().items():
    if size != 1 and axis not in ShardingRules().batch:
      raise ConfigError(
        f"config.{where}.mesh.{axis}={size} must be 1: frames are divided over "
        f"{' and '.join(ShardingRules().batch)} only."
      )


def _check_batch(where: str, stage: Stage) -> None:
  for field in ("sequence_length", "tokens_per_batch", "accumulation_steps"):
    _at_least(f"{where}.{field}", getattr(stage, field), 1)
  _positive(f"{where}.rope_theta", stage.rope_theta)
  _one_of(f"{where}.layout", stage.layout, experiment_lib.LAYOUTS)
  if stage.tokens_per_batch % stage.sequence_length:
    raise ConfigError(
      f"config.{where}.tokens_per_batch={stage.tokens_per_batch} must be a multiple of "
      f"sequence_length={stage.sequence_length}."
    )
  if stage.rows_per_batch % stage.accumulation_steps:
    raise ConfigError(
      f"config.{where}.accumulation_steps={stage.accumulation_steps} must divide the "
      f"{stage.rows_per_batch} rows of a batch (tokens_per_batch / sequence_length)."
    )


def _check_sequence(
  where: str, stage: Stage, sizes: Mapping[str, int], rules: ShardingRules
) -> None:
  ring = sizes[rules.ring]
  chunks = 2 * ring if stage.layout == "zigzag" and ring > 1 else ring
  if stage.sequence_length % chunks:
    raise ConfigError(
      f"{where}.sequence_length={stage.sequence_length} does not divide into the {chunks} chunks "
      f"of mesh.{rules.ring}={ring} with layout={stage.layout!r}: change one of them."
    )
  axes = rules.residual or ()
  if stage.sequence_length % _product(axes, sizes):
    raise ConfigError(
      f"{where}.sequence_length={stage.sequence_length} does not divide over mesh "
      f"{_by_axis(axes, sizes)}: change one of them."
    )


def _one_of(setting: str, value: str, allowed: Sequence[str]) -> None:
  if value not in allowed:
    choices = ", ".join(repr(name) for name in allowed) or "nothing: config.datasets is empty"
    raise ConfigError(f"config.{setting}={value!r} must be one of {choices}.")


def _unique(setting: str, names: list[str]) -> None:
  for name in names:
    if not name or names.count(name) > 1:
      raise ConfigError(
        f"config.{setting}: every entry needs its own name, but {name!r} is empty or used twice."
      )


def _at_least(setting: str, value: int, least: int) -> None:
  if value < least:
    raise ConfigError(f"config.{setting}={value} must be at least {least}.")


def _positive(setting: str, value: float) -> None:
  if not (value > 0 and math.isfinite(value)):
    raise ConfigError(f"config.{setting}={value} must be a positive number.")


def _not_negative(setting: str, value: float) -> None:
  if not (value >= 0 and math.isfinite(value)):
    raise ConfigError(f"config.{setting}={value} must be a finite number and not negative.")
