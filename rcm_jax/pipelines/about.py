"""How a video was made, as its file's comment says it, and how a command makes it anew (--again)."""

import dataclasses
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from rcm_jax.convert.merge import given_lora
from rcm_jax.errors import ArgumentError
from rcm_jax.hub import Place
from rcm_jax.media.tags import read_tags
from rcm_jax.pipelines.opening import Opened
from rcm_jax.pipelines.options import FileOptions, SamplingOptions
from rcm_jax.pipelines.request import Request
from rcm_jax.pipelines.scenes import has_scenes
from rcm_jax.pipelines.stream_batch_options import SETTINGS as SLOTS
from rcm_jax.version import version
from rcm_jax.worlds.builtin import BUILTIN

LORAS = ("lora", "second_lora")
OPTIONS = {field.name for options in (FileOptions, SamplingOptions) for field in dataclasses.fields(options)}


# what is given beside --again, and what of the file's it takes the place of, beside its own
INSTEAD = {
    "num_steps": ("steps_per_chunk", "mid_t", "mid_t_schedules"),
    "steps_per_chunk": ("num_steps", "mid_t", "mid_t_schedules"),
    "mid_t": ("mid_t_schedules",),
    "mid_t_schedules": ("mid_t",),
    "size": ("resolution", "aspect_ratio", "adaptive_resolution"),
    "resolution": ("size",),
    "aspect_ratio": ("size", "adaptive_resolution"),
    "prompt": ("prompts_file",),
    "dit_path": ("scale",),
    "model": ("dit_path", "scale"),
    "distilled": ("kind",),
    "decoder": ("tiny_vae_path",),
    "video_path": ("image_path",),
    "image_path": ("video_path", "noise_scale", "noise_rule", "stream_batch", "one_by_one", *SLOTS),
    "fsdp": ("batch_size",),  # which goes by it
}


def describe(opened: Opened, request: Request, asked: SamplingOptions) -> list[dict[str, Any]]:
    """For each video of a call all that makes it again: prompt, options as given, state of the files, versions.

    Of weights or input video that are in no file only prompt and seed. The batch's size is among the options, whoever
    set it: on it depends the program, and on that the last bits.
    """
    made_by = {"rcm_jax": version(), "jax": jax.__version__, "device": jax.devices()[0].device_kind}
    if not opened.experts.sources or (request.video is not None and request.video.path is None):
        return [{"prompt": words, "seed": request.seed} | made_by for words in request.prompts]
    options = {"dit_path": _place(opened.options.dit_path), "seed": request.seed}
    options |= _given(opened.options) | _given(asked)
    for name in ("num_samples", "negative_prompt"):
        options.pop(name, None)
    if not opened.info.causal:
        options["batch_size"] = request.batch_size
    if request.timed is not None:  # the prompts themselves: their file may change
        options["prompts_file"] = request.timed
    paths = [value for name, value in options.items() if name.endswith("_path")]
    paths += [str(given_lora(text, name).path) for name in LORAS for text in options.get(name, ())]
    files = {path: state_of(path) for path in paths}
    if opened.files is not None:  # those that were found beside the network too
        own = (*opened.files.dit, opened.files.vae, opened.files.text, opened.files.clip, opened.files.tiny)
        files |= {_place(network.path): state_of(str(network.path)) for network in own if network is not None}
    whole = {
        "command": "sample_causal" if opened.info.causal else "sample",
        "files": {path: state for path, state in files.items() if state}, **made_by,
    }  # fmt: skip
    negative = request.negative_prompts * (len(request.prompts) // len(request.negative_prompts))
    return [
        {"prompt": words, "options": options | ({"negative_prompt": no} if no else {}) | {"indices": [index]}} | whole
        for words, no, index in zip(request.prompts, negative, request.indices, strict=True)
    ]


def _given(options: Any) -> dict[str, Any]:
    """The fields that differ from their defaults, but for the indices, which every video has of its own."""
    fields = [f for f in dataclasses.fields(options) if f.name != "indices"]
    given = {f.name: getattr(options, f.name) for f in fields if getattr(options, f.name) != f.default}
    return {name: _absolute(name, value) for name, value in given.items()}


def _absolute(name: str, value: Any) -> Any:
    if name in LORAS:
        given = [given_lora(text, name) for text in value]
        return [_place(one.path) + (f":{one.strength:g}" if one.strength != 1 else "") for one in given]
    return _place(value) if name.endswith("_path") else value


def _place(path: str | Place) -> str:
    """From wherever the file is read; what is not here is on the hub, or built in."""
    named = str(path)
    return str(Path(named).absolute()) if named not in BUILTIN and Path(named).exists() else named


def state_of(path: str) -> dict[str, int] | None:
    """Size and time of a file, or of all in a folder: to tell whether it has changed, without reading it."""
    if path in BUILTIN or not Path(path).exists():
        return None
    found = [Path(path)] if Path(path).is_file() else [p for p in Path(path).rglob("*") if p.is_file()]
    stats = [p.stat() for p in found]
    return {"bytes": sum(s.st_size for s in stats), "modified": int(max((s.st_mtime for s in stats), default=0))}


def join(abouts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of several videos of one call in one file; {} for others."""
    parts = [dict(about, options=dict(about.get("options", {}))) for about in abouts]
    prompts = [part.pop("prompt", None) for part in parts]
    indices = [index for part in parts for index in part["options"].pop("indices", [])]
    negatives = [part["options"].pop("negative_prompt", "") for part in parts]
    if len(parts) == 1 or not parts[0] or any(part != parts[0] for part in parts) or len(indices) != len(parts):
        return dict(abouts[0]) if len(parts) == 1 else {}
    same = len(set(prompts)) == len(set(negatives)) == 1
    options = parts[0]["options"] | {"indices": indices} | ({"num_samples": len(parts)} if same else {})
    if any(negatives):
        options["negative_prompt"] = negatives[0] if same else negatives
    return parts[0] | {"prompt": prompts[0] if same else prompts, "options": options}


def tags(prompt: str, about: dict[str, Any], fps: float, scale: int) -> dict[str, str]:
    """Title and comment of a file; no comment where nothing is known."""
    if not about:
        return {"title": prompt}
    known = {"prompt": about["prompt"]} | about | {"fps": fps, "scale": scale}
    if "options" in about:
        options = dict(sorted(about["options"].items()))  # one order, so that the same video is the same file
        if options.get("indices") == list(range(options.get("num_samples", 1))):
            del options["indices"]
        known["options"] = options
    return {"title": prompt, "comment": json.dumps(known, ensure_ascii=False, default=_plain)}


def _plain(value: Any) -> Any:
    """What JSON does not know, e.g. numbers of NumPy and paths."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return list(value) if isinstance(value, Sequence) else str(value)


def read_about(path: str | Path, command: str) -> dict[str, Any]:
    """What the comment of a video's file says of its making. Raises ArgumentError for one that does not say it, or that
    another command made, and as `read_tags`."""
    try:
        about = json.loads(read_tags(path).get("comment", ""))
        options = dict(about["options"])
        maker, _ = about["command"], about["prompt"]
    except (KeyError, TypeError, json.JSONDecodeError):
        raise ArgumentError(
            "{again} does not say how it was made: its comment is none that a sampling command wrote", again=path
        ) from None
    if maker != command:
        raise ArgumentError(f"{{again}} was made by another command: use python -m rcm_jax.{maker}", again=path)
    if unknown := sorted(options.keys() - OPTIONS):
        raise ArgumentError(
            f"{{again}} is of rcm_jax {about.get('rcm_jax')}; this one does not know {', '.join(unknown)}", again=path
        )
    return about | {"options": options}


def fill_in(given: dict[str, Any], path: str | Path, command: str) -> None:
    """Takes from the file what is not given: so what is given overrules it, and one thing can be changed alone.

    Warns of what may make the video another one. Raises as `read_about`."""
    about = read_about(path, command)
    options, prompts = about["options"], about["prompt"]
    other_prompt = given.get("prompt") is not None or given.get("prompts_file") is not None
    other_videos = given.get("prompts_file") is not None and command == "sample"  # one each a line
    if other_videos or "num_samples" in given or (other_prompt and isinstance(prompts, list)):
        options.pop("indices", None)  # a number for each video
        if isinstance(options.get("negative_prompt"), list):
            del options["negative_prompt"]
    if isinstance(given.get("prompt"), str) and command == "sample_causal" and has_scenes(given["prompt"]):
        options.pop("num_frames", None)  # the scenes say it
    for name, others in INSTEAD.items():
        if given.get(name) not in (None, False):
            for other in others:
                options.pop(other, None)
                about.pop(other, None)
    for name, value in options.items():
        given.setdefault(name, value)
    if not other_prompt and given.get("prompts_file") is None:
        given["prompt"] = prompts
    for name in ("fps", "scale"):
        if name in about:
            given.setdefault(name, about[name])
    for line in _changes(about):
        warnings.warn(f"{line} since {path} was made: it may become another video", stacklevel=2)


def _changes(about: dict[str, Any]) -> list[str]:
    files = dict(about.get("files", {}))
    lines = [f"{file} has changed or gone" for file, state in files.items() if state_of(file) != state]
    now = {"rcm_jax": version(), "jax": jax.__version__, "device": jax.devices()[0].device_kind}
    lines += [f"{name} was {about[name]} and is {new}" for name, new in now.items() if about.get(name, new) != new]
    return lines
