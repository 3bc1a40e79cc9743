"""Adding to a network: a student's difference from its base, or LoRA files. In float32, one tensor at a time."""

import dataclasses
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rcm_jax.convert.checkpoint import Checkpoint
from rcm_jax.convert.lora import WHOLE, Lora, parse_lora
from rcm_jax.convert.tensors import Tensor
from rcm_jax.hub import Place, find

Float32 = np.float32
Shape = tuple[int, ...]


def add_difference(
    base: Checkpoint, student: Checkpoint, reference: Checkpoint, *, scale: float = 1.0, keep: str | None = None
) -> Checkpoint:
    """base + scale · (student − reference), in the base's dtypes: how rCM brings its students to Wan2.2.

    keep: a pattern of Wan2.1 names that stay the base's, for tensors of another shape (`patch_embedding` of an
    image-to-video base). Raises ValueError listing names and shapes that the three do not share.
    """
    networks = {"base": base.wan(), "student": student.wan(), "reference": reference.wan()}
    kept = {name for name in networks["base"] if keep and re.search(keep, name)}
    if keep and not kept:
        raise ValueError(f"--keep {keep!r} matches no tensor of {base.path}")
    problems = []
    for name in sorted(set().union(*networks.values()) - kept):
        shapes = {who: tensors[name].shape if name in tensors else None for who, tensors in networks.items()}
        if len(set(shapes.values())) > 1:
            problems.append(f"{name}: " + ", ".join(f"{who} {shape or 'has none'}" for who, shape in shapes.items()))
    if problems:
        raise ValueError("the networks differ; --keep PATTERN keeps the base's:\n  " + "\n  ".join(problems))

    def one(name: str, tensor: Tensor) -> Tensor:
        if name in kept:
            return tensor
        new, old = networks["student"][name], networks["reference"][name]
        return _plus(tensor, lambda: Float32(scale) * (new.load().astype(Float32) - old.load().astype(Float32)))

    return dataclasses.replace(base, tensors={name: one(name, t) for name, t in networks["base"].items()})


def _plus(tensor: Tensor, change: Any) -> Tensor:
    load = lambda: (tensor.load().astype(Float32) + change()).astype(tensor.dtype)  # noqa: E731
    return dataclasses.replace(tensor, load=load)


class Given(NamedTuple):
    """A LoRA file that is asked for, and how strongly."""

    path: Place
    strength: float


def given_lora(text: str, argument: str = "lora") -> Given:
    """Of "FILE" or "FILE:0.8". Raises ArgumentError for a strength that is no number, and as `hub.find`."""
    path, colon, strength = text.rpartition(":")
    if not colon or not re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", strength.strip(), re.IGNORECASE):
        path, strength = text, "1"
    return Given(find(path, argument), float(strength))


def add_loras(base: Checkpoint, given: Sequence[Given], *, skip: str | None = None) -> Checkpoint:
    """`add_lora` for one after the other."""
    for path, strength in given:
        base = add_lora(base, path, scale=strength, skip=skip)
    return base


def add_lora(base: Checkpoint, path: str | Place, *, scale: float = 1.0, skip: str | None = None) -> Checkpoint:
    """base + scale · (alpha / rank) · up · down for every layer that the LoRA file has, and its whole differences.

    Names as diffusers, PEFT, ComfyUI, kohya, musubi, VideoX-Fun and LightX2V write them. alpha is the rank where the
    file does not tell it. A file of ours says how the sum is sampled. skip: a pattern of Wan2.1 modules that are left
    out, and warned of: what an image-to-video LoRA has and a text-to-video base lacks. Raises ValueError listing names
    that are no part of a LoRA or of the base, halves without the other, and wrong shapes.
    """
    if base.network.name != "dit":
        raise ValueError(f"{base.path} is a {base.network.title}; LoRA files are for the diffusion transformer")
    (lora, problems), tensors = parse_lora(path), base.wan()
    left = [module for module in lora.modules if skip and re.search(skip, module)]
    if skip and not left:
        raise ValueError(f"--skip {skip!r} matches no layer of {path}")
    if left:
        warnings.warn(f"{path}: {len(left)} layers are left out: {', '.join(left)}", stacklevel=2)
    modules = {module: parts for module, parts in lora.modules.items() if module not in left}
    problems += [line for module, parts in modules.items() for line in _misfits(module, parts, tensors)]
    if problems:
        raise ValueError(
            f"{path} does not fit {base.path} (--skip PATTERN leaves layers out):\n  " + "\n  ".join(problems)
        )
    for module in modules:
        for kind in WHOLE:
            change = _change(lora, module, kind, scale)
            if change is not None:
                name = _target(module, kind, tensors)
                tensors[name] = _plus(tensors[name], change)
    known = {"dialect": "rcm_jax", "info": lora.info} if lora.info else {}
    return dataclasses.replace(base, tensors=tensors, **known)


def _target(module: str, kind: str, own: Mapping[str, Tensor]) -> str:
    """The parameter that a part changes; a module may be a parameter itself, as modulation is."""
    return module if kind == "weight" and module in own else f"{module}.{kind}"


def _misfits(module: str, parts: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    if module not in own and not any(name.rpartition(".")[0] == module for name in own):
        return [f"{t.origin or module} {t.shape} is not known" for t in parts.values()]
    out = []
    if "up" in parts and "down" in parts:
        up, down = parts["up"].shape, parts["down"].shape
        shape = own[f"{module}.weight"].shape if f"{module}.weight" in own else None
        if shape is None or not _multiply(up, down, shape):
            out.append(f"{module}: up {up} times down {down} is not {shape}")
    for kind in WHOLE:
        target = own.get(_target(module, kind, own))
        if kind in parts and (target is None or target.shape != parts[kind].shape):
            out.append(f"{module}.{kind}: {parts[kind].shape} in the LoRA, {target and target.shape} in the base")
    return out


def _multiply(up: Shape, down: Shape, shape: Shape) -> bool:
    """Whether up [out, rank, 1, …] times down [rank, in, kernel …] is of that shape."""
    if min(len(up), len(down)) < 2 or any(n != 1 for n in up[2:]):
        return False
    return up[1] == down[0] and (up[0], *down[1:]) == shape


def _change(lora: Lora, module: str, kind: str, scale: float) -> Any:
    """A function that computes what is added to a module's weight or bias; None where nothing is."""
    parts = lora.modules[module]
    if kind not in parts and not (kind == "weight" and "up" in parts):
        return None

    def change() -> np.ndarray:
        total = parts[kind].load().astype(Float32) if kind in parts else Float32(0)
        if kind == "weight" and "up" in parts:
            up, down = (parts[half].load().astype(Float32) for half in ("up", "down"))
            product = (up.reshape(up.shape[:2]) @ down.reshape(len(down), -1)).reshape(len(up), *down.shape[1:])
            total = total + Float32(lora.alpha_of(module) / lora.rank_of(module)) * product
        return Float32(scale) * total

    return change
