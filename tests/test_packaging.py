"""Pins, installed versions, and which packages may import which."""

import ast
import importlib.metadata
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).parent.parent


def pins(name: str) -> dict[str, str]:
  """The versions in a file, by package."""
  return {
    canonicalize_name(line.split("==")[0]): line.split("==")[1]
    for line in (ROOT / name).read_text().splitlines()
    if line and not line.startswith("#")
  }


PINS = pins("pins.txt")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def _requirements() -> list[Requirement]:
  optional = [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
  return [Requirement(line) for line in PROJECT["dependencies"] + optional]


@pytest.mark.parametrize("name", ["pins.txt", "pins_beam.txt"])
def test_pins_name_versions_only(name):
  for line in (ROOT / name).read_text().splitlines():
    assert line.startswith("#") or re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line), line


@pytest.mark.parametrize("requirement", _requirements(), ids=lambda requirement: requirement.name)
def test_every_dependency_is_pinned_within_its_range(requirement):
  # Beam has versions of its own for what others need too.
  pinned = pins("pins_beam.txt") | PINS
  assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)])


def test_installed_versions_are_the_pinned_ones():
  installed = {
    canonicalize_name(distribution.name): distribution.version
    for distribution in importlib.metadata.distributions()
  }
  wrong = {
    name: (installed[name], pin)
    for name, pin in PINS.items()
    if name in installed and installed[name] != pin
  }
  assert not wrong, "installed, pinned"


def test_hooks_run_the_tools_of_make_lint():
  config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
  lint = (ROOT / "Makefile").read_text().partition("\nlint:")[2].partition("\n\n")[0]
  tools = set(re.findall(r"\$\(BIN\)/(\w+)", lint))
  assert {repository["repo"] for repository in config["repos"]} == {"local"}
  hooks = [hook for repository in config["repos"] for hook in repository["hooks"]]
  assert {hook["entry"].split()[0] for hook in hooks} == {f".venv/bin/{tool}" for tool in tools}
  assert tools <= set(PINS)


def test_a_plain_install_needs_neither_tensorflow_nor_pytorch():
  assert not {"tensorflow", "torch"} & {requirement.name for requirement in _requirements()}


def test_our_kernels_and_transformers_live_side_by_side():
  """PyPI has a package named `kernels`, and transformers looks for it."""
  program = (
    "import kernels, transformers, pathlib; from transformers import LlamaConfig; LlamaConfig(); "
    f"assert pathlib.Path(kernels.__file__).parent.parent == pathlib.Path({str(ROOT)!r})"
  )
  # Run outside the checkout, where importing `kernels` cannot fail.
  subprocess.run([sys.executable, "-c", program], cwd=ROOT.parent, check=True)


def test_imports_point_one_way():
  layers = ("kernels", "lwm", "configs", "experiments")
  wrong = []
  for rank, layer in enumerate(layers):
    for path in (ROOT / layer).rglob("*.py"):
      for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
          names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
          names = [node.module or ""]
        else:
          continue
        wrong += [f"{path}: {name}" for name in names if name.split(".")[0] in layers[rank + 1 :]]
  assert not wrong


def test_kernels_need_only_arrays():
  banned = {"flax", "ml_collections", "orbax", "grain", "optax"}
  for path in (ROOT / "kernels").rglob("*.py"):
    tree = ast.parse(path.read_text())
    names = {
      alias.name.split(".")[0]
      for node in ast.walk(tree)
      if isinstance(node, ast.Import)
      for alias in node.names
    }
    names |= {
      (node.module or "").split(".")[0]
      for node in ast.walk(tree)
      if isinstance(node, ast.ImportFrom)
    }
    assert not names & banned, path
