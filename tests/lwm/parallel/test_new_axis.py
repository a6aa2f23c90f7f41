"""A mesh axis is added in lwm/parallel/sharding.py and nowhere else."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np

CHECKOUT = pathlib.Path(__file__).parents[3]
WORKER = pathlib.Path(__file__).parent / "new_axis_worker.py"
# What a new axis that divides rows and stored parameters takes: text of sharding.py, and its
# replacement.
EDITS = (
  ("  fsdp: int = -1\n", "  fsdp: int = -1\n  expert: int = 1\n"),
  ('model: tuple[str, ...] = ("fsdp", ', 'model: tuple[str, ...] = ("fsdp", "expert", '),
  (
    'batch: tuple[str, ...] = ("data", "fsdp")',
    'batch: tuple[str, ...] = ("data", "fsdp", "expert")',
  ),
)
# The name of a mesh axis as a string.
AXIS = re.compile(r'"(data|fsdp|ring|ulysses|tensor)"')


def losses(checkout: pathlib.Path, num_devices: int, **mesh: int) -> list[float]:
  """Losses of a tiny model, trained by the code in `checkout`."""
  process = subprocess.run(
    [sys.executable, WORKER, str(num_devices), json.dumps(mesh)],
    cwd=checkout,
    env=os.environ | {"PYTHONPATH": str(checkout)},
    capture_output=True,
    text=True,
  )
  assert process.returncode == 0, process.stderr
  return json.loads(process.stdout)


def test_a_new_axis_trains_like_one_device(tmp_path):
  for folder in ("kernels", "lwm"):
    shutil.copytree(
      CHECKOUT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__")
    )
  path = tmp_path / "lwm" / "parallel" / "sharding.py"
  text = path.read_text()
  for old, new in EDITS:
    assert text.count(old) == 1, old
    text = text.replace(old, new)
  path.write_text(text)
  expected = losses(CHECKOUT, 1, fsdp=1)
  actual = losses(tmp_path, 8, fsdp=2, expert=2, ring=2)
  assert expected[-1] < expected[0]
  np.testing.assert_allclose(actual, expected, rtol=1e-4)


def test_only_sharding_names_the_mesh_axes():
  """Also not in a docstring. MeshConfig(...) names its fields without quotation marks."""
  named = [
    f"{path.relative_to(CHECKOUT)}:{number}"
    for folder in ("lwm", "configs")
    for path in sorted((CHECKOUT / folder).rglob("*.py"))
    for number, line in enumerate(path.read_text().splitlines(), start=1)
    if AXIS.search(line) and path.name != "sharding.py"
  ]
  assert not named
