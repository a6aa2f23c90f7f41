"""A run's first parameters: another run's (`Experiment.init_from`), or random ones."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lwm.checkpoint.identity import first_difference
from lwm.checkpoint.reader import StoredCheckpoint, newest
from lwm.config.experiment import Experiment
from lwm.errors import UserError
from lwm.program.stage import StageProgram
from lwm.program.trainable import ADDED, added_to, num_elements

# Settings of the model that may differ from the other run's. Rows for vision are added, and so are
# the parameters of the settings in ADDED to a model without them.
_MAY_DIFFER = ("vision_vocab_size", "initializer_std", "compute_dtype", "vocab_multiple")
# Settings that no parameter depends on, so that a run may continue with another value. It says so.
_CHANGEABLE = ("norm_epsilon", "rope_scaling", "sliding_window", "attention_soft_cap")


def initial_params(
  experiment: Experiment, program: StageProgram, tokenizer: bytes
) -> tuple[Any, str]:
  """The parameters that a run without a checkpoint starts from, sharded for the program.

  Each device reads or draws its own shards only. A model without vision rows is widened by them:
  the new rows of the embedding and columns of the head are drawn as `initializer_std` says. The
  parameters of `ModelConfig.lora` and `ModelConfig.adapter` are added to a model without them; they
  change nothing at first.

  Args:
    experiment: the run's.
    program: of its first stage.
    tokenizer: content of the run's tokenizer file.

  Returns:
    The parameters, and a sentence that says where they come from; empty for random ones.

  Raises:
    UserError: `init_from` has no checkpoint, or holds another model or tokenizer.
  """
  if not experiment.init_from:
    return program.initial_params(experiment.seed), ""
  stored = newest(pathlib.Path(experiment.init_from))
  stored.require(Experiment)
  theirs, ours = stored.config["model"], dataclasses.asdict(experiment.model)
  absent = [setting for setting in ADDED if theirs[setting] is None]
  may_differ = (*_MAY_DIFFER, *_CHANGEABLE, *absent)
  difference = first_difference(theirs, ours | {name: theirs[name] for name in may_differ}, "model")
  if difference is None and theirs["vision_vocab_size"] not in (0, ours["vision_vocab_size"]):
    sizes = theirs["vision_vocab_size"], ours["vision_vocab_size"]
    difference = "config.model.vision_vocab_size={}, not {}".format(*sizes)
  if difference is None and stored.tokenizer != tokenizer:
    difference = f"another tokenizer than {experiment.tokenizer}"
  if difference:
    raise UserError(
      f"config.init_from={experiment.init_from} holds a model with {difference}: change the "
      "config, or initialise from another run."
    )
  rows = theirs["text_vocab_size"] + theirs["vision_vocab_size"]
  origin = f"initial parameters: {stored.path}"
  for name in _CHANGEABLE:
    if change := first_difference(theirs[name], ours[name], f"model.{name}"):
      origin += f"; they were trained with {change}"
  if added := [setting for setting in absent if ours[setting]]:
    params, number = _with_added(program, stored, added, experiment.seed)
    settings = " and ".join(f"config.model.{setting}" for setting in added)
    origin += f"; {number:,} parameters of {settings} are added, which change nothing at first"
  else:
    params = stored.params(program.state.params)
  new = experiment.model.vocab_size - rows
  if not new:
    return params, origin
  params = _fill(program, params, rows, experiment.seed)
  tables = " and ".join(jax.tree_util.keystr(path, simple=True) for path in _tables(program))
  return params, f"{origin}; {new} new rows for vision ids in {tables} are drawn at random"


def _with_added(
  program: StageProgram, stored: StoredCheckpoint, settings: Sequence[str], seed: int
) -> tuple[Any, int]:
  """The stored parameters with drawn ones of these settings, and the number of elements added."""
  division = added_to(program.state.params, settings)
  added, base = division.split(program.state.params)
  drawn = jax.jit(
    lambda key: division.split(program.objective.model.init(key))[0],
    out_shardings=jax.tree.map(lambda leaf: leaf.sharding, added),
  )(jax.random.key(seed))
  return division.join(drawn, stored.params(base)), num_elements(added)


def _tables(program: StageProgram) -> list[Any]:
  """Paths of the parameters that have one row or column per id."""
  axes = jax.tree_util.tree_flatten_with_path(
    program.objective.model.logical_axes, is_leaf=lambda node: isinstance(node, tuple)
  )[0]
  return [path for path, names in axes if "vocab" in names]


def _fill(program: StageProgram, params: Any, rows: int, seed: int) -> Any:
  """The parameters with all ids from `rows` on drawn at random."""
  shardings = jax.tree.map(lambda leaf: leaf.sharding, program.state.params)

  def fill(params: Any, key: jax.Array) -> Any:
    random = program.objective.model.init(key)

    def merge(axes: tuple[str | None, ...], read: jax.Array, drawn: jax.Array) -> jax.Array:
      if "vocab" not in axes:
        return read
      index = jax.lax.broadcasted_iota(
        jnp.int32, read.shape, axes.index("vocab"), out_sharding=jax.typeof(read).sharding
      )
      return jnp.where(index < rows, read, drawn)

    return jax.tree.map(
      merge,
      program.objective.model.logical_axes,
      params,
      random,
      is_leaf=lambda node: isinstance(node, tuple),
    )

  return jax.jit(fill, out_shardings=shardings, donate_argnums=0)(params, jax.random.key(seed))
