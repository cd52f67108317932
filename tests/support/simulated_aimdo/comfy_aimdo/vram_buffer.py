"""Staging buffers. ComfyUI makes them for its streams, of which the simulated device has none."""
