"""No nodes: has ComfyUI take the sizes of a model from its file's metadata for every family, not for LTX-Video only, so that
models of families whose sizes it takes for granted can be tiny too."""
import json

import comfy.model_detection

detect = comfy.model_detection.detect_unet_config


def detect_with_metadata(state_dict, key_prefix, metadata=None):
    config = detect(state_dict, key_prefix, metadata)
    if config is not None and metadata and "config" in metadata:
        config.update(json.loads(metadata["config"]).get("transformer", {}))
    return config


comfy.model_detection.detect_unet_config = detect_with_metadata

NODE_CLASS_MAPPINGS = {}
