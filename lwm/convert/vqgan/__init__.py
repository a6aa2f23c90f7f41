"""VQGANs of LWM (a pickle) and of diffusers (a VQModel's directory)."""
