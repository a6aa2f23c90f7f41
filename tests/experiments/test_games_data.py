"""`python -m experiments.games_data` on the real games, with a tiny VQGAN."""

import json
import pathlib

import numpy as np
import pytest
from ale_py import roms

from experiments.games_data import play
from lwm.data import Dataset, load_tokenizer, train_sentencepiece
from lwm.vision.codec import Codec
from tests import programs
from tests.lwm.films import TINY_VQGAN, write_vqgan


def write_tokenizer(path: pathlib.Path) -> pathlib.Path:
  train_sentencepiece(["A game of ms pacman.", "A game of pong."], path, 280)
  return path


def films(game: str, seed: int, count: int = 2) -> np.ndarray:
  rom = roms.get_rom_path(game)
  assert rom is not None
  return np.stack(list(play(rom, count, 32, seed)))


def test_a_seed_gives_the_same_films_again_and_another_seed_others():
  first = films("pong", 1)
  assert first.shape == (2, 15, 32, 32, 3) and first.dtype == np.uint8
  np.testing.assert_array_equal(first, films("pong", 1))
  assert (first != films("pong", 2)).any()


def test_the_screen_moves_within_a_film_and_films_differ():
  first, second = films("breakout", 0)
  assert (first[0] != first[-1]).any() and (first != second).any()


@pytest.mark.slow
def test_the_dataset_has_films_of_each_game_and_others_held_out(tmp_path):
  data = tmp_path / "laptop"
  write_vqgan(data / "vqgan.npz")
  tokenizer = load_tokenizer(write_tokenizer(data / "tokenizer.model"))
  ended = programs.run(
    "experiments.games_data", f"--data={data}", "--films=1", "--games=ms_pacman,pong"
  )
  assert ended.returncode == 0, ended.stderr
  dataset = Dataset(data / "games")
  dataset.check_tokenizer(tokenizer)
  manifest = json.loads((data / "games" / "manifest.json").read_text())
  assert manifest["vqgan_sha256"] == Codec(data / "vqgan.npz").sha256
  documents = {name: split["documents"] for name, split in dataset.manifest["splits"].items()}
  assert documents == {"train": 2, "validation": 4}
  split = dataset.split("train")
  for number, game in enumerate(["ms pacman", "pong"]):
    tokens, loss_mask = split.read(number, 0, int(split.lengths[number]))
    (vision,) = np.nonzero(tokens >= tokenizer.vocab_size)
    assert tokenizer.decode(tokens[1 : vision[0]]) == f"A game of {game}.<vision>"
    assert (np.nonzero(loss_mask)[0] == vision).all()
    assert len(vision) == 15 * (TINY_VQGAN.grid**2 + 1)


def test_a_game_that_does_not_exist_is_named(tmp_path):
  ended = programs.run("experiments.games_data", f"--data={tmp_path}", "--games=pong,pongs")
  assert ended.returncode == 1
  assert "--games: ale-py has no game pongs; its games are adventure, " in ended.stderr
  assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
  "has_games, words", [(True, "vqgan.npz does not exist: run `make data`"), (False, "'.[games]'")]
)
def test_what_is_missing_is_named(tmp_path, has_games, words):
  write_tokenizer(tmp_path / "tokenizer.model")
  program = (
    "import importlib.util, runpy, sys\n"
    "find = importlib.util.find_spec\n"
    f"hidden = {None if has_games else 'ale_py'!r}\n"
    "importlib.util.find_spec = lambda name, *a: None if name == hidden else find(name, *a)\n"
    f"sys.argv = ['games_data', '--data={tmp_path}']\n"
    "runpy.run_module('experiments.games_data', run_name='__main__')\n"
  )
  ended = programs.run(program)
  assert ended.returncode == 1
  assert words in ended.stderr and "Traceback" not in ended.stderr
