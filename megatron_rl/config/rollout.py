"""Settings of sampling and of the engines that sample."""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import urlsplit

from megatron_rl.config.choices import (
    ENVIRONMENTS,
    DType,
    HandOut,
    LateGroups,
    Placement,
    QuantizationFormat,
    QuantizationStrategy,
    TopKTies,
)
from megatron_rl.config.rules import (
    above_zero,
    at_least,
    is_import_path,
    literal_choices,
    one_of,
    require,
)

# Settings of sampling that training refuses, with the value that turns each off.
_EVALUATION_ONLY = {
    "min_tokens": 0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
# Options of vLLM's server that the run sets itself.
_OF_THE_RUN = ("--host", "--port", "--uds")


def _is_address(url: str) -> bool:
    """Whether a URL names a scheme, a host and no impossible port."""
    try:
        parts = urlsplit(url)
        has_port = parts.port is None or parts.port > 0  # ValueError if it is none
    except ValueError:
        return False
    is_known = parts.scheme in ("http", "https") and bool(parts.hostname)
    return is_known and has_port and not any(each.isspace() for each in url)


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How a response is sampled."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    max_tokens: int = 256
    # texts that end a response. They are part of it, and so is the rest of a token that goes beyond
    # one: the text of a response is always that of its tokens
    stop: list[str] = field(default_factory=list)
    # tokens that end a response, besides the model's own; as those, they are part of its tokens and
    # not of the text that is judged
    stop_token_ids: list[int] = field(default_factory=list)
    # The rest is for evaluation only (rollout.sampling refuses it): it changes the distribution
    # that tokens are drawn from in a way that the learner's log-probs cannot follow.
    min_tokens: int = 0  # tokens before a response may end
    # divides the positive logits of tokens that prompt or response have, and multiplies the
    # negative ones; 1: off
    repetition_penalty: float = 1.0
    # subtracted from the logits of tokens that the response has, once or as often as it has them
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    @property
    def is_truncated(self) -> bool:
        """Whether tokens of low probability are left out."""
        return (self.top_p, self.top_k, self.min_p) != (1, 0, 0)

    @property
    def truncation_text(self) -> str:
        """The settings behind `is_truncated`, for messages."""
        return f"top_p={self.top_p:g}, top_k={self.top_k}, min_p={self.min_p:g}"

    def __post_init__(self) -> None:
        above_zero(temperature=self.temperature, repetition_penalty=self.repetition_penalty)
        at_least(1, max_tokens=self.max_tokens)
        require(
            0 <= self.min_tokens <= self.max_tokens,
            f"min_tokens: expected 0 to max_tokens={self.max_tokens}, got {self.min_tokens}",
        )
        require(all(self.stop), f"stop: expected texts that are not empty, got {self.stop}")
        require(
            all(token >= 0 for token in self.stop_token_ids),
            f"stop_token_ids: expected ids of 0 or more, got {self.stop_token_ids}",
        )
        for key in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, key)
            require(-2 <= value <= 2, f"{key}: expected in [-2, 2], as vLLM does, got {value:g}")
        require(0 < self.top_p <= 1, f"top_p: expected in (0, 1], got {self.top_p:g}")
        require(self.top_k >= 0, f"top_k: expected 0 (off) or more, got {self.top_k}")
        require(0 <= self.min_p < 1, f"min_p: expected in [0, 1), got {self.min_p:g}")


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """The format to which the learner's weights are rounded at every sync, before they are sent."""

    # none; int8, fp8, int4: only the weights, sent in rollout.dtype; int8_w8a8: activations too
    format: QuantizationFormat = "none"
    # one scale per output channel, per group of group_size inputs, or per block of 128 x 128
    strategy: QuantizationStrategy = "channel"
    group_size: int = 128

    def __post_init__(self) -> None:
        literal_choices(self)
        at_least(1, group_size=self.group_size)
        require(
            self.format != "int8_w8a8" or self.strategy == "channel",
            f"strategy: expected channel with format=int8_w8a8, got {self.strategy}",
        )


@dataclass(frozen=True, kw_only=True)
class EnvironmentConfig:
    """What produces the rollouts of a prompt: one response, or an episode of several turns."""

    # single_turn; a module of rollout/tools/; or a user's "package.module:function"
    name: str = "single_turn"
    max_turns: int = 4  # of the policy, in an episode
    tool_seconds: float = 5.0  # for each answer of the tool; then its episode ends as a timeout
    episode_seconds: float = 0.0  # for an episode with its sampling; 0: no limit
    num_workers: int = 2  # processes that run the tool, of each replica

    def __post_init__(self) -> None:
        if not is_import_path(self.name):
            one_of("name", self.name, ENVIRONMENTS)
        at_least(1, max_turns=self.max_turns, num_workers=self.num_workers)
        at_least(0, episode_seconds=self.episode_seconds)
        above_zero(tool_seconds=self.tool_seconds)


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """The engines, which the run starts or which are already running."""

    num_engines: int = (
        1  # servers that the run starts, or waits for (placement=nodes); 0 with `urls`
    )
    # share: GPUs of the learner's nodes without a rank; colocated: GPUs with ranks, and engines
    # sleep while the learner works; auto: share if there are enough, else GPUs with ranks, without
    # sleep; nodes: engines that megatron_rl.serve starts with this run_dir on nodes of their own
    placement: Placement = "auto"
    tensor_parallel: int = 1  # GPUs of each engine; on CPUs, processes with cores of their own
    # interface, or its address, on which engines of this node listen; "": loopback if all of the
    # run is on one node, otherwise the interface by which the first node is reached
    host: str = ""
    # servers that are running already; their token comes from MEGATRON_RL_TOKEN
    urls: list[str] = field(default_factory=list)
    dtype: DType = "bfloat16"  # of the engine
    kv_cache_dtype: str = "auto"  # auto (the engine's dtype), fp8
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    max_model_len: int = 0  # 0: the model's own context
    max_num_seqs: int = 256
    keep_steps: int = 200  # steps whose rollouts stay in run_dir/rollouts; 0: all
    kv_cache_gib: float = 1.0  # CPU engines: memory for the KV cache
    gpu_memory_utilization: float = 0.8  # CUDA engines
    num_threads: int = 0  # CPU engines: OpenMP threads; 0: vLLM decides
    port: int = 0  # first port of the servers that the run starts; 0: free ones
    startup_timeout_seconds: float = 300.0
    request_timeout_seconds: float = 300.0
    # an engine that answers no health check for so long, beside requests, counts as frozen
    health_timeout_seconds: float = 8.0
    # the run goes on without engines that died, froze or answered garbage, as long as so many
    # serve; with fewer it waits for those that it starts again, or ends with what became of them
    min_engines: int = 1
    max_restarts: int = 5  # of each engine that the run starts; 0: an engine that is lost stays so
    max_retries: int = 3
    max_in_flight: int = 64  # requests, per engine
    # 0: a step samples its rollouts before it trains on them. k: the engines sample ahead while the
    # learner trains, and no token that a step trains on was sampled by weights more than k
    # publications older than the learner's (docs/asynchronous.md)
    max_policy_age: int = 0
    # with max_policy_age above 0: a step takes the groups whose prompts come first, or those that
    # are finished first
    hand_out: HandOut = "in_order"
    # with hand_out=finished, a group that is too old for the step after this one and not finished
    # yet: the step waits for it, or it is dropped as soon as the step has enough others
    late_groups: LateGroups = "wait"
    # with max_policy_age above 0: a longer response is sampled by several requests of at most so
    # many tokens, so that an update waits for one of them and not for the response; 0: by one
    tokens_per_request: int = 0
    # the same by time: of as many tokens as the engines sample in so many seconds; 0: any time
    seconds_per_request: float = 0.0
    # how many of several equal logits at rank top_k the engine keeps. all: all of them (vLLM's
    # torch path); exact: only enough for exactly k (its Triton path); auto: all on a CPU, exact on
    # CUDA
    top_k_ties: TopKTies = "auto"
    extra_args: list[str] = field(default_factory=list)  # appended to the server's command line
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)

    def __post_init__(self) -> None:
        require(
            bool(self.urls) != (self.num_engines > 0) and self.num_engines >= 0,
            "num_engines: expected 1 or more and no urls, or 0 with urls of running servers, "
            f"got num_engines={self.num_engines} and {len(self.urls)} urls",
        )
        num_engines = self.num_engines or len(self.urls)
        require(
            self.min_engines <= num_engines,
            f"min_engines: expected at most {num_engines}, all engines, got {self.min_engines}",
        )
        literal_choices(self)
        require(
            self.placement != "colocated" or self.max_policy_age == 0,
            "placement: expected share, auto or nodes with max_policy_age="
            f"{self.max_policy_age}, since colocated engines sleep while the learner works and "
            "samples are taken ahead then, got colocated",
        )
        require(
            self.quantization.format != "int8_w8a8" or self.dtype == "bfloat16",
            f"dtype: expected bfloat16 with quantization.format=int8_w8a8, got {self.dtype}",
        )
        at_least(
            0,
            max_model_len=self.max_model_len,
            num_threads=self.num_threads,
            max_retries=self.max_retries,
            max_restarts=self.max_restarts,
            keep_steps=self.keep_steps,
            max_policy_age=self.max_policy_age,
            tokens_per_request=self.tokens_per_request,
            seconds_per_request=self.seconds_per_request,
        )
        at_least(
            1,
            max_num_seqs=self.max_num_seqs,
            max_in_flight=self.max_in_flight,
            tensor_parallel=self.tensor_parallel,
            min_engines=self.min_engines,
        )
        above_zero(
            kv_cache_gib=self.kv_cache_gib,
            startup_timeout_seconds=self.startup_timeout_seconds,
            request_timeout_seconds=self.request_timeout_seconds,
            health_timeout_seconds=self.health_timeout_seconds,
        )
        require(
            0 < self.gpu_memory_utilization <= 1,
            f"gpu_memory_utilization: expected in (0, 1], got {self.gpu_memory_utilization:g}",
        )
        require(
            self.port == 0 or 1024 <= self.port <= 65536 - self.num_engines,
            "port: expected 0 (free ones) or a first port from 1024 that leaves room for "
            f"{self.num_engines} below 65536, got {self.port}",
        )
        require(
            self.max_model_len == 0 or self.sampling.max_tokens < self.max_model_len,
            f"sampling.max_tokens: expected below max_model_len={self.max_model_len}, "
            f"got {self.sampling.max_tokens}",
        )
        self._check_listening()
        self._check_ahead()
        for key, neutral in _EVALUATION_ONLY.items():
            value = getattr(self.sampling, key)
            require(
                value == neutral,
                f"sampling.{key}: expected {neutral:g} in training, got {value:g}: it changes the "
                "distribution that tokens are drawn from, which the learner's log-probs cannot "
                "follow; evaluation may use it (eval.sampling)",
            )
        require(
            self.sampling.top_k != 1,
            "sampling.top_k: expected 0 (off) or at least 2 in training, got 1, which leaves one "
            "token, of log-prob 0 whatever the weights are; evaluation may be greedy "
            "(eval.sampling)",
        )

    def _check_listening(self) -> None:
        """The run must know where its engines listen."""
        for index, url in enumerate(self.urls):
            require(
                _is_address(url),
                f"urls[{index}]: expected an address such as http://10.0.0.2:40001, got {url!r}",
            )
        for option in (each.partition("=")[0] for each in self.extra_args):
            require(
                option not in _OF_THE_RUN,
                f"extra_args: expected no {option}, since the run must know where its engines "
                "listen, and nothing may listen elsewhere; set rollout.host or rollout.port",
            )

    def _check_ahead(self) -> None:
        """The rules of sampling ahead."""
        require(
            self.late_groups == "wait" or self.hand_out == "finished",
            "late_groups: expected wait with hand_out=in_order, where a step waits for its own "
            f"groups, got {self.late_groups}",
        )
        for key in ("tokens_per_request", "seconds_per_request"):
            value = getattr(self, key)
            require(
                value == 0 or (self.max_policy_age > 0 and not self.sampling.stop),
                f"{key}: expected 0 unless max_policy_age is above 0 and sampling.stop is empty (a "
                f"stop text may begin in one request and end in the next), got {value:g}",
            )
