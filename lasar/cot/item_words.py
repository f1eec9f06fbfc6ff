"""Words of titles: which are nouns that name a kind of product, and which are style words many items share.

No dictionary of products is needed. In English titles the noun stands last ("vintage heart t-light holder") and what
describes it stands first, so a word that ends more titles than it opens is taken for a noun.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

_WORD = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*")
_MIN_NOUN_SHARE = 0.1
_MAX_BRAND_SHARE = 0.5
# Neither a kind nor a style: grammar, units, packaging, praise.
_EMPTY_TEXT = """
a all an and any approx appx are as assorted at be beautiful beauty best better big bonus bundle buy by can care
classic cm collection color colors colour colours combo complete contain contains count ct day de des design designs
different dr du ea each edition en et etc even exclusive extra f fl fluid for formula free from full g get gift gm
go good grade gram great guarantee guaranteed has help helps hour in inc inch inches ingredient ingredients is it
item items its kg kit la large lb lbs le les less like limited look love made make may me medium mg mini ml mm money
more most my net new no none not now of off old on one only or original ounce ounces our out over own oz pack
package packaging packs pair pairs pc pcs per perfect piece pieces plus premium pro product products professional
quality reduce reduces regular result results sale series set sets shape single size sizes small so special style
super supply system t than that the their this tier time tm to top total tube two type types ultra under unit up usa
use value various vary very w was way will with x you your
"""
_EMPTY_WORDS = frozenset(_EMPTY_TEXT.split())


def title_words(title: str) -> list[str]:
    """Words of a title in lower case, without numbers and empty words.

    >>> title_words("SET OF 6 T-LIGHTS, RED")
    ['t-lights', 'red']
    """
    return [word for word in _WORD.findall(title.lower()) if word not in _EMPTY_WORDS and len(word) > 1]


def named_words(names: Iterable[str]) -> set[str]:
    """Every word of some names, in singular and plural."""
    words = {word for name in set(names) for word in _WORD.findall(name.lower())}
    return words | {word.removesuffix("s") for word in words} | {f"{word}s" for word in words}


class FreeWords:
    """Title words that enough items of the training split share, singular and plural taken together.

    Args:
        words: words of every item's title, as `title_words` gives them.
        trained: which items count.
        min_items: items that have to share a word.
        max_share: largest share of items that may share it.
        brands: brand of every item; a word that is mostly one brand's is no style.
    """

    def __init__(
        self,
        words: Sequence[Sequence[str]],
        trained: Sequence[bool],
        *,
        min_items: int,
        max_share: float,
        brands: Sequence[str],
    ) -> None:
        counted = [row for row, kept in enumerate(trained) if kept]
        spelled = Counter(word for row in counted for word in set(words[row]))
        self._spelled = spelled
        self._min_items = min_items
        self.counts = Counter(word for row in counted for word in {self.stem(word) for word in words[row]})
        most = max_share * len(counted)
        self.frequent = {word for word, count in self.counts.items() if min_items <= count <= most}
        self._branded = self._words_of_brands([(words[row], brands[row].lower()) for row in counted])

    def _words_of_brands(self, titles: Sequence[tuple[Sequence[str], str]]) -> set[str]:
        """Words that are mostly one brand's, or, where brands are known, mostly open a title as brands do."""
        if not any(brand for _, brand in titles):
            return set()
        opens = Counter(self.stem(of_item[0]) for of_item, _ in titles if of_item)
        branded = {word for word in self.frequent if opens[word] > _MAX_BRAND_SHARE * self.counts[word]}
        of_brand: dict[str, Counter[str]] = {word: Counter() for word in self.frequent}
        for of_item, brand in titles:
            for word in self.frequent.intersection(map(self.stem, of_item)):
                of_brand[word][brand] += bool(brand)
        for word, count in of_brand.items():
            known = max(sum(count.values()), self._min_items // 2)
            if max(count.values(), default=0) > _MAX_BRAND_SHARE * known:
                branded.add(word)
        return branded

    def stem(self, word: str) -> str:
        """The singular, where titles also use that; otherwise the word."""
        singular = word.removesuffix("s")
        return singular if len(singular) > 2 and self._spelled[singular] > 0 else word

    def plural(self, word: str) -> str:
        """The plural, where titles use it; otherwise the word."""
        for plural in (f"{word}s", f"{word}es"):
            if self._spelled[plural] > 0:
                return plural
        return word

    def styles(self, words: Sequence[str], taken: set[str]) -> tuple[str, ...]:
        """An item's style words in order of the alphabet: frequent, no brand's own, and in no name of a kind."""
        stems = {self.stem(word) for word in words} & self.frequent
        return tuple(sorted(word for word in stems - self._branded if word not in taken))

    def common_pairs(self, words: Sequence[Sequence[str]], trained: Sequence[bool]) -> set[tuple[str, str]]:
        """Neighbouring words that at least `min_items` titles have."""
        pairs: Counter[tuple[str, str]] = Counter()
        for of_item, kept in zip(words, trained, strict=True):
            if kept:
                pairs.update(set(pairwise(map(self.stem, of_item))))
        return {pair for pair, count in pairs.items() if count >= self._min_items}


def title_kinds(words: Sequence[Sequence[str]], trained: Sequence[bool], free: FreeWords) -> list[str]:
    """Per item what its title is about: a noun, with the word before it where many titles have both.

    Where a title has no frequent noun, its last frequent word ("fairy items"); "" where it has no frequent word.
    """
    stems = [[free.stem(word) for word in of_item] for of_item in words]
    counted = [of_item for of_item, kept in zip(stems, trained, strict=True) if kept and of_item]
    ends = Counter(of_item[-1] for of_item in counted)
    opens = Counter(of_item[0] for of_item in counted)
    nouns = {word: (ends[word] - opens[word]) / free.counts[word] for word in free.frequent}
    nouns = {word: share for word, share in nouns.items() if share > _MIN_NOUN_SHARE}
    pairs = free.common_pairs(words, trained)
    kinds = []
    for of_item in stems:
        found = [position for position, word in enumerate(of_item) if word in nouns]
        if not found:
            last = [word for word in of_item if word in free.frequent]
            kinds.append(f"{last[-1]} items" if last else "")
            continue
        best = max(found, key=lambda position: (nouns[of_item[position]], position))
        pair = (of_item[best - 1], of_item[best])
        plural = free.plural(of_item[best])
        kinds.append(f"{pair[0]} {plural}" if best and pair in pairs else plural)
    return kinds
