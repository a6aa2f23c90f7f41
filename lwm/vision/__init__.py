"""Frames to codes and back: reading films, the VQGAN, its training and its file.

Import the modules: a decoder's process imports `video` alone, and so starts without JAX.
"""
