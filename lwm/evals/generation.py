"""How generated frames differ from true ones, measured with no weights but the model's own VQGAN.

Frames are compared with the truth one by one (PSNR and SSIM), and as sets: the Frechet distance
between Gaussians (Heusel et al., arXiv 1706.08500) of the frames' mean code vectors, and the
Jensen-Shannon divergence of the codes' frequencies.

C clips, N frames, P codes per frame, V codes of the codebook, E codebook width; H, W pixels.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from lwm.infer import Clip, Engine, Grammar, Sampling, sampled_codes
from lwm.vision.codec import Codec
from lwm.vision.similarity import structural_similarity


def continue_clips(
  engine: Engine, grammar: Grammar, prompts: Sequence[np.ndarray], seeds: Sequence[int], rows: int
) -> list[np.ndarray]:
  """The codes [N, P] of the frames that follow each prompt.

  Args:
    engine: of the model.
    grammar: of pictures with a number of frames.
    prompts: at most `rows` of them, each ends after <vision> or after a frame.
    seeds: one per prompt.
    rows: number of rows for which programs are compiled.
  """
  pictures = grammar.pictures
  assert pictures is not None and pictures.frames is not None
  layout = pictures.layout
  count = pictures.frames * layout.tokens_per_frame
  missing = rows - len(prompts)
  padded = [*prompts, *[prompts[0]] * missing]
  session = engine.open(padded, max(map(len, padded)) + count)
  sampling = Sampling(grammar, count, block=layout.tokens_per_frame)
  tokens: list[list[int]] = [[] for _ in padded]
  for block in session.generate(sampling, [*seeds, *[seeds[0]] * missing]):
    for own, new in zip(tokens, block):
      own += new
  return [sampled_codes(np.array(own), pictures.first, layout) for own, _ in zip(tokens, prompts)]


def compare_with_truth(codec: Codec, clip: Clip, codes_NxP: np.ndarray) -> dict[str, list[float]]:
  """Squared error and SSIM of each generated frame, and of the last given frame in its place.

  The truth is what the VQGAN makes of the true codes, so its own losses don't count.

  Args:
    codec: the VQGAN.
    clip: the truth; the frames before the last `N` were given.
    codes_NxP: generated.
  """
  given = len(clip.codes_NxP) - len(codes_NxP)
  truth_NxHxWx3 = codec.decode(clip.codes_NxP)
  found = _errors(truth_NxHxWx3[given:], codec.decode(codes_NxP), "")
  if given:
    still_NxHxWx3 = np.broadcast_to(truth_NxHxWx3[given - 1], truth_NxHxWx3[given:].shape)
    found |= _errors(truth_NxHxWx3[given:], still_NxHxWx3, "still_")
  return found


def _errors(truth_NxHxWx3: np.ndarray, other_NxHxWx3: np.ndarray, name: str) -> dict[str, Any]:
  error_N = np.square(truth_NxHxWx3.astype(np.float64) - other_NxHxWx3).mean((1, 2, 3))
  similarity_N = jax.jit(structural_similarity)(truth_NxHxWx3, other_NxHxWx3)
  return {
    f"{name}squared_error": error_N.tolist(),
    f"{name}ssim": np.asarray(similarity_N, np.float64).tolist(),
  }


def frechet_distance(ours_NxE: np.ndarray, theirs_NxE: np.ndarray) -> float:
  """The squared Frechet distance between Gaussians with the means and covariances of two sets.

  Args:
    ours_NxE: features, at least two rows.
    theirs_NxE: features of the other set.
  """
  (ours_E, ours_ExE), (theirs_E, theirs_ExE) = (
    (features.mean(0), np.atleast_2d(np.cov(features, rowvar=False)))
    for features in (ours_NxE.astype(np.float64), theirs_NxE.astype(np.float64))
  )
  # The trace of the square root of the product, by matrices that are symmetric.
  values_E, vectors_ExE = np.linalg.eigh(ours_ExE)
  root_ExE = vectors_ExE * np.sqrt(np.maximum(values_E, 0)) @ vectors_ExE.T
  product_E = np.linalg.eigvalsh(root_ExE @ theirs_ExE @ root_ExE)
  overlap = np.sqrt(np.maximum(product_E, 0)).sum()
  distance = np.square(ours_E - theirs_E).sum()
  distance += np.trace(ours_ExE) + np.trace(theirs_ExE) - 2 * overlap
  return max(0.0, float(distance))  # Rounding can leave less than nothing.


def code_divergence(ours: np.ndarray, theirs: np.ndarray, size: int) -> float:
  """The Jensen-Shannon divergence in bits, 0 to 1, of how often two sets have each code.

  Args:
    ours: codes of any shape.
    theirs: codes of the other set.
    size: of the codebook.
  """
  frequencies_2xV = np.stack(
    [np.bincount(codes.reshape(-1), minlength=size) / codes.size for codes in (ours, theirs)]
  )
  return _entropy(frequencies_2xV.mean(0)) - sum(map(_entropy, frequencies_2xV)) / 2


def _entropy(frequency_V: np.ndarray) -> float:
  """In bits."""
  positive = frequency_V[frequency_V > 0]
  return float(-(positive * np.log2(positive)).sum())


def compare_sets(
  codec: Codec, ours_CxNxP: np.ndarray, theirs_CxNxP: np.ndarray
) -> dict[str, float]:
  """How a set of clips differs from another one, and what it is like.

  Args:
    codec: the VQGAN.
    ours_CxNxP: codes of the clips.
    theirs_CxNxP: of true clips.

  Returns:
    frechet_distance, code_divergence, usage (fraction of the codebook that occurs), perplexity (of
    the codes' frequencies), and repetition (fraction of codes that equal the code at
    the same place in the frame before).
  """
  codebook_VxE = np.asarray(codec.state["codebook"][...])
  size, codes = len(codebook_VxE), ours_CxNxP.shape[-1]
  ours_NxE, theirs_NxE = (
    codebook_VxE[clips.reshape(-1, codes)].mean(1) for clips in (ours_CxNxP, theirs_CxNxP)
  )
  counts_V = np.bincount(ours_CxNxP.reshape(-1), minlength=size)
  found = {
    "frechet_distance": frechet_distance(ours_NxE, theirs_NxE),
    "code_divergence": code_divergence(ours_CxNxP, theirs_CxNxP, size),
    "usage": float((counts_V > 0).mean()),
    "perplexity": 2.0 ** _entropy(counts_V / counts_V.sum()),
  }
  if ours_CxNxP.shape[1] > 1:
    found["repetition"] = float((ours_CxNxP[:, 1:] == ours_CxNxP[:, :-1]).mean())
  return found
