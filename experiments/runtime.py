"""What programs set before they use JAX."""

import os
import pathlib

import jax

from lwm.errors import UserError


def devices() -> list[jax.Device]:
  """The devices of all processes.

  Raises:
    UserError: JAX finds no device of the platform that JAX_PLATFORMS names.
  """
  try:
    return jax.devices()
  except (AssertionError, RuntimeError) as error:
    reason = str(error).partition("\n")[0] or "no such device"
    raise UserError(
      f"JAX cannot start with JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS')} ({reason}): run "
      "`pip install --constraint pins.txt '.[gpu]'` or '.[tpu]' on a machine with such devices, or "
      "set JAX_PLATFORMS=cpu."
    ) from error


def use_compilation_cache() -> None:
  """Keeps compiled programs in ~/.cache/lwm, so that a resumed run starts quickly.

  JAX skips an entry that a killed process left unfinished, with a warning, and compiles the program
  again. JAX's own setting, JAX_COMPILATION_CACHE_DIR, takes precedence. Runs on several CPU devices
  never use a cache: with jaxlib 0.11.2, their cached programs have computed wrong gradients of a
  ring, and waited forever in collectives.
  """
  if jax.default_backend() == "cpu" and jax.device_count() > 1:
    jax.config.update("jax_enable_compilation_cache", False)
  elif jax.config.jax_compilation_cache_dir is None:
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(cache / "lwm" / "jax"))
