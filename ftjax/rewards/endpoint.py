"""A client of OpenAI-compatible endpoints: chat completions over HTTP, with the standard library alone."""

from __future__ import annotations

import dataclasses
import http.client
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from ftjax.rewards.beside import beside

_BUSY = (408, 409, 429, 500, 502, 503, 504)
_MOST_BYTES = 4 << 20


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: the key goes to the configured host alone."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


class EndpointError(RuntimeError):
    """An endpoint gave no answer, or one that is none."""


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """Where a model answers.

    Its key is read from the environment when it is asked, and stands in no config and no error.
    """

    url: str
    """Up to the version: `http://host:8000/v1`."""
    model: str
    key_variable: str = ""
    timeout: float = 30.0
    """Seconds of one request."""
    retries: int = 2
    """After a refusal that may pass (429, 5xx) or a broken connection."""
    pause: float = 0.5
    """Seconds before the first retry, doubled for each further one; a `Retry-After` of the server counts up to `timeout`."""
    parallel: int = 8
    """Requests at a time, of this process."""
    max_tokens: int | None = 256
    """None: not sent. Some endpoints refuse it, and want another field in `body`."""
    temperature: float | None = 0.0
    """None: not sent."""
    body: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Further fields of each request."""

    def __post_init__(self) -> None:
        if urllib.parse.urlsplit(self.url).scheme not in ("http", "https"):
            raise ValueError(f"endpoint: the url starts with http:// or https://, not {self.url!r}.")

    def ask(self, questions: Sequence[str]) -> list[str]:
        """Return the answer to each question, some asked at a time; raise `EndpointError` where there is none."""
        if not questions:
            return []
        if self.key_variable and self.key_variable not in os.environ:
            raise EndpointError(f"endpoint {self.url}: set the environment variable {self.key_variable}, or key_variable to '' for no key.")
        return beside([partial(self._answer, question) for question in questions], at_once=self.parallel, whose=self.url)

    def _answer(self, question: str) -> str:
        for trial in range(self.retries + 1):
            try:
                return self._once(question)
            except urllib.error.HTTPError as error:
                with error:
                    why = f"{error.code} {error.reason}: {_beginning(error)}"
                wait = error.headers.get("Retry-After", "")
                if error.code not in _BUSY:
                    break
            except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
                # No connection, a timeout, an answer that is cut; no JSON, or not of this shape.
                why, wait = f"{type(error).__name__}: {error}", ""
            if trial < self.retries:
                time.sleep(min(float(wait) if wait.isdigit() else self.pause * 2**trial, self.timeout))
        raise EndpointError(f"endpoint {self.url} gave no answer in {trial + 1} tries: {why}")

    def _once(self, question: str) -> str:
        messages = [{"role": "user", "content": question}]
        limits = {"max_tokens": self.max_tokens, "temperature": self.temperature}
        sent = {name: value for name, value in limits.items() if value is not None}
        body = {"model": self.model, "messages": messages, **sent, **self.body}
        headers = {"Content-Type": "application/json"}
        if self.key_variable:
            headers["Authorization"] = f"Bearer {os.environ[self.key_variable]}"
        request = urllib.request.Request(self.url.rstrip("/") + "/chat/completions", json.dumps(body).encode(), headers)
        with _OPENER.open(request, timeout=self.timeout) as response:
            content = json.loads(response.read(_MOST_BYTES))["choices"][0]["message"]["content"]
        if not isinstance(content, str):
            raise TypeError(f"the answer's content is {content!r}, not a string")
        return content


def _beginning(error: urllib.error.HTTPError) -> str:
    """Return how the body of a refusal begins."""
    try:
        return error.read(300).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return ""
