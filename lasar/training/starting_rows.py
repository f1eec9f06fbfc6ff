"""The embeddings of codes and items before Stage 1, from what is known of the items."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file

from lasar.data.interactions import ItemTable
from lasar.model.backbone import Backbone
from lasar.model.new_rows import place_codes, title_vectors
from lasar.model.presets import PRESETS, CodeStart
from lasar.prompts.text_tokens import pretrained_tokenizer
from lasar.sid.code_vectors import code_vectors


def place_new_rows(
    backbone: Backbone,
    start: CodeStart,
    *,
    name: str,
    codes_IL: NDArray[np.int32],
    codebook_size: int,
    prepared: Path,
    embedded: Path,
) -> None:
    """Place them in item-vector space, or where a pre-trained model places the words of their titles.

    Args:
        backbone: its tables are written; `random` and `mean` leave them as `build_backbone` made them.
        start: where.
        name: of the backbone, whose tokenizer reads titles.
        codes_IL: codes of every item, I items, L levels.
        codebook_size: codes per level.
        prepared: the `prepare` artifact, read for titles.
        embedded: the `embed` artifact, read for item vectors.
    """
    if start == "vectors":
        items_IE = load_file(embedded / "embeddings.safetensors")["item_embeddings"]
    elif start == "text":
        titles = ItemTable.load(prepared).titles
        items_IE = title_vectors(backbone.model, pretrained_tokenizer(name), titles).numpy()
    else:
        return
    vectors_LCE = torch.from_numpy(code_vectors(items_IE, codes_IL, codebook_size=codebook_size))
    own_IE = torch.from_numpy(items_IE) if backbone.vocabulary.num_items else None
    place_codes(
        backbone.model, backbone.vocabulary, vectors_LCE, vectors_IE=own_IE, among_words=name not in PRESETS
    )
