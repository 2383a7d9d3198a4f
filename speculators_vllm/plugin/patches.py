"""Everything that changes vLLM, in one place.

Each patch names the function it wraps and the parameters it relies on. Where vLLM's signature is
another, the patch steps aside with a warning and vLLM behaves as it does alone.
"""

import functools
import inspect
import logging
import sys
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)

MARK = "_speculators_vllm"
REGISTRY = "vllm.model_executor.models.registry"
TESTED = ((0, 32), (0, 33))
"""First and last minor version of vLLM that this was made for."""


def apply() -> None:
    """Registers networks and wraps vLLM's functions, once a process.

    A process that builds networks has imported vLLM's model registry before it loads plug-ins; one
    that builds an engine's config has imported `vllm.engine.arg_utils`, and looks networks up. In
    any other there is nothing to do, and nothing is imported for it.
    """
    arg_utils = sys.modules.get("vllm.engine.arg_utils")
    if arg_utils is not None or REGISTRY in sys.modules:
        _register_networks()
        _mend_sampling_on_cpus()
    if arg_utils is None:
        return
    warn_of_untested_version()
    _read_drafts_by_our_config()
    # vLLM 0.32, 0.33: builds the speculative settings from the user's --speculative-config.
    _wrap(
        arg_utils.EngineArgs,
        "create_speculative_config",
        ["self", "target_model_config", "target_parallel_config"],
        _completing_speculative_config,
    )
    # vLLM 0.32 takes a relative verifier from the working directory. 0.33 refuses local verifiers
    # of a speculator on purpose, and there the refusal comes before this wrapper's change.
    _wrap(
        arg_utils,
        "maybe_override_with_speculators",
        [
            "model",
            "tokenizer",
            "trust_remote_code",
            "revision",
            "vllm_speculative_config",
            "hf_token",
            "kwargs",
        ],
        _locating_verifier,
    )


@functools.cache
def _register_networks() -> None:
    """Tells vLLM's model registry, by name alone, of the networks that proposers bring."""
    from vllm.model_executor.models.registry import ModelRegistry

    from speculators_vllm.plugin.proposers import PROPOSERS

    for name in PROPOSERS.names():
        try:
            networks = PROPOSERS.load(name).networks
        except Exception:  # another package's fault must not stop ours
            logger.warning("speculators-vllm left out the proposer %s", name, exc_info=True)
            continue
        for architecture, path in networks.items():
            ModelRegistry.register_model(architecture, path)


def _mend_sampling_on_cpus() -> None:
    """vLLM 0.32: a worker calls this method of its platform right after it has loaded plug-ins."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        _wrap(type(current_platform), "register_triton_kernel_overrides", [], _mending_sampling)


def _mending_sampling(original: Callable) -> Callable:
    def register_triton_kernel_overrides() -> None:
        try:
            _mend_samplers()
        except ImportError as error:
            logger.warning("speculators-vllm left vLLM's sampling on CPUs alone: %s", error)
        original()

    return register_triton_kernel_overrides


def _mend_samplers() -> None:
    from vllm.utils import cpu_triton_utils
    from vllm.v1.sample import rejection_sampler
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from speculators_vllm.plugin import cpu_sampling

    # vLLM 0.32: spreads the settings of a request over its drafted tokens.
    _wrap(
        cpu_triton_utils,
        "_expand_kernel_impl",
        cpu_sampling.EXPAND_PARAMETERS,
        cpu_sampling.expanding,
    )
    # vLLM 0.32: temperature, top-k and top-p of drafted tokens.
    _wrap(
        rejection_sampler,
        "apply_sampling_constraints",
        ["logits", "cu_num_draft_tokens", "sampling_metadata"],
        cpu_sampling.constraining,
    )
    # vLLM 0.32: samples, and throws samples away; of every runner, the CPU's too.
    puts_back = _wrap(
        GPUModelRunner,
        "_sample",
        ["self", "logits", "spec_decode_metadata"],
        cpu_sampling.putting_generators_back,
    )
    if not puts_back:
        return
    _wrap(
        GPUModelRunner,
        "_bookkeeping_sync",
        [
            "self",
            "scheduler_output",
            "sampler_output",
            "logits",
            "hidden_states",
            "num_scheduled_tokens",
        ],
        cpu_sampling.hiding_generators,
    )


def _read_drafts_by_our_config() -> None:
    """vLLM 0.32, 0.33: the table of config classes by model type; its own cannot read MTP."""
    from vllm.transformers_utils import config

    from speculators_vllm.plugin.draft_config import DraftConfig

    registry = getattr(config, "_CONFIG_REGISTRY", None)
    if not isinstance(registry, dict) or "speculators" not in registry:
        logger.warning("speculators-vllm found no vLLM config class for speculators to replace")
        return
    registry["speculators"] = DraftConfig


def _wrap(
    owner: Any, name: str, parameters: list[str], wrapper: Callable[[Callable], Callable]
) -> bool:
    """Puts ``wrapper(original)`` in place, and says whether it stands there.

    ``...`` as the last parameter stands for any others.
    """
    original = getattr(owner, name, None)
    if getattr(original, MARK, False):
        return True
    found = list(inspect.signature(original).parameters) if original is not None else None
    relied_on = parameters[:-1] if parameters[-1:] == ["..."] else parameters
    compared = (found or [])[: len(relied_on)] if relied_on is not parameters else found
    if original is None or compared != relied_on:
        logger.warning(
            "speculators-vllm left vLLM's %s.%s alone: its parameters are %s, expected %s",
            owner.__name__,
            name,
            found,
            parameters,
        )
        return False
    wrapped = functools.wraps(original)(wrapper(original))
    setattr(wrapped, MARK, True)
    is_method = inspect.ismethod(original)  # of the class itself: it is bound already
    setattr(owner, name, staticmethod(wrapped) if is_method else wrapped)
    return True


def _completing_speculative_config(original: Callable) -> Callable:
    def create_speculative_config(
        self: Any, target_model_config: Any, target_parallel_config: Any
    ) -> Any:
        _refuse_malformed_requests(self.kv_transfer_config)
        if self.speculative_config is not None or self.spec_model is not None:
            from speculators_vllm.plugin.speculative_config import Source, complete

            by_flag = {
                "method": self.spec_method,
                "model": self.spec_model,
                "num_speculative_tokens": self.spec_tokens,
            }
            self.speculative_config = complete(
                self.speculative_config or {},
                {key: value for key, value in by_flag.items() if value is not None},
                target_model_config.hf_config,
                target_model_config.model,
                Source(
                    token=self.hf_token,
                    cache_dir=self.download_dir,
                    tokenizer=target_model_config.tokenizer,
                    has_weights=self.load_format != "dummy",
                ),
            )
        return original(self, target_model_config, target_parallel_config)

    return create_speculative_config


def _refuse_malformed_requests(kv_transfer: Any) -> None:
    """Where hidden states are handed out, a server answers to malformed options with HTTP 400."""
    from speculators_vllm.hidden_states import CONNECTOR_MODULE

    if getattr(kv_transfer, "kv_connector_module_path", None) != CONNECTOR_MODULE:
        return
    from vllm.v1.engine.async_llm import AsyncLLM

    # vLLM 0.32, 0.33: takes a server's requests; `LLM` has another, and answers in the output.
    _wrap(AsyncLLM, "add_request", ["self", "request_id", "prompt", "params", "..."], _checking)


def _checking(original: Callable) -> Callable:
    async def add_request(
        self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        from vllm import SamplingParams
        from vllm.exceptions import VLLMValidationError

        from speculators_core.errors import SpeculatorError
        from speculators_vllm.hidden_states import CONNECTOR_MODULE
        from speculators_vllm.hidden_states.settings import read_request, read_sink

        kv_transfer = self.vllm_config.kv_transfer_config
        is_ours = getattr(kv_transfer, "kv_connector_module_path", None) == CONNECTOR_MODULE
        if is_ours and isinstance(params, SamplingParams):
            try:
                read_request(params, read_sink(kv_transfer.kv_connector_extra_config))
            except SpeculatorError as error:
                raise VLLMValidationError(str(error), parameter="kv_transfer_params") from error
        return await original(self, request_id, prompt, params, *args, **kwargs)

    return add_request


@functools.cache
def warn_of_untested_version() -> None:
    """One warning a process where vLLM is older or newer than what was tested."""
    from vllm.version import __version_tuple__

    found = tuple(__version_tuple__[:2])
    if not TESTED[0] <= found <= TESTED[1]:
        first, last = ("{}.{}".format(*version) for version in TESTED)
        logger.warning(
            "speculators-vllm was tested with vLLM %s to %s; found %s.%s", first, last, *found
        )


def _locating_verifier(original: Callable) -> Callable:
    def maybe_override_with_speculators(model: str, *args: Any, **kwargs: Any) -> Any:
        verifier, tokenizer, speculative_config = original(model, *args, **kwargs)
        if verifier == model:
            return verifier, tokenizer, speculative_config
        from speculators_vllm.plugin.speculative_config import locate

        located, settings = locate(model, verifier, kwargs.get("revision"), kwargs.get("hf_token"))
        user = kwargs.get("vllm_speculative_config") or {}
        method = {"method": settings["method"]}  # not the user's to choose
        return located, kwargs.get("tokenizer") or located, {**settings, **user, **method}

    return maybe_override_with_speculators
