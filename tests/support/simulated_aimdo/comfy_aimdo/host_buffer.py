"""Reading a file to the device. Pinned memory is CUDA's, so ComfyUI has to run with `--disable-pinned-memory`."""
import ctypes
import os

file_to_device_bytes = 0


def read_file_to_device(file, offset, size, stream, device_pointer, device, mark_cold=True):
    global file_to_device_bytes
    descriptor = file if isinstance(file, int) else file.fileno()
    data = os.pread(descriptor, size, offset)
    if len(data) != size:
        raise RuntimeError(f"{len(data)} of {size} bytes could be read")
    ctypes.memmove(device_pointer, data, size)  # the simulated device's memory is the host's
    file_to_device_bytes += size
    if mark_cold:
        os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_DONTNEED)


def cleanup_file_reader(): pass


class HostBuffer:
    def __init__(self, size, prewarm=0, max_grow_size=0, mark_cold=True):
        self.size = 0

    def truncate(self, size, do_unregister=True):
        self.size = size
