"""`rlrestore judge serve`: a trained judge, or the rewards of a YAML file, as an HTTP service."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Mapping
from pathlib import Path

from rewards.base import Reward
from rewards.registry import build_reward
from rewards.remote.server import LOOPBACK, ServeLimits, Service, serve
from rewards.rubric import TermConfig
from rlrestore.config.files import read_yaml, reward_terms, user_errors
from rlrestore.errors import InputError
from rlrestore.quiet import quiet

SHORTEST_TOKEN = 16  # characters


def run_judge_serve(
    source: Path, host: str, port: int, token_env: str, allow_host: list[str], limits: Mapping[str, int]
) -> None:
    """Serve until Ctrl-C. InputError for what the user has to mend."""
    quiet()
    terms = served_terms(source)
    for name, value in limits.items():
        if value < 1:
            raise InputError(f"--{name.replace('_', '-')} is {value}; it is at least 1")
    token, made = server_token(host, token_env)
    hosts = allowed_hosts(host, allow_host)
    check_port(host, port)
    rewards = {name: build_served(name, term) for name, term in terms.items()}
    for name, reward in rewards.items():
        print(f"{name:<24} {reward.spec.version}, {'higher' if reward.spec.higher_is_better else 'lower'} is better")
    if made:
        print(f"export {token_env}={token}    # for the clients; made for this start")
    print(f"listening on http://{host}:{port}", flush=True)
    serve(Service(rewards, ServeLimits(**limits)), host, port, token, hosts)


def served_terms(source: Path) -> dict[str, TermConfig]:
    """The terms to serve by name. InputError or ConfigError if `source` is neither a judge nor a file with rewards."""
    if source.is_dir():
        if (source / "heads.safetensors").is_file():
            kinds = {"ll_score": "checkpoint", "ll_score_hallucination": "checkpoint"}
        elif (source / "model.safetensors").is_file():
            kinds = {"judge": "weights", "judge_hallucination": "weights"}
        else:
            raise InputError(
                f"{source} holds no judge; give a folder that `rlrestore judge train` wrote, or a YAML file"
            )
        return reward_terms({kind: {"params": {key: str(source)}} for kind, key in kinds.items()}, str(source))
    data = read_yaml(source)
    if not data.get("rewards"):
        raise InputError(f"{source} has no rewards; write e.g. rewards: {{nss: {{}}}}")
    return reward_terms(data["rewards"], f"{source}: rewards")


def build_served(name: str, term: TermConfig) -> Reward:
    return user_errors(lambda: build_reward(term.kind, term.params), f"rewards.{name}")


def server_token(host: str, token_env: str) -> tuple[str, bool]:
    """(token, whether it was made here). InputError if it is missing or too short to be one."""
    token = os.environ.get(token_env, "")
    if not token and host in LOOPBACK:
        return secrets.token_urlsafe(24), True
    if len(token) < SHORTEST_TOKEN:
        what = "is not set" if not token else f"has {len(token)} characters, wanted at least {SHORTEST_TOKEN}"
        raise InputError(
            f"--host {host}: {token_env} {what}. Run: export {token_env}=$(openssl rand -hex 24), here and for the clients"
        )
    return token, False


def allowed_hosts(host: str, allow_host: list[str]) -> list[str]:
    """Values of the Host header that are answered: a page in somebody's browser must not reach a local server."""
    if host in LOOPBACK:
        return [*LOOPBACK, *allow_host]
    named = [] if host in ("0.0.0.0", "::") else [host]
    return [*LOOPBACK, *named, socket.gethostname(), socket.getfqdn(), *allow_host]


def check_port(host: str, port: int) -> None:
    """InputError if nobody can listen there; said before a judge is loaded."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except (OSError, OverflowError) as error:
        raise InputError(f"cannot listen on {host}:{port}: {error}; choose another --port or --host") from error
