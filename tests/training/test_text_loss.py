import numpy as np
import pytest
import torch
from torch.nn import functional

from lasar.decoding.trie import Trie
from lasar.model.backbone import build_preset
from lasar.prompts.text_tasks import TASKS, Renderer, TextRow, text_batches
from lasar.prompts.text_tokens import train_tokenizer
from lasar.prompts.vocabulary import Normalise, Vocabulary
from lasar.training.text_loss import text_loss

CODES = np.array([[0, 1], [0, 2], [1, 1], [3, 0], [3, 3], [3, 1]], np.int32)
TITLES = ["red hose", "red pot", "blue soil", "green rake", "green shears", "gloves"]
TOKENIZER = train_tokenizer(TITLES, 280)
TRIE = Trie(CODES)


def renderer(codes=CODES, titles=TITLES, tokenizer=TOKENIZER, **changes):
    size = 1 + int(codes.max())
    vocabulary = Vocabulary(num_levels=2, codebook_size=size, base_size=tokenizer.size, **changes)
    return Renderer(
        vocabulary=vocabulary, tokens_IL=vocabulary.item_tokens(codes), titles=titles, tokenizer=tokenizer,
        max_tokens=50,
    )  # fmt: skip


def item_rows(count):
    nothing = np.zeros(0, np.int32)
    return [TextRow(nothing, nothing, np.array([item], np.int32)) for item in range(count)]


HISTORY = TextRow(
    np.array([3, 0], np.int32), np.array([0, 1], np.int32), np.array([4], np.int32), "likes green"
)
SOURCES = {"items": item_rows(6), "histories": [HISTORY], "rationales": [HISTORY]}
MODEL = build_preset("tiny", vocabulary=renderer().vocabulary, seed=0).eval()


def batches(render, *, rows=4, batch_tokens=10_000):
    return text_batches(
        SOURCES, render, num_rows=dict.fromkeys(TASKS, rows), batch_tokens=batch_tokens, seed=0, epoch=0
    )


def rivals(token: int, codes: tuple[int, ...], vocabulary: Vocabulary) -> list[int]:
    """What a token competes with: words with words, a code as `normalise` says, after the codes before it."""
    if token < vocabulary.first_code:
        return [*range(vocabulary.base_size), vocabulary.latent_end]
    level = len(codes)
    start = vocabulary.level_start(level)
    return {
        "trie": sorted({start + int(c[level]) for c in CODES if tuple(c[:level].tolist()) == codes}),
        "level": list(range(start, start + 4)),
        "sid": list(range(vocabulary.first_code, vocabulary.size)),
        "full": list(range(vocabulary.size)),
    }[vocabulary.normalise]


def one_sequence_per_token(render: Renderer) -> torch.Tensor:
    """The same rows, every target token predicted at the end of a plain sequence of its own."""
    total = torch.zeros(())
    vocabulary = render.vocabulary
    for task in TASKS.values():
        for row in SOURCES[task.source]:
            item = int(row.targets[0])
            ids, codes = task.prompt(render, row, item), ()
            for token in task.target(render, row, item):
                choices = rivals(token, codes, vocabulary)
                logits = MODEL(torch.tensor([ids])).logits[0, -1, choices]
                loss = functional.cross_entropy(logits[None], torch.tensor([choices.index(token)]))
                total = total + loss
                if token >= vocabulary.first_code:
                    codes = (*codes, token - vocabulary.level_start(len(codes)))
                ids = [*ids, token]
    return total


@pytest.mark.parametrize("normalise", ["trie", "level", "sid", "full"])
def test_loss_and_gradient_equal_one_sequence_per_token(normalise: Normalise):
    render = renderer(normalise=normalise)
    counts = {name: len(SOURCES[task.source]) for name, task in TASKS.items()}
    made = text_batches(SOURCES, render, num_rows=counts, batch_tokens=60, seed=0, epoch=0)
    assert len(made) > 2
    MODEL.zero_grad()
    ours = sum(text_loss(MODEL, batch, vocabulary=render.vocabulary, trie=TRIE) for batch in made)
    ours.backward()
    gradient = {name: p.grad.clone() for name, p in MODEL.named_parameters()}
    MODEL.zero_grad()
    plain = one_sequence_per_token(render)
    plain.backward()
    torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-5)
    for name, parameter in MODEL.named_parameters():
        torch.testing.assert_close(gradient[name], parameter.grad, atol=1e-4, rtol=1e-4)


def test_padding_and_batching_change_nothing():
    render = renderer()
    sums = []
    for batch_tokens in (1, 60, 10_000):
        made = batches(render, batch_tokens=batch_tokens)
        losses = [text_loss(MODEL, batch, vocabulary=render.vocabulary, trie=TRIE) for batch in made]
        sums.append((torch.stack(losses).sum(), sum(batch.num_targets for batch in made)))
    assert len({count for _, count in sums}) == 1
    for total, _ in sums[1:]:
        torch.testing.assert_close(total, sums[0][0], atol=1e-4, rtol=1e-5)


def test_words_do_not_compete_with_codes_and_other_markers():
    render = renderer()
    (batch,) = text_batches(
        SOURCES, render, num_rows={"sid_to_title": 6}, batch_tokens=10_000, seed=0, epoch=0
    )
    before = text_loss(MODEL, batch, vocabulary=render.vocabulary, trie=TRIE)
    vocabulary = render.vocabulary
    head = MODEL.get_output_embeddings().weight
    kept = head.detach().clone()
    with torch.no_grad():
        head[vocabulary.first_code :] += 10
        head[vocabulary.pad : vocabulary.latent_end] += 10
        unmoved = text_loss(MODEL, batch, vocabulary=vocabulary, trie=TRIE)
        head[vocabulary.latent_end] += 10
        moved = text_loss(MODEL, batch, vocabulary=vocabulary, trie=TRIE)
        head.copy_(kept)
    torch.testing.assert_close(before.detach(), unmoved)
    assert abs(moved - before) > 1


def greedy(model, render: Renderer, prompt: list[int]) -> str:
    ids, vocabulary = list(prompt), render.vocabulary
    words: list[int] = []
    while len(words) < 20:
        logits = model(torch.tensor([ids + words])).logits[0, -1, : vocabulary.latent_end + 1]
        logits[vocabulary.base_size : vocabulary.latent_end] = -torch.inf
        token = int(logits.argmax())
        if token == vocabulary.latent_end:
            break
        words.append(token)
    return render.tokenizer.decode(words)


def test_titles_of_planted_items_are_learned_by_heart():
    rng = np.random.default_rng(0)
    codes = np.stack(np.divmod(rng.permutation(64)[:20], 8), axis=1).astype(np.int32)
    words = ["red", "blue", "green", "old", "new", "hose", "pot", "rake"]
    titles = [" ".join(words[int(i)] for i in rng.choice(8, size=rng.integers(1, 4))) for _ in range(20)]
    render = renderer(codes, titles, train_tokenizer(titles, 300))
    model = build_preset("tiny", vocabulary=render.vocabulary, seed=0)
    trie = Trie(codes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    sources = {"items": item_rows(20)}
    for epoch in range(80):
        for batch in text_batches(
            sources, render, num_rows={"sid_to_title": 20}, batch_tokens=10_000, seed=0, epoch=epoch
        ):
            loss = text_loss(model, batch, vocabulary=render.vocabulary, trie=trie) / batch.num_targets
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.eval()
    task = TASKS["sid_to_title"]
    with torch.no_grad():
        written = [
            greedy(model, render, task.prompt(render, row, i)) for i, row in enumerate(sources["items"])
        ]
    assert written == titles
