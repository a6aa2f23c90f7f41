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


def trained(checkout: pathlib.Path, num_devices: int, **mesh: int) -> dict:
  """What new_axis_worker.py prints, with the code in `checkout`."""
  process = subprocess.run(
    [sys.executable, WORKER, str(num_devices), json.dumps(mesh)],
    cwd=checkout,
    env=os.environ | {"PYTHONPATH": str(checkout)},
    capture_output=True,
    text=True,
  )
  assert process.returncode == 0, process.stderr
  return json.loads(process.stdout)


def test_a_new_axis_trains_and_is_planned(tmp_path):
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
  added = trained(tmp_path, 8, fsdp=2, expert=2, ring=2)
  expected = trained(CHECKOUT, 1, fsdp=1)["losses"]
  assert expected[-1] < expected[0]
  np.testing.assert_allclose(added["losses"], expected, rtol=1e-4)
  # It divides what fsdp divides.
  like_fsdp = trained(CHECKOUT, 8, fsdp=4, ring=2)
  for name in ("least_memory", "sent"):
    assert added[name] == like_fsdp[name]


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
