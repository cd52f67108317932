"""Nodes that patch a model as packs do: with closures, objects of their own, objects that count. For the Ray tests only."""
import threading
import time

import comfy.patcher_extension

WRAPPER = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL


class _Patch:
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "amount": ("FLOAT", {"default": 1.0})}}

    def run(self, model, amount):
        model = model.clone()
        self.patch(model, amount)
        return (model,)


class ScaleAttention(_Patch):
    """A closure in the place of the attention function."""

    def patch(self, model, amount):
        def scaled(func, q, k, v, *args, **kwargs):
            return func(q, k, v * amount, *args, **kwargs)

        model.model_options["transformer_options"]["optimized_attention_override"] = scaled


class Pause:
    """An instance of a class of the pack's module, which another process has to import."""

    def __init__(self, seconds):
        self.seconds = seconds

    def __call__(self, executor, *args, **kwargs):
        end = time.monotonic() + self.seconds
        while time.monotonic() < end:
            time.sleep(0.02)
        return executor(*args, **kwargs)


class PauseInModel(_Patch):
    """Each prediction takes longer."""

    def patch(self, model, amount):
        model.add_wrapper(WRAPPER, Pause(amount))


class PauseAfterStep(_Patch):
    """In ComfyUI's own process, when a step is predicted and the next one is not."""

    def patch(self, model, amount):
        def pause(args):
            time.sleep(amount)
            return args["denoised"]

        model.set_model_sampler_post_cfg_function(pause)


class Counter:
    """Scales what the model predicts by how often it was asked."""

    def __init__(self):
        self.calls = 0

    def __call__(self, executor, *args, **kwargs):
        self.calls += 1
        return executor(*args, **kwargs) * (1 + 0.1 * self.calls)


class CountCalls(_Patch):
    """A patch with a state of its own."""

    def patch(self, model, amount):
        model.add_wrapper(WRAPPER, Counter())


class HoldLock(_Patch):
    """A patch that cannot be pickled."""

    def patch(self, model, amount):
        lock = threading.Lock()

        def locked(executor, *args, **kwargs):
            with lock:
                return executor(*args, **kwargs) * amount

        model.add_wrapper(WRAPPER, locked)


NODE_CLASS_MAPPINGS = {cls.__name__: cls for cls in (ScaleAttention, PauseInModel, PauseAfterStep, CountCalls, HoldLock)}
