"""Which tests run in one process, where pytest-xdist runs them in several."""
from __future__ import annotations

import re
from functools import cache

from xdist.scheduler import LoadScopeScheduling

from support.loading import ROOT

_PAIR_OF_THE_SESSION = re.compile(r"\b(cpu_|npu_|dynamic_|)pair: Pair\b")


class ByServers(LoadScopeScheduling):
    """By files, as their tests share servers; all that use a pair of the session count as one, or each process starts it."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::")[0]
        return "the session's pairs" if uses_a_pair_of_the_session(file) else file


@cache
def uses_a_pair_of_the_session(file: str) -> bool:
    return _PAIR_OF_THE_SESSION.search((ROOT / file).read_text(encoding="utf-8")) is not None
