"""The --config flag of every program, with one sentence for whatever is wrong with it."""

import dataclasses
import difflib
import inspect
import os
import re
import runpy
import sys
import typing
import warnings
from collections.abc import Collection
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from lwm.errors import RESUME_EXIT_CODE, ConfigError, ResumeError, UserError

# Of `define_settings`, by the flag's name.
_SETTINGS = {}
_IN_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}


def define_config(required: bool = True) -> flags.FlagHolder:
  """Defines --config=FILE[:ARGUMENT]; its settings are flags too: --config.seed=1."""
  holder = config_flags.DEFINE_config_file(
    "config", None, "A Python file whose get_config() returns an Experiment.", lock_config=False
  )
  _list_in_help("config")
  if required:
    flags.mark_flag_as_required("config")
  return holder


def define_settings(name: str, settings: Any) -> flags.FlagHolder:
  """Defines a flag for each setting of a dataclass: --NAME.SETTING=1."""
  _SETTINGS[name] = settings
  # ml_collections reads what overrides them here already.
  try:
    _override_types(sys.argv)
  except ConfigError as error:
    sys.exit(f"error: {error}")
  holder = config_flags.DEFINE_config_dataclass(name, settings)
  _list_in_help(name)
  return holder


def run(main, takes_arguments: bool = False) -> None:
  """`absl.app.run`, but a UserError or a wrong flag ends in one sentence and exit status 1.

  A ResumeError does so with exit status RESUME_EXIT_CODE.

  Args:
    main: called with the list of arguments that are no flags, the program's name first.
    takes_arguments: whether there may be any beside that; else they are an error.
  """
  # The library's own notes (Orbax: a line per save) are not for the person at the terminal; nor are
  # the stack traces that come with errors that are also raised, nor what a run says itself; nor the
  # items of a checkpoint that Orbax leaves behind when the first has failed.
  logging.set_verbosity(logging.WARNING)
  logging.get_absl_handler().addFilter(_is_told_once)
  sys.unraisablehook = _unraisablehook
  warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)

  def checked_main(argv: list[str]) -> None:
    try:
      if len(argv) > 1 and not takes_arguments:
        raise UserError(f"{argv[1]!r} is no flag: flags begin with --.")
      main(argv)
    except ResumeError as error:
      print(error, file=sys.stderr)
      sys.exit(RESUME_EXIT_CODE)
    except UserError as error:
      sys.exit(f"error: {error}")

  app.run(checked_main, flags_parser=_parse)


def _list_in_help(name: str) -> None:
  """Makes a flag one of the program's own."""
  flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])


def _is_told_once(record) -> bool:
  if "orbax" in record.pathname:
    return not record.exc_info and "preemption" not in record.getMessage()
  # asyncio logs what happened to those of Orbax's tasks that came after the first to fail.
  return not (record.exc_info and record.name == "asyncio")


def _unraisablehook(unraisable) -> None:
  # TensorStore comes here with each write of a checkpoint that outlives the one that failed.
  if str(unraisable.exc_value) != "Event loop is closed":
    sys.__unraisablehook__(unraisable)


def _parse(argv: list[str]) -> list[str]:
  try:
    kinds = _override_types(argv)
    try:
      return flags.FLAGS(argv)
    except flags.IllegalFlagValueError as error:
      flag = re.match(r"flag --(\w+[.\[][^=]*)=(.*?): ", str(error), re.DOTALL)
      if not flag or flag[1] not in kinds:
        raise
      # Else a group that may be None.
      expected = _IN_WORDS.get(kinds[flag[1]], "build or none")
      raise ConfigError(f"--{flag[1]}={flag[2]}: this setting takes {expected}.") from error
  except (UserError, flags.Error) as error:
    sys.exit(f"error: {error}")


def _override_types(argv: list[str]) -> dict[str, type]:
  """The type of each setting that a flag overrides, by the flag's name.

  Raises ConfigError for the first --NAME.PATH that the settings have no place for: ml_collections
  would raise what its own data structures raise, which names neither flag nor cure.
  """
  settings = _SETTINGS | {"config": None} if "config" in flags.FLAGS else _SETTINGS
  types = {}
  for index, argument in enumerate(argv):
    match = re.match(r"--?(?:no)?(\w+)([.\[][^=]*)?(?:=(.*))?$", argument, re.DOTALL)
    if not match or match[1] not in settings:
      continue
    name, path, value = match.groups()
    if path is None and name != "config":
      raise ConfigError(f"{argument}: --{name} is a group of settings; override one of them.")
    if path is None:
      file = value if value is not None else "".join(argv[index + 1 : index + 2])
      settings = settings | {name: _load(file)}
    elif settings[name] is None:
      raise ConfigError(f"{argument}: --config=FILE must come before what overrides it.")
    else:
      types[name + path] = _setting_type(settings[name], name, path, types)
  return types


def _load(path: str):
  name, _, parameter = path.partition(":")
  arguments = [parameter] if parameter else []
  if not os.path.isfile(name):
    raise ConfigError(f"--config={path}: there is no file {name!r}.")
  try:
    get_config = runpy.run_path(name).get("get_config")
  except (OSError, ImportError, SyntaxError) as error:
    raise ConfigError(f"--config={path}: cannot use this file: {error}.") from error
  if get_config is None:
    raise ConfigError(f"--config={path}: cannot use this file: it defines no get_config().")
  try:
    inspect.signature(get_config).bind(*arguments)
  except TypeError as error:
    raise ConfigError(f"--config={path}: {error} of get_config(), after the colon.") from error
  return get_config(*arguments)


def _setting_type(node, flag: str, path: str, given: Collection[str]) -> type:
  """The type of the setting at `.a.b[2].c` of a flag's `node`, behind those that are `given`."""
  where, is_optional = flag, False
  kind = type(node)
  for name, index in re.findall(r"\.([^.\[\]]*)|\[([^\]]*)\]", path):
    if index:
      if not isinstance(node, list) or not index.isdigit() or int(index) >= len(node):
        size = "is no list"
        if isinstance(node, list):
          size = f"has {len(node)} entries, counted from 0"
        raise ConfigError(f"--{flag}{path}: there is no {where}[{index}]; {where} {size}.")
      node = node[int(index)]
      kind, is_optional = type(node), False
      where += f"[{index}]"
    else:
      if is_optional and node is None:
        raise ConfigError(f"--{flag}{path}: {where} is None; say --{where}=build before it.")
      types = (
        {field.name: field.type for field in dataclasses.fields(node)}
        if (dataclasses.is_dataclass(node))
        else {}
      )
      if name not in types:
        close = difflib.get_close_matches(name, types, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"it has: {', '.join(types) or 'none'}."
        raise ConfigError(f"--{flag}{path}: {where} has no setting {name!r}; {hint}")
      node, kind = getattr(node, name), types[name]
      kind = next((member for member in typing.get_args(kind) if member is not type(None)), kind)
      is_optional = dataclasses.is_dataclass(kind) and kind is not types[name]
      where += f".{name}"
      if is_optional and where in given:
        node = kind()
  if (dataclasses.is_dataclass(node) and not is_optional) or isinstance(node, list):
    raise ConfigError(f"--{flag}{path}: {where} is a group of settings; override one of them.")
  return kind
