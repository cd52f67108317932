"""Nodes that change a VAE as packs do. For the Ray tests only."""
import copy
import time


class _Change:
    RETURN_TYPES = ("VAE",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"vae": ("VAE",), "amount": ("FLOAT", {"default": 1.0})}}


class ScaleInput(_Change):
    """A copy of the VAE over the same model, which sees its pixels through another function."""

    def run(self, vae, amount):
        vae = copy.copy(vae)
        theirs = vae.process_input
        vae.process_input = lambda image: theirs(image) * amount
        return (vae,)


class WriteWeights(_Change):
    """Scales weights in place, in this process, and tells nobody."""

    def run(self, vae, amount):
        for parameter in vae.first_stage_model.parameters():
            parameter.mul_(amount)
        return (vae,)


class Slow:
    """An instance of a class of the pack's module, which another process has to import."""

    def __init__(self, function, seconds):
        self.function, self.seconds = function, seconds

    def __call__(self, image):
        time.sleep(self.seconds)
        return self.function(image)


class SlowInput(_Change):
    """Each tile to be encoded takes longer."""

    def run(self, vae, amount):
        vae = copy.copy(vae)
        vae.process_input = Slow(vae.process_input, amount)
        return (vae,)


class Locked(_Change):
    """A copy of the VAE that cannot be pickled."""

    def run(self, vae, amount):
        vae = copy.copy(vae)
        vae.lock = __import__("threading").Lock()
        return (vae,)


NODE_CLASS_MAPPINGS = {cls.__name__: cls for cls in (ScaleInput, WriteWeights, SlowInput, Locked)}
