"""Frames to codes and back: reading video files, the VQGAN, its training and its file."""

from lwm.config.vqgan import VQGANConfig, VQGANTrainingConfig
from lwm.vision.codec import Codec, save_vqgan
from lwm.vision.fit import fit
from lwm.vision.video import read_clip, read_frames
from lwm.vision.vqgan import VQGAN
