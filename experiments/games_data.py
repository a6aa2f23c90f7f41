"""Makes films of Atari games, for configs/laptop_experts.py, in minutes on two CPU cores.

    make data
    .venv/bin/pip install --constraint pins.txt --editable '.[games]'
    python -m experiments.games_data

The package ale-py ships the games. Random actions play them, and the VQGAN and the tokenizer of
`make data` turn screens and captions into tokens. The last films of each game are held out.
"""

import importlib.util
import pathlib
from collections.abc import Iterator

import numpy as np
from absl import flags
from PIL import Image

from experiments import dataset_summary, flags as experiment_flags
from lwm.data.dataset import TRAIN, VALIDATION, Dataset
from lwm.data.documents import video_document
from lwm.data.tokenizer import load_tokenizer
from lwm.data.writer import DatasetWriter
from lwm.errors import UserError
from lwm.vision.codec import Codec

_DATA = flags.DEFINE_string(
  "data", "data/laptop", "Directory with tokenizer.model and vqgan.npz, to write `games` to."
)
_GAMES = flags.DEFINE_list(
  "games",
  "alien,amidar,assault,asterix,asteroids,bank_heist,battle_zone,beam_rider,boxing,breakout,"
  "centipede,chopper_command,demon_attack,enduro,freeway,frostbite,gopher,hero,kangaroo,krull,"
  "ms_pacman,pong,qbert,riverraid,road_runner,seaquest,space_invaders,tennis,up_n_down,zaxxon",
  "Games, as ale-py names them.",
)
_FILMS = flags.DEFINE_integer("films", 40, "Films per game to train on.", lower_bound=1)

_HELD_OUT = 2
# 15 frames of 257 tokens, a caption and the marks around both fit in 4096 tokens.
_FRAMES_PER_FILM = 15
# Atari shows 60 frames per second, so a film has 7.5 frames per second. Each action lasts as long.
_STEP = 8
# Before a film, the game goes on for fewer frames of the film than this.
_LONGEST_PAUSE = 60


def play(rom: pathlib.Path, films: int, resolution: int, seed: int) -> Iterator[np.ndarray]:
  """Yields films of a game, uint8 [15, resolution, resolution, 3]; none goes beyond a game's end.

  Args:
    rom: the game's file.
    films: how many to yield.
    resolution: to which the screen, 160x210, is scaled.
    seed: of the actions, and of the emulator, which repeats a quarter of them (arXiv 1709.06009).
  """
  from ale_py import ALEInterface, LoggerMode

  ALEInterface.setLoggerMode(LoggerMode.Error)
  emulator = ALEInterface()
  emulator.setInt("random_seed", seed)
  emulator.setFloat("repeat_action_probability", 0.25)
  emulator.loadROM(rom)
  actions, random = emulator.getMinimalActionSet(), np.random.default_rng(seed)

  for _ in range(films):
    frames: list[np.ndarray] = []
    pause = random.integers(_LONGEST_PAUSE)
    while len(frames) < _FRAMES_PER_FILM:
      if emulator.game_over():
        emulator.reset_game()
        frames.clear()
        pause = random.integers(_LONGEST_PAUSE)
      action = actions[random.integers(len(actions))]
      for _ in range(_STEP):
        emulator.act(action)
      if pause > 0:
        pause -= 1
      else:
        screen = Image.fromarray(emulator.getScreenRGB())
        frames.append(np.array(screen.resize((resolution, resolution), Image.Resampling.BOX)))
    yield np.stack(frames)


def main(argv: list[str]) -> None:
  del argv
  data = pathlib.Path(_DATA.value or "")
  if importlib.util.find_spec("ale_py") is None:
    raise UserError(
      "The games come with the package ale-py: run "
      "`.venv/bin/pip install --constraint pins.txt --editable '.[games]'` first."
    )
  from ale_py import roms

  games = {}
  for game in _GAMES.value or []:
    rom = roms.get_rom_path(game)
    if rom is None:
      known = ", ".join(roms.get_all_rom_ids())
      raise UserError(f"--games: ale-py has no game {game}; its games are {known}.")
    games[game] = rom
  for name in ("tokenizer.model", "vqgan.npz"):
    if not (data / name).is_file():
      raise UserError(f"{data / name} does not exist: run `make data` first, or name it in --data.")
  tokenizer, codec = load_tokenizer(data / "tokenizer.model"), Codec(data / "vqgan.npz")
  layout, path = codec.config.layout, data / "games"
  count = (_FILMS.value or 1) + _HELD_OUT
  with DatasetWriter(path, tokenizer, vqgan_sha256=codec.sha256, layout=layout) as writer:
    codes = []
    for seed, (game, rom) in enumerate(games.items()):
      frames = np.concatenate(list(play(rom, count, codec.config.resolution, seed)))
      codes.append(codec.encode(frames).reshape(count, _FRAMES_PER_FILM, -1))
      print(f"{game}: {count} films", flush=True)
    for film in range(count):
      for game, own in zip(games, codes):
        caption = f"A game of {game.replace('_', ' ')}."
        document = video_document(tokenizer, own[film], caption, layout)
        writer.write(TRAIN if film < count - _HELD_OUT else VALIDATION, document, game)
  dataset_summary.print_splits(Dataset(path))


if __name__ == "__main__":
  experiment_flags.run(main)
