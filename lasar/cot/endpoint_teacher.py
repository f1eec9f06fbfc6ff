"""The paper's teacher: a language model behind any OpenAI-compatible chat endpoint (METHOD section 4).

It sees the history and, with `intent="from_target"`, the true next items, and writes behaviour, preferences, intent and
a recommendation as if it did not know them; the recommendation is cut off, and a text that names a target all the same
is refused. Answers are kept on disk as they came. Nothing is dropped in silence: every row has an outcome.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lasar.cot.answer_store import Answer, AnswerStore, answer_key
from lasar.cot.chat import Chat, Endpoint
from lasar.cot.rationale import Intent, Rationale
from lasar.cot.rationale_checks import TargetCheck, reasoning_part
from lasar.cot.rows import TrainingRow
from lasar.data.interactions import ItemTable
from lasar.data.text import shorten
from lasar.progress import progress

LimitField = Literal["max_tokens", "max_completion_tokens"]

SYSTEM = (
    "You study how customers choose. You write plain English in short sentences, without lists, and you state only "
    "what the choices show."
)
TASK = """Choices of a customer, oldest first:
{history}
{target}
Write four lines, each beginning with its label:
Behaviour: what the customer has been choosing, and what changed lately.
Preferences: the kinds, brands, styles or prices that this shows.
Intent: what kind of thing the customer is after next, in general terms.
Recommendation: one item."""
TARGET = """Chosen next: {titles}
Reason towards this as if you did not know it: the first three lines never name it and never repeat its wording."""
# One answered question: weak models copy the question otherwise, strong ones keep to the format.
EXAMPLE_HISTORY = "1. Trail running shoes, size 9\n2. Merino hiking socks\n3. Insulated steel water bottle"
EXAMPLE_TARGET = "Ultralight two-person tent, green"
EXAMPLE_ANSWER = """Behaviour: The customer began with shoes for rough ground. Lately the choices moved on to gear.
Preferences: Sturdy things for long days outdoors matter more than fashion. Good materials are worth a price.
Intent: Longer trips seem to be planned. Something light for staying out overnight would come next.
Recommendation: Ultralight two-person tent, green"""
NO_HISTORY = "(nothing yet)"
_ASKED = "\n".join((SYSTEM, TASK, TARGET, EXAMPLE_ANSWER))

_MAX_TITLE_CHARS = 120
_MAX_TARGETS = 20


class EndpointTeacher:
    """Writes rationales with a language model.

    Args:
        items: ids and titles by item index.
        trained: which items occur in training.
        endpoint: where and how to ask.
        cache: folder of the answers.
        intent: `from_target` shows the model what was chosen next, `history_only` does not.
        max_history: newest items of a history that are shown.
        max_tokens: longest answer.
        limit_field: name of that limit in the request; newer OpenAI models want `max_completion_tokens`.
        temperature: None leaves it to the server.
    """

    def __init__(
        self,
        *,
        items: ItemTable,
        trained: Sequence[bool],
        endpoint: Endpoint,
        cache: Path,
        intent: Intent = "from_target",
        max_history: int = 50,
        max_tokens: int = 400,
        limit_field: LimitField = "max_tokens",
        temperature: float | None = None,
    ) -> None:
        self._titles = [
            shorten(title, _MAX_TITLE_CHARS) or "an item without a name" for title in items.titles
        ]
        self._check = TargetCheck(items, trained)
        self._endpoint = endpoint
        self._cache = cache
        self._intent = intent
        self._max_history = max_history
        self._sampling: dict[str, Any] = {limit_field: max_tokens}
        if temperature is not None:
            self._sampling["temperature"] = temperature

    @property
    def name(self) -> str:
        """`endpoint:` and the model."""
        return f"endpoint:{self._endpoint.model}"

    def write(self, rows: Sequence[TrainingRow]) -> list[Rationale]:
        """One rationale per row; equal prompts are asked once.

        Raises:
            ConfigError: no server, wrong key, or unknown model.
            DataError: the server keeps failing. Answers so far are kept.
        """
        rationales = [Rationale("", "over_budget")] * len(rows)
        requests: dict[str, dict[str, Any]] = {}
        rows_of: dict[str, list[int]] = {}
        for number, row in enumerate(rows):
            request = self.request(row)
            key = answer_key(request)
            requests[key] = request
            rows_of.setdefault(key, []).append(number)
        store = AnswerStore(self._cache)
        found = store.find(requests)
        used = sum(answer.prompt_tokens + answer.completion_tokens for answer in found.values())

        def settle(key: str, result: Answer | str) -> None:
            for position, number in enumerate(rows_of[key]):
                rationale = self.judge(result, rows[number])
                if position:  # paid for with the first row
                    rationale = rationale._replace(prompt_tokens=0, completion_tokens=0)
                rationales[number] = rationale

        for key, answer in found.items():
            settle(key, answer)
        with progress(
            f"asking {self._endpoint.model}", total=len(requests), start=len(found), unit="answers"
        ) as advance:

            def on_result(key: str, result: Answer | str) -> None:
                if isinstance(result, Answer):
                    store.add(key, result)
                settle(key, result)
                advance()

            asked = {key: request for key, request in requests.items() if key not in found}
            try:
                Chat(self._endpoint, used_tokens=used).ask_all(asked, on_result)
            finally:
                store.flush()
        return rationales

    def request(self, row: TrainingRow) -> dict[str, Any]:
        """Arguments of the chat call for one row; all that its answer depends on."""
        history = [self._titles[item] for item in row.history[-self._max_history :].tolist()]
        shown = "\n".join(f"{number}. {title}" for number, title in enumerate(history, 1))
        targets = [self._titles[item] for item in dict.fromkeys(row.targets.tolist())][:_MAX_TARGETS]
        messages = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": self._question(EXAMPLE_HISTORY, EXAMPLE_TARGET)},
            {"role": "assistant", "content": EXAMPLE_ANSWER},
            {"role": "user", "content": self._question(shown or NO_HISTORY, "; ".join(targets))},
        ]
        return {"model": self._endpoint.model, "messages": messages, **self._sampling}

    def _question(self, history: str, target: str) -> str:
        hint = TARGET.format(titles=target) if self._intent == "from_target" else ""
        return TASK.format(history=history, target=hint)

    def judge(self, result: Answer | str, row: TrainingRow) -> Rationale:
        """A rationale from an answer, or from the reason why there is none."""
        if not isinstance(result, Answer):
            return Rationale("", "over_budget" if result == "over_budget" else "failed")
        text = reasoning_part(result.text, asked=_ASKED, cut_off=result.finish_reason == "length")
        if result.finish_reason in ("refusal", "content_filter"):
            outcome: Any = "refused"
        else:
            outcome = self._check.outcome(
                text, targets=row.targets.tolist(), history=row.history[-self._max_history :].tolist()
            )
        tokens: Mapping[str, int] = {
            "prompt_tokens": result.prompt_tokens, "completion_tokens": result.completion_tokens
        }  # fmt: skip
        return Rationale(text if outcome == "ok" else "", outcome, **tokens)
