"""The data of a run: opened, checked, split."""

from contextlib import ExitStack
from functools import partial

from speculators_core.data_generation.engines.pipeline import schema_of
from speculators_core.data_generation.examples import Schema
from speculators_core.data_generation.settings import GenerationPlan
from speculators_core.errors import SpeculatorError
from speculators_core.provenance import sample_weights
from speculators_core.training.device import training_device
from speculators_core.training.draft import CountTokens
from speculators_core.training.ranks import rank, world_size
from speculators_core.training.rows.online import (
    Generation,
    Received,
    TextExamples,
    read_generation_plan,
)
from speculators_core.training.rows.sources import Arrivals, Examples, Split, StoredExamples
from speculators_core.training.settings import TrainingPlan, TrainModelConfig
from speculators_core.verifier.fit import check_tokenizer
from speculators_core.verifier.reading import read_verifier_config

Source = Examples | Arrivals


def generation_of(plan: TrainingPlan) -> GenerationPlan | None:
    """The plan by which examples are generated; None where they are in a store.

    Raises:
        SpeculatorError: its file cannot be read, or an option in it is unknown or out of bounds.
    """
    data = plan.data
    file = data.texts or data.online or data.queue
    return None if file is None else read_generation_plan(file, is_elsewhere=file == data.queue)


def open_source(plan: TrainingPlan, generation: GenerationPlan | None, stack: ExitStack) -> Source:
    """The examples, which are closed with ``stack``. Texts load the verifier.

    Raises:
        SpeculatorError: there are no examples, or another verifier made them.
    """
    data = plan.data
    if generation is None:
        assert data.store is not None
        stored = StoredExamples(data.store)
        check_data(stored.schema, stored.verifier_weights, plan.model, stored.name)
        return stored
    weights = sample_weights(generation.data.verifier)
    check_data(schema_of(generation), weights, plan.model, str(getattr(data, data.kind)))
    if data.texts is not None:
        device = generation.engine.device or str(training_device())
        engine = generation.engine.model_copy(update={"device": device})
        return TextExamples(generation.model_copy(update={"engine": engine}))
    if data.online is not None:
        if world_size() > 1:
            raise SpeculatorError(
                f"data.online feeds one process, the training has {world_size()}. Start "
                "`speculators generate-data` separately and set data.queue, or set data.store."
            )
        source: Generation | Received = Generation(generation, data.queue_size)
    else:
        source = Received(generation, data.queue_size, rank(), world_size())
    stack.callback(source.close)
    return source


def check_data(schema: Schema, weights: str | None, model: TrainModelConfig, where: str) -> None:
    """Validates data against the draft's verifier; ``weights`` is a hash of their verifier's.

    Raises:
        SpeculatorError: a verifier of another shape, weights or tokenizer made them.
    """
    verifier = model.verifier
    text = read_verifier_config(verifier, model.trust_remote_code).get_text_config()
    depth = schema.layer_ids[-1] if schema.has_last else text.num_hidden_layers
    for what, theirs, ours in (
        ("width", schema.hidden_size, text.hidden_size),
        ("vocabulary", schema.vocab_size, text.vocab_size),
        ("depth", depth, text.num_hidden_layers),
        ("weights", weights or "", sample_weights(verifier) or weights or ""),
    ):
        if theirs != ours:
            shown = (
                "config.json or weights differ"
                if what == "weights"
                else f"{what} is {theirs}, not {ours}"
            )
            raise SpeculatorError(
                f"{where}: made with {schema.verifier}, expected {verifier}: its {shown}. "
                f"Generate data with `data.verifier: {verifier}`."
            )
    check_tokenizer(where, schema.verifier, verifier)


def split_of(plan: TrainingPlan, source: Source) -> Split | None:
    """The split of numbered examples; None for a stream, whose first ones are held out."""
    if source.is_stream:
        return None
    return Split.draw(source, plan.data.eval_examples, plan.data.limit, plan.run.seed)


def token_counter(plan: TrainingPlan, source: Source) -> CountTokens | None:
    """Counts the tokens to learn of the examples that are trained on; None for a stream."""
    split = split_of(plan, source)
    if source.is_stream or split is None:
        return None
    return partial(source.count_tokens, split.train)
