"""LTX-Video, and LTX-2, which makes sound beside the video."""
from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from ..layout import Layout
from ..tokens import TokenParallel, Unsuited
from .flow import Arguments, enough, instead, within


class Stream:
    """Tokens of one kind, and what has a value for each of them.

    Attributes:
        layout: how they are spread.
        frames: times of which a frame's tokens have one: to which time each of this rank's tokens belongs.
    """

    def __init__(self, tokens: TokenParallel) -> None:
        self._tokens = tokens
        self.layout = tokens.layout(0)
        self.frames: dict[Any, torch.Tensor] = {}

    def begin(self, *segments: int) -> None:
        """Spreads them; there may be none."""
        self.frames.clear()
        self.layout = self._tokens.layout(*segments)
        if self.layout.total:
            enough(self.layout)

    def take(self, tensor: torch.Tensor, dim: int = 1) -> torch.Tensor:
        return self._tokens.take(tensor, self.layout, dim)

    def times(self, times: Any) -> Any:
        """(batch, tokens, width), of which there may be one for all; or an object that has such, or one for each frame."""
        if isinstance(times, torch.Tensor):
            return times if times.shape[1] == 1 else self.take(times)
        mine, each = copy.copy(times), times.patches_per_frame
        if times.data.shape[1] > 1 and each > 1:
            frames = torch.arange(times.data.shape[1], device=times.data.device).repeat_interleave(each)
            self.frames[mine] = self.take(frames, 0)
        else:
            mine.data = self.times(times.data)
        mine.num_frames, mine.patches_per_frame = mine.data.shape[1], 1  # to be worked on as they are, and expanded here
        return mine

    def expanded(self, forward: Callable[[], Any], arguments: Arguments) -> Any:
        """A block's numbers of its times: for each token, if they were made for each frame."""
        frames = self.frames.get(arguments["timestep"])
        return forward() if frames is None else tuple(value.index_select(1, frames) for value in forward())

    def for_tokens(self, times: Any) -> torch.Tensor:
        """(batch, this rank's tokens, width), or one for all."""
        mine = self.times(times)
        values: torch.Tensor = mine if isinstance(mine, torch.Tensor) else mine.data
        return values if mine not in self.frames else values.index_select(1, self.frames[mine])

    def positions(self, rotation: tuple[Any, ...]) -> tuple[Any, ...]:
        """Matrices (batch, tokens, ...), or a cosine and a sine, (batch, tokens, width) or (batch, heads, tokens, width)."""
        *rotations, split = rotation  # which says whether a number's partner is next to it, or half a head away
        return (*(self.take(part, 2 if part.ndim == 4 else 1) for part in rotations), split)

    def guided(self, mask: Any) -> Any:
        """A mask that asks for the guides, which come last, by themselves: what it masks stays whole."""
        if not hasattr(mask, "guide_start"):
            return mask
        mine = copy.copy(mask)
        mine.guide_start, mine.tracked_count = map(len, self.layout.pieces[self._tokens.rank])
        video, guides = map(self._tokens.layout, self.layout.segments)
        self._tokens.parts.update({mask.noisy_mask: video, mask.tracked_mask: guides})
        return mine

    def gathered(self, forward: Callable[[], Any], _: Arguments) -> torch.Tensor:
        """What a layer makes of all of them."""
        return self._tokens.gather(forward(), self.layout)


def segments(video: torch.Tensor, mask: Any, tokens: TokenParallel) -> tuple[int, ...]:
    """The video, and guides whose part in its attention is not that of others."""
    total = video.shape[1]
    if not hasattr(mask, "guide_start"):
        return (total,)
    found = mask.guide_start, mask.tracked_count
    if sum(found) != total or not all(all(tokens.layout(segment).lengths) for segment in found):
        raise Unsuited(f"{found[1]} guides after {found[0]} tokens of {total} cannot be spread")
    return found


@contextlib.contextmanager
def ltxv(model: Any, tokens: TokenParallel) -> Iterator[None]:
    """Spread over the blocks, and gathered after the last layer, before keyframes are put in their places."""
    video = Stream(tokens)

    def blocks(forward: Callable[[], Any], arguments: Arguments) -> Any:
        mask = arguments["self_attention_mask"]
        video.begin(*segments(arguments["x"], mask, tokens))
        arguments["x"] = video.take(arguments["x"])
        arguments["timestep"] = video.times(arguments["timestep"])
        arguments["pe"] = video.positions(arguments["pe"])
        arguments["self_attention_mask"] = video.guided(mask)
        return forward()

    def output(forward: Callable[[], Any], arguments: Arguments) -> Any:
        arguments["embedded_timestep"] = video.times(arguments["embedded_timestep"])
        return forward()

    with (instead(model, "_process_transformer_blocks", blocks, ("x", "timestep", "pe", "self_attention_mask")),
          instead(model, "_process_output", output, ("embedded_timestep",)),
          instead(model.proj_out, "forward", video.gathered),
          within(model.transformer_blocks, ["attn1"], lambda: tokens.among(video.layout, video.layout))):
        yield


class Sound:
    """Video and audio: each is spread by itself, and attends to itself and to the other."""

    def __init__(self, tokens: TokenParallel) -> None:
        self._tokens = tokens
        self.video, self.audio = Stream(tokens), Stream(tokens)

    @contextlib.contextmanager
    def attending(self, blocks: Any) -> Iterator[None]:
        streams = {"attn1": (self.video, self.video), "audio_attn1": (self.audio, self.audio),
                   "audio_to_video_attn": (self.video, self.audio), "video_to_audio_attn": (self.audio, self.video)}
        with contextlib.ExitStack() as stack:
            for name, (queries, keys) in streams.items():
                stack.enter_context(within(blocks, [name], partial(self._among, queries, keys)))
            for block in blocks:
                stack.enter_context(instead(block, "get_ada_values", self.video.expanded, ("timestep",)))
            yield

    def _among(self, queries: Stream, keys: Stream) -> contextlib.AbstractContextManager[None]:
        return self._tokens.among(queries.layout, keys.layout)

    def blocks(self, forward: Callable[[], Any], arguments: Arguments) -> Any:
        """Reference audio, which is cut off at the end, comes first."""
        (video, audio), mask = arguments["x"], arguments["self_attention_mask"]
        self.video.begin(*segments(video, mask, self._tokens))
        reference = arguments["kwargs"].get("ref_audio_seq_len", 0)
        self.audio.begin(reference, audio.shape[1] - reference)
        arguments["x"] = [self.video.take(video), self.audio.take(audio)]
        arguments["timestep"] = self._times(*arguments["timestep"])
        arguments["pe"] = [tuple(map(stream.positions, of_stream))
                           for stream, of_stream in zip((self.video, self.audio), arguments["pe"], strict=True)]
        arguments["self_attention_mask"] = self.video.guided(mask)
        return forward()

    def _times(self, video: Any, audio: Any, between: Any, *of_text: Any) -> list[Any]:
        """In `between` are shifts and scales of audio and of video, and what gates the other into the video and the audio."""
        streams = [self.audio, self.video, self.video, self.audio]
        return [self.video.times(video), self.audio.times(audio),
                [stream.times(times) for stream, times in zip(streams, between, strict=True)], *of_text]

    def output(self, forward: Callable[[], Any], arguments: Arguments) -> Any:
        video, audio = arguments["embedded_timestep"]
        arguments["embedded_timestep"] = [self.video.for_tokens(video), self.audio.times(audio)]
        arguments["kwargs"]["ref_audio_seq_len"] = len(self.audio.layout.pieces[self._tokens.rank][0])
        return forward()

    def heard(self, forward: Callable[[], Any], _: Arguments) -> torch.Tensor:
        return self._tokens.gather(forward(), self._new)

    @property
    def _new(self) -> Layout:
        return self._tokens.layout(self.audio.layout.segments[-1])


@contextlib.contextmanager
def ltxav(model: Any, tokens: TokenParallel) -> Iterator[None]:
    """As the video alone; what attends to the other stream finds its tokens spread in their own way."""
    sound = Sound(tokens)
    with (instead(model, "_process_transformer_blocks", sound.blocks, ("x", "timestep", "pe", "self_attention_mask", "kwargs")),
          instead(model, "_process_output", sound.output, ("embedded_timestep", "kwargs")),
          instead(model.proj_out, "forward", sound.video.gathered), instead(model.audio_proj_out, "forward", sound.heard),
          sound.attending(model.transformer_blocks)):
        yield
