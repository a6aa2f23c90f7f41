import pathlib
from unittest import mock

import jax

from lwm.train import loop


def test_trains(experiment, tmp_path):
  with mock.patch("jax.devices", lambda *_: jax.local_devices()[:1]):
    loop.train(experiment, tmp_path / "run")
