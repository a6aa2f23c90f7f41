"""Eight CPU devices in every test process, and JAX's compilation cache."""

import os
import pathlib
import tempfile

os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "")
  + " --xla_force_host_platform_device_count=8"
  # With it, jaxlib 0.11.2 computes wrong gradients of a ring with a program from the cache.
  + " --xla_cpu_enable_concurrency_optimized_scheduler=false"
)
# Fewer threads may all wait in collectives: see lwm/parallel/xla_flags.py.
os.environ.setdefault("PJRT_NPROC", "128")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(tempfile.gettempdir()) / "lwm-test-jax-cache")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
# Test processes side by side compile for TPUs with libtpu, which no one here runs on.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
