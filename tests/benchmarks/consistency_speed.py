"""How fast sCM and dCM learn what their causal teacher does: python -m tests.benchmarks.consistency_speed --out FOLDER

A step of either makes as many network passes. The paper finds continuous time about ten times faster; on the built-in
world it is not. Two reasons are tried: that a trajectory of 48 discrete steps is too short to be slow (dCM with 96 and
192), and that the network is too small (a student with twice the layers, the new ones adding nothing at first, from the
same teacher).

A causal teacher is trained (`toy_causal_tf`, seed 0). From it a student of each case learns for --steps steps, at a
rate that does not fall, and its averaged weights are taken on the way. Each is sampled in 1 and 4 steps: the share of
right videos, and the agreement with the teacher's videos in 20 guided steps from the same noises (PSNR of frames, dB).
A JSON line a student goes to FOLDER/curves.jsonl; what is in it is not made again. At the end a table a measure: means
over the seeds.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from rcm_jax.compilation import keep_programs
from rcm_jax.configs import toy_causal_tf, toy_causal_tf_dcm, toy_causal_tf_scm
from rcm_jax.configs.base import run_config
from rcm_jax.media.pictures import to_uint8
from rcm_jax.model_file import load_model, save_model
from rcm_jax.pipelines.comparing import psnr
from rcm_jax.pipelines.pipeline import load
from rcm_jax.training.runs import train_recipe
from rcm_jax.worlds.toy.scores import evaluation_prompts, score
from tests.benchmarks import machine

EVERY = 5  # steps between weights that are left
TAKEN = (0, 5, 10, 15, 30, 60, 125)
SAMPLED = (1, 4)
TEACHER_STEPS = 20
ADDS = ("self_attn/o/", "cross_attn/o/", "ffn_out/")  # the products with which a block adds to its input


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    discrete_steps: int = 0  # of dCM's trajectory; 0 is sCM
    layers: int = 1  # times the teacher's


CASES = {
    case.name: case
    for case in (
        Case("scm"), Case("dcm 48", 48), Case("dcm 96", 96), Case("dcm 192", 192), Case("scm deep", layers=2),
        Case("dcm 48 deep", 48, 2),
    )
}  # fmt: skip


def deeper(teacher: Path, path: Path, times: int) -> Path:
    """The same function in so many times the layers: after each block copies of it that add nothing yet."""
    params, info = load_model(teacher)
    flat = flatten_dict(params, sep="/")
    for name in [name for name in flat if name.startswith("blocks/")]:
        flat[name] = np.repeat(np.asarray(flat[name]), times, axis=0)
        if any(part in name for part in ADDS):
            flat[name][np.arange(len(flat[name])) % times != 0] = 0
    model = dataclasses.replace(info.model, num_layers=times * info.model.num_layers)
    return save_model(path, unflatten_dict(flat, sep="/"), dataclasses.replace(info, model=model))


def recipe(case: Case, seed: int, steps: int, teacher: Path, start: Path):
    config = (toy_causal_tf_dcm if case.discrete_steps else toy_causal_tf_scm).get_config()
    config.update({"seed": seed, "steps": steps, "tensorboard": False, "keep": 1, "weights_every": EVERY})
    config.teacher = str(teacher)
    config.optimizer.update({"warmup_updates": steps // 10, "decay_updates": 10**9})
    if case.discrete_steps:
        config.method.dcm_total_steps = case.discrete_steps
    else:
        config.method.tangent_warmup = steps // 5
    own = run_config(config)
    if case.layers == 1:
        return own
    model = dataclasses.replace(own.model, num_layers=case.layers * own.model.num_layers)
    return dataclasses.replace(own, model=model, teacher_model=own.model, init=str(start))


def videos(path: Path, kind: str, prompts: list[str], num_steps: int, label: str) -> np.ndarray:
    return np.asarray(
        load(path, kind=kind).arrays(prompts, seed=1, num_steps=num_steps, indices=range(len(prompts)), progress=label)
    )


def curve(workdir: Path, steps: int, ends: tuple[Path, Path], prompts: list[str], target: np.ndarray) -> list[dict]:
    """Scores of the weights at the start, of what was left on the way, and of the end. ends: the first and the last."""
    rows = []
    for at in [n for n in TAKEN if n <= steps]:
        path = ends[bool(at)] if at in (0, steps) else workdir / "weights" / f"{at:07d}"
        for n in SAMPLED:
            made = videos(path, "student", prompts, n, f"{workdir.name}, step {at}, in {n}")
            agreement = float(psnr(to_uint8(made), to_uint8(target), 255.0).mean())
            right = score(made, prompts, resamples=1)["all"]["value"]
            rows.append({"at": at, "num_steps": n, "all": right, "psnr": agreement})
    return rows


def table(records: list[dict], measure: str, num_steps: int) -> str:
    """Mean over the seeds, with the least and the greatest; a row a case, a column a number of training steps."""
    rows = [r for r in records if r["num_steps"] == num_steps]
    at = sorted({r["at"] for r in rows})
    digits = 1 if measure == "psnr" else 2
    lines = [f"{measure}, sampled in {num_steps}", f"{'':14}" + "".join(f"{n:>20}" for n in at)]
    for name in dict.fromkeys(r["case"] for r in rows):
        cells = []
        for n in at:
            values = [r[measure] for r in rows if r["case"] == name and r["at"] == n]
            cells.append(
                f"{np.mean(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]" if values else ""
            )
        lines.append(f"{name:14}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join(lines)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--steps", type=int, default=125, help="of a student's training")
    p.add_argument("--teacher_steps", type=int, help="of the causal teacher's training (default: the recipe's)")
    p.add_argument("--per_caption", type=int, default=4, help="videos for each of 48 captions")
    args = p.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    keep_programs()  # the seeds of a case share them

    config = toy_causal_tf.get_config()
    config.update({"tensorboard": False, "keep": 1} | ({"steps": args.teacher_steps} if args.teacher_steps else {}))
    teacher = train_recipe(run_config(config), args.out / "teacher", progress="the teacher")
    prompts = evaluation_prompts(args.per_caption)
    target = videos(teacher, "teacher", prompts, TEACHER_STEPS, "the teacher")
    print(
        f"the teacher in {TEACHER_STEPS} steps: {score(target, prompts, resamples=1)['all']['value']:.2f}", flush=True
    )

    file = args.out / "curves.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for seed in args.seeds:
        for case in (CASES[name] for name in args.cases):
            key = [case.name, seed, args.steps, args.per_caption]
            if any(r["key"] == key for r in records):
                continue
            start = teacher if case.layers == 1 else deeper(teacher, args.out / "deep.safetensors", case.layers)
            workdir = args.out / f"{case.name.replace(' ', '_')}-{seed}-{args.steps}"
            student = train_recipe(recipe(case, seed, args.steps, teacher, start), workdir, progress=workdir.name)
            found = [
                {"key": key, "case": case.name, "seed": seed} | row | machine("jax")
                for row in curve(workdir, args.steps, (start, student), prompts, target)
            ]
            records += found
            with file.open("a") as out:
                out.writelines(json.dumps(r) + "\n" for r in found)
            jax.clear_caches()  # the next case's programs are others
    for measure in ("all", "psnr"):
        for n in SAMPLED:
            print(table(records, measure, n), end="\n\n")


if __name__ == "__main__":
    main()
