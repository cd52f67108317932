"""Each worker has blocks that come one after the other, and computes those; what goes from block to block is handed on.

Every worker runs the model's own forward, so that whatever is computed before, between and after the blocks is computed where
it is needed. A block that another worker has gives tensors of the right shapes, and nothing else: which these are is learned
from that worker, once for each shape of arguments. What a block gets from those before it is handed over at the entry of the
first block of the next worker, after all that is added between blocks; the last worker has the answer. Short lists of blocks
(a text's refiner) are computed by all: many models compute them in another order than they are defined in.

Rows do not know of each other: where there are several they are predicted in two parts, and two workers are busy at a time.
"""
from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ... import rows
from ..families.flow import instead
from ..group import Group
from ..mail import Pending, broadcast, receive, send
from ..tokens import Unsuited
from .owned import Owned, Predict
from .streams import Place, Recipe, Stage, put, shapes_of, tensors_of
from .units import Unit, in_a_row, long_lists

_PARTS = 2  # in which a batch is predicted


class Pipeline(Owned):
    """See `Owned`. Of all answers the last rank's is the model's."""

    last_answers = True

    def __init__(self, group: Group, shares: Sequence[float]) -> None:
        super().__init__(group, shares)
        self._learned: dict[Any, list[Recipe]] = {}  # by the shapes of the arguments, what each block makes
        self._sending: list[Pending] = []

    def _units(self, model: torch.nn.Module) -> list[Unit]:
        return long_lists(super()._units(model))

    def _owners(self, sizes: Sequence[int], shares: Sequence[float]) -> list[int]:
        return in_a_row(sizes, shares)

    def _placed(self) -> bool:
        return True

    def _told(self, rank: int, news: Any) -> None: ...

    def _taken_off(self) -> None: ...

    def _run(self, predict: Predict, x: torch.Tensor, arguments: dict[str, Any], apart: bool) -> torch.Tensor:
        self._sending.clear()
        count = x.shape[0]
        parts_of = [1.0] * (_PARTS if apart else 1)
        shares = rows.split(count, rows.chunks_of(arguments, count), parts_of, rows.belong_together(arguments, count))
        parts = [rows.part({"x": x, **arguments}, share, count) for share in shares]
        answers = [self._part(predict, part.pop("x"), part) for part in parts]
        for pending in self._sending:
            pending.wait()
        return rows.join(shares, answers)

    def _part(self, predict: Predict, x: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
        key = shapes_of((x, arguments))
        stage = Stage(self.owners, self._learned.get(key))
        with self._in_turn(stage):
            answer = predict(x, arguments)
        if stage.at != len(self.units):
            raise Unsuited(f"{stage.at} of {len(self.units)} blocks were computed")
        self._learned[key] = stage.recipes
        return answer

    @contextlib.contextmanager
    def _in_turn(self, stage: Stage) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for index, unit in enumerate(self.units):
                stack.enter_context(instead(unit.module, "forward", self._block(stage, index)))
            yield

    def _block(self, stage: Stage, index: int) -> Any:
        owner = self.owners[index]

        def around(forward: Any, arguments: dict[str, Any]) -> Any:
            for place in stage.enter(index, arguments):
                self._hand_over(self.owners[index - 1], owner, arguments, place)
            made = forward() if owner == self.group.rank else None
            if stage.learns:
                self._learn(stage, owner, arguments, made)
            if owner != self.group.rank:
                made = stage.recipes[index].imitate(self._patcher.load_device)
            stage.leave(made)
            return made

        return around

    def _learn(self, stage: Stage, owner: int, arguments: dict[str, Any], made: Any) -> None:
        """What a block makes of its arguments, from who has it.

        Raises:
            Unsuited: it cannot be said; on all ranks.
        """
        said = pickle.dumps(Recipe.of(arguments, made)) if owner == self.group.rank else b""
        length = broadcast(self.group, owner, torch.tensor([len(said)]).view(torch.uint8) if said else 8, torch.device("cpu"))
        count = int(length.wait().view(torch.int64).item())
        data = torch.frombuffer(bytearray(said), dtype=torch.uint8) if said else count
        recipe = pickle.loads(broadcast(self.group, owner, data, torch.device("cpu")).wait().numpy().tobytes())
        if isinstance(recipe, str):
            raise Unsuited(recipe)
        stage.recipes.append(recipe)

    def _hand_over(self, before: int, owner: int, arguments: dict[str, Any], place: Place) -> None:
        """A tensor goes from the worker of the last block to that of this one."""
        tensor = tensors_of(arguments)[place]
        if self.group.rank == before:
            self._sending.append(send(self.group, owner, tensor.detach().contiguous().view(-1).view(torch.uint8)))
        elif self.group.rank == owner:
            data = receive(self.group, before, tensor.nbytes, tensor.device).wait()
            put(arguments, place, data.view(tensor.dtype).view(tensor.shape))
