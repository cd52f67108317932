"""Nodes that do on purpose what packs do by accident. Used by the end-to-end tests only."""
import inspect

import comfy.model_management
import comfy.ops
import comfy.sd
import comfy.utils
import folder_paths
import nodes


class ScaleWeightOnDevice:
    """Writes into a weight behind everybody's back, on the device."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "factor": ("FLOAT",)}}

    def run(self, model, factor):
        comfy.model_management.load_models_gpu([model])
        model.model.diffusion_model.double_blocks[0].img_attn.qkv.weight.data.mul_(factor)
        return (model,)


class CancelWhileBuilding:
    """The user's Cancel, raised by the host in the middle of building a model."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"unet_name": ("STRING",)}}

    def run(self, unet_name):
        class Ops(comfy.ops.disable_weight_init):
            class Linear(comfy.ops.disable_weight_init.Linear):
                def _load_from_state_dict(self, *args, **kwargs):
                    comfy.model_management.interrupt_current_processing(True)
                    comfy.model_management.throw_exception_if_processing_interrupted()

        path = folder_paths.get_full_path("diffusion_models", unet_name)
        return (comfy.sd.load_diffusion_model(path, model_options={"custom_operations": Ops}),)


class InThePacksWay:
    """Another pack's loader, past everything that wraps it."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"loader": ("STRING",), "name": ("STRING",)}}

    def run(self, loader, name):
        node = nodes.NODE_CLASS_MAPPINGS[loader]
        return inspect.unwrap(getattr(node, node.FUNCTION))(node(), name)


NODE_CLASS_MAPPINGS = {cls.__name__: cls for cls in (ScaleWeightOnDevice, CancelWhileBuilding, InThePacksWay)}
