"""Recognises what a file or folder holds and gives it Wan2.1's names, whatever it was named."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from rcm_jax.convert.files import Weights, open_weights
from rcm_jax.convert.networks import MODELS, NETWORKS, Network, differences, short, with_dtype
from rcm_jax.convert.table import lazy_to_ours, lazy_to_theirs
from rcm_jax.convert.tensors import Tensor, total_bytes
from rcm_jax.convert.variants import UnsupportedVariantError, refusal
from rcm_jax.hub import Place
from rcm_jax.model_file import ASIDE, FORMAT, ModelInfo, info_from_json
from rcm_jax.options import option
from rcm_jax.ranges import at_least

# which of several copies of a network in one file is meant: averaged weights first
PREFERRED = ("generator_ema", "net_ema", "ema", "generator", "net", "model")
SPIECE = "spiece_model"  # in ComfyUI's umT5: the bytes of its SentencePiece model
UNUSED = "what Wan does not use"
WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod", "module")


WAN_LATENTS = (20, 60, 104)  # 77 frames of 832 x 480, what the published students are trained on
WAN22_LATENTS = (31, 44, 80)  # of TI2V-5B: 121 frames of 1280 x 704


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """What a file may leave unsaid of a DiT."""

    kind: str | None = option(
        None, "how it is sampled: a teacher with guidance in many steps, a student in 1 to 4 (default: what our file "
        "says; student for rCM's and Self-Forcing's files)", choices=("teacher", "student"),
    )  # fmt: skip
    round_time_to: str | None = option(
        None, "rounding of the time before its embedding (default: the file's; bfloat16 for students of rCM, which are "
        "trained so)", choices=("none", "bfloat16"),
    )  # fmt: skip
    num_heads: int | None = option(
        None, "attention heads, where they are not 128 wide and no config.json says", range=at_least(1)
    )


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """One network of a file. tensors: by Wan2.1's names, or of a network that is not Wan2.1's by its own. aside: what
    else is in the file, entry -> number of tensors.

    besides: by Wan2.1's names, tensors of the network that nothing here computes with; they are for the way back.

    objects: what else a pickle holds, its keys -> its class; nothing of it was run. tokenizer: bytes of a SentencePiece
    model that came with a text encoder.

    dialect: "wan", "rcm" (patch embedding as a Linear), "diffusers", "transformers" or "rcm_jax". info: of our own
    files, else None.
    """

    path: Place
    entry: str
    network: Network
    dialect: str
    config: Any
    tensors: Mapping[str, Tensor]
    aside: Mapping[str, int]
    info: ModelInfo | None = None
    objects: Mapping[str, str] = dataclasses.field(default_factory=dict)
    tokenizer: Tensor | None = None
    besides: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)

    @property
    def distilled(self) -> bool:
        """Whether it is named as few-step students are: rCM's `net`, Self-Forcing's `generator`."""
        return self.dialect == "rcm" or any(part.startswith(("generator", "net")) for part in self.entry.split("."))

    def ours(self) -> dict[str, Tensor]:
        """By our names, stacked. Raises ValueError that lists all that is missing, unused or misshapen."""
        n, c = self.network, self.config
        try:
            return lazy_to_ours(n.table.rows(c), self.tensors, n.num_layers(c), n.table.layouts(c), n.shapes(c))
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error

    def wan(self, dtype: str = "keep") -> dict[str, Tensor]:
        """By Wan2.1's names and in its layouts, checked as `ours`. dtype: see `networks.with_dtype`."""
        n, c = self.network, self.config
        return lazy_to_theirs(n.table.rows(c), with_dtype(self.ours(), dtype, n), n.num_layers(c), n.table.layouts(c))

    def whole(self, dtype: str = "keep") -> dict[str, Tensor]:
        """`wan` and what is `besides`. Raises ValueError where that is not all that a way back needs."""
        n = self.network
        if lacking := n.lacking(self.config, self.besides):
            raise ValueError(
                f"our {n.title} lacks what Wan does not use of it: {', '.join(lacking)}; convert the file that it was "
                "made from once more, or export that"
            )
        return self.wan(dtype) | self.kept(dtype)

    def kept(self, dtype: str = "keep", names: tuple[str, ...] = ("",)) -> dict[str, Tensor]:
        """What is `besides`, of names that begin so. dtype: see `networks.with_dtype`."""
        found = {name: tensor for name, tensor in self.besides.items() if name.startswith(names)}
        return with_dtype(found, dtype, self.network)

    def mapping(self, ours: Mapping[str, Tensor]) -> list[str]:
        """A line for every tensor of the file and its place in `ours`."""
        lines = []
        for row in self.network.table.rows(self.config):
            target = ours[row.ours]
            for i in range(self.network.num_layers(self.config) if row.stacked else 1):
                t = self.tensors[row.theirs.format(i=i)]
                place = f"{row.ours}[{i}] {target.shape[1:]}" if row.stacked else f"{row.ours} {target.shape}"
                lines.append(f"{t.origin} {t.shape} {t.dtype} -> {place} {target.dtype}")
        return lines

    def __str__(self) -> str:
        names = {
            "wan": f"{self.network.names} names", "rcm": "rCM names (Linear patch embedding)",
            "diffusers": "diffusers names", "transformers": "transformers names", "rcm_jax": "our own file",
        }  # fmt: skip
        same = [name for name, (network, c) in MODELS.items() if network is self.network]
        known = [name for name in same if not differences(MODELS[name][1], self.config)]
        dtypes = sorted({str(t.dtype) for t in self.tensors.values()})
        size = total_bytes(self.tensors) / 1e9
        parts = [
            f"{self.path}: {self.network.title}",
            f"size of {' or '.join(known)}" if known else short(self.config),
            names[self.dialect],
            *([f"entry {self.entry}"] if self.entry else []),
            f"{len(self.tensors)} tensors, {'+'.join(dtypes)}, {size:.2f} GB",
        ]
        objects = [f"{name or 'all'} ({kind})" for name, kind in self.objects.items()]
        parts += ["with its tokenizer"] * (self.tokenizer is not None)
        aside = ", ".join([*(f"{k or 'rest'} ({n})" for k, n in self.aside.items()), *objects])
        return ", ".join(parts) + (f"; left aside: {aside}" if aside else "")


def info_of(network: Checkpoint, options: NetworkOptions, like: Checkpoint | None = None) -> ModelInfo:
    """What a network is and how it is sampled: its own file says so, else the names in it, which may be those of
    another network that it was made `like`; the options overrule both."""
    config, kind, like = network.config, network.network.name, network if like is None else like
    if kind != "dit":
        return ModelInfo(config, kind, "wan")
    shape = WAN22_LATENTS if config.image_first else WAN_LATENTS
    known = like.info or ModelInfo(like.config, "student" if like.distilled else "teacher", "wan", shape)
    known = dataclasses.replace(known, kind=options.kind or known.kind)
    rounding = known.model.round_time_to
    if options.round_time_to:
        rounding = None if options.round_time_to == "none" else options.round_time_to
    elif like.dialect == "rcm" and known.kind == "student":
        rounding = "bfloat16"
    return dataclasses.replace(known, model=dataclasses.replace(config, round_time_to=rounding))


def open_checkpoint(
    path: str | Place, *, entry: str | None = None, model: str | None = None, num_heads: int | None = None
) -> Checkpoint:
    """Finds the network in a file or folder; reads names and shapes only.

    entry: which of several copies; without it the first of PREFERRED. model: one of MODELS that it must be. num_heads:
    where heads are not 128 wide and no config.json says so. Raises ValueError for a file without a known network, and
    for a network that is not `model`.
    """
    weights = open_weights(path)
    wanted = MODELS[model] if model else None
    found = ours_of(weights) if weights.metadata.get("format") == FORMAT else None
    if found is None:
        found = _foreign(weights, entry, wanted and wanted[0], num_heads)
    if wanted and wanted[0] is not found.network:
        raise ValueError(f"{path} is a {found.network.title}, not a {wanted[0].title} ({model})")
    if wanted and (differ := differences(wanted[1], found.config)):
        raise ValueError(f"{path} is not of the size of {model}: {', '.join(differ)}")
    return found


def ours_of(weights: Weights) -> Checkpoint:
    """The network of a file or folder in our form."""
    info = info_from_json(weights.metadata["info"])
    besides = {n.removeprefix(ASIDE): t for n, t in weights.groups[""].items() if n.startswith(ASIDE)}
    tensors = {n: t for n, t in weights.groups[""].items() if not n.startswith(ASIDE)}
    network = next(n for n in NETWORKS if n.name == info.network)
    config = info.model
    layers, layouts = network.num_layers(config), network.table.layouts(config)
    try:
        flat = lazy_to_theirs(network.table.rows(config), tensors, layers, layouts)
    except ValueError as error:
        raise ValueError(f"{weights.path}: {error}") from error
    aside = {UNUSED: len(besides)} if besides else {}
    return Checkpoint(weights.path, "", network, "rcm_jax", config, flat, aside, info, besides=besides)


def _foreign(weights: Weights, entry: str | None, network: Network | None, num_heads: int | None) -> Checkpoint:
    candidates = [c for c in _candidates(weights) if entry is None or entry in (c.name, *c.name.split("."))]
    if network and any(c.network is network for c in candidates):
        candidates = [c for c in candidates if c.network is network]
    if not candidates:
        raise _nothing(weights, entry)
    best = min(c.rank for c in candidates)
    chosen = [c for c in candidates if c.rank == best]
    if len(chosen) > 1 or len({c.network.name for c in candidates}) > 1:
        names = [c.name for c in candidates]
        raise ValueError(f"{weights.path} has several networks: choose with --entry from {names}")
    (found,) = chosen
    tensors, dialect = found.tensors(), found.dialect
    if found.network.name == "dit" and (why := refusal({name: t.shape for name, t in tensors.items()})):
        raise UnsupportedVariantError(f"{weights.path}: {why}")
    if dialect == "wan" and len(tensors.get("patch_embedding.weight", Tensor.of(0)).shape) == 2:
        dialect = "rcm"
    try:
        config = found.network.read_config({k: t.shape for k, t in tensors.items()}, weights.config, num_heads)
    except ValueError as error:
        raise ValueError(f"{weights.path}: {error}") from error
    tokenizer = tensors.pop(SPIECE, None) if found.network.name == "umt5" else None
    used = {name: t for name, t in tensors.items() if not name.startswith(found.network.dropped(config))}
    aside = found.aside(weights)
    besides = {name: t for name, t in tensors.items() if name not in used}
    if besides:
        aside[UNUSED] = len(besides)
    return Checkpoint(
        weights.path, found.name, found.network, dialect, config, used, aside, objects=weights.objects,
        tokenizer=tokenizer, besides=besides,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Candidate:
    """A network seen in a group of tensors, under a prefix of their names."""

    network: Network
    dialect: str
    group: str
    prefix: str
    members: Mapping[str, Tensor]

    @property
    def name(self) -> str:
        return ".".join(part for part in (self.group, self.prefix.rstrip(".")) if part)

    @property
    def rank(self) -> int:
        parts = self.name.split(".")
        return min((i for i, name in enumerate(PREFERRED) if name in parts), default=len(PREFERRED) + bool(self.name))

    def tensors(self) -> dict[str, Tensor]:
        renaming = self.network.renamings.get(self.dialect)
        own = {name[len(self.prefix) :]: t for name, t in self.members.items() if name.startswith(self.prefix)}
        return renaming.to_wan(own) if renaming else own

    def aside(self, weights: Weights) -> dict[str, int]:
        counts = {group: len(tensors) for group, tensors in weights.groups.items() if group != self.group}
        rest: dict[str, int] = {}
        for name in self.members:
            if not name.startswith(self.prefix):
                rest[name.split(".")[0]] = rest.get(name.split(".")[0], 0) + 1
        return counts | rest


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _candidates(weights: Weights) -> list[_Candidate]:
    out = []
    for group, tensors in weights.groups.items():
        members = {_unwrapped(name): tensor for name, tensor in tensors.items()}
        if len(members) < len(tensors):
            raise ValueError(f"{weights.path} has tensors with and without a wrapper's name, otherwise called the same")
        for network in NETWORKS:
            for dialect, signs in network.signs.items():
                prefixes = {
                    name.removesuffix(sign) for sign in signs for name in members if f".{name}".endswith(f".{sign}")
                }
                out += [_Candidate(network, dialect, group, prefix, members) for prefix in sorted(prefixes)]
    return out


def _nothing(weights: Weights, entry: str | None) -> ValueError:
    shapes = {name: tensor.shape for tensors in weights.groups.values() for name, tensor in tensors.items()}
    if entry is not None:
        found = [c.name for c in _candidates(weights)]
        return ValueError(f"{weights.path} has no network under {entry!r}; it has {found}")
    if any(".lora_" in name for name in shapes):
        how = "add it to its base with `merge BASE OUT --lora FILE`"
        return ValueError(f"{weights.path} is a LoRA, not a network: {how}")
    if why := refusal(shapes):
        return UnsupportedVariantError(f"{weights.path}: {why}")
    titles = ", ".join(network.title for network in NETWORKS)
    sample = ", ".join([*shapes][:4]) or "none"
    return ValueError(
        f"{weights.path} holds no network known here ({titles}): its {len(shapes)} tensors begin with {sample}"
    )
