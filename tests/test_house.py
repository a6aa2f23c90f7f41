"""The house rules that a syntax tree can check: one-way imports, short parameter lists, types."""

import ast
import pathlib
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PRODUCT = ("kernels", "lwm", "configs", "experiments")

# From the ground up: a package may import those before it. lwm/benchmark.py is a module of its own.
TOP_LEVEL = ("kernels", "lwm", "configs", "experiments")
ROOMS = (
  "errors",
  "parallel",
  "config",
  "cost",
  "vision",
  "data",
  "model",
  "program",
  "checkpoint",
  "convert",
  "plan",
  "report",
  "train",
  "infer",
  "evals",
  "benchmark",
)
# Packages whose functions take few parameters: what belongs together is an object.
FEW_PARAMETERS = ("lwm/train", "lwm/program", "lwm/report", "lwm/checkpoint")
MOST_PARAMETERS = 6
# The only files that use JAX's private modules; each says why.
PRIVATE_JAX = ("lwm/parallel/coordination.py",)


def _files(*folders: str) -> list[pathlib.Path]:
  return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def _tree(path: pathlib.Path) -> ast.Module:
  return ast.parse(path.read_text())


def _imports(tree: ast.AST) -> Iterator[str]:
  """Full names of what a file imports: `from a.b import c` is `a.b.c`."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _rank(name: str) -> tuple[int, int] | None:
  """Where a module of ours stands, from the ground up; None for others' modules."""
  top, *rest = name.split(".")
  if top not in TOP_LEVEL:
    return None
  return TOP_LEVEL.index(top), ROOMS.index(rest[0]) if top == "lwm" and rest else 0


def test_imports_point_one_way():
  wrong = []
  for path in _files(*PRODUCT):
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    if module == "lwm.__init__":
      continue
    for name in _imports(_tree(path)):
      rank = _rank(name)
      if rank is not None and rank > _rank(module):
        wrong.append(f"{module} imports {name}")
  assert not wrong


def test_every_room_has_its_place():
  names = {path.stem for path in (ROOT / "lwm").iterdir() if not path.name.startswith("_")}
  assert names <= set(ROOMS)


def test_no_import_for_type_checkers_alone():
  assert not [path for path in _files(*PRODUCT) if "TYPE_CHECKING" in path.read_text()]


def test_private_jax_modules_are_used_in_one_place():
  users = {
    str(path.relative_to(ROOT))
    for path in _files(*PRODUCT)
    if any(name.startswith("jax._src") for name in _imports(_tree(path)))
  }
  assert users <= set(PRIVATE_JAX)


def _functions(node: ast.AST, public: bool = True) -> Iterator[tuple[ast.FunctionDef, bool]]:
  """All functions, and whether each is public: not nested in another, no leading underscore."""
  for child in ast.iter_child_nodes(node):
    if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
      dunder = child.name in ("__init__", "__call__")
      yield child, public and (dunder or not child.name.startswith("_"))
      yield from _functions(child, public=False)
    elif isinstance(child, ast.ClassDef):
      yield from _functions(child, public and not child.name.startswith("_"))
    else:
      yield from _functions(child, public)


def _parameters(function: ast.FunctionDef) -> list[ast.arg]:
  arguments = function.args
  named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
  return [argument for argument in named if argument.arg not in ("self", "cls")]


@pytest.mark.parametrize("folder", FEW_PARAMETERS)
def test_functions_take_few_parameters(folder):
  long = [
    f"{path.relative_to(ROOT)}: {function.name} takes {len(_parameters(function))}"
    for path in _files(folder)
    for function, _ in _functions(_tree(path))
    if len(_parameters(function)) > MOST_PARAMETERS
  ]
  assert not long


@pytest.mark.parametrize("folder", PRODUCT)
def test_public_functions_are_annotated(folder):
  bare = []
  for path in _files(folder):
    for function, public in _functions(_tree(path)):
      if not public:
        continue
      names = [argument.arg for argument in _parameters(function) if argument.annotation is None]
      if function.returns is None and function.name != "__init__":
        names.append("return")
      if names:
        bare.append(f"{path.relative_to(ROOT)}:{function.lineno} {function.name}: {names}")
  assert not bare, "\n".join(bare)
