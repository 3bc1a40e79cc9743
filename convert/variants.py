"""Networks of Wan's family that are not read here: told by what they have besides, and what would be right.

Fine-tunes that have Wan's own tensors (SkyReels-V2's T2V and I2V, MoviiGen, Phantom, Fun-InP, …) are read as it is.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping

T2V, I2V = "Wan2.1-T2V in the same width", "Wan2.1-I2V-14B or Wan2.2-I2V-A14B"


class UnsupportedVariantError(ValueError):
    """A known network that is not read here; the message is one line."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """signs: parts of names, from a dot to a dot, that no other network has; any is enough. does: what it is for.
    right: what can be read instead."""

    name: str
    does: str
    right: str
    signs: tuple[str, ...] = ()


VARIANTS = (
    Variant("VACE", "is steered by videos, masks and references", T2V, ("vace_blocks", "vace_patch_embedding")),
    Variant(
        "Wan2.2-S2V", "speaks to a sound track", I2V,
        ("casual_audio_encoder", "audio_injector", "trainable_cond_mask", "frame_packer"),
    ),
    Variant(
        "Wan2.2-Animate", "moves a person as another one does", I2V,
        ("face_adapter", "face_encoder", "motion_encoder", "pose_patch_embedding"),
    ),
    Variant("HuMo", "speaks to a sound track", T2V, ("audio_proj.audio_proj_glob_1", "audio_cross_attn_wrapper")),
    Variant("MultiTalk or InfiniteTalk", "speaks to a sound track", I2V, ("audio_cross_attn", "audio_proj")),
    Variant("SCAIL", "moves a person as a skeleton does", I2V, ("patch_embedding_pose", "patch_embedding_mask")),
    Variant("Fun-Control-Camera", "is steered by a camera's way", I2V, ("control_adapter",)),
    Variant("Fun-Control", "is steered by a control video and a reference", I2V, ("ref_conv",)),
    Variant(
        "Wan2.1-FLF2V", "takes a first and a last frame", "Wan2.1-I2V-14B",
        ("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"),
    ),
    Variant(
        "SkyReels-V2-DF", "is told the frame rate", "SkyReels-V2's T2V or I2V, which are read as Wan2.1's",
        ("fps_embedding", "fps_projection"),
    ),
    Variant("ReCamMaster", "is steered by a camera's way", T2V, ("cam_encoder",)),
)  # fmt: skip
CONTROL = Variant("Fun-Control", "is steered by a control video", I2V)
CONTROL_2_2 = Variant("Wan2.2-Fun-Control", "is steered by a control video", I2V)
CAMERA = Variant("Fun-Control-Camera", "is steered by a camera's way", I2V)
INP_5B = Variant("Wan2.2-Fun-5B-InP", "takes a first and a last frame", "Wan2.2-TI2V-5B")


def variant_of(shapes: Mapping[str, tuple[int, ...]]) -> tuple[Variant, str] | None:
    """The variant whose tensors these are, and what tells it; None for what is not known as one."""
    found = _by_name(shapes)
    return found or _by_channels(shapes)


def refusal(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Why a network is not read: one line without its path."""
    found = variant_of(shapes)
    if found is None:
        return None
    variant, sign = found
    return (
        f"it is {variant.name}, which {variant.does} ({sign}) and is not supported; "
        f"of its family can be read {variant.right}"
    )


def _by_name(names: Collection[str]) -> tuple[Variant, str] | None:
    text = "\n".join(f".{name}." for name in names)
    found = ((variant, sign) for variant in VARIANTS for sign in variant.signs if f".{sign}." in text)
    return next(found, None)


def _by_channels(shapes: Mapping[str, tuple[int, ...]]) -> tuple[Variant, str] | None:
    """Those with Wan's own tensors and other channels into its patches: what steers them is laid beside the noise."""
    patch, head = shapes.get("patch_embedding.weight", ()), shapes.get("head.head.weight", ())
    if len(patch) != 5 or len(head) != 2:
        return None
    into, out = patch[1], head[0] // math.prod(patch[2:])
    known = {3 * out: CONTROL, 3 * out + 4: CONTROL_2_2, 2 * out: CAMERA}
    if out == 48:  # TI2V-5B's latents, which takes its image without channels of its own
        known[2 * out + 4] = INP_5B
    return (known[into], f"{into} channels in, {out} out") if into in known else None
