"""Virtual address ranges for weights, a page to each allocation. Mapping and unmapping a page changes its signature."""
import itertools

import torch

from . import control

_ranges = []  # the one with the most priority last
_serials = itertools.count(1)


class Page:
    def __init__(self, size, start):
        self.size, self.end, self.memory, self.serial, self.pins = size, start + size, None, 0, 0


class ModelVBAR:
    def __init__(self, size, device):
        self.device, self.max_size, self.pages, self.watermark = device, size, [], size
        _ranges.append(self)

    def __reduce__(self):
        raise TypeError("addresses of this process are of no use in another")

    def prioritize(self):
        _ranges.remove(self)
        _ranges.append(self)
        self.watermark = self.max_size

    def deprioritize(self):
        _ranges.remove(self)
        _ranges.insert(0, self)

    def alloc(self, size):
        self.pages.append(Page(size, self.pages[-1].end if self.pages else 0))
        return self, len(self.pages) - 1, size

    def fault(self, index):
        page = self.pages[index]
        if page.memory is None:
            if page.end > self.watermark or not self._room(page.size):
                return None
            page.memory = torch.empty(page.size, dtype=torch.uint8, device=torch.device("npu", self.device))
            page.serial = next(_serials)
        page.pins += 1
        return (page.serial,)

    def _room(self, size):
        """Makes room at the cost of models with less priority."""
        def short():
            return size + control.headroom - torch.npu.mem_get_info(self.device)[0]

        for other in _ranges:
            if other is self or short() <= 0:
                break
            if other.device == self.device:
                other.free_memory(short())
        return short() <= 0

    def loaded_size(self):
        return sum(page.size for page in self.pages if page.memory is not None)

    def free_memory(self, size):
        freed = 0
        for page in reversed(self.pages):
            if freed >= size:
                break
            if page.memory is not None and not page.pins:
                page.memory = None
                freed += page.size
        return freed

    def get_nr_pages(self): return len(self.pages)
    def get_residency(self): return [(page.memory is not None) | bool(page.pins) << 1 for page in self.pages]
    def get_watermark(self): return len(self.pages)
    def set_watermark_limit(self, size): pass

    def set_watermark(self, size):
        """Pages above it leave the device, and come back no more until the range is prioritised again."""
        self.watermark = size
        for page in self.pages:
            if page.end > size and not page.pins:
                page.memory = None

    def __del__(self):
        if self in _ranges:
            _ranges.remove(self)


def vbar_fault(alloc):
    return alloc[0].fault(alloc[1])


def vbar_unpin(alloc):
    if alloc is not None:
        page = alloc[0].pages[alloc[1]]
        page.pins = max(0, page.pins - 1)


def vbar_signature_compare(one, other):
    return one is not None and one == other


def vbars_reset_watermark_limits(): pass
def vbars_analyze(device=None): return sum(one.loaded_size() for one in _ranges)
