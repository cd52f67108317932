"""A model's prediction for a batch, computed by the workers.

Rows of a batch do not know of each other, and heads of an attention neither, so each way gives what the host alone would give.
Where a way is not possible, or goes wrong, the next one is taken, and at last the host predicts itself: the same step, with the
same arguments.
"""
from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...telemetry import emit
from ..chunking import Ineffective
from ..models import Remote
from ..policy import Proceed
from ..sampling import Predict
from . import rows
from .branches import lane
from .comparing import difference, tolerance
from .crew import Crew
from .freight import UNSENDABLE, Freight, Freighter
from .parcels import Parcel, unpack
from .score import Score
from .settings import Settings
from .ways import LOCAL, PIPELINE, TOKENS, Way, in_order
from .weights import Weights
from .workers import Failed, Lost, Worker

_PATIENCE = 3  # failures one after the other, and a model is not sent again in this prompt


class Unsuited(Exception):
    """A way that does not lead to the result, or saves nothing, for this model and what is patched in it."""


@dataclass(frozen=True)
class Found:
    """The workers' answer, and the way to it."""

    freight: Freight
    way: Way
    answer: torch.Tensor


class Dispatcher:
    """Answers `Predict`."""

    def __init__(self, settings: Settings, crew: Crew, freighter: Freighter) -> None:
        self._settings, self._crew, self._freighter = settings, crew, freighter
        self._weights = Weights(settings, crew)
        self._refused: dict[tuple[Any, ...], str] = {}  # why, by model, what is patched, packs that take part, and way
        self._verified: set[tuple[Any, ...]] = set()
        self._told: set[tuple[str, str, str]] = set()
        self._in_a_row: Counter[str] = Counter()  # failures, by model
        self._sending = threading.Lock()  # branches may share a worker: it gets what it is sent in the order of its naming
        self._here = threading.Lock()  # one branch at a time, and no other model is placed meanwhile
        self._ineffective = Ineffective("ray_shard")
        self.score = Score()

    def act(self, request: Predict, proceed: Proceed) -> Any:
        found, reason = self._try(request)
        if found is not None:
            return self._verify(request, proceed, found)
        if reason:
            self._tell(request, LOCAL, reason)
        return self._predict_here(request, proceed)

    def shares_weights(self, remote: Remote, shape: Sequence[int]) -> bool:
        """Whether all workers are needed for each prediction of this model, so that they compute all conditionings of a step
        together; `shape` is of the latents then."""
        try:
            workers = self._crew.ready()
            if not workers or not self._crew.grouped:
                return False
            with self._sending:
                freight = self._freighter.deliver(remote, workers)
            return bool(self._weights.of(freight, shape, workers))
        except (Lost, Failed, *UNSENDABLE):
            return False  # the prediction finds the same, and says so

    def _try(self, request: Predict) -> tuple[Found | None, str]:
        """The workers' answer, or why there is none. The host is not asked in here, so that no error of its own is taken for
        one of theirs."""
        if self._in_a_row[self._freighter.key(request.remote.module)] >= _PATIENCE:
            return None, ""
        workers = lane().of(self._crew.ready())
        if not workers:
            return None, self._crew.broken
        try:
            return self._elsewhere(request, workers)
        except Lost as lost:
            self._crew.lose(lost.workers, str(lost))
            return None, str(lost)
        except (Failed, *UNSENDABLE) as error:
            self._failed(request, workers)
            return None, str(error) if isinstance(error, Failed) else f"it cannot be sent: {type(error).__name__}: {error}"

    def prompt_ended(self) -> bool:
        """What failed is tried again. Whether the workers did anything."""
        self._in_a_row.clear()
        return self.score.tell()

    def _failed(self, request: Predict, workers: Sequence[Worker]) -> None:
        self._in_a_row[self._freighter.key(request.remote.module)] += 1
        with self._sending:
            for worker in workers:
                worker.sent.clear()  # what was on its way may not have come

    def _elsewhere(self, request: Predict, workers: Sequence[Worker]) -> tuple[Found | None, str]:
        """The workers' answer, or why no way leads to it."""
        with self._sending:
            freight = self._freighter.deliver(request.remote, workers)
        reason = ""
        for way in self._ways(request, freight, workers):
            reason = self._refused.get(_case(request, freight, way), "")
            if reason:
                self.score.passed_over(way.name, reason)
                continue
            try:
                answer = self._ask(request, freight, way, workers)
            except Unsuited as unsuited:
                reason = self._refuse(request, freight, way, str(unsuited))
            else:
                self._in_a_row.pop(freight.key, None)
                return Found(freight, way, answer), ""
        return None, reason

    def _refuse(self, request: Predict, freight: Freight, way: Way, reason: str) -> str:
        """Does not go this way again."""
        self._refused[_case(request, freight, way)] = reason
        self._tell(request, way.label, reason)
        return reason

    def _ways(self, request: Predict, freight: Freight, workers: Sequence[Worker]) -> list[Way]:
        """In the order in which they are tried. Packs see the whole batch, on every worker that they are asked on."""
        count = request.x.shape[0]
        whole = rows.Share(0, tuple(range(count)), tuple(range(rows.chunks_of(request.rest, count))))
        shares = [whole] if request.guests or not self._settings.rows else rows.split(
            count, len(whole.chunks), [worker.weight for worker in workers], rows.belong_together(request.rest, count))
        everywhere = [rows.Share(place, whole.rows, whole.chunks) for place in range(len(workers))]
        grouped = self._crew.grouped and lane().count == 1
        modes = self._weights.of(freight, request.x.shape, workers) if grouped else ()
        return list(in_order(modes, shares, everywhere, self._settings.together if grouped else ()))

    def _verify(self, request: Predict, proceed: Proceed, found: Found) -> Any:
        """The workers' answer, or the host's own where both were computed to be compared."""
        freight, way = found.freight, found.way
        kind = (freight.name, request.guests, way.name, way.weights, len(way.shares), *request.x.shape)
        if self._settings.verify == "off" or (self._settings.verify == "first_step" and kind in self._verified):
            return found.answer
        expected = self._predict_here(request, proceed)
        error = difference(found.answer, expected)
        if error <= tolerance({request.x.dtype, *(parameter.dtype for parameter in request.remote.module.parameters())}):
            self._verified.add(kind)
        else:
            self._refuse(request, freight, way, f"what the workers computed differs by {error:.1e} of the largest value")
        return expected

    def _ask(self, request: Predict, freight: Freight, way: Way, workers: Sequence[Worker]) -> torch.Tensor:
        if way.name == TOKENS and request.guests:
            raise Unsuited(f"{', '.join(request.guests)} may need all tokens")
        started = time.perf_counter()
        asked, sent = {}, 0
        with self._sending:
            for share in way.shares:
                worker = workers[share.worker]
                parcel = self._parcel(request, share, worker)
                sent += len(parcel.data) + parcel.copied_bytes
                asked[worker] = worker.ask("predict", freight.key, freight.digest, parcel, way.name, bool(request.guests),
                                           way.weights)
        answers = self._crew.gather(asked, self._settings.timeout_seconds, lane().check)
        for worker, answer in zip(asked, answers, strict=True):
            worker.about["free_bytes"] = answer["free_bytes"]
            self._ineffective.tell(type(request.remote.module).__name__, answer.get("whole", ""))
        if unsuited := next((answer["unsuited"] for answer in answers if "unsuited" in answer), ""):
            raise Unsuited(unsuited)
        if any(answer["stateful"] for answer in answers):
            raise Unsuited("a pack keeps a state of its own from step to step, which is here")
        if way.shares_attention and not any(answer["shared"] for answer in answers):
            raise Unsuited("no attention of it could be shared")
        wanted = answers if way.is_by_rows else answers[-1:] if way.name == PIPELINE else answers[:1]
        parts = [unpack(answer["answer"], writable=True) for answer in wanted]
        whole = rows.join(way.shares, parts) if way.is_by_rows else parts[0]
        self.score.elsewhere(way.label, _like(request), time.perf_counter() - started, answers, sent)
        return whole.to(request.x.device)

    def _parcel(self, request: Predict, share: rows.Share, worker: Worker) -> Parcel:
        part = rows.part({"x": request.x, **request.rest}, share, request.x.shape[0])
        return worker.sent.pack(part.pop("x"), part)

    def _predict_here(self, request: Predict, proceed: Proceed) -> torch.Tensor:
        with self._here:
            request.remote.place()
            started = time.perf_counter()
            answer: torch.Tensor = proceed()
            self.score.here(_like(request), time.perf_counter() - started)
        return answer

    def _tell(self, request: Predict, way: str, reason: str) -> None:
        """Once for each reason."""
        model = type(request.remote.module).__name__
        self.score.passed_over(way, reason)
        if (model, way, reason) not in self._told:
            self._told.add((model, way, reason))
            emit("shard.demoted", model=model, way=way, reason=reason)


def _case(request: Predict, freight: Freight, way: Way) -> tuple[Any, ...]:
    """What a way suits, or does not."""
    return freight.key, freight.digest, request.guests, way.name, way.weights


def _like(request: Predict) -> tuple[Any, ...]:
    """Predictions that take about as long."""
    return (type(request.remote.module).__name__, *request.x.shape)
