"""Makes a Q8_0 GGUF of a Flux safetensors file: `python make_gguf.py SOURCE FILE`. Needs the gguf package."""
import sys
from pathlib import Path

import gguf
import safetensors.torch
import torch

source, file = sys.argv[1:]
partial = Path(file).with_suffix(".partial")
writer = gguf.GGUFWriter(str(partial), "flux")
for key, value in safetensors.torch.load_file(source).items():
    array = value.to(torch.float32).numpy()
    if value.ndim == 2 and value.shape[1] % 32 == 0 and "blocks." in key:
        quantised = gguf.quants.quantize(array, gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(key, quantised, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    else:
        writer.add_tensor(key, array)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
partial.rename(file)
