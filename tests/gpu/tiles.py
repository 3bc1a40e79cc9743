"""Stage 3: the fastest tiles of every kernel, into tiles.json (to be added to kernels/tile_table.json)."""

import functools
import json
from collections.abc import Iterator

from rcm_jax.kernels import tune
from rcm_jax.kernels.tiles import KINDS, this_gpu
from tests.gpu.parts import Context, Part

WIDTHS = (128, 64)  # Wan's, and the built-in networks'


def parts(context: Context) -> Iterator[Part]:
    for width in WIDTHS[1:] if context.tiny else WIDTHS:
        for kind in ("forward",) if context.tiny else KINDS:
            yield Part(f"{kind}, {width} wide", functools.partial(one_kernel, kind, width, context))


def one_kernel(kind: str, width: int, context: Context) -> dict:
    out = context.out / "tiles.json"
    command = ["--kinds", kind, "--widths", str(width), "--dtypes", "bfloat16", "--out", str(out)]
    tune.main(command + (["--tokens", "64", "--repeats", "1", "--anyway"] if context.tiny else []))
    table = json.loads(out.read_text()) if out.exists() else {}
    tiles = table.get(this_gpu()[0], {}).get(kind, {}).get(tune.operand_size("bfloat16"), {}).get(str(width))
    return {"ok": tiles is not None, "tiles": tiles}
