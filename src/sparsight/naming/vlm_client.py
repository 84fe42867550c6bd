"""Questions to a vision-language model behind an OpenAI-compatible address."""

from __future__ import annotations

import http.client
import ipaddress
import json
import math
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from sparsight.errors import SparsightError, UserError
from sparsight.text import without_surrogates

KEY_VARIABLE = "SPARSIGHT_VLM_KEY"
"""Environment variable with the key of the address; the key is in no option, file or message."""

LARGEST_ANSWER = 1 << 20
"""Largest response that is read, in bytes."""

LONGEST_WAIT = 30.0
"""Longest wait before a question is repeated, in seconds."""

_AGAIN = (408, 409, 429)


def _key() -> str | None:
    return os.environ.get(KEY_VARIABLE) or None


@dataclass(frozen=True)
class VlmSettings:
    """Which vision-language model is asked, and how.

    The key, if the address wants one, is read from the environment variable `SPARSIGHT_VLM_KEY`.

    Args:
        url: the address before `/chat/completions`, such as `http://localhost:8000/v1`.
        model: name of the model there.
        latents: number of latents that it is asked about.
        timeout: seconds until an answer is late.
        tries: how often a question is put if the address is busy or the connection fails.
        pause: seconds before the second try; doubled before each further one.

    Raises:
        UserError: the address is no http or https address, has a user name, password or query, or
            would get the key unencrypted; a number is out of range.
    """

    url: str
    model: str
    latents: int = 200
    timeout: float = 60.0
    tries: int = 3
    pause: float = 1.0
    key: str | None = field(default_factory=_key, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check_address(self.url, self.key)
        if not self.model.strip():
            raise UserError("--vlm-model is empty; give the name of a model at the address.")
        if self.latents < 1:
            raise UserError(f"--vlm-latents is {self.latents}; it must be at least 1.")
        if not (math.isfinite(self.timeout) and self.timeout > 0) or self.tries < 1:
            raise UserError(
                f"A time-out of {self.timeout:g} s and {self.tries} tries: the time-out must be "
                "larger than 0 (--vlm-timeout), and there must be at least one try."
            )
        if self.key is not None and (not self.key.isascii() or not self.key.isprintable()):
            raise UserError(
                f"{KEY_VARIABLE} has a character that no key has, such as a line break."
            )

    @property
    def is_local(self) -> bool:
        """Whether the address is on this machine."""
        return _is_local(urlsplit(self.url).hostname or "")

    def hidden(self, text: str) -> str:
        """Return a text without the key."""
        return text.replace(self.key, "***") if self.key else text


class AskFailure(SparsightError):
    """A question got no answer; `kind` says why, in words that do not differ between questions."""

    def __init__(
        self, kind: str, detail: str = "", *, again: bool = False, wait: float = 0
    ) -> None:
        super().__init__(f"{kind} ({detail})" if detail else kind)
        self.kind, self.again, self.wait = kind, again, wait


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuse redirects: they would carry the key and the images elsewhere."""

    def redirect_request(self, *arguments: Any, **named: Any) -> None:
        return None


class VlmClient:
    """Puts questions to the model, one after the other.

    Args:
        settings: address, model and time-outs.
    """

    def __init__(self, settings: VlmSettings) -> None:
        self.settings = settings
        handlers: list[urllib.request.BaseHandler] = [_NoRedirect()]
        if settings.is_local:
            handlers.append(urllib.request.ProxyHandler({}))
        self._opener = urllib.request.build_opener(*handlers)

    def ask(self, content: Sequence[Mapping[str, Any]]) -> str:
        """Return the model's answer to one message of texts and images.

        Args:
            content: the parts of the message, as in OpenAI's chat completions.

        Raises:
            AskFailure: no answer came in time, or none that can be read, after all tries.
        """
        settings, pause = self.settings, self.settings.pause
        for tries_left in reversed(range(settings.tries)):
            try:
                return _content_of(self._post(content))
            except AskFailure as failure:
                if not failure.again or not tries_left:
                    raise
                time.sleep(min(max(pause, failure.wait), LONGEST_WAIT))
                pause *= 2
        raise AssertionError("there is at least one try")

    def _post(self, content: Sequence[Mapping[str, Any]]) -> bytes:
        settings = self.settings
        body = {
            "model": settings.model,
            "messages": [{"role": "user", "content": list(content)}],
            "temperature": 0,
            "max_tokens": 100,
        }
        request = urllib.request.Request(
            settings.url.rstrip("/") + "/chat/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json", "Accept": "application/json"},
        )
        if settings.key:
            request.add_unredirected_header("Authorization", f"Bearer {settings.key}")
        deadline = time.monotonic() + settings.timeout
        try:
            with self._opener.open(request, timeout=settings.timeout) as response:
                return self._read(response, deadline)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(error) from None
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise self._late() from None
            raise AskFailure("no connection", self._words(error.reason), again=True) from None
        except TimeoutError:
            raise self._late() from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            kind = "the connection broke off"
            raise AskFailure(kind, self._words(error), again=True) from None

    def _read(self, response: Any, deadline: float) -> bytes:
        parts, size = [], 0
        while part := response.read1(1 << 16):
            parts.append(part)
            size += len(part)
            if size > LARGEST_ANSWER:
                raise AskFailure(f"the response was larger than {LARGEST_ANSWER:,} bytes")
            if time.monotonic() > deadline:
                raise self._late()
        return b"".join(parts)

    def _late(self) -> AskFailure:
        return AskFailure(f"no answer within {self.settings.timeout:g} s")

    def _refused(self, error: urllib.error.HTTPError) -> AskFailure:
        try:
            about = error.read(4096).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            about = ""
        try:
            said = json.loads(about)
            said = said["error"]["message"] if "error" in said else said["message"]
        except (ValueError, KeyError, TypeError):
            said = ""
        try:
            wait = float(error.headers.get("Retry-After") or 0)
        except ValueError:
            wait = 0.0
        again = error.code in _AGAIN or error.code >= 500
        return AskFailure(f"HTTP {error.code}", self._words(said), again=again, wait=wait)

    def _words(self, what: object) -> str:
        """Return what went wrong in one short line without the key."""
        words = " ".join(self.settings.hidden(without_surrogates(str(what))).split())
        return "".join(c for c in words if c.isprintable())[:200]


def _content_of(data: bytes) -> str:
    try:
        response = json.loads(data)
    except (ValueError, RecursionError):
        raise AskFailure("the response was not JSON") from None
    try:
        content = response["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        raise AskFailure("the response had no choices[0].message.content") from None
    if content is None:
        return ""
    if not isinstance(content, str):
        raise AskFailure("the response had no text in choices[0].message.content")
    return content


def _check_address(url: str, key: str | None) -> None:
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise UserError(f"--vlm-url: {url!r} is no address; give http(s)://HOST/v1.") from None
    if parts.username is not None or parts.password is not None:
        raise UserError(
            f"--vlm-url must not contain a user name or password; set {KEY_VARIABLE} instead."
        )
    if parts.scheme not in ("http", "https") or not host:
        raise UserError(
            f"--vlm-url: {url!r} is no http or https address; give one such as "
            "http://localhost:8000/v1."
        )
    if parts.query or parts.fragment or not url.isascii() or not url.isprintable() or " " in url:
        raise UserError(
            f"--vlm-url: {url!r}: give the plain address before /chat/completions, such as "
            "http://localhost:8000/v1."
        )
    if parts.scheme == "http" and key and not _is_local(host):
        raise UserError(
            f"--vlm-url: {url} is not encrypted, and {KEY_VARIABLE} would travel in plain text; "
            "use https, or unset the key."
        )


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
