"""Every row of a batch is computed once, its answer comes back to its place, and each part is a batch of the same kind."""
from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from residency.policies.ray_shard.rows import Share, apportion, belong_together, chunks_of, join, part, split

WEIGHTS = st.lists(st.floats(0.05, 20), min_size=1, max_size=7)


def batch(chunks: int, each: int, **more: Any) -> dict[str, Any]:
    """The arguments of a prediction: row r of every tensor is r."""
    rows = chunks * each
    column = torch.arange(rows, dtype=torch.float32)[:, None]
    options = {"cond_or_uncond": list(range(chunks)), "uuids": [f"u{chunk}" for chunk in range(chunks)], "sigmas": column[:, 0]}
    control = {"middle": [column, None], "output": (column,)}
    return {"x": column.repeat(1, 3), "c_crossattn": column[:, None], "control": control,
            "transformer_options": options, "mask": torch.ones(1, 4), "guidance": column[:, 0], "frame_rate": 25, **more}


class TestApportion:
    @given(st.integers(0, 60), WEIGHTS)
    @settings(max_examples=60, deadline=None)
    def test_everything_is_given_out(self, count: int, weights: list[float]) -> None:
        """Nothing twice."""
        assert sum(apportion(count, weights)) == count

    @given(st.integers(1, 7), st.lists(st.sampled_from([0.5, 1.0, 2.0, 3.0]), min_size=2, max_size=3))
    @settings(max_examples=60, deadline=None)
    def test_the_slowest_finishes_as_soon_as_it_can(self, count: int, weights: list[float]) -> None:
        """Compared with every other way of giving out."""
        def slowest(counts: list[int]) -> float:
            return max(one / weight for one, weight in zip(counts, weights, strict=True))

        def ways(left: int, places: int) -> list[list[int]]:
            if places == 1:
                return [[left]]
            return [[first, *rest] for first in range(left + 1) for rest in ways(left - first, places - 1)]

        best = min(slowest(way) for way in ways(count, len(weights)))
        assert slowest(apportion(count, weights)) == pytest.approx(best)

    def test_equal_workers_get_equal_shares(self) -> None:
        """The first ones get what is left over."""
        assert apportion(7, [1, 1, 1]) == [3, 2, 2]


class TestSplit:
    @given(st.integers(1, 4), st.integers(1, 6), WEIGHTS, st.booleans())
    @settings(max_examples=150, deadline=None)
    def test_every_row_once_and_in_its_place_again(self, chunks: int, each: int, weights: list[float], whole: bool) -> None:
        """Whatever the workers are; and a share's options name the chunks of its rows, in their order."""
        arguments = batch(chunks, each)
        shares = split(chunks * each, chunks, weights, whole)
        parts = [part(arguments, share, chunks * each) for share in shares]

        assert sorted(row for share in shares for row in share.rows) == list(range(chunks * each))
        assert len({share.worker for share in shares}) == len(shares)
        for share, one in zip(shares, parts, strict=True):
            named = one["transformer_options"]["cond_or_uncond"]
            rows = one["x"][:, 0].long().tolist()
            assert rows == list(share.rows)
            assert len(rows) % len(named) == 0
            assert [row // each for row in rows] == [chunk for chunk in named for _ in range(len(rows) // len(named))]
            assert one["transformer_options"]["uuids"] == [f"u{chunk}" for chunk in named]
        assert torch.equal(join(shares, [one["x"] for one in parts]), arguments["x"])

    @given(st.integers(1, 4), st.integers(1, 6), WEIGHTS)
    @settings(max_examples=60, deadline=None)
    def test_frames_of_a_video_stay_together(self, chunks: int, each: int, weights: list[float]) -> None:
        """A worker has all rows of a chunk, or none."""
        for share in split(chunks * each, chunks, weights, whole_chunks=True):
            assert [row // each for row in share.rows] == [chunk for chunk in share.chunks for _ in range(each)]

    @pytest.mark.parametrize(("chunks", "each", "weights", "expected"), [
        (2, 1, [1, 1], [(0,), (1,)]),
        (2, 1, [1, 1, 1], [(0,), (1,)]),
        (1, 4, [1, 1], [(0, 1), (2, 3)]),
        (2, 4, [3, 1], [(0, 1, 2, 4, 5, 6), (3, 7)]),
        (2, 2, [1, 1], [(0, 1), (2, 3)]),
        (3, 2, [1, 1], [(0, 2, 4), (1, 3, 5)]),
        (1, 1, [1, 5], [(0,)]),
    ])
    def test_the_way_that_ends_sooner(self, chunks: int, each: int, weights: list[float],
                                      expected: list[tuple[int, ...]]) -> None:
        """Whole chunks where that is as good, since these are contiguous; who can do nothing useful gets nothing."""
        assert [share.rows for share in split(chunks * each, chunks, weights)] == expected

    def test_a_fast_worker_takes_a_single_row(self) -> None:
        """And is named by its place."""
        assert split(1, 1, [1, 5]) == [Share(1, (0,), (0,))]


class TestPart:
    SHARE = Share(1, (1, 3), (0, 1))

    def test_all_tensors_with_a_row_for_each(self) -> None:
        """In lists, tuples and dicts too, which keep their kinds; what is one for all is for all."""
        cut = part(batch(2, 2), self.SHARE, 4)
        assert cut["guidance"].tolist() == [1, 3]
        assert cut["c_crossattn"].flatten().tolist() == [1, 3]
        assert cut["control"]["middle"][0].flatten().tolist() == [1, 3]
        assert cut["control"]["middle"][1] is None
        assert isinstance(cut["control"]["output"], tuple)
        assert (cut["mask"].shape, cut["frame_rate"]) == ((1, 4), 25)

    def test_the_schedule_is_not_cut(self) -> None:
        """Its sigmas may be as many as the rows by accident."""
        cut = part(batch(2, 2), self.SHARE, 4)
        assert cut["transformer_options"]["sigmas"].tolist() == [0, 1, 2, 3]

    def test_nothing_of_the_callers_is_changed(self) -> None:
        """The host may have to predict with it."""
        arguments = batch(2, 2)
        part(arguments, self.SHARE, 4)
        assert arguments["transformer_options"]["cond_or_uncond"] == [0, 1]
        assert len(arguments["x"]) == 4

    def test_a_number_in_a_tensor_is_for_all(self) -> None:
        """It has no rows."""
        assert part(batch(2, 2, scale=torch.tensor(4.0)), self.SHARE, 4)["scale"] == 4

    def test_shapes_are_no_rows(self) -> None:
        """torch's own tuples and the numbers in a list stay what they are."""
        cut = part(batch(2, 2, latent_shapes=[torch.Size([4, 3])], sizes=[4, 3, 2, 1]), self.SHARE, 4)
        assert (cut["latent_shapes"], cut["sizes"]) == ([torch.Size([4, 3])], [4, 3, 2, 1])

    def test_neighbouring_rows_are_not_copied(self) -> None:
        """A view is enough."""
        arguments = batch(2, 2)
        cut = part(arguments, Share(0, (2, 3), (1,)), 4)
        assert cut["x"].data_ptr() == arguments["x"][2:].data_ptr()


class TestChunks:
    def test_as_many_as_the_options_name(self) -> None:
        """Without a word the batch is one."""
        assert chunks_of({"transformer_options": {"cond_or_uncond": [0, 1]}}, 6) == 2
        assert chunks_of({"transformer_options": {}}, 6) == 1
        assert chunks_of({"transformer_options": {"cond_or_uncond": []}}, 6) == 1

    def test_options_of_another_batch(self) -> None:
        """Nobody knows then which rows they name: these rows go together, and the options with them, to one worker."""
        arguments = batch(2, 2, x=torch.zeros(5, 3))
        assert chunks_of(arguments, 5) == 1
        assert belong_together(arguments, 5)
        assert [share.rows for share in split(5, 1, [1, 1], whole_chunks=True)] == [(0, 1, 2, 3, 4)]

    @pytest.mark.parametrize(("more", "together"), [
        ({"num_video_frames": 14}, True), ({"image_only_indicator": torch.zeros(2, 14)}, True),
        ({"num_video_frames": None}, False), ({}, False),
    ])
    def test_frames_are_told_by_the_models_arguments(self, more: dict[str, Any], together: bool) -> None:
        """Stable Video Diffusion's."""
        assert belong_together(batch(2, 2, **more), 4) is together


def test_answers_in_any_order_of_rows() -> None:
    """A share may hold rows of every chunk."""
    shares = [Share(0, (0, 2), (0, 1)), Share(1, (1, 3), (0, 1))]
    assert join(shares, [torch.tensor([[0.], [2.]]), torch.tensor([[1.], [3.]])]).flatten().tolist() == [0, 1, 2, 3]
