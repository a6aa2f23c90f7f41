"""What kernels ask about the program's NVIDIA GPU."""

import importlib.util

from jax.experimental.pallas import triton as pallas_triton

# The options of every Triton kernel. By default, Triton writes PTX for the newest CUDA that it
# knows, which the assembler of an older CUDA 13 refuses. JAX's oldest, 13.0, takes version 9.0.
TRITON_OPTIONS = dict(enable_fp_fusion=True, ptx_version=90)


def compute_capability() -> int:
  """Ten times the compute capability of the program's GPU; 0 if JAX does not know its name."""
  try:
    return pallas_triton.get_gpu_info().compute_capability
  except ValueError:  # JAX does not know names without "NVIDIA"; these GPUs predate Ampere.
    return 0


def triton_is_missing(fallback: str) -> str | None:
  """Why no Triton kernel runs here, or None.

  Args:
    fallback: the backend that runs everywhere.
  """
  if not pallas_triton.is_gpu_device():
    return f"it needs an NVIDIA GPU; '{fallback}' runs everywhere"
  if importlib.util.find_spec("jax_triton") is None:
    return "it needs jax-triton: pip install 'lwm[gpu]'"
  if compute_capability() < 80:
    return f"it needs an NVIDIA GPU of compute capability 8.0 (Ampere) or later; use '{fallback}'"
  return None
