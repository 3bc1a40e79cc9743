"""What sampling takes of a device: the estimate, and what is said where it does not fit."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rcm_jax.aot.compile import absent, compile_for
from rcm_jax.convert.checkpoint import open_checkpoint
from rcm_jax.convert.networks import NETWORKS
from rcm_jax.errors import ArgumentError
from rcm_jax.parallel import batch_sharding, make_mesh, sharded_attention, state_shardings
from rcm_jax.pipelines import memory
from rcm_jax.pipelines.bidirectional import one_pass
from rcm_jax.pipelines.memory import GIB, Job, check_memory
from rcm_jax.wan.config import TAEW2_1, WAN22_TI2V_5B, WAN22_VAE, WAN_1_3B, WAN_14B, WAN_VAE
from rcm_jax.wan.dit import DiT
from rcm_jax.wan.networks import abstract_network
from rcm_jax.wan.tiny_vae import TinyVAE
from rcm_jax.wan.vae import VAE
from rcm_jax.wan.vae_layers import solid
from rcm_jax.worlds.wan.files import open_files
from tests.wan.tiny import write_wan


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return open_files([open_checkpoint(write_wan(tmp_path_factory.mktemp("wan")))])


def published(files, **changes):
    big = dataclasses.replace(
        files,
        dit=(dataclasses.replace(files.dit[0], config=WAN_1_3B),),
        vae=dataclasses.replace(files.vae, config=WAN_VAE),
    )
    return Job(**({"files": big, "size": (832, 480), "num_frames": 77} | changes))


def test_1_3b_at_480p_fits_24_gb(files):
    check_memory(published(files), int(0.75 * 24e9))
    check_memory(published(files, size=(1280, 720), num_frames=81), None)


@pytest.mark.parametrize(
    ("changes", "limit", "fitting"),
    [
        ({"size": (1280, 720)}, 6, ["--vae_tiling", "--resolution=480p"]),
        ({"size": (1280, 720), "decoder_dtype": "float32"}, 14, ["--vae_tiling", "--vae_dtype=bfloat16"]),
        ({"decoder_dtype": "float32"}, 5, ["--vae_tiling"]),
        ({"size": (1280, 720), "tiled": True, "num_frames": 501}, 14, ["--num_frames=", "--sequence=2"]),
        ({"dtype": "float32", "tiled": True}, 7, ["--dtype=bfloat16"]),
        ({}, 0.1, ["nothing of this network"]),
    ],
)
def test_what_does_not_fit_says_what_would(files, changes, limit, fitting):
    job = published(files, **changes)
    with pytest.raises(ArgumentError, match="takes about the network") as error:
        check_memory(job, int(limit * GIB))
    for words in fitting:
        assert words in error.value.as_flags()
        assert words.lstrip("-") in str(error.value)


def test_a_tiny_decoder_is_what_fits_and_needs_no_tiles(files):
    with pytest.raises(ArgumentError, match="decoder=tiny") as error:
        check_memory(published(files, decoder_dtype="float32"), 5 * GIB)
    tiny = dataclasses.replace(files.vae, config=TAEW2_1)
    job = published(files, decoder_dtype="float32")
    job = dataclasses.replace(job, files=dataclasses.replace(job.files, tiny=tiny))
    check_memory(job, 5 * GIB)
    with pytest.raises(ArgumentError, match="would fit") as error:
        check_memory(dataclasses.replace(job, num_frames=501), 5 * GIB)
    assert not {"vae_tiling", "decoder"} & set(error.value.arguments)


def test_what_is_said_to_fit_does(files):
    """The largest number of frames, and not one latent frame more."""
    job = published(files, size=(1280, 720), num_frames=501, tiled=True)
    limit = 14 * GIB
    with pytest.raises(ArgumentError, match="would fit") as error:
        check_memory(job, limit)
    frames = error.value.arguments["num_frames"]
    check_memory(dataclasses.replace(job, num_frames=frames), limit)
    with pytest.raises(ValueError, match="would fit"):
        check_memory(dataclasses.replace(job, num_frames=frames + 4), limit)


@pytest.mark.optimised
def test_the_estimate_is_near_the_compilers(monkeypatch):
    """The autoencoder's features, at a frame of 128 x 128, in the form for GPUs."""
    monkeypatch.setattr("rcm_jax.wan.vae_layers.convolve", solid)
    vae, latents = VAE(WAN_VAE), jax.ShapeDtypeStruct((1, 1, 16, 16, 16), jnp.float32)
    params = abstract_network(WAN_VAE)
    _, state = jax.eval_shape(vae.decode_chunk, params, latents)
    step = jax.jit(functools.partial(VAE.decode_chunk, vae)).lower(params, latents, state).compile()
    temporary = step.memory_analysis().temp_size_in_bytes
    features = 4 * 4 * 96 * 128 * 128
    assert temporary == pytest.approx(memory.PEAK_DECODE * features, rel=0.3)


@pytest.mark.aot
@pytest.mark.optimised
@pytest.mark.parametrize(
    ("model", "size", "dtype", "fsdp", "sequence"),
    [
        (WAN_1_3B, (832, 480), "bfloat16", 1, 1),
        (WAN_1_3B, (832, 480), "float32", 1, 1),
        (WAN_14B, (1280, 720), "bfloat16", 1, 1),
        (WAN_14B, (1280, 720), "bfloat16", 2, 2),
    ],
    ids=["1.3B", "1.3B float32", "14B", "14B on four"],
)
def test_the_network_s_estimate_is_the_compilers(files, model, size, dtype, fsdp, sequence):
    big = dataclasses.replace(published(files).files, dit=(dataclasses.replace(files.dit[0], config=model),))
    job = Job(big, size, 77, dtype, batch_size=fsdp, fsdp=fsdp, sequence=sequence)
    mesh = make_mesh(1, fsdp, sequence, absent("h200", fsdp * sequence))
    flat = flatten_dict(abstract_network(model), sep="/")
    whole = next(network for network in NETWORKS if network.name == "dit").full_precision
    kept = {k: x.update(dtype="float32" if whole.search(k) else dtype) for k, x in flat.items()}
    params = unflatten_dict(kept, sep="/")
    params = jax.tree.map(lambda x, s: x.update(sharding=s), params, state_shardings(mesh, params))

    def shaped(*dims):
        return jax.ShapeDtypeStruct((fsdp, *dims), jnp.float32, sharding=batch_sharding(mesh))

    dit = DiT(dataclasses.replace(model, dtype=dtype), sharded_attention(mesh))
    with jax.set_mesh(mesh), jax.default_matmul_precision(None):
        program = compile_for(
            one_pass, dit, params, shaped(512, 4096), shaped(*job.latent_shape, 16), shaped(), None, None
        )
    assert memory.network_bytes(job) == pytest.approx(program.peak, rel=0.15)


def decoding_step(vae, latents):
    """The program of a step with a past, for one absent H200."""
    dtype, mesh = vae.config.dtype, make_mesh(devices=absent("h200", 1))
    params = {"decoder": jax.tree.map(lambda x: x.update(dtype=dtype), abstract_network(vae.config)["decoder"])}
    state = jax.eval_shape(vae.decode_chunk, params, latents)[1]
    placed = jax.tree.map(lambda x: x.update(sharding=NamedSharding(mesh, P())), (params, latents, state))
    with jax.set_mesh(mesh), jax.default_matmul_precision(None):
        return compile_for(jax.jit(vae.decode_chunk, donate_argnums=2), *placed)


@pytest.mark.aot
@pytest.mark.optimised
def test_the_tiny_decoder_s_estimate_is_the_compilers(files):
    job, tiny = published(files), TinyVAE(dataclasses.replace(TAEW2_1, dtype="bfloat16"))
    job = dataclasses.replace(
        job, files=dataclasses.replace(job.files, tiny=dataclasses.replace(files.vae, config=TAEW2_1))
    )
    latents = jax.ShapeDtypeStruct((1, 1, *job.latent_shape[1:], 16), jnp.float32)
    assert memory.autoencoder_bytes(job) == pytest.approx(decoding_step(tiny, latents).peak, rel=0.15)


@pytest.mark.aot
@pytest.mark.optimised
@pytest.mark.parametrize(
    "changes",
    [{}, {"size": (1280, 720)}, {"size": (1280, 720), "tiled": True}, {"decoder_dtype": "float32"}],
    ids=str,
)
def test_the_autoencoder_s_estimate_is_the_compilers(files, changes):
    job = published(files, **changes)
    vae = VAE(dataclasses.replace(WAN_VAE, dtype=job.decoder_dtype))
    rows, columns = (memory.TILE,) * 2 if job.tiled else job.latent_shape[1:]
    latents = jax.ShapeDtypeStruct((1, 1, rows, columns, 16), jnp.float32)
    assert memory.autoencoder_bytes(job) == pytest.approx(decoding_step(vae, latents).peak, rel=0.15)


def of_ti2v(files, **changes):
    dit, vae = (dataclasses.replace(x, config=c) for x, c in ((files.dit[0], WAN22_TI2V_5B), (files.vae, WAN22_VAE)))
    return Job(dataclasses.replace(files, dit=(dit,), vae=vae), (1280, 704), 121, **changes)


@pytest.mark.aot
@pytest.mark.optimised
@pytest.mark.parametrize("changes", [{}, {"tiled": True}, {"decoder_dtype": "float32"}], ids=str)
def test_wan22_s_autoencoder_s_estimate_is_the_compilers(files, changes):
    job = of_ti2v(files, **changes)
    vae = VAE(dataclasses.replace(WAN22_VAE, dtype=job.decoder_dtype))
    rows, columns = (memory.TILE,) * 2 if job.tiled else job.latent_shape[1:]
    latents = jax.ShapeDtypeStruct((1, 1, rows, columns, 48), jnp.float32)
    assert memory.autoencoder_bytes(job) == pytest.approx(decoding_step(vae, latents).peak, rel=0.15)


def test_ti2v_fits_24_gb_in_tiles(files):
    """Its card asks for 24 GB; the tiny decoder is not of its latents."""
    check_memory(of_ti2v(files, tiled=True), int(0.95 * 24e9))
    assert of_ti2v(files).latent_shape == (31, 44, 80)
    with pytest.raises(ArgumentError, match="would fit") as error:
        check_memory(of_ti2v(files, decoder_dtype="float32"), int(13 * GIB))
    assert error.value.arguments["vae_dtype"] == "bfloat16"
    assert "decoder" not in error.value.arguments
