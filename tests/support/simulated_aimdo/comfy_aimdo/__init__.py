"""A stand-in for ComfyUI's paging library on the simulated NPU: put this folder's parent on PYTHONPATH, before the real one,
and unmodified ComfyUI runs its dynamic VRAM (`--enable-dynamic-vram --disable-pinned-memory`) without a GPU.

It pages like the real one, in spirit: weights are faulted in when they are used and pinned while they are; where the device
is full, pages of models with less priority leave, and a weight that still finds no room is streamed.

SIMAIMDO_HEADROOM_MB   device memory that is left for everything but weights (default 256)
SIMNPU_STATS           the NPU's counters get `file_to_device_bytes` too: what went there straight from a file
"""
