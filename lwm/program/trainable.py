"""Which parameters a stage trains. The others are frozen: no gradients, no moments, no decay.

A parameter's name is its dotted path in the tree, such as `blocks.attention.query`, `embedding` or
`norm.scale`. Patterns are globs over whole names, in which `*` matches dots too.
"""

import dataclasses
import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from flax import traverse_util

from lwm import model as model_lib
from lwm.config.experiment import Experiment, Stage
from lwm.config.model import ModelConfig
from lwm.errors import ConfigError
from lwm.model import adapter, balance, lora
from lwm.model.flops import TrainedShares

# Settings of the model that add parameters to a base, and globs over the names of these.
ADDED = {"lora": lora.ADDED, "adapter": adapter.ADDED}


@dataclasses.dataclass(frozen=True)
class Trainable:
  """A division of a tree of parameters in two.

  Attributes:
    names: of the trained parameters; None: all are trained.
  """

  names: frozenset[str] | None = None

  def split(self, params: Any) -> tuple[Any, Any]:
    """The trained parameters and the frozen ones, as nested dicts without the others."""
    if self.names is None:
      return params, {}
    trained: dict[str, Any] = {}
    frozen: dict[str, Any] = {}
    for path, leaf in _flatten(params).items():
      (trained if path in self.names else frozen)[path] = leaf
    return _unflatten(trained), _unflatten(frozen)

  def join(self, trained: Any, frozen: Any) -> Any:
    """The inverse of `split`."""
    if self.names is None:
      return trained
    return _unflatten(_flatten(trained) | _flatten(frozen))


def trainable(experiment: Experiment, stage: Stage, params: Mapping[str, Any]) -> Trainable:
  """What `Stage.trainable`, or else `OptimizerConfig.trainable`, names.

  No optimizer trains what follows the loads of experts (lwm/model/balance.py). Without patterns,
  all other parameters are trained; of a model with parameters that were added to a base (ADDED),
  only the added ones are.

  Args:
    experiment: validated.
    stage: one of its stages.
    params: of the model, or a tree like them.

  Raises:
    ConfigError: a pattern matches no parameter.
  """
  where, patterns = "optimizer.trainable", experiment.optimizer.trainable
  if stage.trainable is not None:
    where, patterns = f"stages.trainable of stage {stage.name!r}", stage.trainable
  names = _flatten(params)
  balanced = [name for glob in balance.FOLLOWERS for name in fnmatch.filter(names, glob)]
  if not patterns:
    settings = _settings(experiment.model)
    if settings:
      return added_to(params, settings)
    return Trainable(frozenset(names).difference(balanced)) if balanced else Trainable()
  for pattern in patterns:
    if not fnmatch.filter(names, pattern):
      raise ConfigError(
        f"config.{where}: {pattern!r} matches no parameter; their names are {', '.join(names)}."
      )
  named = matching(params, patterns).names
  assert named is not None
  return Trainable(named.difference(balanced))


def matching(params: Mapping[str, Any], patterns: Iterable[str]) -> Trainable:
  """The parameters whose names match one of the patterns."""
  names = _flatten(params)
  return Trainable(
    frozenset(name for pattern in patterns for name in fnmatch.filter(names, pattern))
  )


def check_trainable(experiment: Experiment) -> None:
  """Raises ConfigError if a pattern of any stage matches no parameter."""
  for stage in experiment.stages:
    if experiment.optimizer.trainable or stage.trainable:
      trainable(experiment, stage, _abstract_params(experiment.model))


def added_to(params: Mapping[str, Any], settings: Sequence[str]) -> Trainable:
  """The parameters that these settings of the model, keys of ADDED, add to a base."""
  return matching(params, [ADDED[setting] for setting in settings])


def _settings(model: ModelConfig) -> list[str]:
  return [setting for setting in ADDED if getattr(model, setting)]


def trained_shares(experiment: Experiment, stage: Stage) -> TrainedShares:
  """The shares of the parameters that a stage trains, for counting FLOPs, bytes and traffic."""
  if not (experiment.optimizer.trainable or stage.trainable or _settings(experiment.model)):
    return TrainedShares()
  params = _abstract_params(experiment.model)
  trained, _ = trainable(experiment, stage, params).split(params)
  (body, tables), (all_body, all_tables) = _body_and_tables(trained), _body_and_tables(params)
  return TrainedShares(body / all_body, tables / all_tables)


# Parameters of models by their configuration: a planner asks for the same ones many times.
_ABSTRACT: dict[str, Any] = {}


def _abstract_params(config: ModelConfig) -> Any:
  key = repr(config)
  if key not in _ABSTRACT:
    _ABSTRACT[key] = model_lib.build(config).abstract()
  return _ABSTRACT[key]


def _body_and_tables(params: Any) -> tuple[int, int]:
  """Numbers of elements in stretches of layers, and in the embedding and the head."""
  tables = num_elements([params.get(name, {}) for name in ("embedding", "output")])
  return num_elements(params) - tables, tables


def num_elements(tree: Any) -> int:
  """Number of elements of all arrays."""
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _flatten(params: Any) -> dict[str, Any]:
  return traverse_util.flatten_dict(params, sep=".")


def _unflatten(leaves: dict[str, Any]) -> Any:
  return traverse_util.unflatten_dict(leaves, sep=".")
