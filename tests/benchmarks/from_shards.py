"""The recipe `toy_rcm` from shards, and from the source that they were made of.

    python -m tests.benchmarks.from_shards --out FOLDER

Makes the videos of a whole run into shards (`python -m rcm_jax.data.prepare world`), trains the recipe from the source
and from the shards in their order, says whether the two students and their records are the same to the last bit, and
scores both in 4, 2 and 1 steps as the demo does. What was stopped goes on where it was.
"""

import argparse
import dataclasses
from pathlib import Path

from safetensors.numpy import load_file

from rcm_jax.data.prepare.__main__ import main as prepare
from rcm_jax.training.metrics import read_metrics
from rcm_jax.training.runs import train_recipe
from tests.benchmarks.lora_toy import recipe, scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, help="of training (default: the recipe's)")
    parser.add_argument("--per_caption", type=int, default=4, help="videos for each of 48 captions")
    args = parser.parse_args()
    source = recipe(0, seed=0, steps=args.steps, lr_factor=1.0)
    folder = args.out / "set"
    prepare(["world", "--count", str(source.steps * source.data.batch_size), "--out", str(folder)])
    data = dataclasses.replace(source.data, name="shards", path=str(folder), shuffle=False, null_text="toy")
    students, records = {}, {}
    for name, config in {"source": source, "shards": dataclasses.replace(source, data=data)}.items():
        students[name] = train_recipe(config, args.out / name, progress=name)
        records[name] = read_metrics(args.out / name)
    one, other = (load_file(path) for path in students.values())
    same = one.keys() == other.keys() and all(one[name].tobytes() == other[name].tobytes() for name in one)
    print(f"weights the same, bit for bit: {same}; records the same: {records['source'] == records['shards']}")
    for name, student in students.items():
        for steps, found in scores(student, args.per_caption).items():
            print("from {}, {} steps: all {value:.3f} [{low:.3f}, {high:.3f}]".format(name, steps, **found["all"]))


if __name__ == "__main__":
    main()
