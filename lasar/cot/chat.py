"""Asking an OpenAI-compatible chat endpoint many things at once, politely and within a budget.

Bounded concurrency; attempts with exponential back-off and jitter that honour Retry-After; a cap in tokens. Mistakes
that concern every request (no server, wrong key, unknown model) stop everything at once.
"""

import asyncio
import email.utils
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lasar.cot.answer_store import Answer
from lasar.errors import ConfigError, DataError, require

Outcome = Answer | str

_MAX_PAUSE_SECONDS = 60.0
_MAX_RETRY_AFTER_SECONDS = 900.0
_CONNECT_SECONDS = 10.0
_CHARS_PER_TOKEN = 2  # pessimistic for English, so that a reservation is never too small
_WHERE = "rationalize.endpoint"


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where and how to ask.

    Attributes:
        url: base address, usually ending in `/v1`.
        model: the server's name of the model.
        api_key: sent as the bearer token; "" where the server wants none. Never printed, never stored.
        key_source: how an error names where the key came from.
        concurrency: requests in flight at most.
        attempts: per request, the first one included.
        timeout_seconds: longest wait for one answer.
        pause_seconds: pause before the second attempt, doubled each time.
        token_budget: tokens read and written in all; 0 sets no cap.
        max_failures: requests that fail in a row before giving up altogether.
    """

    url: str
    model: str
    api_key: str = ""
    key_source: str = "the API key"
    concurrency: int = 8
    attempts: int = 6
    timeout_seconds: float = 120.0
    pause_seconds: float = 1.0
    token_budget: int = 0
    max_failures: int = 20


class Chat:
    """Asks the requests of one call of `ask_all`.

    Args:
        endpoint: where and how.
        used_tokens: tokens that count against the budget already (answers found on disk).
    """

    def __init__(self, endpoint: Endpoint, *, used_tokens: int = 0) -> None:
        self._openai = require("openai", extra="teacher")
        self._endpoint = endpoint
        self._used_tokens = used_tokens
        self._reserved_tokens = 0
        self._failures_in_a_row = 0
        self._reached = False
        self._answered = used_tokens > 0
        self._not_before = 0.0
        self._settled = asyncio.Event()
        self._jitter = random.Random(0)

    def ask_all(
        self, requests: Mapping[str, Mapping[str, Any]], on_result: Callable[[str, Outcome], None]
    ) -> None:
        """Ask every request; results come in any order.

        Args:
            requests: arguments of `chat.completions.create` by key.
            on_result: called with the key and an `Answer`, or `"failed"` or `"over_budget"`.

        Raises:
            ConfigError: no server, wrong key, or unknown model.
            DataError: the server refuses the very first request, or keeps failing.
        """
        if requests:
            asyncio.run(self._ask_all(requests, on_result))

    async def _ask_all(
        self, requests: Mapping[str, Mapping[str, Any]], on_result: Callable[[str, Outcome], None]
    ) -> None:
        endpoint = self._endpoint
        waiting = iter(requests.items())
        timeout = self._openai.Timeout(
            endpoint.timeout_seconds, connect=min(_CONNECT_SECONDS, endpoint.timeout_seconds)
        )
        async with self._openai.AsyncOpenAI(
            base_url=endpoint.url, api_key=endpoint.api_key or "none", timeout=timeout, max_retries=0
        ) as client:

            async def work() -> None:
                for key, request in waiting:
                    on_result(key, await self._ask(client, request))

            key, request = next(waiting)
            on_result(key, await self._ask(client, request))  # alone: a mistake costs one request, not many
            workers = [asyncio.create_task(work()) for _ in range(endpoint.concurrency)]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    async def _ask(self, client: Any, request: Mapping[str, Any]) -> Outcome:
        """One request with its attempts, under the budget."""
        limit = request.get("max_tokens") or request.get("max_completion_tokens") or 0
        size = sum(len(message["content"]) for message in request["messages"]) // _CHARS_PER_TOKEN + limit
        # Wait for what is in flight before saying no: then a rerun that finds these answers says no to the same rows.
        while self._over_budget(self._reserved_tokens + size):
            if self._over_budget(size) or not self._reserved_tokens:
                return "over_budget"
            self._settled.clear()
            await self._settled.wait()
        self._reserved_tokens += size
        try:
            answer = await self._attempts(client, request)
        finally:
            self._reserved_tokens -= size
            self._settled.set()
        if isinstance(answer, Answer):
            # A server that counts nothing is taken at the most it can have used, or the budget would bind nobody.
            self._used_tokens += answer.prompt_tokens + answer.completion_tokens or size
            self._failures_in_a_row, self._answered, self._reached = 0, True, True
            return answer
        self._failures_in_a_row += 1
        if self._failures_in_a_row >= self._endpoint.max_failures or not self._answered:
            raise DataError(
                f"{_WHERE}.url: {self._endpoint.url}: {answer}; answers so far are kept, run again to continue"
            )
        return "failed"

    def _over_budget(self, more_tokens: int) -> bool:
        budget = self._endpoint.token_budget
        return budget > 0 and self._used_tokens + more_tokens > budget

    async def _attempts(self, client: Any, request: Mapping[str, Any]) -> Answer | str:
        """An answer, or why there is none."""
        openai, reason = self._openai, "no attempt was made"
        for attempt in range(self._endpoint.attempts):
            await asyncio.sleep(max(0.0, self._not_before - time.monotonic()))
            pause = self._jitter.uniform(0.5, 1.0) * self._endpoint.pause_seconds * 2**attempt
            try:
                return _answer(await client.chat.completions.create(**request))
            except openai.APIConnectionError as error:
                if isinstance(error, openai.APITimeoutError) and not _is_connecting(error):
                    self._reached = True
                    reason = f"no answer within {self._endpoint.timeout_seconds:g} seconds"
                else:
                    reason = f"cannot be reached ({_cause(error)})"
                if not self._reached:
                    raise ConfigError(
                        f"{_WHERE}.url: {self._endpoint.url}: {reason}; start the server, or correct the address"
                    ) from None
            except openai.APIStatusError as error:
                self._reached = True
                reason = f"the server answers {error.status_code}: {self._message(error)}"
                self._refuse_for_all(error.status_code, reason)
                if error.status_code not in (408, 409, 429) and error.status_code < 500:
                    return reason
                told = _retry_after(error.response.headers)
                if told is not None:  # the server speaks to all of us
                    pause = min(told, _MAX_RETRY_AFTER_SECONDS)
                    self._not_before = max(self._not_before, time.monotonic() + pause)
            except (openai.APIError, ValueError, TypeError) as error:  # an answer that is not one
                reason = f"an answer that cannot be read ({_cause(error)})"
            if attempt + 1 < self._endpoint.attempts:
                await asyncio.sleep(min(pause, _MAX_PAUSE_SECONDS))
        return f"{reason}, {self._endpoint.attempts} attempts"

    def _refuse_for_all(self, status: int, reason: str) -> None:
        """Raise for what no other request would fare better with."""
        endpoint = self._endpoint
        if status in (401, 403):
            state = "is refused" if endpoint.api_key else "is not set"
            raise ConfigError(f"{_WHERE}.api_key_variable: {endpoint.key_source} {state}: {reason}")
        if status == 404:
            raise ConfigError(
                f"{_WHERE}.model: {endpoint.model!r} is not served at {endpoint.url} (or {_WHERE}.url is wrong): "
                f"{reason}"
            )

    def _message(self, error: Any) -> str:
        """What the server says, without the key that some servers repeat."""
        body = error.body if isinstance(error.body, dict) else {}
        text = " ".join(str(body.get("message") or error.message).split())
        return (text.replace(self._endpoint.api_key, "***") if self._endpoint.api_key else text)[:200]


def _answer(completion: Any) -> Answer:
    """Read a chat completion; servers leave out what they like.

    Raises:
        TypeError, ValueError: there is no message in it.
    """
    choices = getattr(completion, "choices", None)
    if not choices or choices[0].message is None:
        raise ValueError("no choices")
    message, usage = choices[0].message, getattr(completion, "usage", None)
    refusal = getattr(message, "refusal", None)
    return Answer(
        text=str(message.content or refusal or ""),
        finish_reason="refusal" if refusal else str(choices[0].finish_reason or "stop"),
        prompt_tokens=int(getattr(usage, "prompt_tokens", 0) or 0),
        completion_tokens=int(getattr(usage, "completion_tokens", 0) or 0),
    )


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait, from either form of the header."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        date = email.utils.parsedate_tz(value)
        return None if date is None else max(0.0, email.utils.mktime_tz(date) - time.time())


def _is_connecting(error: BaseException) -> bool:
    """Whether a timeout was one of reaching the server at all (the HTTP library's own type, which openai hides)."""
    return type(error.__cause__).__name__ == "ConnectTimeout"


def _cause(error: BaseException) -> str:
    deepest: BaseException = error
    while deepest.__cause__ is not None:
        deepest = deepest.__cause__
    return " ".join(str(deepest).split())[:200] or type(deepest).__name__
