"""What the student's tangent along the teacher's trajectory is made of, time by time, on the built-in world.

    python -m tests.benchmarks.tangent_parts student.safetensors …      ("toy" is the built-in teacher)

For each file and angle theta: the norm of sCM's tangent g, of the parts of tF that come through the latents and through
the time, and of tF from a central difference over 0.02 rad. Where the part through the time is far above the
difference, the network has learned to ripple in time faster than any sampler step can see, and g is mostly that.
"""

import argparse

import jax
import jax.numpy as jnp

from rcm_jax.configs import toy_scm
from rcm_jax.configs.base import run_config
from rcm_jax.data.source import make_source
from rcm_jax.flow import trig_noisy, trig_velocity
from rcm_jax.losses.samples import sample_sum
from rcm_jax.model_file import load_model
from rcm_jax.wan.dit import DiT, guided_velocity, velocity
from rcm_jax.worlds.builtin import find_model

ANGLES = (0.1, 0.4, 0.7, 1.0, 1.2, 1.35, 1.45, 1.5)
STEP = 0.01


def norm(x: jax.Array) -> jax.Array:
    """Mean over the batch of the norm over all else."""
    return jnp.sqrt(sample_sum(jnp.square(x))).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+")
    args = parser.parse_args()
    config = run_config(toy_scm.get_config())
    source = make_source(config.data, seed=123)
    batch = source.batch(0)
    x0, text, null = jnp.asarray(batch.latents), jnp.asarray(batch.text), jnp.asarray(source.null_text)
    noise = jax.random.normal(jax.random.key(0), x0.shape)
    dit = DiT(config.model)
    frozen, _ = load_model(find_model("toy"))
    teacher = trig_velocity(guided_velocity(dit, frozen, text, null, config.method.guidance))

    @jax.jit
    def parts(params, angle):
        student = trig_velocity(velocity(dit, params, text))
        theta = jnp.full(x0.shape[0], angle)
        c, s = jnp.cos(angle), jnp.sin(angle)
        z = trig_noisy(x0, noise, theta)
        F_teacher = teacher(z, theta)
        F, through_z = jax.jvp(lambda z: student(z, theta), (z,), (c * s * F_teacher,))
        _, through_time = jax.jvp(lambda theta: student(z, theta), (theta,), (jnp.full_like(theta, c * s),))
        ahead, behind = (student(z + h * F_teacher, theta + h) for h in (STEP, -STEP))
        g = -c * jnp.abs(c) * (F - F_teacher) - (c * s * z + through_z + through_time)
        return [norm(x) for x in (g, through_z, through_time, c * s * (ahead - behind) / (2 * STEP))]

    for file in args.files:
        params, _ = load_model(find_model(file))
        print(f"{file}\n  theta       g   through z   through time   difference")
        for angle in ANGLES:
            g, z, time, difference = (float(x) for x in parts(params, angle))
            print(f"  {angle:5.2f} {g:7.0f} {z:11.0f} {time:14.0f} {difference:12.0f}")


if __name__ == "__main__":
    main()
