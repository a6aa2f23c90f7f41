"""Films as they are shown: rotation, mirroring, pixel aspect, transparency, ranges, bit depths."""

from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image, ImageOps

from lwm.vision.video import read_frames

RED, GREEN, BLUE, GREY = (230, 30, 30), (30, 230, 30), (30, 30, 230), (120, 120, 120)
HEIGHT, WIDTH = 64, 96


def quarters(alpha: bool = False) -> np.ndarray:
  """Red and green above blue and grey; with `alpha`, the left half is transparent."""
  pixels = np.full((HEIGHT, WIDTH, 4), 255, np.uint8)
  top, left = slice(HEIGHT // 2), slice(WIDTH // 2)
  bottom, right = slice(HEIGHT // 2, None), slice(WIDTH // 2, None)
  for row, column, colour in (
    (top, left, RED), (top, right, GREEN), (bottom, left, BLUE), (bottom, right, GREY)
  ):  # fmt: skip
    pixels[row, column, :3] = colour
  if alpha:
    pixels[:, left, 3] = 0
  return pixels if alpha else pixels[..., :3]


def write(path, codec: str, pixel_format: str, alpha: bool = False, prepare=lambda stream: None):
  """A film of two frames of `quarters`."""
  with av.open(str(path), "w") as container:
    stream = container.add_stream(codec, rate=10)
    stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, pixel_format
    prepare(stream)
    frame = av.VideoFrame.from_ndarray(quarters(alpha), format="rgba" if alpha else "rgb24")
    for number in range(2):
      frame.pts = number
      container.mux(stream.encode(frame))
    container.mux(stream.encode())
  return path


def corners(image: Image.Image) -> list[tuple[int, ...]]:
  """Colours near the corners, row by row."""
  pixels, edge = np.asarray(image), 6
  return [tuple(pixels[y, x].tolist()) for y in (edge, -edge) for x in (edge, -edge)]


def assert_shows(path, size, colours, atol=6):
  for image in read_frames(path):
    assert image.size == size
    np.testing.assert_allclose(corners(image), colours, atol=atol)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize(
  "degrees, mirrored, colours",
  [
    (0, False, [RED, GREEN, BLUE, GREY]),
    (90, False, [GREEN, GREY, RED, BLUE]),
    (180, False, [GREY, BLUE, GREEN, RED]),
    (270, False, [BLUE, RED, GREY, GREEN]),
    (0, True, [GREEN, RED, GREY, BLUE]),
    (90, True, [GREY, GREEN, BLUE, RED]),
    (180, True, [BLUE, GREY, RED, GREEN]),
    (270, True, [RED, BLUE, GREEN, GREY]),
  ],
)
def test_display_matrix(tmp_path, suffix, degrees, mirrored, colours):
  """PyAV's `set_display_rotation` turns counterclockwise, then mirrors left and right."""
  path = write(
    tmp_path / f"film.{suffix}",
    "libx264",
    "yuv420p",
    prepare=lambda stream: stream.set_display_rotation(degrees, hflip=mirrored),
  )
  assert_shows(path, (WIDTH, HEIGHT) if degrees % 180 == 0 else (HEIGHT, WIDTH), colours)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_of_an_image(tmp_path, orientation):
  exif = Image.Exif()
  exif[0x0112] = orientation
  Image.fromarray(quarters()).save(tmp_path / "photo.jpg", exif=exif, quality=95)
  with Image.open(tmp_path / "photo.jpg") as photo:
    upright = ImageOps.exif_transpose(photo)
  assert_shows(tmp_path / "photo.jpg", upright.size, corners(upright))


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
@pytest.mark.parametrize("aspect, size", [((2, 1), (192, 64)), ((1, 2), (96, 128))])
def test_pixels_that_are_not_square(tmp_path, suffix, aspect, size):
  def prepare(stream):
    stream.sample_aspect_ratio = Fraction(*aspect)

  path = write(tmp_path / f"film.{suffix}", "libx264", "yuv420p", prepare=prepare)
  assert_shows(path, size, [RED, GREEN, BLUE, GREY])
  assert next(read_frames(path, square_pixels=False)).size == (WIDTH, HEIGHT)


def test_pixel_aspect_is_that_of_the_film_before_it_is_turned(tmp_path):
  def prepare(stream):
    stream.sample_aspect_ratio = Fraction(2, 1)
    stream.set_display_rotation(90)

  path = write(tmp_path / "film.mp4", "libx264", "yuv420p", prepare=prepare)
  assert_shows(path, (HEIGHT, 2 * WIDTH), [GREEN, GREY, RED, BLUE])


@pytest.mark.parametrize(
  "name, codec, pixel_format",
  [
    ("film.mov", "qtrle", "argb"),
    ("film.mkv", "ffv1", "yuva420p"),
    ("twelve_bits.mov", "prores_ks", "yuva444p10le"),
    ("film.webm", "libvpx-vp9", "yuva420p"),
  ],
)
def test_transparent_pixels_are_white(tmp_path, name, codec, pixel_format):
  white = (255, 255, 255)
  path = write(tmp_path / name, codec, pixel_format, alpha=True)
  assert_shows(path, (WIDTH, HEIGHT), [white, GREEN, white, GREY])


def test_vp8_is_read_by_the_decoder_that_knows_transparency(tmp_path):
  """FFmpeg writes no VP8 with transparency: an opaque film is marked as if it had some."""
  path = write(tmp_path / "film.webm", "libvpx", "yuv420p")
  # Video element of 6 bytes (width, height), MaxBlockAdditionID 0 -> of 10 bytes, with AlphaMode 1.
  size = b"\xb0\x81\x60\xba\x81\x40"
  opaque, marked = (
    b"\xe0\x86" + size + b"\x55\xee\x81\x00",
    b"\xe0\x8a" + size + b"\x53\xc0\x81\x01",
  )
  path.write_bytes(path.read_bytes().replace(opaque, marked))
  with av.open(str(path)) as container:
    assert container.streams.video[0].metadata["alpha_mode"] == "1"
  assert_shows(path, (WIDTH, HEIGHT), [RED, GREEN, BLUE, GREY])


def test_transparent_entry_of_a_palette_is_white(tmp_path):
  image = Image.fromarray(quarters()).quantize(4)
  image.save(tmp_path / "image.png", transparency=image.getpixel((0, 0)))
  assert_shows(tmp_path / "image.png", (WIDTH, HEIGHT), [(255, 255, 255), GREEN, BLUE, GREY])


@pytest.mark.parametrize(
  "codec, pixel_format",
  [
    ("libx264", "yuvj420p"),
    ("ffv1", "yuv420p10le"),
    ("libx265", "yuv420p10le"),
    ("ffv1", "gbrp10le"),
  ],
)
def test_full_range_and_ten_bits(tmp_path, codec, pixel_format):
  path = write(tmp_path / "film.mkv", codec, pixel_format)
  assert_shows(path, (WIDTH, HEIGHT), [RED, GREEN, BLUE, GREY])


@pytest.mark.parametrize("pixel_format", ["gray", "gray10le"])
@pytest.mark.parametrize("limited", [False, True])
def test_grey_films_of_both_ranges(tmp_path, pixel_format, limited):
  path = tmp_path / "film.mkv"
  levels = np.linspace(16, 235, WIDTH).round().astype(np.uint8)
  with av.open(str(path), "w") as container:
    stream = container.add_stream("ffv1", rate=10)
    stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, pixel_format
    stream.codec_context.color_range = 1 if limited else 2
    frame = av.VideoFrame.from_ndarray(np.tile(levels, (HEIGHT, 1)), format="gray")
    container.mux(stream.encode(frame.reformat(format=pixel_format)))
    container.mux(stream.encode())
  expected = (levels - 16.0) * 255 / 219 if limited else levels
  (image,) = read_frames(path)
  np.testing.assert_allclose(np.asarray(image)[0], np.stack([expected] * 3, -1), atol=2)
