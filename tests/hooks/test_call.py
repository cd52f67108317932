"""The host's own answer: bound by name, run once, its errors untouched."""
from __future__ import annotations

import contextlib
import inspect
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from residency.hooks.call import HostCall


class Read:
    """A host's function that remembers how it was called."""

    def __init__(self, outcome: Any = "weights") -> None:
        self.outcome = outcome
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((args, kwargs))
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome

    def called_with(self, *args: Any, **kwargs: Any) -> HostCall:
        return HostCall(self, None, args, kwargs, inspect.signature(signature))


def signature(path: str, device: str | None = None, *rest: int, keep: bool = False, **options: int) -> None: ...


@pytest.mark.parametrize("call", [
    pytest.param(Read().called_with("a", "cpu", keep=True), id="by position"),
    pytest.param(Read().called_with(keep=True, device="cpu", path="a"), id="by name"),
])
def test_binds_arguments_by_name(call: HostCall) -> None:
    """How the host's caller passed an argument does not matter."""
    assert ("a", "cpu", True) == (call["path"], call["device"], call["keep"])


def test_knows_defaults() -> None:
    """An argument that the caller left out is the host's default."""
    call = Read().called_with("a")

    assert (None, False, (), {}) == (call["device"], call["keep"], call["rest"], call["options"])


def test_unknown_parameter_is_a_key_error() -> None:
    """A name that the host's function lacks is a bug of the hook, which then disarms itself."""
    with pytest.raises(KeyError):
        Read().called_with("a")["budget"]


def test_without_changes_the_host_gets_exactly_what_it_was_given() -> None:
    """No default is spelled out, nothing by position becomes a name: a neighbour below may look at that."""
    read, path = Read(), object()
    call = read.called_with(path, keep=True)

    assert call["device"] is None
    assert "weights" == call()
    assert [((path,), {"keep": True})] == read.calls
    assert path is read.calls[0][0][0]


def test_without_changes_nothing_is_bound() -> None:
    """A wrong call of a neighbour fails in the host, with the host's words."""
    read = Read(TypeError("read() missing 1 required argument"))

    with pytest.raises(TypeError) as caught:
        read.called_with()()

    assert read.outcome is caught.value


def test_changes_arguments_by_name() -> None:
    """A change replaces the argument wherever the caller had put it, and leaves the others."""
    read = Read()

    read.called_with("a", "cpu", 7, keep=True, dtype=2)(path="b", keep=False)

    assert [(("b", "cpu", 7), {"keep": False, "dtype": 2})] == read.calls


def test_changes_an_argument_that_was_left_out() -> None:
    """A default can be changed."""
    read = Read()

    read.called_with("a")(device="cuda")

    assert [(("a", "cuda"), {"keep": False})] == read.calls


def test_runs_once() -> None:
    """The second call raises, and the host does not see it."""
    read = Read()
    call = read.called_with("a")
    assert not call.spent

    call()

    assert call.spent
    with pytest.raises(RuntimeError, match="once"):
        call()
    assert 1 == len(read.calls)


@pytest.mark.parametrize("error", [OSError("no such file"), KeyboardInterrupt()], ids=["error", "cancel"])
def test_the_hosts_error_goes_up_as_it_is(error: BaseException) -> None:
    """The same object, and the call is spent: the host is never run twice."""
    call = Read(error).called_with("a")

    with pytest.raises(type(error)) as caught:
        call()

    assert error is caught.value
    assert call.spent


def test_keeps_the_instance_of_a_method() -> None:
    """A translator reads the host's object there."""
    instance = object()

    assert instance is HostCall(Read(), instance, (), {}, inspect.signature(signature)).instance


def full(error: BaseException) -> bool:
    return isinstance(error, MemoryError)


class TestRepeating:
    def test_runs_again_after_an_error_of_that_kind(self) -> None:
        """As often as was said, and not once more."""
        read = Read(MemoryError())
        call = read.called_with("a")
        call.may_repeat(1, full)
        for _ in range(2):
            with pytest.raises(MemoryError):
                call()
        with pytest.raises(RuntimeError, match="once"):
            call()
        assert 2 == len(read.calls)

    @pytest.mark.parametrize("outcome", ["weights", OSError("gone"), KeyboardInterrupt()], ids=repr)
    def test_not_after_an_answer_or_another_error(self, outcome: Any) -> None:
        """What did something is not done twice."""
        read = Read(outcome)
        call = read.called_with("a")
        call.may_repeat(2, full)
        with contextlib.suppress(OSError, KeyboardInterrupt):
            call()
        with pytest.raises(RuntimeError, match="once"):
            call()
        assert 1 == len(read.calls)

    def test_changes_of_one_run_are_not_those_of_the_next(self) -> None:
        """Each starts with what the caller gave."""
        read = Read(MemoryError())
        call = read.called_with("a")
        call.may_repeat(2, full)
        for changes in ({"device": "cuda"}, {"keep": True}, {}):
            with pytest.raises(MemoryError):
                call(**changes)
        assert [(("a", "cuda"), {"keep": False}), (("a", None), {"keep": True}), (("a",), {})] == read.calls


class TestParts:
    def test_a_part_is_asked_later_and_leaves_the_whole(self) -> None:
        """Nothing runs before it is called; its argument replaces the whole's, wherever the caller had put that."""
        read = Read()
        call = read.called_with("a", "cpu", keep=True)
        parts = [call.part(path="b"), call.part(device=None)]
        assert [] == read.calls

        assert ["weights", "weights"] == [part() for part in parts]

        assert [(("b", "cpu"), {"keep": True}), (("a", None), {"keep": True})] == read.calls
        assert not call.spent

    def test_a_part_runs_once(self) -> None:
        """Like the whole; others made of the same call do not mind."""
        read = Read()
        call = read.called_with("a")
        part, other = call.part(path="b"), call.part(path="b")
        part()
        with pytest.raises(RuntimeError, match="once"):
            part()
        other()
        call()
        assert 3 == len(read.calls)

    def test_a_part_does_not_repeat(self) -> None:
        """Whoever repeats the whole makes new parts."""
        read = Read(MemoryError())
        call = read.called_with("a")
        call.may_repeat(2, full)
        part = call.part(path="b")
        with pytest.raises(MemoryError):
            part()
        with pytest.raises(RuntimeError, match="once"):
            part()

    def test_parts_run_in_any_thread(self) -> None:
        """The host's error goes up there as it is."""
        error = OSError("gone")
        part = Read(error).called_with("a").part(path="b")
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(part).exception() is error

    def test_a_method_keeps_its_instance(self) -> None:
        """The part is asked of the same object."""
        text = "abc"
        call = HostCall(text.startswith, text, ("z",), {}, inspect.Signature(
            [inspect.Parameter("prefix", inspect.Parameter.POSITIONAL_ONLY)]))
        assert call.part(prefix="a")()
