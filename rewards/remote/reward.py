"""`remote`: a reward that another process computes (`rlrestore judge serve`, rewards/remote/server.py), over HTTP.

What it declares (direction, block, needs, scale) stands in its params, so that a config can be read while the server is
down; building it asks the server and refuses a different nature. A request that fails after all its tries makes its
rows invalid, with a reason that begins with `infra:`; the other requests of the batch count.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from envs.types import Restoration
from rewards.base import Block, Reward, RewardSpec, Scores, missing_data
from rewards.remote.http import Asker, AskError, Patience
from rewards.remote.wire import decode_rows, encode_item

TOKEN_ENV = "RLRESTORE_JUDGE_TOKEN"


@dataclass(frozen=True)
class RemoteParams:
    url: str  # of the server, e.g. http://127.0.0.1:8420
    reward: str  # its name there
    higher_is_better: bool
    block: Block  # quality | fidelity
    scale: float = 1.0
    needs: tuple[str, ...] = ("lq",)  # of lq, gt
    token_env: str = TOKEN_ENV  # environment variable that holds the bearer token
    batch_size: int = 8  # items a request
    concurrency: int = 2  # requests at a time
    deadline_s: float = 45.0  # of one `score`, over all requests and tries; keep it below the term's timeout_s
    connect_s: float = 5.0
    attempts: int = 4  # of one request
    backoff_s: float = 0.5


class RemoteReward(Reward):
    params: RemoteParams
    waits = True  # for another machine, not for a core of this one

    @classmethod
    def spec_for(cls, params: RemoteParams) -> RewardSpec:
        for name in ("batch_size", "concurrency"):
            if getattr(params, name) < 1:
                raise ValueError(f"remote.{name} is {getattr(params, name)}; it is at least 1")
        if params.block not in ("quality", "fidelity"):
            raise ValueError(f"remote.block is {params.block!r}; it is quality or fidelity")
        if unknown := set(params.needs) - {"lq", "gt"}:
            raise ValueError(f"remote.needs has {sorted(unknown)}; pictures travel (lq, gt), prompts do not")
        if not params.deadline_s > 0:
            raise ValueError(f"remote.deadline_s is {params.deadline_s}; give seconds > 0")
        return RewardSpec(
            name=params.reward, version="remote", higher_is_better=params.higher_is_better, range=(None, None),
            needs=frozenset({"lq", *params.needs}), block=params.block, scale=params.scale, differentiable=False,
            deterministic=True, licence="of the reward behind the server",
        )  # fmt: skip

    def __init__(self, params: RemoteParams) -> None:
        self.params, self.spec = params, self.spec_for(params)
        self.asker = Asker(
            params.url,
            params.token_env,
            Patience(params.connect_s, params.deadline_s, params.attempts, params.backoff_s),
        )
        self.spec = self._agreed(self._served())

    def _served(self) -> dict:
        """The server's own words about the reward. ValueError if it cannot be asked or has no such reward."""
        try:
            answer = self.asker.ask("v1/spec", None, time.monotonic() + min(10.0, self.params.deadline_s))
        except AskError as error:
            hint = f"the token is read from ${self.params.token_env}" if " 401" in str(error) else "is it running?"
            raise ValueError(f"reward server {self.params.url}: {error}; {hint}") from error
        served = answer.get("rewards")
        if not isinstance(served, dict) or not isinstance(served.get(self.params.reward), dict):
            known = ", ".join(served) if isinstance(served, dict) else "nothing that can be read"
            raise ValueError(f"reward server {self.params.url} has no reward {self.params.reward!r}; it has {known}")
        return served[self.params.reward]

    def _agreed(self, served: dict) -> RewardSpec:
        """The declared spec with the server's version and range. ValueError where they disagree."""
        for name, declared in (
            ("higher_is_better", self.spec.higher_is_better),
            ("block", self.spec.block),
            ("needs", sorted(self.spec.needs)),
        ):
            told = served.get(name)
            told = sorted({"lq", *told}) if name == "needs" and isinstance(told, list) else told
            if told != declared:
                raise ValueError(
                    f"reward {self.params.reward!r} at {self.params.url} has {name} {told}, the config says {declared}: "
                    f"set params.{name}"
                )
        low, high = served.get("range") or (None, None)
        return replace(self.spec, version=str(served.get("version")), range=(low, high))

    def score(self, items: Sequence[Restoration]) -> Scores:
        until = time.monotonic() + self.params.deadline_s
        rows = [Scores.failed(1, missing_data(item, self.spec.needs)) for item in items]
        good = [i for i, row in enumerate(rows) if not row.reason_N[0]]
        size = self.params.batch_size
        batches = [good[start : start + size] for start in range(0, len(good), size)]
        with ThreadPoolExecutor(max_workers=self.params.concurrency) as pool:
            answers = list(pool.map(lambda index: self._ask([items[i] for i in index], until), batches))
        for index, answer in zip(batches, answers, strict=True):
            for place, i in enumerate(index):
                rows[i] = Scores(
                    answer.value_N[place : place + 1], answer.valid_N[place : place + 1], (answer.reason_N[place],)
                )
        return Scores.cat(rows)

    def _ask(self, items: Sequence[Restoration], until: float) -> Scores:
        keys = [str(i) for i in range(len(items))]
        body = {
            "reward": self.params.reward,
            "items": [encode_item(item, key, self.spec.needs) for item, key in zip(items, keys, strict=True)],
        }
        try:
            answer = self.asker.ask("v1/score", body, until)
            if answer.get("version") != self.spec.version:
                raise AskError(
                    f"infra: the server now has version {answer.get('version')} of the reward, the run began with "
                    f"{self.spec.version}"
                )
            return decode_rows(answer, keys, self.spec.range)
        except AskError as error:
            return Scores.failed(len(items), str(error)[:400])
        except ValueError as error:
            return Scores.failed(len(items), f"parse: {error}")
