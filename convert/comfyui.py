"""ComfyUI's scaled float8: a linear layer's weight is what is stored times a number beside it."""

import functools
import json
import math
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from rcm_jax.convert.tensors import Tensor

MARK = "scaled_fp8"  # a tensor of a file that has scales: its dtype names the format
SCALES = (".scale_weight", ".weight_scale")
HINTS = (".scale_input", ".input_scale")  # for products in float8: of no use to others
FORMAT = ".comfy_quant"  # JSON in bytes, of a layer
QUANTISED = "_quantization_metadata"  # JSON in a file's metadata, of all layers
FORMATS = ("float8_e4m3fn", "float8_e5m2")


def unscaled(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors with every weight that has a scale multiplied by it when it is read: bfloat16, or float32 where that
    is asked for. Without scales they are as they were. Raises ValueError for formats that are not read, and scales
    without a weight or of several numbers."""
    layers = json.loads(metadata.get(QUANTISED, "{}")).get("layers", {})
    formats = {name: about.get("format", "") for name, about in layers.items()}
    formats |= {n.removesuffix(FORMAT): _format(t) for n, t in tensors.items() if n.endswith(FORMAT)}
    for name, kind in formats.items():
        if kind not in FORMATS:
            raise ValueError(f"{name} is quantised as {kind or 'nothing that is named'}; read are {', '.join(FORMATS)}")
    scales = {_module(n): t for n, t in tensors.items() if n.endswith(SCALES)}
    marks = [name for name in tensors if name.rpartition(".")[2] == MARK]
    if not scales and not marks and not formats:
        return dict(tensors)
    extras = {name for name in tensors if name.endswith((*SCALES, *HINTS, FORMAT)) or name in marks}
    out = {name: tensor for name, tensor in tensors.items() if name not in extras}
    for module, scale in scales.items():
        name = f"{module}.weight"
        if name not in out or scale.size != 1:
            raise ValueError(f"{scale.origin} {scale.shape} is no scale of one number for a weight {name}")
        out[name] = _times(out[name], scale)
    return out


def _module(name: str) -> str:
    return functools.reduce(str.removesuffix, SCALES, name)


def _format(tensor: Tensor) -> str:
    try:
        return json.loads(bytes(tensor.read().reshape(-1).view(np.uint8))).get("format", "")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{tensor.origin} is not the JSON of a format") from error


def _times(weight: Tensor, scale: Tensor) -> Tensor:
    def load() -> np.ndarray:
        number = np.float32(scale.read().reshape(-1)[0])
        if not math.isfinite(number):
            raise ValueError(f"{scale.origin} is {number}")
        return weight.load().astype(np.float32) * number

    return Tensor(weight.shape, np.dtype(ml_dtypes.bfloat16), load, origin=weight.origin)
