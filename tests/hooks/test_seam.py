"""A seam is found where every parameter that is relied on is there, and says why where it is not."""
from __future__ import annotations

import sys
from types import ModuleType

import pytest
from residency.hooks.seam import Declined, Seam


def refusal(seam: Seam) -> str:
    with pytest.raises(Declined) as caught:
        seam.resolve()
    return str(caught.value)


@pytest.mark.usefixtures("fake_host")
class TestResolve:
    def test_finds_a_function_in_its_module(self, fake_host: ModuleType) -> None:
        """The owner of a function is its module."""
        site = Seam("fake_host", "read", ("path", "keep")).resolve()

        assert (fake_host, "read", fake_host.read) == (site.owner, site.name, site.original)
        assert ["path", "device", "keep"] == list(site.signature.parameters)

    def test_finds_a_method_in_its_class_without_self(self, fake_host: ModuleType) -> None:
        """The owner of a method is its class, and `self` is not one of the parameters that a call binds."""
        site = Seam("fake_host", "Thing.fill", ("size",)).resolve()

        assert (fake_host.Thing, "fill") == (site.owner, site.name)
        assert ["size", "full"] == list(site.signature.parameters)

    def test_declines_without_the_module(self) -> None:
        """A host that lacks a module is named in the reason."""
        assert "no module no_such_host" in refusal(Seam("no_such_host", "read"))

    def test_declines_without_the_class(self) -> None:
        """A class that went is named in the reason."""
        assert "fake_host has no Gone" == refusal(Seam("fake_host", "Gone.fill"))

    @pytest.mark.parametrize("path", ["gone", "Thing.gone"])
    def test_declines_without_the_function(self, path: str) -> None:
        """A function that went is named in the reason."""
        assert f"fake_host has no {path} of its own" == refusal(Seam("fake_host", path))

    def test_declines_what_cannot_be_called(self) -> None:
        """A name that holds something else now is no seam."""
        assert "fake_host has no number of its own" == refusal(Seam("fake_host", "number"))

    def test_declines_an_inherited_method(self) -> None:
        """Wrapping it on the subclass, and removing that, would leave an attribute that was not there."""
        assert "fake_host has no Thing.inherited of its own" == refusal(Seam("fake_host", "Thing.inherited"))

    def test_declines_when_needed_parameters_are_gone(self) -> None:
        """The reason names what is missing and what there is."""
        reason = refusal(Seam("fake_host", "Thing.fill", ("size", "budget", "device")))

        assert "fake_host.Thing.fill has no parameter budget, device; it takes (size, full=False)" == reason

    def test_declines_when_self_is_needed(self) -> None:
        """`self` is the instance, not an argument."""
        assert "no parameter self" in refusal(Seam("fake_host", "Thing.fill", ("self",)))

    def test_declines_a_replacement_that_hides_its_parameters(self, fake_host: ModuleType) -> None:
        """A neighbour's `(*args, **kwargs)` cannot be bound by name."""
        fake_host.read = lambda *args, **kwargs: None

        assert "no parameter path; it takes (*args, **kwargs)" in refusal(Seam("fake_host", "read", ("path",)))

    def test_declines_a_compiled_replacement_without_a_signature(self, fake_host: ModuleType) -> None:
        """A compiled function may not tell its parameters at all."""
        class Compiled:
            __signature__ = "(path)"
            __call__ = print

        fake_host.read = Compiled()

        assert "fake_host.read does not tell its parameters" in refusal(Seam("fake_host", "read", ("path",)))


@pytest.mark.usefixtures("fake_host")
class TestCopies:
    seam = Seam("fake_host", "read", aliases=("fake_copy:read", "fake_late:read", "fake_copy:gone"))

    def test_lists_copies_whose_module_is_imported(self) -> None:
        """Modules that are not imported yet, and names that went, are left out."""
        assert [(sys.modules["fake_copy"], "read")] == list(self.seam.copies())

    def test_imports_nothing(self) -> None:
        """A module that nobody imported will import what it finds."""
        list(Seam("fake_host", "read", aliases=("wave:open",)).copies())

        assert "wave" not in sys.modules

    def test_is_named_by_module_and_path(self) -> None:
        """The name is the ledger's key."""
        assert "fake_host.read" == self.seam.name
