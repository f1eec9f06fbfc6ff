"""Two processes against one, one thread each, for every stage that processes share; wall time of the stage, in turns.

The stages are run again in copies of a finished run, in their own settings but for what makes them short: one epoch,
ten steps of reinforcement learning, 4,000 users. Opening the data in each process is counted, as the stage's manifest
counts it; starting them is not. Two cores must be free for the ratio to mean anything. `ceiling` is what the machine
would allow: how much more gets done when two processes run the stage that know nothing of each other, each all of it.

Usage: python benchmarks/ranks.py --recipe recipes/study/beauty_2x1024.yaml --run RUN [--rounds 3] [--set KEY=VALUE]
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

STAGES = ("sft", "anchor", "latent_sft", "rl", "evaluate")
SHORT = (
    "sft.epochs=1", "latent_sft.epochs=1", "rl.steps=10", "rl.guards.users=500", "sft.validation.users=500",
    "latent_sft.validation.users=500", "evaluate.max_users=4000", "evaluate.also=[]", "evaluate.baselines=[]",
    "evaluate.model=latent_sft", "sft.accumulate=2", "sft.batch_tokens=2048", "latent_sft.accumulate=2",
    "latent_sft.batch_tokens=4096", "anchor.cache=null", "rl.rollouts.accumulate=4",
)  # fmt: skip


def main() -> None:
    """Print one JSON line for every stage."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stages", nargs="+", default=list(STAGES))
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    for stage in options.stages:
        alone: list[float] = []
        together: list[float] = []
        strangers: list[float] = []
        for _ in range(options.rounds):
            alone.append(timed(options, stage, 1))
            together.append(timed(options, stage, 2))
            with ThreadPoolExecutor(2) as pool:
                both = [pool.submit(timed, options, stage, 1) for _ in range(2)]
                strangers.append(statistics.mean(future.result() for future in both))
        one, two, both_s = map(statistics.median, (alone, together, strangers))
        line = {
            "benchmark": "ranks", "stage": stage, "ratio": round(one / two, 2), "baseline": "one process, one thread",
            "seconds": round(two, 1), "baseline_seconds": round(one, 1), "rounds": options.rounds,
            "ceiling": round(2 * one / both_s, 2),
        }  # fmt: skip
        print(json.dumps(line), flush=True)


def timed(options: argparse.Namespace, stage: str, processes: int) -> float:
    """Seconds that a stage takes in a copy of the run without it."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "run"
        copy.mkdir()
        for folder in options.run.iterdir():
            if folder.is_dir() and folder.name != stage and (folder / "manifest.json").is_file():
                shutil.copytree(folder, copy / folder.name)
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        words = [
            sys.executable, *(launcher if processes > 1 else []), "-m", "lasar", stage, str(options.recipe),
            *SHORT, *options.overrides, f"run_dir={copy}",
        ]  # fmt: skip
        done = subprocess.run(
            words, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(done.stderr)
        seconds: float = json.loads((copy / stage / "manifest.json").read_text())["seconds"]
    return seconds


if __name__ == "__main__":
    main()
