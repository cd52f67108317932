"""Nodes that open GGUF files as packs do: with a tensor subclass, layers and a patcher of their own.

Text encoders have V1 nodes, like ComfyUI-GGUF's. The model's node is one of the newer API, which cannot be hooked.
Used by the end-to-end tests only: of the types of blocks it knows Q8_0.
"""
import comfy.lora
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.utils
import folder_paths
import gguf
import nodes
import torch
from comfy_api.latest import io

Q8_0 = gguf.GGMLQuantizationType.Q8_0
for key, folder in {"unet_gguf": "diffusion_models", "clip_gguf": "text_encoders"}.items():
    folder_paths.folder_names_and_paths[key] = (folder_paths.folder_names_and_paths[folder][0], {".gguf"})


class Blocks(torch.Tensor):
    """The file's own memory; what it stands for is in attributes, and `shape` is what the host should see."""

    def __new__(cls, data, **attributes):
        return super().__new__(cls, data)

    def __init__(self, data, **attributes):
        super().__init__()
        self.__dict__.update(attributes)

    def to(self, *args, **options):
        moved = super().to(*args, **options)
        moved.kind, moved.numbers, moved.patches = self.kind, self.numbers, self.patches
        return moved

    def detach(self):
        return self

    @property
    def shape(self):
        return self.numbers

    def dense(self, dtype):
        with torch._C.DisableTorchFunctionSubclass():
            data = self.as_subclass(torch.Tensor)
            if self.kind is Q8_0:
                blocks = data.reshape(-1, 34)
                data = blocks[:, 2:].view(torch.int8).float() * blocks[:, :2].view(torch.float16).float()
            data = data.reshape(self.numbers).float()
        for key, patches in self.patches:
            data = comfy.lora.calculate_weight(patches, data, key)
        return data.to(dtype)


def state_dict(path):
    """The tensors by name, and what else the file says, as newer packs return it."""
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        shape, data = torch.Size(map(int, reversed(tensor.shape))), torch.from_numpy(tensor.data)
        found[tensor.name] = Blocks(data if tensor.tensor_type is Q8_0 else data.view(shape), kind=tensor.tensor_type,
                                    numbers=shape, patches=())
    return found, {"metadata": {}}


class Layers(comfy.ops.manual_cast):
    class Linear(comfy.ops.manual_cast.Linear):
        def __init__(self, in_features, out_features, *args, **options):
            torch.nn.Module.__init__(self)
            self.in_features, self.out_features = in_features, out_features
            self.weight = self.bias = None

        def _load_from_state_dict(self, state_dict, prefix, *args):
            for name in ("weight", "bias"):
                if prefix + name in state_dict:
                    setattr(self, name, torch.nn.Parameter(state_dict[prefix + name], requires_grad=False))

        def forward_comfy_cast_weights(self, input):
            weight, bias = (None if each is None else each.to(input.device).dense(input.dtype)
                            for each in (self.weight, self.bias))
            return torch.nn.functional.linear(input, weight, bias)


class Patcher(comfy.model_patcher.ModelPatcher):
    mmap_released = False

    def patch_weight_to_device(self, key, device_to=None, inplace_update=False):
        weight = comfy.utils.get_attr(self.model, key)
        if key not in self.patches or not isinstance(weight, Blocks):
            return
        weight = weight.to(device_to)
        weight.patches = ((key, self.patches[key]),)
        comfy.utils.set_attr_param(self.model, key, weight)

    def unpatch_model(self, device_to=None, unpatch_weights=True):
        for parameter in self.model.parameters() if unpatch_weights else ():
            if isinstance(parameter, Blocks):
                parameter.patches = ()
        return super().unpatch_model(device_to=device_to, unpatch_weights=unpatch_weights)

    def load(self, *args, force_patch_weights=False, **options):
        super().load(*args, force_patch_weights=True, **options)
        if self.mmap_released:
            return
        for module in self.model.modules() if options.get("lowvram_model_memory", 0) > 0 else ():
            if getattr(getattr(module, "weight", None), "device", None) == self.offload_device:
                module.to(self.load_device).to(self.offload_device)
        self.mmap_released = True

    def clone(self, *args, **options):
        own, self.__class__ = self.__class__, Patcher  # the host's class makes a clone of its own
        made = super().clone(*args, **options)
        self.__class__, made.__class__ = own, Patcher
        return made


class ModelOfAPack(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(node_id="ModelOfAPack", inputs=[io.String.Input("name")], outputs=[io.Model.Output()])

    @classmethod
    def execute(cls, name):
        weights, extra = state_dict(folder_paths.get_full_path_or_raise("unet_gguf", name))
        options = {"custom_operations": Layers}
        return io.NodeOutput(Patcher.clone(comfy.sd.load_diffusion_model_state_dict(weights, model_options=options, **extra)))


class TextEncoderOfAPack:
    RETURN_TYPES = ("CLIP",)
    FUNCTION = "load_clip"

    @classmethod
    def INPUT_TYPES(cls):
        files = (folder_paths.get_filename_list("clip") + folder_paths.get_filename_list("clip_gguf"),)
        return {"required": {"name": files, "type": nodes.CLIPLoader.INPUT_TYPES()["required"]["type"]},
                "optional": {"name2": files, "device": (["default", "cpu"],), "dequant_dtype": ("STRING",)}}

    def load_data(self, paths):
        return [{name: blocks.dense(torch.float16) for name, blocks in state_dict(path)[0].items()} if path.endswith(".gguf")
                else comfy.utils.load_torch_file(path) for path in paths]

    def load_patcher(self, paths, clip_type):
        return comfy.sd.load_text_encoder_state_dicts(self.load_data(paths), clip_type=clip_type)

    def load_clip(self, name, type, name2=None, device="default", dequant_dtype=None):
        paths = [folder_paths.get_full_path_or_raise("clip", each) for each in (name, name2) if each is not None]
        return (self.load_patcher(paths, getattr(comfy.sd.CLIPType, type.upper())),)


ModelOfAPack.GET_SCHEMA()
NODE_CLASS_MAPPINGS = {node.__name__: node for node in (ModelOfAPack, TextEncoderOfAPack)}
