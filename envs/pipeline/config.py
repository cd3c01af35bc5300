"""What a build config may say; `rlrestore data build` reads it from YAML. Bounds are starting points, not findings."""

from __future__ import annotations

from dataclasses import dataclass, field

APIS = ("gemini", "openai")


@dataclass
class BuildSection:
    name: str
    source: str  # LQ photos: anything that `envs.index` reads
    root: str | None = None  # of a manifest
    dir: str = "builds"
    licence: str = ""  # of photos whose row has none; a photo without a licence is not published
    min_side: int = 256  # px
    long_edge: int = 1024  # px; larger photos are downscaled before anything else
    concurrency: int = 4  # photos under way at once
    reviewed: str = "uncertain"  # none | uncertain (the judge's votes disagree) | all
    seed: int = 0


@dataclass
class ApiSection:
    """A server that speaks OpenAI's or Gemini's HTTP API."""

    kind: str = "openai"  # openai | gemini
    url: str = ""  # e.g. https://api.openai.com/v1, https://generativelanguage.googleapis.com/v1beta
    model: str = ""
    api_key_env: str = ""  # name of the environment variable that holds the key; the key itself is never stored
    requests_per_minute: float = 60.0
    timeout_s: float = 120.0
    retries: int = 4  # after 429, 5xx and time-outs
    price_request: float = 0.0  # in the currency of budget.cost
    price_in: float = 0.0  # a million tokens
    price_out: float = 0.0


@dataclass
class GenerateSection(ApiSection):
    # openai: POST {url}/images/edits | gemini: POST {url}/models/{model}:generateContent | local: a restorer of ours, no network
    # ncnn: a packaged restorer (`envs.pipeline.ncnn_models`), no network
    checkpoint: str | None = (
        None  # of `local`: as for `rlrestore restore --checkpoint`; of `ncnn`: path without .param and .bin
    )
    downscale: int = 1  # of `ncnn`: the network gets the photo at 1/downscale of its size
    image_size: str = ""  # of `gemini`: 1K, 2K or 4K, for models that know it
    rounds: int = 1  # times a candidate is asked for again with the judge's objections, always from the original LQ
    max_aspect_change: float = 0.02


@dataclass
class AssessSection(ApiSection):
    """`kind`: openai or gemini write an adaptive prompt a photo; fixed: the fixed prompt of the photo's type."""


@dataclass
class JudgeSection(ApiSection):
    """`kind`: openai | gemini | none (the metric filter alone decides)."""

    votes: int = 2
    min_d: float = 60.0  # degradation removed
    min_f: float = 80.0  # faithful
    disagreement: float = 20.0  # of two votes: to a person


@dataclass
class FilterSection:
    """Bounds of `envs.pipeline.filters`; null turns a check off."""

    no_op: float | None = 0.97  # grey SSIM at 192 px above it: nothing was done
    shift: float | None = 0.005  # of the width
    border: float | None = 0.01  # of a side
    chroma: float | None = 0.02  # drift, for types whose colour must stay
    lowfreq: float | None = 0.10  # mean absolute difference of blurred luminance, likewise
    clip: float | None = 0.03  # more saturated pixels than the LQ has
    crispness: float | None = 0.2  # energy of detail of 1 to 3 px over that of 4 to 12 px, of the result alone
    softening: float | None = 1.08  # detail of 4 to 8 px of the LQ over that of the result; 1: as sharp as the LQ
    structure: float | None = 0.4  # correlation with the LQ's structure, of the median block: another scene has none
    added: float | None = 3.1  # the place of the result that the LQ explains worst, over the worst tenth of the picture
    lost: float | None = (
        3.0  # the place of the LQ that the result explains worst, likewise; not of rain, snow, scratches
    )


@dataclass
class BudgetSection:
    cost: float | None = None
    requests: int | None = None
    seconds: float | None = None


@dataclass
class BuildConfig:
    build: BuildSection
    assess: AssessSection = field(default_factory=AssessSection)
    generate: GenerateSection = field(default_factory=GenerateSection)
    filter: FilterSection = field(default_factory=FilterSection)
    judge: JudgeSection = field(default_factory=JudgeSection)
    budget: BudgetSection = field(default_factory=BudgetSection)


def check_build_config(config: BuildConfig) -> None:
    """ValueError, naming key and remedy, for what cannot work."""
    for key, value, choices in (
        ("generate.kind", config.generate.kind, (*APIS, "local", "ncnn")),
        ("assess.kind", config.assess.kind, (*APIS, "fixed")),
        ("judge.kind", config.judge.kind, (*APIS, "none")),
        ("build.reviewed", config.build.reviewed, ("none", "uncertain", "all")),
    ):
        if value not in choices:
            raise ValueError(f"{key}={value} is unknown: choose one of {', '.join(choices)}")
    sections = {"assess": config.assess, "generate": config.generate, "judge": config.judge}
    for name, section in sections.items():
        if section.kind in APIS and not (section.url.startswith(("http://", "https://")) and section.model):
            raise ValueError(f"{name}.url={section.url!r} and {name}.model={section.model!r}: both are needed, e.g. "
                             "https://host/v1")  # fmt: skip
        if section.requests_per_minute <= 0 or section.timeout_s <= 0 or section.retries < 0:
            raise ValueError(f"{name}: requests_per_minute and timeout_s must be positive, retries 0 or more")
    if config.generate.kind == "ncnn" and (not config.generate.checkpoint or config.generate.downscale < 1):
        raise ValueError(
            "generate.kind=ncnn needs generate.checkpoint=PATH (without .param) and a downscale of at least 1"
        )
    if config.build.concurrency < 1 or config.judge.votes < 1 or config.generate.rounds < 0:
        raise ValueError("build.concurrency and judge.votes must be at least 1, generate.rounds 0 or more")
