"""What models need to be tiny. ComfyUI takes the sizes of a model from its file's metadata for every family, not for LTX-Video
only; and a node gives a text the mask that a larger encoder would give."""
import json

import comfy.model_detection
import node_helpers
import torch

detect = comfy.model_detection.detect_unet_config


def detect_with_metadata(state_dict, key_prefix, metadata=None):
    config = detect(state_dict, key_prefix, metadata)
    if config is not None and metadata and "config" in metadata:
        config.update(json.loads(metadata["config"]).get("transformer", {}))
    return config


comfy.model_detection.detect_unet_config = detect_with_metadata


class MaskText:
    """Only the first tokens of a text count."""

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"conditioning": ("CONDITIONING",), "tokens": ("INT", {"default": 20})}}

    def run(self, conditioning, tokens):
        mask = torch.zeros(1, conditioning[0][0].shape[1], dtype=torch.long)
        mask[:, :tokens] = 1
        return (node_helpers.conditioning_set_values(conditioning, {"attention_mask": mask}),)


NODE_CLASS_MAPPINGS = {"MaskText": MaskText}
