"""Write a small made-up shop whose customers follow a rule that a model can learn in seconds.

Usage: python examples/make_mini_data.py [FOLDER]     (default: data/mini)

Sixty items lie in six departments of ten. Inside a department the items form a ring, and a customer walks
along it: after item 3 comes item 4, after item 9 item 0. One step in ten is noise, and sometimes a customer
moves to another department. So the next item follows from the last one, while popularity says nothing: all
items are about equally popular. Orders hold one to three items and share a timestamp.

Writes events.csv (user_id, item_id, timestamp) and items.csv (item_id, title, department, description). The
same seed gives the same bytes.
"""

import argparse
import csv
from pathlib import Path

import numpy as np

DEPARTMENTS = {
    "garden": "for beds, balconies and greenhouses",
    "kitchen": "for cooking, baking and serving",
    "office": "for desks, notes and letters",
    "sport": "for training at home and outdoors",
    "toys": "for children from three years",
    "travel": "for weekends and long journeys",
}
ITEMS = {
    "garden": "seeds pot soil trowel gloves hose sprinkler shears rake basket",
    "kitchen": "flour bowl whisk spatula tin oven-mitt rack knife board plate",
    "office": "pencil eraser notebook folder stapler clips envelope stamp lamp tray",
    "sport": "mat band dumbbell rope ball glove bottle towel shoes bag",
    "toys": "blocks puzzle doll train track station crayons paper stickers kite",
    "travel": "map guide suitcase tag pillow mask adapter charger pouch lock",
}
FIRST_DAY = 1_600_000_000
SECONDS_PER_DAY = 86_400


def item_rows() -> list[tuple[str, str, str, str]]:
    """(item_id, title, department, description) of every item, department by department in ring order."""
    rows = []
    for department, purpose in DEPARTMENTS.items():
        for number, word in enumerate(ITEMS[department].split()):
            title = f"{word.replace('-', ' ').title()} ({department})"
            rows.append((f"{department[0].upper()}{department[1]}{number:02}", title, department, purpose))
    return rows


def event_rows(num_users: int, noise: float, seed: int) -> list[tuple[str, str, int]]:
    """(user_id, item_id, timestamp) of every purchase, customer by customer, oldest first."""
    item_ids = [row[0] for row in item_rows()]
    ring = len(item_ids) // len(DEPARTMENTS)
    generator = np.random.default_rng(seed)
    rows = []
    for user in range(num_users):
        department, place = int(generator.integers(len(DEPARTMENTS))), int(generator.integers(ring))
        day = int(generator.integers(300))
        for _ in range(int(generator.integers(5, 11))):
            day += int(generator.integers(1, 15))
            if generator.random() < 0.1:
                department = int(generator.integers(len(DEPARTMENTS)))
            for _ in range(int(generator.integers(1, 4))):
                place = int(generator.integers(ring)) if generator.random() < noise else (place + 1) % ring
                time = FIRST_DAY + day * SECONDS_PER_DAY
                rows.append((f"u{user:03}", item_ids[department * ring + place], time))
    return rows


def write_csv(
    path: Path, header: tuple[str, ...], rows: list[tuple[str, str, int]] | list[tuple[str, ...]]
) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def main(folder: Path, *, num_users: int = 200, noise: float = 0.1, seed: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    events, items = event_rows(num_users, noise, seed), item_rows()
    write_csv(folder / "events.csv", ("user_id", "item_id", "timestamp"), events)
    write_csv(
        folder / "items.csv", ("item_id", "title", "department", "description"), [tuple(row) for row in items]
    )
    print(f"{folder}: {num_users} users, {len(items)} items, {len(events):,} events")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, default=Path("data/mini"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    main(arguments.folder, seed=arguments.seed)
