"""Two processes that torchrun starts train what one process trains."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[2]
RECIPE = """
name: together
stages: [prepare, embed, quantize, rationalize, sft, anchor, latent_sft, explicit_cot, sasrec, tiger, rl, evaluate]
prepare: {dataset: mini, split: last_basket}
embed: {kind: collaborative, collaborative_width: 8}
quantize: {num_levels: 2, codebook_size: 16}
sft: {backbone: tiny, epochs: 12, batch_tokens: 512, accumulate: 2, precision: fp32, max_history: 20, ema_decay: 0.9}
anchor: {text_model: ngrams}
latent_sft: {epochs: 2, batch_tokens: 512, accumulate: 2, precision: fp32}
explicit_cot: {epochs: 1, batch_tokens: 1024, accumulate: 2, precision: fp32}
sasrec: {epochs: 2, hidden_size: 16, batch_tokens: 256, training: {accumulate: 2, precision: fp32}}
tiger: {epochs: 1, hidden_size: 16, num_layers: 1, num_heads: 2, head_size: 8, feed_size: 16, batch_tokens: 512,
        training: {accumulate: 2, precision: fp32}}
rl: {steps: 4, learning_rate: 1.0e-3, rollouts: {prompts: 16, accumulate: 2, group_size: 4, replay: 0.25},
     guards: {validate_every: 2, users: 60}}
evaluate: {model: rl, also: [latent_sft, sft], beam_width: 20, baselines: [], bootstrap_samples: 50, num_examples: 0}
"""


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shop")
    script = ROOT / "examples" / "make_mini_data.py"
    subprocess.run([sys.executable, str(script), str(folder / "mini")], check=True, capture_output=True)
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def command(shop: Path, run: str, *, processes: int, extra: tuple[str, ...] = ()) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    data = shop / "mini"
    return [
        sys.executable, *(launcher if processes > 1 else []), "-m", "lasar", "run", str(shop / "recipe.yaml"),
        f"prepare.source={data / 'events.csv'}", f"prepare.items={data / 'items.csv'}",
        f"run_dir={shop / run}", *extra,
    ]  # fmt: skip


def go(words: list[str], *, check: bool = True) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=280, env=env)
    if check and done.returncode:
        pytest.fail(f"{' '.join(words[-4:])}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
    return done


@pytest.fixture(scope="module")
def both(shop):
    one = go(command(shop, "one", processes=1))
    two = go(command(shop, "two", processes=2))
    return shop, one, two


TRAINED = {
    "sft": "model/model.safetensors", "latent_sft": "model/model.safetensors", "sasrec": "baseline.safetensors",
    "explicit_cot": "model/model.safetensors", "tiger": "baseline.safetensors",
    "rl": "model/model.safetensors",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("stage", TRAINED)
def test_two_processes_train_what_one_trains(both, stage):
    shop, _, _ = both
    assert_same_training(shop, stage, "two")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("stage", ["sft", "latent_sft", "rl"])
def test_two_processes_with_parts_of_the_layers_train_what_one_trains(both, stage):
    # On what one process made of the stages before: rounding there would decide which rollouts there are here.
    shop, _, _ = both
    before = ["prepare", "embed", "quantize", "rationalize", "sft", "anchor", "latent_sft", "rl"]
    run = f"parts_{stage}"
    shutil.copytree(shop / "one", shop / run, ignore=shutil.ignore_patterns(stage, ".*"))
    stages = ",".join(before[: before.index(stage) + 1])
    done = go(command(shop, run, processes=2, extra=("shard_layers=true", f"stages=[{stages}]")))
    assert done.stdout.count(": done in") == 1  # this stage alone
    # A list can turn over at a near tie.
    assert_same_training(shop, stage, run, tolerance=1e-4 if stage == "rl" else 1e-5, lists=1e-3)


def assert_same_training(shop, stage, other, *, tolerance=1e-5, lists=0.0):
    curves = [
        [json.loads(line) for line in (shop / run / stage / "curve.jsonl").read_text().splitlines()]
        for run in ("one", other)
    ]
    assert len(curves[0]) == len(curves[1]) > 0
    for first, second in zip(*curves, strict=True):
        assert first.keys() == second.keys()
        for name, value in first.items():
            allowed = 1e-5 if name == "loss" else tolerance
            allowed = max(allowed, lists) if name.startswith("valid_") else allowed
            assert second[name] == pytest.approx(value, abs=allowed), name
    weights = [load_file(shop / run / stage / TRAINED[stage]) for run in ("one", other)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        np.testing.assert_allclose(weights[1][name], tensor, atol=20 * tolerance, err_msg=name)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_is_not_trained_is_made_once_and_is_the_same(both):
    shop, one, two = both
    for stage in ("prepare", "embed", "quantize", "rationalize"):
        outputs = [
            json.loads((shop / run / stage / "manifest.json").read_text())["outputs"]
            for run in ("one", "two")
        ]
        assert outputs[0] == outputs[1], stage
    anchors = [load_file(shop / run / "anchor" / "anchors.safetensors")["anchors"] for run in ("one", "two")]
    np.testing.assert_allclose(anchors[0], anchors[1], atol=1e-5)
    metrics = [
        json.loads((shop / run / "evaluate" / "metrics.json").read_text())["methods"]
        for run in ("one", "two")
    ]
    for method, values in metrics[0].items():
        assert metrics[1][method]["hr@10"] == pytest.approx(values["hr@10"], abs=2e-3)
    assert two.stdout.count("sft: done in") == one.stdout.count("sft: done in") == 2  # said by one process


LONG = ("stages=[prepare,embed,quantize,sft]", "sft.epochs=40")  # long enough to be killed in the middle


@pytest.fixture(scope="module")
def calm(both):
    """An undisturbed run of what will be killed."""
    shop, _, _ = both
    go(command(shop, "calm", processes=2, extra=LONG))
    return shop


def killed_in_training(shop: Path, run: str, *extra: str) -> None:
    """Start two processes, kill one when there is a checkpoint, and look at how they end."""
    words = command(shop, run, processes=2, extra=(*LONG, *extra))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
    ) as started:
        while not (shop / run / "quantize").is_dir() or not list((shop / run).glob(".sft.scratch*/sft")):
            assert started.poll() is None, started.stdout.read()
            time.sleep(0.2)
        listed = subprocess.run(["pgrep", "-P", str(started.pid)], capture_output=True, text=True)
        os.kill(int(listed.stdout.split()[-1]), signal.SIGKILL)
        output, _ = started.communicate(timeout=120)
    assert started.returncode != 0
    assert "Signal 9" in output or "SIGKILL" in output
    assert (
        "another process of this command failed" in output or "error:" not in output
    )  # stopped before it knew
    assert "lasar/training/fit.py" not in output  # no traceback of ours
    assert not (shop / run / "sft").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_process_ends_them_all_and_a_rerun_goes_on(calm):
    killed_in_training(calm, "killed")
    again = go(command(calm, "killed", processes=2, extra=LONG))
    assert "sft: done in" in again.stdout
    outputs = [
        json.loads((calm / run / "sft" / "manifest.json").read_text())["outputs"]
        for run in ("killed", "calm")
    ]
    assert outputs[0] == outputs[1]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_two_processes_hold_in_parts_one_process_goes_on_with(calm):
    killed_in_training(calm, "alone", "shard_layers=true")
    again = go(command(calm, "alone", processes=1, extra=LONG))
    assert "sft: trains" not in again.stderr  # no rehearsal: it goes on
    curves = [
        [json.loads(line)["loss"] for line in (calm / run / "sft" / "curve.jsonl").read_text().splitlines()]
        for run in ("calm", "alone")
    ]
    # Rounding that differs grows over 360 steps; half a gradient would be off by more after the first epoch.
    np.testing.assert_allclose(curves[1], curves[0], atol=3e-4)
    weights = [load_file(calm / run / "sft" / TRAINED["sft"]) for run in ("calm", "alone")]
    for name, tensor in weights[0].items():
        apart = np.abs(weights[1][name] - tensor)
        assert apart.mean() < 2e-4, name
        assert apart.max() < 2e-3, name


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_batches_that_do_not_divide_are_refused(both):
    shop, _, _ = both
    refused = go(command(shop, "two", processes=2, extra=("sft.accumulate=3",)), check=False)
    assert refused.returncode != 0
    assert "accumulate=3 batches a step of sft do not divide among 2 processes" in " ".join(
        refused.stderr.split()
    )
    assert "lasar/training" not in refused.stderr  # torchrun's own traceback is not ours to prevent
