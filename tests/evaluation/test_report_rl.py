"""What the report says about reinforcement learning, from plain JSON values."""

import pytest

from lasar.evaluation.report_rl import rl_section

START = {"ndcg@10": 0.1, "hr@10": 0.2, "nll": 6.5, "mean_depth": 4.25}
END = {**START, "ndcg@10": 0.125, "mean_depth": 2.0}
USERS = [{"bucket": "1-3", "num_users": 1200, "mean_depth": 1.25, "depths": [0, 900, 300]}]
METRICS = {
    "kept": "rl", "verdict": "RL did well", "stopped": None, "steps": 90, "best_step": 60, "validation_users": 1200,
    "terminal_weight": 14.0, "start": START, "end": END, "depths": [0, 900, 300],
    "users": {"history_length": USERS, "target_popularity": USERS, "first_code_entropy": USERS},
}  # fmt: skip


def records(steps=90):
    found = [{"step": 0, **{f"valid_{name}": value for name, value in START.items()}}]
    for step in range(1, steps + 1):
        record = {
            "step": step, "reward": 0.001 * step, "kl": 0.0001 * step, "entropy": 4.0, "hit_share": 0.5,
            "silent_share": 0.5, "mean_depth": 3 - step / 90, "depths": [0, step, 90 - step], "depth_entropy": 1.0,
        }  # fmt: skip
        if step % 30 == 0:
            record |= {"valid_ndcg@10": 0.1 + step / 1000, "valid_mean_depth": 2.0}
        found.append(record)
    return found


def words(section):
    return [
        [[cell["value"] for cell in row["cells"]] for row in table["rows"]] for table in section["tables"]
    ]


def test_before_after_and_who_gets_what():
    found = rl_section(records(), METRICS)
    first, *by_user = words(found)
    assert first == [
        ["NDCG@10", "0.1000", "0.1250"], ["HR@10", "0.2000", "0.2000"], ["nats per item", "6.500", "6.500"],
        ["latent steps, mean", "4.25", "2.00"],
    ]  # fmt: skip
    assert by_user == [[["1-3", "1,200", "1.25"]]] * 3
    assert found["text"] == ["RL did well (step 60 of 90)."]


def test_every_curve_is_drawn_and_says_where_it_went():
    found = rl_section(records(), METRICS)
    labels = [figure.split('aria-label="')[1].split('"')[0] for figure in found["figures"]]
    assert len(labels) == 11
    # 90 steps are shown as 30 means of three.
    assert labels[0] == "reward over steps; mean reward: 0.002 to 0.089"
    assert labels[4] == "NDCG@10 over steps; validation: 0.1 to 0.19"
    assert labels[8] == "Depth by events in the history; 1-3: 75% take 1, 25% take 2"
    assert labels[6] == "Depths drawn over steps; 1: 2% to 99%, 2: 98% to 1%"


def test_a_model_that_never_reasons_has_no_depths():
    plain = {name: value for name, value in START.items() if name != "mean_depth"}
    found = rl_section(
        [{"step": 0, "valid_ndcg@10": 0.1}], {**METRICS, "start": plain, "end": plain, "depths": [1200, 0, 0]}
    )
    assert len(found["tables"]) == 1
    assert len(found["figures"]) == 1


def test_a_run_that_was_stopped_says_why():
    found = rl_section(records(10), {**METRICS, "stopped": "stopped at step 10: too far"})
    assert found["text"][1] == "Stopped at step 10: too far."


@pytest.mark.parametrize("steps", [1, 39, 40, 41, 200])
def test_any_number_of_steps_can_be_drawn(steps):
    assert len(rl_section(records(steps), METRICS)["figures"]) == 11
