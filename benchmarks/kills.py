"""kill -9 of one of two processes at a random moment of a run: it ends, and a rerun ends as if nothing had been.

A tiny made-up shop, every stage that processes share. An undisturbed run is made first; every kill has a run folder
of its own, falls at a moment drawn from the length of the undisturbed run, on a process drawn at random; then the same
command is given again, and may be killed again (`--again`), until it ends well. `equal`: weights, arrays and tables of
every stage are the undisturbed run's, byte for byte.

Usage: python benchmarks/kills.py [--times 10] [--seed 0] [--again 0.3]
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
RECIPE = """
name: killed
stages: [prepare, embed, quantize, rationalize, sft, anchor, latent_sft, sasrec, rl, evaluate]
prepare: {dataset: mini, source: EVENTS, items: ITEMS, split: last_basket}
embed: {kind: collaborative, collaborative_width: 8}
quantize: {num_levels: 2, codebook_size: 16}
sft: {backbone: tiny, epochs: 12, batch_tokens: 512, accumulate: 2, precision: fp32, max_history: 20, ema_decay: 0.9}
anchor: {text_model: ngrams}
latent_sft: {epochs: 4, batch_tokens: 512, accumulate: 2, precision: fp32}
sasrec: {epochs: 4, hidden_size: 16, batch_tokens: 256, training: {accumulate: 2, precision: fp32}}
rl: {steps: 12, rollouts: {prompts: 16, accumulate: 2, group_size: 4}, guards: {validate_every: 3, users: 60}}
evaluate: {model: rl, also: [latent_sft, sft], beam_width: 20, baselines: [], bootstrap_samples: 50, num_examples: 0}
"""


def main() -> None:
    """Print one JSON line for every kill and one for all of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", type=float, default=0.3, help="share of reruns that are killed, too")
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        shop = folder / "shop"
        subprocess.run(
            [sys.executable, str(ROOT / "examples" / "make_mini_data.py"), str(shop)], check=True, capture_output=True
        )  # fmt: skip
        text = RECIPE.replace("EVENTS", str(shop / "events.csv")).replace("ITEMS", str(shop / "items.csv"))
        (folder / "recipe.yaml").write_text(text)
        began = time.monotonic()
        finish(folder, "calm")
        length = time.monotonic() - began
        expected = hashes(folder / "calm")
        equal = 0
        for number in range(options.times):
            run, kills = f"killed{number}", []
            while not kills or draw.random() < options.again:
                kills.append(kill(folder, run, after=draw.uniform(3, length), rank=draw.randrange(2)))
            finish(folder, run)
            same = hashes(folder / run) == expected
            equal += same
            line = {"benchmark": "kills", "number": number, "kills": kills, "equal": same}
            print(json.dumps(line), flush=True)
    total = {"benchmark": "kills", "times": options.times, "equal": equal, "seed": options.seed}
    print(json.dumps(total | {"calm_seconds": round(length, 1)}))
    sys.exit(equal != options.times)


def words(folder: Path, run: str) -> list[str]:
    """The command of a run in two processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    recipe = str(folder / "recipe.yaml")
    return [sys.executable, *launcher, "-m", "lasar", "run", recipe, f"run_dir={folder / run}"]


def started(folder: Path, run: str) -> subprocess.Popen[str]:
    """A run in two processes of one thread each."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        words(folder, run), env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(folder: Path, run: str) -> None:
    """Run until it ends well, or stop with what it said."""
    process = started(folder, run)
    said, _ = process.communicate()
    if process.returncode:
        sys.exit(f"{run} ended with {process.returncode}:\n{said}")


def kill(folder: Path, run: str, *, after: float, rank: int) -> str:
    """Start a run, kill one of its processes after some seconds; which stage it was at, or how else it ended."""
    process = started(folder, run)
    time.sleep(after)
    listed = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    if process.poll() is not None or len(listed) != 2:
        said, _ = process.communicate()
        if process.returncode:
            sys.exit(f"{run} ended with {process.returncode} before it was killed:\n{said}")
        return "over before"
    os.kill(int(listed[rank]), signal.SIGKILL)
    said, _ = process.communicate(timeout=300)
    if process.returncode == 0:
        return "over before"
    if "Signal 9" not in said and "SIGKILL" not in said:
        sys.exit(f"{run}: no word about the kill:\n{said}")
    finished = [path.parent.name for path in (folder / run).glob("*/manifest.json")]
    return f"rank {rank} after {after:.1f} s, {len(finished)} stages finished"


def hashes(run: Path) -> dict[str, object]:
    """What every stage wrote, by file; times and curves aside."""
    told = {path.parent.name: json.loads(path.read_text()) for path in run.glob("*/manifest.json")}
    return {
        f"{stage}/{file}": value
        for stage, manifest in told.items()
        for file, value in manifest["outputs"].items()
        if file.endswith((".safetensors", ".parquet", ".npy"))
    }


if __name__ == "__main__":
    main()
