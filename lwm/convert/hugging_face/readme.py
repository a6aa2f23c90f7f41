"""README.md of an exported model with vision ids: how to sample frames without this code."""

from lwm.config.vqgan import VQGANConfig
from lwm.convert.hugging_face.config import VISION, Settings
from lwm.data.vision_tokens import VISION_END, VISION_START

# The directory of the VQGAN beside the model.
VQGAN = "vqgan"

_TEXT = """\
# A model of text and video

A `{class_name}` whose ids are text and frames of video. Exported by `lwm`; the numbers below are
under `{vision}` in config.json too.

| ids | |
|---|---|
| 0 to {last_text} | text, by the tokenizer of this directory (padded at the end if it has fewer) |
| {first_code} to {last_code} | codes of the VQGAN in `{vqgan}/`, a diffusers `VQModel` |
| {end_of_frame} | `<eof>`, after every frame except the last |
| {end_of_vision} | `<eov>`, after the last frame |

A frame is its {codes_per_frame} codes, row by row, of a grid of {grid} by {grid}, and one of the
end marks. A clip stands between `{start}` and `{end}`, which the tokenizer encodes. Pixels of the
VQGAN are in [{low}, {high}]. The model was trained with a softmax over the ids of one modality, so
sampling must choose among the codes where a code comes next, and among text ids elsewhere.

```python
import sys

import numpy as np
import torch
from diffusers import VQModel
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

directory, caption, num_frames = sys.argv[1], sys.argv[2], int(sys.argv[3])
temperature, top_k = 1.0, 1000
tokenizer = AutoTokenizer.from_pretrained(directory)
model = AutoModelForCausalLM.from_pretrained(directory).eval()
vqgan = VQModel.from_pretrained(f"{{directory}}/{vqgan}").eval()
prompt = tokenizer.encode(caption) + tokenizer.encode("{start}", add_special_tokens=False)
ids, cache, codes = torch.tensor([prompt]), None, []
with torch.no_grad():
  for frame in range(num_frames):
    for _ in range({codes_per_frame}):
      output = model(ids, past_key_values=cache, use_cache=True)
      cache = output.past_key_values
      scores = output.logits[0, -1, {first_code} : {last_code} + 1].float() / temperature
      best = scores.topk(min(top_k, len(scores)))
      code = best.indices[torch.multinomial(best.values.softmax(-1), 1)]
      codes.append(code)
      ids = {first_code} + code[None]
    ids = torch.cat([ids, torch.tensor([[{end_of_frame}]])], dim=1)
  shape = num_frames, {grid}, {grid}, vqgan.quantize.vq_embed_dim
  pixels = vqgan.decode(torch.cat(codes), force_not_quantize=True, shape=shape).sample
pixels = (pixels.clamp({low}, {high}) - {low}) / ({high} - {low}) * 255
frames = pixels.round().permute(0, 2, 3, 1).numpy().astype(np.uint8)
Image.fromarray(np.concatenate(frames, axis=1)).save("frames.png")
```
"""


def readme(settings: Settings, vqgan: VQGANConfig) -> str:
  """The text of the README.

  Args:
    settings: of the exported model.
    vqgan: of the VQGAN whose codes are its vision ids.
  """
  layout, first = vqgan.layout, settings.model.text_vocab_size
  low, high = vqgan.pixel_range
  return _TEXT.format(
    class_name=settings.architecture.class_name,
    vision=VISION,
    vqgan=VQGAN,
    start=VISION_START,
    end=VISION_END,
    last_text=first - 1,
    first_code=first,
    last_code=first + vqgan.codebook_size - 1,
    end_of_frame=first + layout.end_of_frame,
    end_of_vision=first + layout.end_of_vision,
    codes_per_frame=layout.codes_per_frame,
    grid=vqgan.grid,
    low=low,
    high=high,
  )
