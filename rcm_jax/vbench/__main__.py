"""Samples and scores VBench: python -m rcm_jax.vbench sample | score

  python -m rcm_jax.vbench sample --prompts VBench_full_info.json --dit_path rCM_Wan2.1_T2V_1.3B_480p.pt --out videos
  vbench evaluate …                                     # VBench's own measures, on the list that is left in videos
  python -m rcm_jax.vbench score results/*_eval_results.json --radar radar.png

sample makes every prompt's videos under the names that VBench looks for, as far as they are not there: the same command
goes on where it was stopped, and any number of processes share the work (--process I --num_processes N). What no flag
says is as published. Causal networks are streamed to their files. score adds the dimensions up as VBench does and shows
published rows beside them.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rcm_jax.cli import Subcommands, number
from rcm_jax.ranges import at_least


def _sample_flags(p: argparse.ArgumentParser) -> None:
    from rcm_jax.options import add_options
    from rcm_jax.pipelines.options import FileOptions, SamplingOptions
    from rcm_jax.vbench.sampling import NOT_HERE, BenchOptions

    add_options(p, BenchOptions)
    sampling = [name for name in SamplingOptions.__dataclass_fields__ if name not in NOT_HERE]
    add_options(p.add_argument_group("how to sample"), SamplingOptions, names=sampling)
    add_options(p.add_argument_group("files and devices"), FileOptions)


def _sample(given: dict[str, Any]) -> str:
    from rcm_jax.media.video import check_encoder
    from rcm_jax.options import taken
    from rcm_jax.pipelines.options import FileOptions, SamplingOptions
    from rcm_jax.pipelines.pipeline import load
    from rcm_jax.vbench.protocol import with_protocol
    from rcm_jax.vbench.sampling import BenchOptions, check_seeds, read_jobs, sample_all

    bench, options = BenchOptions(**taken(given, BenchOptions)), taken(given, SamplingOptions)
    check_seeds(bench, SamplingOptions(**options))
    entries, jobs = read_jobs(bench)  # its errors, before a network is opened
    check_encoder()
    pipe = load(**taken(given, FileOptions))
    return sample_all(pipe, bench, entries, jobs, with_protocol(pipe, options))


def _score_flags(p: argparse.ArgumentParser) -> None:
    from rcm_jax.vbench.suites import SUITES

    p.add_argument(
        "results", type=Path, nargs="+", help="*_eval_results.json of VBench, of one dimension or of several"
    )
    p.add_argument("--suite", choices=SUITES, help="text or image to video (default: what the dimensions say)")
    p.add_argument("--name", default="this", help="of the row in the table")
    p.add_argument("--beside", nargs="+", metavar="MODEL", help="published rows to show (default: the nearest totals; "
                   "beside a partial score none)")  # fmt: skip
    p.add_argument("--prompts", type=Path, help="list that was sampled: every sample must have been measured, and once")
    p.add_argument("--samples", type=number(int, at_least(1)), default=5, help="videos of a prompt, with --prompts (5)")
    p.add_argument(
        "--partial", action="store_true", help="means of the dimensions that there are, where some are missing"
    )
    p.add_argument("--clamp", action="store_true", help="normalised scores to [0, 1], as rCM's script does")
    p.add_argument("--json", type=Path, metavar="OUT", help="write every score here, unrounded")
    p.add_argument("--radar", type=Path, metavar="OUT", help="draw all whole rows here: .png, .pdf or .svg")


def _score(given: dict[str, Any]) -> str:
    from rcm_jax.outputs import PICTURES, check_output, unfinished
    from rcm_jax.vbench.prompts import read_prompts
    from rcm_jax.vbench.report import as_json, nearest, notes, own_row, published, radar, table
    from rcm_jax.vbench.results import read_results

    for name, suffixes in (("json", (".json",)), ("radar", PICTURES)):
        if given[name] is not None:
            check_output(given[name], name, suffixes)
    found = read_results(given["results"], given["suite"], partial=given["partial"])
    if not given["partial"]:
        found.complete()
    if given["prompts"] is not None:
        found.check_videos(read_prompts(given["prompts"]), given["samples"])
    suite, clamp = found.suite, given["clamp"]
    own, others = own_row(suite, found.raw, clamp=clamp), published(suite)
    strange = [name for name in given["beside"] or () if name not in others]
    if strange:
        raise ValueError(f"--beside {strange[0]!r} is no published row; there are {', '.join(others)}")
    partial = bool(found.missing)
    if partial and given["radar"] is not None:
        raise ValueError(f"--radar draws every dimension, and of {', '.join(found.missing)} there is no result")
    shown = given["beside"] or ([] if partial else nearest(others, own["total"], 4))
    if given["name"] in shown:
        raise ValueError(f"--name {given['name']!r} is also the published row shown beside it: give another name")
    rows = {given["name"]: own} | {name: others[name] for name in shown}
    if given["json"] is not None:
        told = as_json(suite, found.raw, clamp=clamp, sources=[str(path) for path in given["results"]])
        with unfinished(given["json"]) as new:
            new.write_text(json.dumps(told, indent=1))
    if given["radar"] is not None:
        radar(suite, rows, given["radar"], clamp=clamp)
    return "\n\n".join([table(suite, rows, partial=partial), *notes(suite, found.raw, clamp=clamp)])


COMMANDS = {
    "sample": (_sample_flags, _sample, "videos of a list of prompts, as VBench reads them"),
    "score": (_score_flags, _score, "VBench's results added up, beside published rows"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """The command; installed as rcm-vbench."""
    Subcommands("vbench", __doc__, COMMANDS).run(argv)


if __name__ == "__main__":
    main()
