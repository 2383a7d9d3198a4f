"""The list of all patches of vLLM.

A patch wraps one function of vLLM and states the parameters it relies on. Where the parameters are
different the patch is skipped with a warning, and vLLM behaves as it does without this package.
"""

import functools
import inspect
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pkgutil import resolve_name

logger = logging.getLogger(__name__)

TESTED = ((0, 32), (0, 33))
"""First and last minor version of vLLM that the patches were written for."""
MARK = "_speculators_vllm"
"""Attribute of a function that is wrapped already."""


@dataclass(frozen=True)
class Patch:
    """One function of vLLM, and the wrapper that takes its place.

    Both are named as ``module:object``, so that the list below imports neither.
    """

    owner: str
    """Module or class that holds the function."""
    name: str
    parameters: tuple[str, ...]
    """Expected parameters of the function; a last ``...`` stands for any others."""
    wrapper: str
    """Called with the original function, returns its replacement."""

    def fits(self) -> bool:
        """Whether the function is there with these parameters; a warning says so where not."""
        try:
            original = getattr(resolve_name(self.owner), self.name, None)
        except (ImportError, AttributeError) as error:
            return self._skip(str(error))
        if original is None:
            return self._skip("it does not exist")
        found = tuple(inspect.signature(original).parameters)
        if not getattr(original, MARK, False) and not self._expects(found):
            return self._skip(f"its parameters are {found}, expected {self.parameters}")
        return True

    def apply(self) -> bool:
        """Puts the wrapper in place, and returns whether it is there.

        A function that is missing or has other parameters is left alone, with a warning.
        """
        if not self.fits():
            return False
        owner = resolve_name(self.owner)
        original = getattr(owner, self.name)
        if getattr(original, MARK, False):
            return True
        wrapped = functools.wraps(original)(resolve_name(self.wrapper)(original))
        setattr(wrapped, MARK, True)
        is_method = inspect.ismethod(original)  # of the class itself: it is bound already
        setattr(owner, self.name, staticmethod(wrapped) if is_method else wrapped)
        return True

    def _expects(self, found: tuple[str, ...]) -> bool:
        if self.parameters[-1:] == ("...",):
            return found[: len(self.parameters) - 1] == self.parameters[:-1]
        return found == self.parameters

    def _skip(self, reason: str) -> bool:
        logger.warning(
            "speculators-vllm did not patch vLLM's %s.%s: %s", self.owner, self.name, reason
        )
        return False


ENGINE_ARGUMENTS = "vllm.engine.arg_utils"
MODEL_REGISTRY = "vllm.model_executor.models.registry"

FOR_ENGINE_ARGUMENTS = (
    # vLLM 0.32, 0.33: builds the speculative settings from the user's --speculative-config.
    Patch(
        owner=f"{ENGINE_ARGUMENTS}:EngineArgs",
        name="create_speculative_config",
        parameters=("self", "target_model_config", "target_parallel_config"),
        wrapper="speculators_vllm.plugin.engine_arguments:completing_speculative_config",
    ),
    # vLLM 0.32 takes a relative verifier from the working directory. 0.33 refuses local verifiers
    # of a speculator on purpose, and the refusal comes before this wrapper has an effect.
    Patch(
        owner=ENGINE_ARGUMENTS,
        name="maybe_override_with_speculators",
        parameters=(
            "model",
            "tokenizer",
            "trust_remote_code",
            "revision",
            "vllm_speculative_config",
            "hf_token",
            "kwargs",
        ),
        wrapper="speculators_vllm.plugin.engine_arguments:locating_verifier",
    ),
)
"""In a process that builds the config of an engine."""

FOR_SERVER_REQUESTS = (
    # vLLM 0.32, 0.33: takes a server's requests; `LLM` has another, and answers in the output.
    Patch(
        owner="vllm.v1.engine.async_llm:AsyncLLM",
        name="add_request",
        parameters=("self", "request_id", "prompt", "params", "..."),
        wrapper="speculators_vllm.plugin.server_requests:checking",
    ),
)
"""Where an engine hands out hidden states."""

FOR_WEIGHTS = (
    # vLLM 0.32, 0.33: all tensors of a checkpoint, of the verifier's and of the draft's.
    Patch(
        owner="vllm.model_executor.model_loader.default_loader:DefaultModelLoader",
        name="_get_weights_iterator",
        parameters=("self", "source"),
        wrapper="speculators_vllm.plugin.leftovers:skipping",
    ),
)
"""Where networks are built."""

PROPOSER = "vllm.v1.spec_decode.llm_base_proposer:SpecDecodeBaseProposer"
THINKING = "vllm.v1.sample.thinking_budget_state:ThinkingBudgetStateHolder"

FOR_V1_RUNNERS = (
    # vLLM 0.32: embeddings and head of the verifier, which may have LoRA adapters.
    Patch(
        owner=PROPOSER,
        name="_maybe_share_embeddings",
        parameters=("self", "target_language_model"),
        wrapper="speculators_vllm.plugin.proposing:sharing_without_adapters",
    ),
    Patch(
        owner=PROPOSER,
        name="_maybe_share_lm_head",
        parameters=("self", "target_language_model"),
        wrapper="speculators_vllm.plugin.proposing:sharing_without_adapters",
    ),
    # vLLM 0.32: a token of a request, for the draft.
    Patch(
        owner="vllm.v1.worker.gpu_input_batch:CachedRequestState",
        name="get_token_id",
        parameters=("self", "idx"),
        wrapper="speculators_vllm.plugin.proposing:naming_unknown_tokens",
    ),
)
"""Where networks are built; each stands alone."""

FOR_THINKING_BUDGETS = (
    # vLLM 0.32: moves the states by a step's tokens; the second relies on its notes.
    Patch(
        owner=THINKING,
        name="update_state",
        parameters=("self", "output_token_ids", "spec_token_ids", "repeat_indices"),
        wrapper="speculators_vllm.plugin.thinking_budgets:updating",
    ),
    Patch(
        owner=THINKING,
        name="_apply_forcing_to_logits",
        parameters=("self", "logits", "predict_bonus_token", "spec_token_ids_for_layout"),
        wrapper="speculators_vllm.plugin.thinking_budgets:applying",
    ),
)
"""Where networks are built. Neither works without the other: both fit, or none is applied."""

FOR_CPU_WORKERS = (
    # vLLM 0.32: a worker calls this method of its platform right after it has loaded plug-ins.
    Patch(
        owner="vllm.platforms:current_platform.__class__",
        name="register_triton_kernel_overrides",
        parameters=(),
        wrapper="speculators_vllm.plugin.cpu_sampling:patching_samplers",
    ),
)
"""Where vLLM runs on a CPU; it applies the next three groups."""

FOR_CPU_SAMPLING = (
    # vLLM 0.32: spreads the settings of a request over its drafted tokens.
    Patch(
        owner="vllm.utils.cpu_triton_utils",
        name="_expand_kernel_impl",
        parameters=(
            "output",
            "input_val",
            "cu_num_tokens",
            "replace_from",
            "replace_to",
            "MAX_NUM_TOKENS",
        ),
        wrapper="speculators_vllm.plugin.cpu_sampling:expanding",
    ),
    # vLLM 0.32: temperature, top-k and top-p of drafted tokens.
    Patch(
        owner="vllm.v1.sample.rejection_sampler",
        name="apply_sampling_constraints",
        parameters=("logits", "cu_num_draft_tokens", "sampling_metadata"),
        wrapper="speculators_vllm.plugin.cpu_sampling:constraining",
    ),
)

FOR_CPU_GENERATORS = (
    # vLLM 0.32: samples, and discards samples; of every runner, the CPU's too.
    Patch(
        owner="vllm.v1.worker.gpu_model_runner:GPUModelRunner",
        name="_sample",
        parameters=("self", "logits", "spec_decode_metadata"),
        wrapper="speculators_vllm.plugin.cpu_sampling:restoring_generators",
    ),
    Patch(
        owner="vllm.v1.worker.gpu_model_runner:GPUModelRunner",
        name="_bookkeeping_sync",
        parameters=(
            "self",
            "scheduler_output",
            "sampler_output",
            "logits",
            "hidden_states",
            "num_scheduled_tokens",
        ),
        wrapper="speculators_vllm.plugin.cpu_sampling:hiding_generators",
    ),
)
"""The second relies on the first: without the first it is not applied."""

FOR_CPU_ADAPTERS = tuple(
    # vLLM 0.32: rows of the batch by the adapters of their requests.
    Patch(
        owner=owner,
        name=name,
        parameters=("inputs", "lora_b_weights", "output_tensor", "lora_indices_tensor", "..."),
        wrapper="speculators_vllm.plugin.cpu_adapters:sparing_tokens_without",
    )
    for owner in ("vllm.lora.ops.torch_ops.lora_ops", "vllm.lora.punica_wrapper.punica_cpu")
    for name in ("bgmv_shrink", "bgmv_expand", "bgmv_expand_slice")
)

PATCHES = (
    *FOR_ENGINE_ARGUMENTS,
    *FOR_SERVER_REQUESTS,
    *FOR_WEIGHTS,
    *FOR_V1_RUNNERS,
    *FOR_THINKING_BUDGETS,
    *FOR_CPU_WORKERS,
    *FOR_CPU_SAMPLING,
    *FOR_CPU_GENERATORS,
    *FOR_CPU_ADAPTERS,
)
"""All functions of vLLM that are wrapped. What is added to its tables is in `registries`."""


def apply() -> None:
    """Changes vLLM's tables and functions, once a process.

    A process that builds networks has imported vLLM's model registry before it loads plug-ins; one
    that builds an engine's config has imported `vllm.engine.arg_utils`, and looks networks up. In
    any other there is nothing to do, and nothing is imported for it.
    """
    builds_config = ENGINE_ARGUMENTS in sys.modules
    if not builds_config and MODEL_REGISTRY not in sys.modules:
        return
    # vLLM, and what imports it: not in every process.
    from vllm import platforms, version

    from speculators_vllm.plugin import registries  # imports vLLM

    registries.register_networks()
    for patch in (*FOR_WEIGHTS, *FOR_V1_RUNNERS):
        patch.apply()
    apply_together(FOR_THINKING_BUDGETS)
    if platforms.current_platform.is_cpu():
        for patch in FOR_CPU_WORKERS:
            patch.apply()
    if builds_config:
        warn_of_untested_version(version.__version_tuple__)
        registries.replace_config_class()
        for patch in FOR_ENGINE_ARGUMENTS:
            patch.apply()


def apply_together(group: Sequence[Patch]) -> None:
    """Applies all patches of a group, or none where one does not fit."""
    if all(patch.fits() for patch in group):
        for patch in group:
            patch.apply()


@functools.cache
def warn_of_untested_version(found: tuple[int | str, ...]) -> None:
    """One warning a process where vLLM is older or newer than what was tested."""
    minor = found[:2]
    if not TESTED[0] <= minor <= TESTED[1]:
        first, last = ("{}.{}".format(*version) for version in TESTED)
        logger.warning(
            "speculators-vllm was tested with vLLM %s to %s; found %s.%s", first, last, *minor
        )
