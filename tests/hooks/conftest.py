"""A small host, made anew for each test."""
from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

_HOST = '''
def read(path, device=None, *, keep=False):
    """Reads."""
    return ("read", path, device, keep)


class Base:
    def inherited(self):
        return "inherited"


class Thing(Base):
    def fill(self, size, full=False):
        """Fills."""
        return ("fill", size, full)


number = 3
'''


@pytest.fixture
def fake_host() -> Iterator[ModuleType]:
    """`fake_host`, and `fake_copy`, which imported `read` by name."""
    host, copy = ModuleType("fake_host"), ModuleType("fake_copy")
    sys.modules.update(fake_host=host, fake_copy=copy)
    exec(_HOST, vars(host))
    copy.read = host.read
    yield host
    for name in ("fake_host", "fake_copy", "fake_late"):
        sys.modules.pop(name, None)
