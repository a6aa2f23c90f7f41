"""Pages that cannot rot: their examples run, and the flags, targets and files they name exist.

A page may have four kinds of blocks, named after the opening fence. `python` and `sh run` blocks
run, in one namespace and one temporary directory per page. Nothing runs in a `sh` block: its flags
are parsed by the programs that it calls, and its make targets exist. A `text` block is a picture,
or what a program prints.
"""

import os
import pathlib
import re
import runpy
import shlex
import subprocess
import sys

import pytest
from absl import flags

from experiments import flags as experiment_flags
from lwm.config.validate import validate

ROOT = pathlib.Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]
MOST_LINES = 119
BLOCK = re.compile(r"^```(.*?)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: pathlib.Path, *kinds: str) -> list[tuple[str, str]]:
  return [match for match in BLOCK.findall(page.read_text()) if not kinds or match[0] in kinds]


def commands() -> list[list[str]]:
  """The words of each command in the plain sh blocks of all pages."""
  lines = []
  for page in PAGES:
    for _, text in blocks(page, "sh"):
      lines += text.replace("\\\n", " ").splitlines()
  return list(filter(None, (shlex.split(line, comments=True) for line in lines)))


PROGRAMS = [command for command in commands() if "experiments" in " ".join(command)]
MAKE = sorted({word for command in commands() if command[0] == "make" for word in command[1:]})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_are_of_known_kinds(page):
  kinds = {kind for kind, _ in blocks(page)}
  assert kinds <= {"python", "sh run", "sh", "text"}
  assert page.read_text().count("```") == 2 * len(blocks(page))


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_a_page_is_short(page):
  assert len(page.read_text().splitlines()) <= MOST_LINES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_run(page, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  namespace = {"__name__": page.stem}
  environment = os.environ | {
    "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
    "PYTHONPATH": str(ROOT),
  }
  for kind, text in blocks(page, "python", "sh run"):
    if kind == "python":
      exec(compile(text, str(page), "exec"), namespace)
    else:
      done = subprocess.run(
        ["bash", "-euc", text], env=environment, text=True, capture_output=True, timeout=300
      )
      assert done.returncode == 0, done.stderr


@pytest.fixture
def no_flags():
  """Without the flags of programs, which other tests in this process may have imported."""
  modules = {name: flags.FLAGS.find_module_defining_flag(name) for name in flags.FLAGS}
  # Flags that were put back below have no module.
  ours = [
    name for name, module in modules.items() if not module or module.startswith("experiments.")
  ]
  others = {name: flags.FLAGS[name] for name in ours}
  for name in others:
    delattr(flags.FLAGS, name)
  yield
  for name in set(flags.FLAGS) - (modules.keys() - others.keys()):
    delattr(flags.FLAGS, name)
  for name, flag in others.items():
    flags.FLAGS[name] = flag


@pytest.mark.parametrize("command", PROGRAMS, ids=lambda command: " ".join(command)[:60])
def test_programs_take_the_flags(command, no_flags, monkeypatch):
  monkeypatch.chdir(ROOT)
  program = "train"
  if "-m" in command:
    program = command[command.index("-m") + 1].removeprefix("experiments.")
  arguments = [word for word in command if word.startswith("--") and "--nodes" not in word]
  monkeypatch.setattr(sys, "argv", [program, *arguments])
  monkeypatch.setattr(experiment_flags, "_SETTINGS", {})
  # Under another name than __main__, a program defines its flags and does not run.
  runpy.run_module(f"experiments.{program}", run_name="example")
  experiment_flags.parse(sys.argv)
  if "config" in flags.FLAGS and flags.FLAGS.config is not None:
    validate(flags.FLAGS.config)


@pytest.mark.parametrize("target", MAKE)
def test_make_has_the_target(target):
  assert f"\n{target}:" in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page):
  text = BLOCK.sub("", page.read_text())
  links = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text)]
  named = [page.parent / link for link in links if link and "://" not in link]
  named += [
    ROOT / name
    for name in re.findall(r"`([\w./-]*/[\w./-]*|[\w-]+\.(?:md|txt|toml))`", text)
    if not name.startswith(("data/", "runs/")) and not re.search("NAME|SPLIT|WORKDIR", name)
  ]
  assert not [str(path) for path in named if not path.exists()]
