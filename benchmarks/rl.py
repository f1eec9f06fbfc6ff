"""RL's rollouts and scoring with the prompt shared by its group, against the prompt repeated for every rollout.

The peer is the usual way (`generate()` on expanded prompts, then one forward pass over complete sequences): every
rollout carries a prompt and latents of its own, cached and batched, in plain causal calls without a tree; its beams
reorder their caches. Both roll out G items per prompt by constrained beam search, then compute log-probabilities of all
rollouts and their gradient. Prompts are L tokens, at a fixed depth, so nothing is padded and the peer loses nothing
there. Items, log-probabilities and gradients must agree. Runs are interleaved; ratios are of process CPU time, medians.
`bound` is what the counts of tokens allow.

Usage: python benchmarks/rl.py [--preset 1m] [--prompts 16] [--group 8] [--length 80] [--depth 3] [--runs 5]
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from lasar.decoding.beam import beam_search
from lasar.decoding.trie import Trie
from lasar.model.backbone import build_preset, input_table, trunk
from lasar.model.head import part_logits
from lasar.model.prompt import encode_prompts
from lasar.model.reasoner import LatentReasoner, ReasoningSettings
from lasar.prompts.vocabulary import Vocabulary
from lasar.rl.scoring import score
from lasar.training.losses import code_nll

NUM_ITEMS, LEVELS = 12_000, 4
VOCABULARY = Vocabulary(num_levels=LEVELS, codebook_size=256)
Rolled = tuple[Tensor, Tensor]


class Bench:
    """One policy, one batch of prompts, two ways to ask and to score."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        """Draw codes and prompts."""
        rng = np.random.default_rng(0)
        codes_IL = np.unique(rng.integers(0, 256, (NUM_ITEMS, LEVELS)), axis=0).astype(np.int32)
        self.trie = Trie(codes_IL)
        backbone = build_preset(arguments.preset, vocabulary=VOCABULARY, seed=0)
        settings = ReasoningSettings(fixed_depth=arguments.depth)
        self.policy = LatentReasoner(backbone, vocabulary=VOCABULARY, settings=settings).eval()
        self.tokens_IL = torch.from_numpy(VOCABULARY.item_tokens(codes_IL)).long()
        self.group, self.depth = arguments.group, arguments.depth
        items = rng.integers(0, len(codes_IL), (arguments.prompts, -(-arguments.length // LEVELS)))
        history_BT = self.tokens_IL[torch.from_numpy(items)].flatten(1)[:, : arguments.length - 1]
        opening_B1 = torch.full((arguments.prompts, 1), VOCABULARY.user)
        self.ids_BT = torch.cat([opening_B1, history_BT], dim=1)

    def shared_rollouts(self) -> Rolled:
        """Items [B, G] and scores, beams as branches of one prompt."""
        with torch.no_grad():
            prompts = encode_prompts(self.policy.backbone, self.ids_BT, self._lengths())
            thought = self.policy.think(prompts)
            beams = beam_search(thought.prefix, vocabulary=VOCABULARY, trie=self.trie, beam_width=self.group)
        return beams.items_BW, beams.scores_BW

    def shared_scores(self, items_BG: Tensor) -> Tensor:
        """Log-probabilities [B, G], all rollouts of a prompt hung off it."""
        return score(
            self.policy, self.ids_BT, self._lengths(), depths_B=torch.full((len(self.ids_BT),), self.depth),
            items_BG=items_BG, tokens_IL=self.tokens_IL, trie=self.trie,
        ).logprobs_BGL.sum(-1)  # fmt: skip

    @torch.no_grad()
    def repeated_rollouts(self) -> Rolled:
        """The same, every beam a row with a prompt and a cache of its own."""
        hidden_RD, cache = self._reason(self.ids_BT.repeat_interleave(self.group, dim=0))
        nodes_BG = torch.zeros((len(self.ids_BT), self.group), dtype=torch.int64)
        scores_BG = torch.full(nodes_BG.shape, -torch.inf)
        scores_BG[:, 0] = 0.0  # all beams begin alike: only the first may be extended
        firsts_B1 = self.group * torch.arange(len(self.ids_BT))[:, None]
        for level in range(LEVELS):
            child_BGM, real_BGM = self.trie.children(level, nodes_BG)
            code_BGM = self.trie.levels[level + 1].code[child_BGM]
            start = VOCABULARY.level_start(level)
            logits_RC = part_logits(self.policy.backbone, hidden_RD, start, start + 256)
            logits_BGC = logits_RC.view(*nodes_BG.shape, -1)
            logprobs_BGM = logits_BGC.gather(2, code_BGM).masked_fill(~real_BGM, -torch.inf).log_softmax(-1)
            total_BGM = (scores_BG[..., None] + logprobs_BGM).masked_fill(~real_BGM, -torch.inf)
            scores_BG, chosen_BG = total_BGM.flatten(1).topk(self.group, dim=1)
            nodes_BG = child_BGM.flatten(1).gather(1, chosen_BG)
            if level < LEVELS - 1:
                cache.reorder_cache((firsts_B1 + chosen_BG // child_BGM.shape[2]).flatten())
                ids_R1 = (self.trie.levels[level + 1].code[nodes_BG] + start).view(-1, 1)
                hidden_RD = self._step(cache, input_ids=ids_R1)
        return self.trie.item_of_leaf[nodes_BG], scores_BG

    def repeated_scores(self, items_BG: Tensor) -> Tensor:
        """The same, every rollout a sequence of its own."""
        _, cache = self._reason(self.ids_BT.repeat_interleave(self.group, dim=0), end=False)
        answers_RL = self.tokens_IL[items_BG.flatten()]
        ends_R1 = torch.full((len(answers_RL), 1), VOCABULARY.latent_end)
        hidden_RLD = self._forward(cache, input_ids=torch.cat([ends_R1, answers_RL[:, :-1]], dim=1))
        return -code_nll(
            self.policy.backbone, hidden_RLD.flatten(0, 1), answers_RL.flatten(),
            items_BG.flatten().repeat_interleave(LEVELS), vocabulary=VOCABULARY, trie=self.trie,
        ).view(*items_BG.shape, LEVELS).sum(-1)  # fmt: skip

    def tokens(self, way: str) -> int:
        """Tokens computed in one rollout and one scoring of one prompt."""
        length, group = self.ids_BT.shape[1], self.group
        before, beams, answers = length + 1 + self.depth, group * (LEVELS - 1), group * (LEVELS - 1)
        if way == "shared":
            return 2 * (before + 1) + beams + answers
        return 2 * group * (before + 1) + beams + answers

    def _lengths(self) -> Tensor:
        return torch.full((len(self.ids_BT),), self.ids_BT.shape[1])

    def _reason(self, ids_RT: Tensor, *, end: bool = True) -> tuple[Tensor, DynamicCache]:
        cache = DynamicCache()
        starts_R1 = torch.full((len(ids_RT), 1), VOCABULARY.latent_start)
        hidden_RD = self._step(cache, input_ids=torch.cat([ids_RT, starts_R1], dim=1))
        for _ in range(self.depth):
            hidden_RD = self._step(cache, inputs_embeds=hidden_RD[:, None])
        if end:
            hidden_RD = self._step(cache, input_ids=torch.full((len(ids_RT), 1), VOCABULARY.latent_end))
        return hidden_RD, cache

    def _step(self, cache: DynamicCache, **tokens: Tensor) -> Tensor:
        return self._forward(cache, **tokens)[:, -1]

    def _forward(self, cache: DynamicCache, **tokens: Tensor) -> Tensor:
        hidden = trunk(self.policy.backbone)(
            past_key_values=cache, use_cache=True, **tokens
        ).last_hidden_state
        assert isinstance(hidden, Tensor)
        return hidden


def main() -> None:
    """Compare, and print one line."""
    arguments = _arguments()
    bench = Bench(arguments)
    ways: dict[str, tuple[Callable[[], Rolled], Callable[[Tensor], Tensor]]] = {
        "shared": (bench.shared_rollouts, bench.shared_scores),
        "repeated": (bench.repeated_rollouts, bench.repeated_scores),
    }
    seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    found: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    for number in range(arguments.runs + 1):
        for way, (roll_out, scores) in ways.items():
            bench.policy.zero_grad()
            began = time.process_time()
            items_BG, _ = roll_out()
            rolled = time.process_time()
            logprobs_BG = scores(items_BG)
            logprobs_BG.sum().backward()  # type: ignore[no-untyped-call]
            done = time.process_time()
            if number:  # the first run warms up
                seconds[way].append((rolled - began, done - rolled))
            gradient = input_table(bench.policy.backbone).grad
            assert gradient is not None
            found[way] = items_BG, logprobs_BG.detach(), gradient.clone()
    print(json.dumps(_summary(bench, seconds, found, arguments)))


def _summary(
    bench: Bench,
    seconds: dict[str, list[tuple[float, float]]],
    found: dict[str, tuple[Tensor, Tensor, Tensor]],
    arguments: argparse.Namespace,
) -> dict[str, object]:
    rolled, scored, both = (
        {way: statistics.median(pick(pair) for pair in pairs) for way, pairs in seconds.items()}
        for pick in (lambda pair: pair[0], lambda pair: pair[1], sum)
    )
    (items, logprobs, gradient), (items_2, logprobs_2, gradient_2) = found["shared"], found["repeated"]
    difference = float((logprobs - logprobs_2).abs().max())
    gradients = float((gradient - gradient_2).abs().max() / gradient.abs().max())
    return {
        "benchmark": "rl",
        "ratio": round(both["repeated"] / both["shared"], 2),
        "bound": round(bench.tokens("repeated") / bench.tokens("shared"), 2),
        "baseline": f"prompt and latents repeated for each of {bench.group} rollouts",
        "parity": bool((items == items_2).all()) and difference < 1e-5 and gradients < 1e-5,
        "largest_difference": difference,
        "rollouts_ratio": round(rolled["repeated"] / rolled["shared"], 2),
        "scoring_ratio": round(scored["repeated"] / scored["shared"], 2),
        "rollouts_per_second": round(items.numel() / both["shared"]),
        "baseline_rollouts_per_second": round(items.numel() / both["repeated"]),
        "prompt_tokens": arguments.length,
        "depth": bench.depth,
        "preset": arguments.preset,
        "threads": torch.get_num_threads(),
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="1m")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--length", type=int, default=80)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--runs", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    main()
