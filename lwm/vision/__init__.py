"""Frames to codes and back: video files, the VQGAN, its training and its file."""

from lwm.vision.codec import Codec
from lwm.vision.codec import save_vqgan
from lwm.vision.config import VQGANConfig
from lwm.vision.config import VQGANTrainingConfig
from lwm.vision.fit import fit
from lwm.vision.video import read_clip
from lwm.vision.video import read_frames
from lwm.vision.vqgan import VQGAN
