"""Shards as the published builder writes them, without PyTorch."""

import io
import pickle
import tarfile
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np

NAMES = {np.dtype(ml_dtypes.bfloat16): "BFloat16Storage", np.dtype(np.float32): "FloatStorage"}


def bare(array: np.ndarray, *, offset: int = 0, strides: tuple[int, ...] | None = None, shape=None) -> bytes:
    """As `torch.save(tensor, path)` lays a tensor out: the array is its storage, of which offset, shape and strides
    tell a part."""

    def plain(value):
        return pickle.dumps(value, protocol=2)[2:-1]

    shape = array.shape if shape is None else shape
    if strides is None:
        strides = tuple(int(np.prod(shape[k + 1 :])) for k in range(len(shape)))
    where = b"(" + plain("storage") + f"ctorch\n{NAMES[array.dtype]}\n".encode()
    where += plain("0") + plain("cpu") + plain(array.size) + b"tQ"
    rest = plain(offset) + plain(tuple(shape)) + plain(tuple(strides)) + b"\x89ccollections\nOrderedDict\n)R"
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + where + rest + b"tR.")
        archive.writestr("archive/data/0", np.ascontiguousarray(array).tobytes())
        archive.writestr("archive/version", "3\n")
    return file.getvalue()


def triple(key: str, latents: np.ndarray, text: np.ndarray, prompt: str) -> dict[str, bytes]:
    """The members of a sample; latents are channels first."""
    return {
        f"{key}.latent.pt": bare(latents), f"{key}.embed.pt": bare(text), f"{key}.prompt.txt": prompt.encode(),
    }  # fmt: skip


def write_tar(path: Path, members: list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1.5 if form == tarfile.PAX_FORMAT else 0
            tar.addfile(info, io.BytesIO(data))
    return path
