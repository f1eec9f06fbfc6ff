"""Text as tokens: a small BPE beside the semantic-ID codes, so that a model trained from scratch can read and write.

Byte-level (GPT-2's alphabet), trained on the shop's own texts: no text is unknown and every text comes back unchanged.
Text tokens are `0 ... size - 1`, the backbone's own part of the vocabulary (`Vocabulary.base_size`). A pre-trained
backbone brings its own tokenizer, which is stored the same way, so that nothing downstream asks which one it has.
"""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers.utils.hub import cached_file

from lasar.errors import ArtifactError, ConfigError

logger = logging.getLogger(__name__)

TOKENIZER_FILE = "text_tokenizer.json"
BACKBONE_TOKENIZER_FILE = "backbone_tokenizer.json"  # of a pre-trained model that was trained without text


class TextTokenizer:
    """Text to token ids and back.

    Attributes:
        size: one more than the largest id.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Wrap a tokenizer; what it would add, cut or pad on its own is switched off."""
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # a title that spells a control token is still only a title
        self._tokenizer = tokenizer
        self.size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; nothing is added before or after."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; bytes that are no valid UTF-8 (of a text cut inside a letter) become U+FFFD."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def save(self, folder: Path, *, name: str = TOKENIZER_FILE) -> None:
        """Write `text_tokenizer.json`, or another file; equal tokenizers write equal bytes."""
        (folder / name).write_text(self._tokenizer.to_str(pretty=False), encoding="utf-8")

    @staticmethod
    def load(folder: Path) -> "TextTokenizer":
        """Read what `save` wrote.

        Raises:
            ArtifactError: there is none, or it is damaged.
        """
        path = folder / TOKENIZER_FILE
        if not path.is_file():
            raise ArtifactError(
                f"{path}: missing, this model was trained without text; name tasks in sft.text.tasks "
                f"(for example {{sid_to_title: 1, title_to_sid: 1}}) and run the stage 'sft' again"
            )
        return TextTokenizer(_open(path, "run the stage 'sft' again", ArtifactError))


def load_reader(folder: Path) -> TextTokenizer:
    """The tokenizer of whatever can read words in a model's folder: trained with text, or pre-trained.

    Raises:
        ArtifactError: there is none, or it is damaged.
    """
    path = folder / BACKBONE_TOKENIZER_FILE
    if (folder / TOKENIZER_FILE).is_file():
        return TextTokenizer.load(folder)
    if not path.is_file():
        raise ArtifactError(
            f"{folder}: has no tokenizer; a preset gets one with sft.text.tasks (for example {{sid_to_title: 1}}), a "
            "pre-trained model has that of its own folder (tokenizer.json); mend it and run the stage 'sft' again"
        )
    return TextTokenizer(_open(path, "run the stage 'sft' again", ArtifactError))


def keep_tokenizer(name: str, folder: Path) -> None:
    """Keep a pre-trained model's tokenizer beside what was trained from it, if it has one that can be kept."""
    try:
        pretrained_tokenizer(name).save(folder, name=BACKBONE_TOKENIZER_FILE)
    except ConfigError:
        logger.info(
            "%s: has no tokenizer.json that can be kept: anchors of the model's own words cannot be had", name
        )


def train_tokenizer(texts: Iterable[str], vocabulary_size: int) -> TextTokenizer:
    """Train a byte-level BPE; the same texts give the same tokenizer, in whatever order they come.

    Args:
        texts: what it should write in few tokens.
        vocabulary_size: tokens at most; the 256 bytes are always there, and texts may hold too little for more.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary_size,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=[],
            show_progress=False,
        ),
    )
    return TextTokenizer(tokenizer)


def pretrained_tokenizer(name: str) -> TextTokenizer:
    """The tokenizer of a pre-trained model.

    Args:
        name: a model folder, or a hub id.

    Raises:
        ConfigError: it has no `tokenizer.json`, or one that cannot be read.
    """
    try:
        path = cached_file(name, "tokenizer.json")
    except (OSError, ValueError):
        path = None
    if path is None:
        raise ConfigError(
            f"sft.backbone: {name}: has no tokenizer.json, with which text tasks and code_init=text read; put one "
            "there (AutoTokenizer.from_pretrained(WHERE THE MODEL IS FROM).save_pretrained(FOLDER) writes it)"
        )
    return TextTokenizer(_open(Path(path), "give another backbone, or do without text", ConfigError))


def _open(path: Path, fix: str, error: type[ArtifactError] | type[ConfigError]) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as reason:  # the library raises bare Exception
        first = (str(reason).splitlines() or [""])[0]
        raise error(f"{path}: not a readable tokenizer ({first}); {fix}") from None
