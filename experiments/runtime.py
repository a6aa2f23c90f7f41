"""What every program that runs JAX sets first."""

import os
import pathlib

import jax

from lwm.errors import UserError


def devices() -> list[jax.Device]:
  """Those of all processes.

  Raises:
    UserError: JAX has none of the platform that it was told to take.
  """
  try:
    return jax.devices()
  except (AssertionError, RuntimeError) as error:
    reason = str(error).partition("\n")[0] or "no device of it"
    raise UserError(
      f"JAX cannot start, JAX_PLATFORMS being {os.environ.get('JAX_PLATFORMS')} ({reason}): "
      "pip install --constraint pins.txt '.[gpu]' or '.[tpu]' where such devices are, or take "
      "cpu."
    ) from error


def use_compilation_cache() -> None:
  """Keeps compiled programs in ~/.cache/lwm, so that a resumed run starts at once.

  An entry that a kill cut short is passed over with a warning and compiled anew. JAX's own setting,
  JAX_COMPILATION_CACHE_DIR, comes first. Several CPU devices go without: jaxlib 0.11.2 has been
  seen to compute wrong gradients of a ring of CPU devices with a program from the cache.
  """
  several_cpus = jax.default_backend() == "cpu" and jax.device_count() > 1
  if jax.config.jax_compilation_cache_dir is None and not several_cpus:
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(cache / "lwm" / "jax"))
