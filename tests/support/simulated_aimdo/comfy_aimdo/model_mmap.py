"""A read-only mapping of a model file."""
import ctypes
import mmap
import os

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class ModelMMAP:
    def __init__(self, path):
        self._file = os.open(path, os.O_RDONLY)
        self._size = os.fstat(self._file).st_size
        self._address = _libc.mmap(None, self._size, mmap.PROT_READ, mmap.MAP_PRIVATE, self._file, 0)

    def get(self): return self._address
    def get_file_handle(self): return self._file
    def bounce(self): return True

    def __del__(self):
        _libc.munmap(self._address, self._size)
        os.close(self._file)
