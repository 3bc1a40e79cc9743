"""One network in one file: safetensors, our parameter names, and in the metadata all that its use needs.

The file opens with any safetensors reader; `convert` takes its weights to Wan2.1's names. `convert` can also write the
same as a checkpoint folder of Orbax, which is read here too.
"""

import collections
import dataclasses
import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open

from rcm_jax.finite import check_finite
from rcm_jax.hub import Place, Published, find
from rcm_jax.outputs import check_room, unfinished
from rcm_jax.tensor_stream import Leaf, first_agrees, leaves, write_safetensors
from rcm_jax.types import Params
from rcm_jax.wan.networks import NETWORKS, abstract_network

FORMAT = "rcm_jax/1"
ORBAX_INFO, ORBAX_PARAMS = "model.json", "params"  # what a checkpoint folder of one network holds
ASIDE = "aside/"  # before the published names of tensors that nothing computes with: `convert` keeps them to go back
ORBAX_ASIDE = "aside.safetensors"  # which in a checkpoint folder have a file of their own


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """What a file holds.

    kind: a `teacher` is sampled as an ODE with guidance, a `student` in one to four steps; other networks have their
    name there. world: `toy`, or `wan` for the published networks. latent_shape: (T, H, W) that a DiT was made for,
    empty for other networks. causal: the settings of `CausalConfig` that sampling a causal DiT needs, else empty.
    t_range: the RF times that a DiT is for; of one of Wan2.2's two experts not all.
    """

    model: Any
    kind: str
    world: str
    latent_shape: tuple[int, ...] = ()
    sigma_max: float = 80.0
    guidance: float = 5.0
    note: str = ""
    causal: dict[str, Any] = dataclasses.field(default_factory=dict)
    t_range: tuple[float, float] = (0.0, 1.0)

    @property
    def network(self) -> str:
        """The name of the network in NETWORKS."""
        return "dit" if self.kind in ("teacher", "student") else self.kind

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))


def info_from_json(text: str) -> ModelInfo:
    """The inverse of `ModelInfo.to_json`. Raises ValueError for a kind of network that this version does not have."""
    info = ModelInfo(**json.loads(text))
    if info.network not in NETWORKS:
        raise ValueError(f"the file holds a network of kind {info.kind!r}; this version has {sorted(NETWORKS)}")
    config = NETWORKS[info.network].config(**info.model)
    shape, t_range = tuple(info.latent_shape), tuple(info.t_range)
    return dataclasses.replace(info, model=config, latent_shape=shape, t_range=t_range)


def save_model(path: str | Path, params: Params, info: ModelInfo, *, dtype: str = "float32") -> Path:
    """Writes the file under a temporary name and renames it when it is whole. Makes the folder.

    params: in memory or on devices, of several processes too: then all of them call it, and the first one writes. Each
    holds a layer of the network at a time. Raises OSError, in all of them, where the file cannot be written; what was
    there stays as it was.
    """
    path, tensors = Path(path), leaves(params, dtype)
    return written_by_first(path, tensors, lambda: _write(path, tensors, info))


def written_by_first(path: Path, tensors: Mapping[str, Leaf], write: Callable[[], object]) -> Path:
    """The file that the first process writes of what all of them hold; all call it. Raises as `save_model`."""
    problem: Exception | None = None
    if jax.process_index() == 0:
        try:
            write()
        except OSError as error:
            problem = OSError(f"cannot write {path}: {error.strerror or error}")
            problem.__cause__ = error
        except Exception as error:
            problem = error
    if jax.process_count() > 1:  # what the writer did not come to, the others wait for
        collections.deque(itertools.chain.from_iterable(leaf.blocks() for leaf in tensors.values()), maxlen=0)
    if not first_agrees(problem is None):
        raise problem or OSError(f"cannot write {path}: the first process says why")
    return path


def _write(path: Path, tensors: Mapping[str, Leaf], info: ModelInfo) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    check_room(path, sum(leaf.nbytes for leaf in tensors.values()))
    with unfinished(path) as new:
        write_safetensors(new, tensors, {"format": FORMAT, "info": info.to_json()}, lambda _: None)


def _local(path: str | Place) -> Path:
    """Where the file or checkpoint folder is; fetched where it is on the hub, if its header says it is ours."""
    place = find(path)
    if not isinstance(place, Published):
        return place
    if place.is_dir() and not (place / ORBAX_INFO).is_file():
        files = [name for name in place.files() if "/" not in name and name.endswith(".safetensors")]
        if len(files) != 1:
            raise place.wrong(f"its folder has {', '.join(files) or 'no model file (.safetensors)'}: give one file")
        place = place / files[0]
    if place.suffix == ".safetensors" and not place.cached():
        _check_format(place, place.header().metadata or {})
    return place.fetch()


def _check_format(path: Place, metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} was not written by rcm_jax (format {metadata.get('format')!r}, expected {FORMAT!r})")


def read_info(path: str | Place) -> ModelInfo:
    """The metadata alone, of a file or a checkpoint folder, here or on the hub. Raises FileNotFoundError, or ValueError
    for what is not one of ours."""
    path = _local(path)
    if (path / ORBAX_INFO).is_file():
        return info_from_json((path / ORBAX_INFO).read_text())
    if path.is_dir():
        files = sorted(file.name for file in path.glob("*.safetensors"))
        raise FileNotFoundError(
            f"{path} is a folder without a network of ours: no {ORBAX_INFO}, which a checkpoint of rcm-convert "
            f"--format orbax has; its model files (.safetensors): {', '.join(files) or 'none'}; give the file itself"
        )
    if not path.is_file():
        raise FileNotFoundError(f"no model file at {path}")
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    _check_format(path, metadata)
    return info_from_json(metadata["info"])


def load_model(path: str | Place, expect: Any = None, *, dtype: str | None = "float32") -> tuple[Params, ModelInfo]:
    """Parameters and info of a model file or checkpoint folder, here or on the hub; floats become `dtype`, or stay as
    they are for None.

    With `expect`, a network's config, raises ValueError listing every parameter that does not fit it. Raises
    FloatingPointError for weights that are NaN or infinite.
    """
    path = _local(path)
    info = read_info(path)
    expect = info.model if expect is None else expect
    if path.is_dir():
        with ocp.PyTreeCheckpointer() as checkpointer:
            params = checkpointer.restore((path / ORBAX_PARAMS).absolute())
        check_fit({k: v.shape for k, v in flatten_dict(params, sep="/").items()}, expect, path)
        flat = flatten_dict(params, sep="/")
        flat = {name: jnp.asarray(check_finite(np.asarray(x), f"{path}, {name}"), dtype) for name, x in flat.items()}
        return unflatten_dict(flat, sep="/"), info
    with safe_open(path, "numpy") as file:
        names = [name for name in file.keys() if not name.startswith(ASIDE)]  # noqa: SIM118
        check_fit({name: tuple(file.get_slice(name).get_shape()) for name in names}, expect, path)
    flat = {}
    for name in names:
        with safe_open(path, "numpy") as file:  # a mapping for each: with one for all, the whole file stays resident
            flat[name] = jnp.asarray(check_finite(file.get_tensor(name), f"{path}, {name}"), dtype)
    return unflatten_dict(flat, sep="/"), info


def check_fit(found: Mapping[str, tuple[int, ...]], config: Any, source: str | Path) -> None:
    """Raises ValueError that lists each missing, extra and differently shaped parameter."""
    wanted = {k: v.shape for k, v in flatten_dict(abstract_network(config), sep="/").items()}
    problems = [f"{k}: missing, the config has {wanted[k]}" for k in sorted(set(wanted) - set(found))]
    problems += [f"{k}: {tuple(found[k])} in the file, not in the config" for k in sorted(set(found) - set(wanted))]
    problems += [
        f"{k}: {tuple(found[k])} in the file, {wanted[k]} in the config"
        for k in sorted(set(found) & set(wanted))
        if tuple(found[k]) != tuple(wanted[k])
    ]
    if problems:
        raise ValueError(f"the weights in {source} do not fit the config:\n  " + "\n  ".join(problems))
