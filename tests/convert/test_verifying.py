"""Files carry checksums of what was written, which any reader of safetensors passes over."""

import dataclasses
import json
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from rcm_jax.convert.commands import main
from rcm_jax.convert.output import write_model
from rcm_jax.convert.tensors import Tensor
from rcm_jax.model_file import ModelInfo, load_model, save_model
from rcm_jax.tensor_stream import SUMS, write_safetensors
from tests.convert.test_merge import as_kohya
from tests.convert.test_torch_io import FILES
from tests.convert.tiny import HEADS, T2V, random_params, save, wan_arrays
from tests.test_entry_points import fails
from tests.tiny import MODEL


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ours")
    main([str(save(folder / "x.pt", wan_arrays())), str(folder / "m.safetensors"), *HEADS])
    return folder / "m.safetensors"


def flip(path, place: int, bit: int = 3):
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)
    return path


def offsets(path) -> dict[str, tuple[int, int]]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    return {n: tuple(8 + length + o for o in e["data_offsets"]) for n, e in header.items() if n != "__metadata__"}


def test_what_was_written_is_told_so(ours, capsys):
    main(["verify", str(ours)])
    assert capsys.readouterr().out == f"{ours}: 42 tensors, 0.00 GB, are what was written\n"
    main(["inspect", str(ours)])
    assert "with a checksum of every tensor" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["blocks/ffn_in/kernel", "head/out/bias", "text_out/kernel"])
@pytest.mark.parametrize("end", [0, -1])
def test_a_flipped_bit_is_told_with_its_tensor(tmp_path, ours, name, end):
    path = tmp_path / "m.safetensors"
    path.write_bytes(ours.read_bytes())
    begin, stop = offsets(path)[name]
    flip(path, begin if end == 0 else stop - 1)
    fails(main, ["verify", str(path)], f"{path} is not what was written: {name}")
    load_model(path)  # which does not read everything twice


def test_safetensors_own_readers_take_the_file(ours):
    with safe_open(ours, "numpy") as file:
        told = json.loads(file.metadata()[SUMS])
        assert set(told) == set(file.keys()) == set(load_file(ours))
    hub = pytest.importorskip("huggingface_hub")
    found = hub.parse_local_safetensors_file_metadata(ours)
    assert found.metadata[SUMS] == json.dumps(told)
    assert {name: (8 + found_end(ours) + t.data_offsets[0]) for name, t in found.tensors.items()} == {
        name: begin for name, (begin, _) in offsets(ours).items()
    }


def found_end(path) -> int:
    return struct.unpack("<Q", path.read_bytes()[:8])[0]


def test_a_file_by_others_has_none(tmp_path):
    path = save(tmp_path / "x.safetensors", wan_arrays())
    fails(main, ["verify", str(path)], f"{path} cannot be verified: its header has no checksums")


def test_a_tensor_more_is_told(tmp_path, ours):
    from safetensors.numpy import save_file

    with safe_open(ours, "numpy") as file:
        metadata = file.metadata()
    arrays = load_file(ours) | {"extra": np.ones(3, np.float32)}
    save_file(arrays, tmp_path / "more.safetensors", metadata)
    fails(main, ["verify", str(tmp_path / "more.safetensors")], "is not what was written: extra")


def test_shards_each_have_theirs(tmp_path, ours, capsys):
    out = tmp_path / "out"
    main(["export", str(ours), str(out), "--to", "diffusers", "--shard_size", "60kB"])
    capsys.readouterr()
    main(["verify", str(out)])
    files = sorted(out.glob("*.safetensors"))
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == [str(file) for file in files]
    name, (begin, _) = next(iter(offsets(files[2]).items()))
    flip(files[2], begin)
    fails(main, ["verify", str(out)], f"{files[2]} is not what was written: {name}")


def test_what_training_and_lora_leave_has_them(tmp_path, capsys):
    config = dataclasses.replace(MODEL, num_layers=1)
    model = save_model(
        tmp_path / "m.safetensors", random_params(config), ModelInfo(config, "student", "toy", (9, 6, 6))
    )
    lora = save(tmp_path / "l.safetensors", as_kohya(3.0)[0])
    main(["lora", str(lora), str(tmp_path / "comfyui.safetensors"), "--form", "comfyui"])
    for path in (model, tmp_path / "comfyui.safetensors"):
        capsys.readouterr()
        main(["verify", str(path)])
        assert capsys.readouterr().out.endswith("are what was written\n")


def test_every_dtype_and_shape(tmp_path):
    kinds = [np.float64, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.int64, np.uint8, np.bool_]
    tensors = {f"a{i}": Tensor.of(np.arange(6).reshape(2, 3).astype(kind)) for i, kind in enumerate(kinds)}
    tensors |= {"scalar": Tensor.of(np.float32(3)), "none": Tensor.of(np.zeros((0, 4), np.float32))}
    tensors["stacked"] = Tensor.stack([Tensor.of(np.full((2, 2), i, np.float32)) for i in range(3)])
    write_safetensors(tmp_path / "x.safetensors", tensors, {}, lambda _: None)
    main(["verify", str(tmp_path / "x.safetensors")])
    begin, _ = offsets(tmp_path / "x.safetensors")["scalar"]
    fails(main, ["verify", str(flip(tmp_path / "x.safetensors", begin))], "is not what was written: scalar")


def test_orbax_has_none(tmp_path):
    write_model(tmp_path / "o", {"a": Tensor.of(np.ones(3))}, ModelInfo(T2V, "teacher", "wan"), format="orbax")
    fails(main, ["verify", str(tmp_path / "o")], "its form, Orbax, has no checksums")
    fails(main, ["verify", str(FILES / "legacy.pt")], "cannot be verified: its format has no checksums")


def test_pytorchs_zips_have_their_own(tmp_path, capsys):
    """Those that PyTorch wrote, and ours."""
    main(["verify", str(FILES / "zip.pt")])
    assert ": 7 tensors, " in capsys.readouterr().out
    path = save(tmp_path / "x.pt", wan_arrays(), "net.")
    main(["verify", str(path)])
    numbers = wan_arrays()["blocks.1.ffn.0.weight"].tobytes()
    data = path.read_bytes()
    flip(path, data.index(numbers) + len(numbers) - 1)
    fails(main, ["verify", str(path)], f"{path} is not what was written: net.blocks.1.ffn.0.weight")
    path.write_bytes(data.replace(b"little", b"l1ttle", 1))
    with pytest.raises(SystemExit):
        main(["verify", str(path)])
