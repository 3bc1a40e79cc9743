"""Which device a program is traced for: that of the mesh which is set, and that may be a GPU that is not here."""

import dataclasses

import jax

from rcm_jax.aot.gpus import capability_of

UNKNOWN_CAPABILITY = 8.0  # the least that the kernels serve: right on every GPU they run on


@dataclasses.dataclass(frozen=True)
class Target:
    """`capability` is a GPU's compute capability (9.0 for an H100), None for what is no GPU."""

    kind: str
    capability: float | None

    @property
    def is_gpu(self) -> bool:
        return self.capability is not None

    @property
    def architecture(self) -> str:
        """As tables name it: sm_90."""
        return f"sm_{round(10 * self.capability)}" if self.is_gpu else ""


def target() -> Target:
    """The device of the mesh that is set (`jax.set_mesh`); without one, the first device here."""
    device, here = jax.sharding.get_abstract_mesh().abstract_device, jax.devices()[0]
    if device is None or device.device_kind == here.device_kind:
        capability = float(here.compute_capability) if here.platform == "gpu" else None
        return Target(here.device_kind, capability)
    if device.platform not in ("gpu", "cuda"):
        return Target(device.device_kind, None)
    return Target(device.device_kind, capability_of(device.device_kind) or UNKNOWN_CAPABILITY)
