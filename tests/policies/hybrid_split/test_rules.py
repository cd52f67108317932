"""Which rule holds for which model."""
from __future__ import annotations

import pytest
from residency.policies.hybrid_split.rules import Subject, best, label
from residency.policies.hybrid_split.settings import Rule
from residency.policies.memory import GB


def subject(name: str = "C:\\models\\Wan2.2_14B-Q4_K.gguf", component: str = "diffusion_model", gb: float = 9) -> Subject:
    return Subject((name,), component, int(gb * GB))


@pytest.mark.parametrize(("rule", "holds"), [
    (Rule(), True),
    (Rule(name="wan2.2*"), True), (Rule(name="*Q4_K.GGUF"), True), (Rule(name="wan"), False), (Rule(name="*q8*"), False),
    (Rule(name="C:/models/*"), True), (Rule(name="D:/models/*"), False),
    (Rule(component="diffusion_model"), True), (Rule(component="vae"), False),
    (Rule(format="gguf"), True), (Rule(format=".GGUF"), True), (Rule(format="safetensors"), False),
    (Rule(larger_than_gb=8), True), (Rule(larger_than_gb=9.5), False),
    (Rule(smaller_than_gb=10), True), (Rule(smaller_than_gb=8), False),
    (Rule(name="wan*", component="vae"), False),
])
def test_a_rule_holds_if_all_that_it_asks_holds(rule: Rule, holds: bool) -> None:
    """Names without case and with any slash; one that does not say something asks nothing."""
    assert (best([rule], subject()) is rule) is holds


def test_a_model_of_unknown_files_has_rules_that_ask_for_no_name() -> None:
    unknown = Subject((), "", GB)
    assert best([Rule(name="a*"), Rule(format="gguf"), Rule(larger_than_gb=2)], unknown) is None
    assert best([Rule(name="*")], unknown) == Rule()


@pytest.mark.parametrize(("less", "more"), [
    (Rule(), Rule(component="diffusion_model")),
    (Rule(component="diffusion_model", format="gguf", larger_than_gb=1), Rule(name="wan*")),
    (Rule(name="wan*"), Rule(name="wan2.2*")),
    (Rule(name="wan2.2*"), Rule(name="wan2.2*", format="gguf")),
    (Rule(name="*wan2.2_14b-q4_k.gguf*"), Rule(name="wan2.2_14b-q4_k.gguf")),
])
def test_the_rule_that_says_most_wins(less: Rule, more: Rule) -> None:
    """In whatever order they stand."""
    assert best([less, more], subject()) is more
    assert best([more, less], subject()) is more


def test_of_equal_rules_the_first_wins() -> None:
    first, second = Rule(name="wan*", device_gb=1), Rule(name="*ggu", device_gb=2)
    assert best([first, Rule(name="wan*", device_gb=3)], subject()) is first
    assert best([second], subject()) is None


def test_a_rule_is_called_by_what_it_asks() -> None:
    assert label(Rule(name="wan*", component="vae", format="gguf", larger_than_gb=8, smaller_than_gb=30)) == \
        "wan*, vae, .gguf, > 8 GB, < 30 GB"
    assert label(Rule()) == "*"
