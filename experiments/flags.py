"""The --config flag that programs share; every mistake in a flag ends in one sentence."""

import dataclasses
import difflib
import inspect
import logging as python_logging
import os
import re
import runpy
import sys
import typing
import warnings
from collections.abc import Callable, Collection
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from lwm.errors import RESUME_EXIT_CODE, ConfigError, ResumeError, UserError

# What `define_settings` was given, by the name of the flag.
_SETTINGS: dict[str, Any] = {}
_IN_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}


def define_config(required: bool = True) -> flags.FlagHolder:
  """Defines --config=FILE[:ARGUMENT]; each setting in it is a flag too: --config.seed=1."""
  holder = config_flags.DEFINE_config_file(
    "config", None, "Python file whose get_config() returns an experiment.", lock_config=False
  )
  _list_in_help("config")
  if required:
    flags.mark_flag_as_required("config")
  return holder


def define_settings(name: str, settings: Any) -> flags.FlagHolder:
  """Defines a flag for each setting of a dataclass: --NAME.SETTING=1."""
  _SETTINGS[name] = settings
  # ml_collections reads the overrides as soon as it defines the flag, so check them first.
  try:
    _override_types(sys.argv)
  except ConfigError as error:
    sys.exit(f"error: {error}")
  holder = config_flags.DEFINE_config_dataclass(name, settings)
  _list_in_help(name)
  return holder


def run(main: Callable[[list[str]], None], takes_arguments: bool = False) -> None:
  """Runs `main` by `absl.app.run`; a UserError or a wrong flag ends the program in one sentence.

  The exit status is then 1, and RESUME_EXIT_CODE for a ResumeError.

  Args:
    main: called with the arguments that are not flags, after the program's name.
    takes_arguments: whether such arguments are allowed; if not, they are an error.
  """
  # Hide what libraries print and users don't need: Orbax's line per save, stack traces of errors
  # that are raised as well, messages that the run prints itself, and warnings about the parts of a
  # checkpoint that Orbax abandons after one part has failed.
  logging.set_verbosity(logging.WARNING)
  logging.get_absl_handler().addFilter(_is_needed)
  sys.unraisablehook = _unraisablehook
  warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)

  def checked_main(argv: list[str]) -> None:
    try:
      if len(argv) > 1 and not takes_arguments:
        raise UserError(f"{argv[1]!r} is not a flag: flags begin with --.")
      main(argv)
    except ResumeError as error:
      print(error, file=sys.stderr)
      sys.exit(RESUME_EXIT_CODE)
    except UserError as error:
      sys.exit(f"error: {error}")

  app.run(checked_main, flags_parser=parse)


def _list_in_help(name: str) -> None:
  """Lists a flag under the program's own flags in --help."""
  flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])


def _is_needed(record: python_logging.LogRecord) -> bool:
  if "orbax" in record.pathname:
    return not record.exc_info and "preemption" not in record.getMessage()
  # When one of Orbax's tasks fails, asyncio logs the failures of all later tasks.
  return not (record.exc_info and record.name == "asyncio")


def _unraisablehook(unraisable: Any) -> None:
  # TensorStore raises this for each write that is still running after another write has failed.
  if str(unraisable.exc_value) != "Event loop is closed":
    sys.__unraisablehook__(unraisable)


def parse(argv: list[str]) -> list[str]:
  """Parses the flags; a wrong one ends the program in one sentence. Returns the other arguments."""
  try:
    kinds = _override_types(argv)
    try:
      return flags.FLAGS(argv)
    except flags.IllegalFlagValueError as error:
      flag = re.match(r"flag --(\w+[.\[][^=]*)=(.*?): ", str(error), re.DOTALL)
      if not flag or flag[1] not in kinds:
        raise
      # Settings of other types are groups that may be None.
      expected = _IN_WORDS.get(kinds[flag[1]], "`build` or `none`")
      raise ConfigError(f"--{flag[1]}={flag[2]} must be {expected}.") from error
  except (UserError, flags.Error) as error:
    sys.exit(f"error: {error}")


def _override_types(argv: list[str]) -> dict[str, type]:
  """The type of each setting that a flag overrides, by the flag's name.

  Raises a ConfigError for the first --NAME.PATH that names no setting: the errors of ml_collections
  name neither the flag nor what to do.
  """
  settings = _SETTINGS | {"config": None} if "config" in flags.FLAGS else _SETTINGS
  types: dict[str, type] = {}
  for index, argument in enumerate(argv):
    match = re.match(r"--?(?:no)?(\w+)([.\[][^=]*)?(?:=(.*))?$", argument, re.DOTALL)
    if not match or match[1] not in settings:
      continue
    name, path, value = match.groups()
    if path is None and name != "config":
      raise ConfigError(f"{argument}: --{name} is a group of settings; set one of them.")
    if path is None:
      file = value if value is not None else "".join(argv[index + 1 : index + 2])
      settings = settings | {name: _load(file)}
    elif settings[name] is None:
      raise ConfigError(f"{argument}: --config=FILE must come before the flags that override it.")
    else:
      types[name + path] = _setting_type(settings[name], name, path, types)
  return types


def _load(path: str) -> Any:
  name, _, parameter = path.partition(":")
  arguments = [parameter] if parameter else []
  if not os.path.isfile(name):
    raise ConfigError(f"--config={path}: there is no file {name!r}; name a Python file.")
  try:
    get_config = runpy.run_path(name).get("get_config")
  except (OSError, ImportError, SyntaxError) as error:
    raise ConfigError(f"--config={path}: this file cannot be used: {error}.") from error
  if get_config is None:
    raise ConfigError(f"--config={path}: this file cannot be used: it defines no get_config().")
  try:
    inspect.signature(get_config).bind(*arguments)
  except TypeError as error:
    raise ConfigError(
      f"--config={path}: {error} of get_config(): change what follows the colon."
    ) from error
  # A parameter that takes certain names has the type Literal["a", "b"].
  for kind in typing.get_type_hints(get_config).values():
    names = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else (parameter,)
    if parameter and parameter not in names:
      raise ConfigError(f"--config={path}: after the colon, it takes {' or '.join(names)}.")
  return get_config(*arguments)


def _setting_type(node: Any, flag: str, path: str, given: Collection[str]) -> type:
  """The type of one setting.

  Args:
    node: the settings of the flag.
    flag: its name.
    path: of the setting in `node`, such as `.a.b[2].c`.
    given: names of the settings that earlier flags override.

  Raises:
    ConfigError: there is no such setting, or it is a group of settings.
  """
  where, is_optional = flag, False
  kind: Any = type(node)
  for name, index in re.findall(r"\.([^.\[\]]*)|\[([^\]]*)\]", path):
    if index:
      if not isinstance(node, list) or not index.isdigit() or int(index) >= len(node):
        size = "is not a list"
        if isinstance(node, list):
          size = f"has {len(node)} entries, numbered from 0"
        raise ConfigError(f"--{flag}{path}: there is no {where}[{index}]; {where} {size}.")
      node = node[int(index)]
      kind, is_optional = type(node), False
      where += f"[{index}]"
    else:
      if is_optional and node is None:
        raise ConfigError(f"--{flag}{path}: {where} is None; give --{where}=build before it.")
      types = (
        {field.name: field.type for field in dataclasses.fields(node)}
        if dataclasses.is_dataclass(node)
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
    raise ConfigError(f"--{flag}{path}: {where} is a group of settings; set one of them.")
  return kind
