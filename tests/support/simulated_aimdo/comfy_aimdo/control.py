"""Starting up, as far as ComfyUI calls it."""
import os

import torch

lib = True
headroom = int(float(os.environ.get("SIMAIMDO_HEADROOM_MB", "256")) * 2**20)


def init(implementation=None, simple_vram_headroom=None, nvml_pressure=None):
    return True


def init_devices(devices):
    torch.nn.Parameter.data = property(lambda parameter: _DATA.__get__(parameter), _set_data)
    return bool(list(devices))


def init_device(device, extra_vram_headroom=0):
    return init_devices([device])


_DATA = torch.Tensor.data


def _set_data(parameter, value):
    """A parameter may move to another device by its `data`, which torch allows for CUDA and not for the simulated device."""
    if parameter.device == value.device:
        _DATA.__set__(parameter, value)
    else:
        torch.utils.swap_tensors(parameter, torch.nn.Parameter(value, requires_grad=False))


def analyze(): pass
def set_log_debug(): pass
def set_log_detail(): pass
def set_log_info(): pass
def set_log_warning(): pass
def set_log_error(): pass
def set_log_critical(): pass
