"""Who judged: everything that makes judgements comparable, as one notion.

    Identity.request   what is sent for one judgement, and its key in the store
    Identity.id        16 hex digits: the column judge_id, and what the analysis groups by

Two judgements belong to one judge only if model, parameters, server, prompts, references and
reading are equal. The request holds those of them that determine the reply (prompts and references
are in its messages); the reading is applied to what came back.
"""

import os
import re
from dataclasses import asdict, dataclass, field
from urllib.parse import urlsplit

from pref.files import disk
from pref.judging.benchmark import SINGLE, Bench
from pref.judging.judges import Judge
from pref.judging.reading import Reading
from pref.model import server

TOKEN_LIMITS = ("max_tokens", "max_completion_tokens")  # the same limit by its old and new name


@dataclass(frozen=True)
class Identity:
    judge: str  # --judge, as given
    parameters: dict  # sent with each request; of a local judge, what determines its scores
    server: str  # address, or --server_name; "" for a local judge
    prompts: str  # hash of the prompts' texts
    references: str  # hash of the reference answers
    reading: Reading
    options: dict = field(default_factory=dict)  # the benchmark's own, see benchmark.Bench

    @property
    def values(self) -> dict:
        """What the hashes are made of. Fields that came later count only where they are given."""
        values = asdict(self) | {"reading": self.reading._asdict()}
        return {name: value for name, value in values.items() if name != "options" or value}

    @property
    def id(self) -> str:
        return short_hash(self.values)

    @property
    def limitless_id(self) -> str:
        """Equal for identities that differ in the limit of tokens alone."""
        return short_hash(self.values | {"parameters": without_limit(self.parameters)})

    @property
    def settings(self) -> dict:
        """The parameters, and of options and reading what is not the benchmark's own."""
        official = Reading()._asdict()
        other = {k: v for k, v in self.reading._asdict().items() if v != official[k]}
        return self.parameters | self.options | other

    def request(self, messages: list[dict], repeat: int, grading: str, **more) -> dict:
        """Everything that determines a reply. Its hash is the key in the store.

        more: what requests of other benchmarks than MT-Bench have besides (`bench`, its name). A
        change here changes the hashes: everything judged so far would be paid for again. A request
        of version 1.0.0 is this one without `server` (see `legacy`).
        """
        parameters = self.parameters
        if "seed" in parameters:  # repeats with the same seed would bring the same judgement
            parameters = parameters | {"seed": parameters["seed"] + repeat}
        request = {
            "judge": self.judge,
            "messages": messages,
            "parameters": parameters,
            "repeat": repeat,
        }
        if grading != SINGLE:
            request["grading"] = grading
        if self.server:
            request["server"] = self.server
        return request | more


def identify(judge: Judge, bench: Bench, reading: Reading) -> Identity:
    """The identity of a judge that is asked with the prompts and references of `bench`.

    A score judge is asked with none.
    """
    texts = {
        name: [prompt["system_prompt"], prompt["prompt_template"]]
        for name, prompt in bench.prompts.items()
    }
    references = {str(question_id): turns for question_id, turns in bench.references.items()}
    return Identity(
        judge=judge.name,
        parameters=judge.parameters,
        server=judge.server,
        prompts=short_hash(texts),
        references=short_hash(references),
        reading=reading,
        options=bench.options,
    )


def short_hash(value) -> str:
    return disk.sha256_json(value)[:16]


def without_limit(parameters: dict) -> dict:
    return {key: value for key, value in parameters.items() if key not in TOKEN_LIMITS}


def limitless_hash(request: dict) -> str:
    """Hash of a request without its limit of tokens: a judgement that came to its end is the same
    under any higher limit.
    """
    return disk.sha256_json(request | {"parameters": without_limit(request["parameters"])})


def legacy(request: dict) -> dict:
    """The request as version 1.0.0 made it: without the server."""
    return {key: value for key, value in request.items() if key != "server"}


def server_address(base_url: str | None) -> str:
    """The address that names a server: --base_url, else OPENAI_BASE_URL, else OpenAI's.

    Without user name, password, parameters and key, and in one spelling: "HTTPS://Host:443//v1/"
    is "https://host/v1". Raises UserError for a text that is no address.
    """
    given = base_url or os.environ.get("OPENAI_BASE_URL") or server.DEFAULT_URL
    parts = urlsplit(server.hide_password(server.split_url(given)[0]))
    host = parts.netloc.lower().removesuffix({"http": ":80", "https": ":443"}[parts.scheme])
    url = parts._replace(netloc=host, path=re.sub("/+", "/", parts.path)).geturl()
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    return (url.replace(key, "[key]") if len(key) >= 6 else url).rstrip("/")
