"""OpenAI-compatible servers: a client, and what its errors mean to the user.

Shared by answers (gen_mtbench.py) and judgements (judge.py). A message to the user names the place
(which argument, which server), the fact and the remedy, and never shows the key.
"""

import functools
import json
import os
import re
import time
import urllib.request
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from pref.files.console import UserError, first_line

MOST_SECONDS = 86400  # a socket takes no endless timeout
DEFAULT_URL = "https://api.openai.com/v1"
FATAL_STATUS = (401, 403, 404)  # a later request would fail in the same way
# How providers write that a limit for the day (week, month) is reached; to wait a minute is no use.
LIMIT_OF_THE_DAY = re.compile(
    r"per[-_ ]?(?:day|week|month)|\b(?:daily|weekly|monthly)\b|by(?:day|month)\b|\b[rt]pd\b"
    r"|per (?:86400|24)",
    re.IGNORECASE,
)
# How providers write that the account or key has nothing left to spend, where the status does not
# tell: 400 (Anthropic, LiteLLM), 403 (xAI, OpenRouter), 412 (Fireworks), 429 (OpenAI, Moonshot).
OUT_OF_CREDIT = re.compile(
    r"insufficient[_ ](?:account[_ ])?(?:quota|balance|credits?|funds)|credit balance is too low"
    r"|budget[_ ](?:has been )?exceeded|billing_(?:hard_limit|not_active)|billing hard limit"
    r"|exceeded[_ ]current[_ ]quota|used all available credits|spending limit|arrearage"
    r"|key limit exceeded|out of credits|credits? (?:are |is |has been |have been )?(?:depleted"
    r"|exhausted)",
    re.IGNORECASE,
)
# A limit of tokens that is refused for its size, not for its name.
TOO_LONG = re.compile(
    r"too (?:large|long|many)|context (?:length|window)|exceed|at most \d", re.IGNORECASE
)
STATUS_WITHOUT_CREDIT = (400, 403, 412, 429)


def open_client(
    what: str,
    base_url: str | None,
    timeout_s: float,
    max_retries: int,
    most_bytes: int | None = None,
):
    """An `openai.OpenAI` client. what: needs it, named in the error if the package is missing.

    most_bytes: of a reply, which ends there, and `timeout_s` after its first byte: `timeout_s`
    alone only bounds each pause, so that a server that sends a little for ever is waited for.

    The key is read from OPENAI_API_KEY only, never from an argument: arguments end up in the
    shell's history. Raises UserError without package or key.
    """
    try:
        import openai
    except ModuleNotFoundError:
        raise UserError(f"{what} needs the package openai; pip install openai") from None
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not key:
        raise UserError(
            "OPENAI_API_KEY is not set; export OPENAI_API_KEY=... (for a local server without keys "
            "any text will do)"
        )
    if not (key.isascii() and key.isprintable()):
        raise UserError(
            "OPENAI_API_KEY contains control or non-ASCII characters, so it was not copied "
            "correctly; export it again"
        )
    if timeout_s > MOST_SECONDS:
        raise UserError(f"--timeout_s {timeout_s}: must be at most {MOST_SECONDS} (a day)")
    # Parameters of the address, such as Azure's api-version, belong behind each request's path.
    base_url, query, host = split_url(base_url or os.environ.get("OPENAI_BASE_URL") or DEFAULT_URL)
    return openai.OpenAI(
        api_key=key,
        base_url=base_url,
        timeout=timeout_s,
        max_retries=max_retries,
        default_query=query or None,
        # Azure's deployments want the key under this name.
        default_headers={"api-key": key} if "api-version" in query else None,
        http_client=open_http_client(openai.DefaultHttpxClient, host, timeout_s, most_bytes),
    )


def split_url(url: str) -> tuple[str, dict, str]:
    """The address without its parameters, the parameters, the host. A path to the end is shortened
    to what the client continues. Raises UserError for a text that is no address.
    """
    try:
        parts = urlsplit(url.strip())
        valid = parts.scheme in ("http", "https") and parts.hostname and url.strip().isprintable()
        valid = valid and parts.port != 0  # a port that is no number raises ValueError
    except ValueError:
        valid = False
    if not valid:
        shown = hide_password(repr(url.split("?")[0]))
        raise UserError(
            f"--base_url {shown}: not an address; give one such as http://localhost:8000/v1"
        )
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    path = parts.path.rstrip("/").removesuffix("/chat/completions")
    return urlunsplit(parts._replace(path=path, query="", fragment="")), query, parts.hostname


def open_http_client(factory, host: str | None, timeout_s: float, most_bytes: int | None):
    """The client's connections, through the proxy that the environment names for `host`.

    A redirect is not followed: it would turn a POST into a GET, or take the key elsewhere. Raises
    UserError for a proxy that cannot be used.
    """
    hooks = [stop_retries_without_credit]
    if most_bytes is not None:
        hooks.insert(0, functools.partial(bound_reply, timeout_s, most_bytes))
    try:
        return factory(
            event_hooks={"response": hooks},
            follow_redirects=False,
            trust_env=not is_loopback(host),  # no proxy stands before this machine
        )
    except (ImportError, ValueError) as error:
        proxies = ", ".join(
            f"{name}={hide_password(value)}"
            for name, value in os.environ.items()
            if name.lower().endswith("_proxy") and name.lower() != "no_proxy" and value
        )
        raise UserError(
            f"{proxies}: this proxy cannot be used ({first_line(error)}); correct the variable, "
            "unset it, or list the server in NO_PROXY"
        ) from None


MOST_COMPRESSION = 100  # times; zlib reaches 1,000 with nothing but zeros


def bound_reply(timeout_s: float, most_bytes: int, response) -> None:
    """Let the body of a response end after so many bytes and seconds, whatever the server sends.

    It ends without an error, which the client would answer with another try, paid for again; what
    is missing is noticed by whoever reads the JSON.
    """
    if response.headers.get("content-encoding", "identity") != "identity":
        most_bytes //= MOST_COMPRESSION
    whole, until_s = response.stream, time.monotonic() + timeout_s

    class Bounded(type(whole)):
        def __init__(self):
            pass

        def __iter__(self):
            left = most_bytes
            for chunk in whole:
                yield chunk[:left]
                left -= len(chunk)
                if left <= 0 or time.monotonic() > until_s:
                    return

        def close(self):
            whole.close()

    response.stream = Bounded()


def is_loopback(host: str | None) -> bool:
    return host is not None and (host in ("localhost", "::1", "0.0.0.0") or host.startswith("127."))


def proxy_before(url: str) -> str | None:
    """The proxy that connections to `url` go through, without its password, or None."""
    parts = urlsplit(url)
    if is_loopback(parts.hostname) or urllib.request.proxy_bypass(parts.hostname or ""):
        return None
    proxies = urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    return hide_password(proxy) if proxy else None


def hide_password(url: str) -> str:
    return re.sub(r"//[^/@]*@", "//", url)


def complete(client, body: dict) -> str:
    """The raw text of a chat completion's reply; the client retries as usual.

    `chat.completions.create` would also validate the types of all messages, which takes a third of
    the time of a call.
    """
    return client.post("/chat/completions", body=body, cast_to=str)


def stop_retries_without_credit(response) -> None:
    """The client retries every 429, but waiting restores neither an account's credit nor, within
    minutes, a limit for the day. This header tells the client not to.
    """
    if response.status_code != 429:
        return
    text = response.read().decode("utf-8", "replace")
    if OUT_OF_CREDIT.search(text) or LIMIT_OF_THE_DAY.search(text):
        response.headers["x-should-retry"] = "false"


def clean(client, text: str) -> str:
    """`text` from the server without the key, which it may echo, and fit for a file."""
    # Shorter ones are the "x" or "EMPTY" given to a server without keys.
    if len(client.api_key) >= 6:
        text = text.replace(client.api_key, "[key]")
    return writable(text)


def writable(text: str) -> str:
    """`text` with lone surrogates, which cannot be encoded, replaced by '?'."""
    return text.encode("utf-8", "replace").decode()


def message_of(error) -> str:
    """What the server says in an `openai.APIStatusError`: its message, or, where the client finds
    none, the whole body (FastAPI's {"detail": ...}, a list, an error that is plain text).
    """
    text, bare = error.message, f"Error code: {error.status_code}"
    if text.strip() != bare or not error.body:
        return text
    body = error.body
    return f"{bare} - {body if isinstance(body, str) else json.dumps(body, ensure_ascii=False)}"


def is_out_of_credit(error) -> bool:
    """Whether an `openai.APIStatusError` says that there is nothing left to pay with.

    Only the error's own words count: a moderation quotes what it refuses.
    """
    body = error.body if isinstance(error.body, dict) else {"message": error.body}
    words = [str(body.get(name) or "")[:300] for name in ("code", "type", "message", "error")]
    says_so = OUT_OF_CREDIT.search(" ".join(words)) is not None
    return error.status_code == 402 or (error.status_code in STATUS_WITHOUT_CREDIT and says_so)


def is_unsent(error) -> bool:
    """Whether an `openai.APIConnectionError` says that no connection came about."""
    # By name: the package openai brings its own HTTP client, whichever that is.
    return type(error.__cause__).__name__ in ("ConnectError", "ConnectTimeout")


def is_limit_of_the_day(error) -> bool:
    """Whether an `openai.APIStatusError` is a rate limit that hours of waiting would lift."""
    if error.status_code != 429:
        return False
    return bool(LIMIT_OF_THE_DAY.search(f"{error.message} {error.body}"))


def address(client) -> str:
    """The server's URL, without a user name and password if it contains them. Of its parameters
    only api-version is shown: others may be keys.
    """
    version = {k: v for k, v in client.default_query.items() if k == "api-version"}
    return hide_password(str(client.base_url)) + (f"?{urlencode(version)}" if version else "")


def explain(client, option: str, name: str, error) -> str:
    """A message for the user: what went wrong at the server and what to do.

    option, name: the argument that named the model, and its value. error: an `openai.APIError`.
    """
    import openai

    place, url = f"{option} {name}", address(client)
    if isinstance(error, openai.APITimeoutError):
        return (
            f"{place}: {url} did not answer within --timeout_s {client.timeout}; "
            "raise it, or try again later"
        )
    if isinstance(error, openai.APIConnectionError):
        cause = clean(client, str(error.__cause__ or error))
        proxy = proxy_before(str(client.base_url))
        through = f" through the proxy {proxy}" if proxy else ""
        bypass = ", or list it in NO_PROXY" if proxy else ""
        if not is_unsent(error) and not proxy:
            return (
                f"{place}: {url} breaks off its reply ({cause}); look at its log and at what "
                "stands before it, and check that --base_url has the server's protocol and port"
            )
        return (
            f"{place}: no server answers at {url}{through} ({cause}); start it, or correct "
            f"--base_url{bypass}"
        )
    if 300 <= error.status_code < 400:
        target = hide_password(error.response.headers.get("location", "another address"))
        target = target.split("?")[0]  # parameters can be keys
        return (
            f"{place}: {url} redirects to {clean(client, target)}; give --base_url as the server "
            "has it (https in place of http, no detour)"
        )
    message = " ".join(clean(client, message_of(error)).split())[:300]
    fact = f"{place}: {url} answers {error.status_code}"
    return f"{fact}: {remedy(error, option, url)}. Its message: {message}"


def remedy(error, option: str, url: str) -> str:
    """The meaning of an HTTP status, and what to do. error: an `openai.APIStatusError`."""
    if is_out_of_credit(error):
        return (
            "the account has no credit left; add some, or use another key, and run the same "
            "command again"
        )
    if is_limit_of_the_day(error):
        return (
            "a limit for the day (or longer) is reached; run the same command again when it is "
            "lifted: it asks for what is missing"
        )
    if error.status_code >= 500:
        return "the server failed; look at its log, then run the same command again"
    remedies = {
        401: "it refuses the key; export OPENAI_API_KEY=... with a key for this server",
        403: f"the key may not use this model; choose another {option}, or use a key of an account "
        "that has access",
        404: f"it has no such model; correct the name (`curl {url}models` lists what it has) or "
        "--base_url, which usually ends in /v1",
        429: "too many requests; lower --concurrency, or run the same command again later",
    }
    return remedies.get(error.status_code, f"it refuses the request; check {option} and --base_url")


def explain_other_api(client) -> str:
    """A message for the user: the reply was not a chat completion."""
    return (
        f"{address(client)}: its reply is not that of an OpenAI-compatible server; correct "
        "--base_url, which usually ends in /v1"
    )
