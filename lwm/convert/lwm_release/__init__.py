"""LWM's releases: streams of flax's msgpack."""
