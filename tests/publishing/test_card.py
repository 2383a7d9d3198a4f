import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from benchmarks import playground
from speculators_core.data_generation.lengths import Lengths
from speculators_core.data_generation.settings import DatasetConfig
from speculators_core.data_generation.stores.disk import DiskStore
from speculators_core.errors import SpeculatorError
from speculators_core.format import checkpoint
from speculators_core.format.config import SpeculatorsConfig
from speculators_core.format.proposals import GreedyTokenProposalConfig
from speculators_core.format.vocabulary import choose_draft_vocabulary
from speculators_core.publishing.card import (
    ALGORITHMS,
    CARD,
    REPOSITORY,
    SEAL,
    UNKNOWN_LICENSE,
    VERIFIER,
    complete,
    is_ours,
    learnt_lengths,
    make_card,
    parse,
    write_card,
)
from speculators_core.publishing.card_facts import (
    CardFacts,
    CategoryAcceptance,
    ContextAcceptance,
    DataFacts,
    LearntLengths,
    Measurement,
    TrainingFacts,
)
from tests.conftest import DRAFTS, VOCAB_SIZE, make_draft
from tests.data_generation.making import generated, schema

PUBLIC = "them/verifier"
DATA = DataFacts(
    datasets=(
        DatasetConfig(path="HuggingFaceH4/ultrachat_200k", split="train_sft", limit=1000),
        DatasetConfig(path="/home/me/secret/own.jsonl"),
    ),
    num_examples=1200,
    num_tokens=3_000_000,
    num_trained=2_000_000,
    answers_are_own=True,
)
TRAINING = TrainingFacts(
    num_steps=5000,
    best_step=4500,
    num_tokens=10_240_000,
    optimizer="muon",
    learning_rate=1e-3,
    schedule="cosine",
    row_length=2048,
    lengths=Lengths(
        num_examples=1200, num_tokens=960_000, longest=5210, num_longer=(732, 120, 4, 0)
    ),
    seconds=5400,
    hardware="NVIDIA H100",
)
MEASURED = Measurement(
    rows=(
        CategoryAcceptance(category="code", acceptance_length=3.456, num_prompts=80),
        CategoryAcceptance(category="chat", acceptance_length=2.1, num_prompts=40),
    ),
    command="python -m benchmarks.acceptance --model me/draft --k 3 --max-tokens 512",
    versions={"vllm": "0.32.0", "device": "NVIDIA H100"},
    speculative_tokens=3,
)
ALL = CardFacts(
    license="apache-2.0",
    languages=("en", "code"),
    data=DATA,
    training=TRAINING,
    measured=MEASURED,
    versions={"torch": "2.13.0"},
)


def save(folder: Path, verifier, name="eagle3", named=PUBLIC, **kwargs) -> Path:
    make_draft(name, verifier, name_or_path=named, **kwargs).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(verifier, tmp_path) -> Path:
    return save(tmp_path / "draft", verifier)


def section(text: str, title: str) -> str:
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


def test_front_matter_is_what_the_hub_reads(folder):
    assert write_card(folder, ALL)
    data = ModelCard.load(folder / CARD).data
    assert data.to_dict() == {
        "base_model": PUBLIC,
        "base_model_relation": "adapter",
        "datasets": ["HuggingFaceH4/ultrachat_200k"],
        "language": ["en", "code"],
        "library_name": "speculators",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["speculative-decoding", "speculators", "eagle3", "vllm"],
        "trained_lengths": {"longest": 2048, "mean": 800},
    }


def test_card_tells_what_config_and_weights_say(folder):
    text = make_card(folder, ALL)
    shapes = [tensor.shape for tensor in checkpoint.stored_tensors(folder).values()]
    num_parameters = sum(torch.Size(shape).numel() for shape in shapes)
    for told in (
        f"# EAGLE-3 speculator for {PUBLIC}",
        "https://arxiv.org/abs/2503.01840",
        f"Verifier: `{PUBLIC}`",
        "Tokens per proposal: 3",
        f"Parameters: {num_parameters:,}, stored as float32",
        "Layers of the verifier that it reads: 1 2 3",
    ):
        assert told in text, told
    assert "Vocabulary" not in text
    assert "lossy" not in text
    assert "Verifier: `<verifier>` (Qwen3ForCausalLM)" in make_card(playground.EAGLE3, ALL)


def test_reduced_vocabulary_is_told(verifier, tmp_path):
    maps = choose_draft_vocabulary({i: 1 for i in range(40)}, 40, VOCAB_SIZE)
    folder = save(tmp_path / "draft", verifier, t2d=maps[0], d2t=maps[1])
    assert f"Vocabulary: 40 of the verifier's {VOCAB_SIZE} tokens" in make_card(folder, ALL)


@pytest.mark.parametrize("lossy", [{"accept_tolerance": 0.5}, {"verifier_accept_k": 2}])
def test_lossy_default_proposal_is_told(verifier, tmp_path, lossy):
    model = make_draft("eagle3", verifier, name_or_path=PUBLIC)
    model.config.speculators_config = SpeculatorsConfig(
        algorithm="eagle3",
        proposal_methods=[GreedyTokenProposalConfig(**lossy)],
        default_proposal_method="greedy",
        verifier=model.config.verifier,
    )
    model.save_pretrained(tmp_path)
    assert "is lossy" in make_card(tmp_path, ALL)


def test_facts_of_data_and_training_are_told(folder):
    text = make_card(folder, ALL)
    data, training = section(text, "Data"), section(text, "Training")
    assert "[HuggingFaceH4/ultrachat_200k](https://huggingface.co/datasets/" in data
    assert "split `train_sft`, at most 1,000 rows" in data
    assert "1,200 examples, 3,000,000 tokens, 2,000,000 of them trained on. The verifier" in data
    for told in (
        "Steps: 5,000; the weights are those of step 4,500",
        "10,240,000 without padding, packed in rows of 2,048",
        "muon, learning rate 0.001, cosine",
    ):
        assert told in training, told
    assert "1.50 hours" in training and "NVIDIA H100" in training
    assert "torch 2.13.0" in section(text, "Versions")
    limits = section(text, "Limits")
    for told in (PUBLIC, "at most 2,048 tokens", "en, code", "greedy"):
        assert told in limits, told


@pytest.mark.parametrize(
    ("own", "told"),
    [
        (True, "The verifier wrote the answers."),
        (False, "there is no record that the verifier wrote them"),
        (None, "is not recorded"),
    ],
)
def test_whose_the_answers_are_is_told(folder, own, told):
    data = DATA.model_copy(update={"answers_are_own": own})
    assert told in section(make_card(folder, CardFacts(data=data)), "Data")


def test_measurement_is_told_with_the_command_that_repeats_it(folder):
    told = section(make_card(folder, ALL), "Acceptance length")
    assert "| code | 3.46 | 80 |\n| chat | 2.10 | 40 |" in told
    assert f"```\n{MEASURED.command}\n```" in told
    assert "3 tokens per proposal, greedy" in told
    assert "vllm 0.32.0, device NVIDIA H100" in told


def test_sampled_measurement_is_not_called_greedy(folder):
    measured = MEASURED.model_copy(update={"temperature": 0.6})
    text = make_card(folder, CardFacts(measured=measured))
    assert "at temperature 0.6" in text and "greedy" not in text


def test_lengths_of_examples_are_stated_and_not_that_of_a_row(folder):
    text = make_card(folder, ALL)
    assert (
        "Length of examples: 800 tokens on average, at most 5,210, cut to 2,048; 61% longer than "
        "512 tokens, 10% than 1,024, 0.3% than 2,048, none than 4,096"
    ) in section(text, "Training")
    assert "trained on examples of at most 2,048 tokens" in section(text, "Limits")
    short = TRAINING.model_copy(update={"lengths": Lengths.of([148] * 9 + [160])})
    text = make_card(folder, CardFacts(training=short))
    assert "149 tokens on average, at most 160; none longer than 512 tokens\n" in text
    assert "trained on examples of at most 160 tokens" in section(text, "Limits")
    unknown = TRAINING.model_copy(update={"lengths": None})
    text = make_card(folder, CardFacts(training=unknown))
    assert "Length of examples" not in text
    assert "length of the examples that it was trained on is not recorded" in text


def test_lengths_are_read_back_from_the_card(folder):
    assert learnt_lengths(folder) is None
    for facts, expected in (
        (ALL, LearntLengths(longest=2048, mean=800)),
        (CardFacts(), None),
    ):
        write_card(folder, facts)
        assert learnt_lengths(folder) == expected
    for front in ("trained_lengths: long", "trained_lengths: {longest: 0, mean: 0}", "a: [", ""):
        (folder / CARD).write_text(f"---\n{front}\n---\nby hand\n")
        assert learnt_lengths(folder) is None
    assert learnt_lengths(playground.EAGLE3).longest <= 2048


def test_card_warns_of_lengths_beyond_those_learnt_with_both_numbers(folder):
    short = TRAINING.model_copy(update={"lengths": Lengths.of([100] * 9)})
    measured = MEASURED.model_copy(update={"longest_context": 465})
    limits = section(make_card(folder, CardFacts(training=short, measured=measured)), "Limits")
    assert "at most 100 tokens (100 on average)" in limits
    assert (
        "Its config allows texts of up to 128 and it was measured in texts of up to 465" in limits
    )
    long = TRAINING.model_copy(update={"lengths": Lengths.of([500] * 9)})
    limits = section(make_card(folder, CardFacts(training=long, measured=measured)), "Limits")
    assert "texts of up to" not in limits


def test_acceptance_by_context_length_and_the_worst_cell_before_the_mean(folder):
    contexts = (
        ContextAcceptance(context="<128", num_drafts=200, accepted_per_position=(150, 90, 60)),
        ContextAcceptance(context="128-512", num_drafts=100, accepted_per_position=(70, 7, 0)),
    )
    measured = MEASURED.model_copy(update={"contexts": contexts})
    told = section(make_card(folder, CardFacts(measured=measured)), "Acceptance length")
    assert (
        "| <128 | 2.50 | 200 | 0.75 0.60 0.67 |\n| 128-512 | 1.77 | 100 | 0.70 0.10 0.00 |" in told
    )
    assert told.strip().startswith("Worst at position 2 with 128-512 tokens of context, 7 of 70")
    few = (contexts[0].model_copy(update={"num_drafts": 40, "accepted_per_position": (9, 5, 1)}),)
    measured = MEASURED.model_copy(update={"contexts": few})
    told = section(make_card(folder, CardFacts(measured=measured)), "Acceptance length")
    assert "Worst" not in told and "| <128 |" in told


def test_code_of_the_card_loads_the_class_from_the_face(folder):
    code = re.search(r"```python\n(.*?)\n", section(make_card(folder, ALL), "Use"))
    assert code[1] == "from speculators_core import SpeculatorModel"
    exec(code[1], {})


def test_category_cannot_break_the_table(folder):
    row = CategoryAcceptance(category="a|b", acceptance_length=2, num_prompts=1)
    measured = MEASURED.model_copy(update={"rows": (row,)})
    assert r"| a\|b | 2.00 | 1 |" in make_card(folder, CardFacts(measured=measured))


def test_what_is_not_known_is_said_and_not_guessed(folder):
    text = make_card(folder, CardFacts())
    front = parse(text).data.to_dict()
    assert not {"license", "datasets", "language"} & set(front)
    assert UNKNOWN_LICENSE in section(text, "Licence")
    assert section(text, "Acceptance length").strip().startswith("Not measured;")
    for title in ("Data", "Training", "Versions"):
        assert section(text, title).strip().splitlines()[0] == "Not recorded."
    limits = section(text, "Limits")
    assert "Languages are not recorded" in limits
    assert "is not recorded" in limits and "greedy" not in limits


def test_no_folder_of_this_machine_is_named(verifier, verifier_folder, tmp_path):
    folder = save(tmp_path / "draft", verifier, named=str(verifier_folder))
    training = TRAINING.model_copy(update={"started_from": str(tmp_path / "earlier")})
    text = make_card(folder, ALL.model_copy(update={"training": training}))
    assert str(tmp_path) not in text and "/home/me" not in text
    assert str(verifier_folder) not in text
    assert "`own.jsonl` (local data)" in text and "Continued from: `earlier`" in text
    assert VERIFIER in text and parse(text).data.base_model is None


def test_folder_beside_the_speculator_is_no_hub_id(verifier, tmp_path):
    (tmp_path / "draft" / "verifier").mkdir(parents=True)
    folder = save(tmp_path / "draft", verifier, named="verifier")
    assert VERIFIER in make_card(folder, ALL)


@pytest.mark.parametrize("name", DRAFTS)
def test_card_of_every_algorithm_says_what_stock_vllm_is_told(verifier, tmp_path, name):
    """The very settings that stock vLLM makes of the checkpoint where it is the model."""
    base = pytest.importorskip("vllm.transformers_utils.configs.speculators.base")
    algos = pytest.importorskip("vllm.transformers_utils.configs.speculators.algos")
    use = section(make_card(save(tmp_path, verifier, name), ALL), "Use")
    told = [json.loads(found) for found in re.findall(r"--speculative-config '(.*)'", use)]
    assert told[0] == {"model": REPOSITORY}
    if name in algos.SUPPORTED_SPECULATORS_TYPES:
        config = json.loads((tmp_path / checkpoint.CONFIG).read_text())
        stock = base.SpeculatorsConfig.extract_vllm_speculative_config(config)
        assert told[1:] == [{"model": REPOSITORY, **stock}]
    else:
        assert "without the plug-in does not serve" in use and len(told) == 1


def test_algorithm_of_another_package_has_a_card(folder, monkeypatch):
    monkeypatch.delitem(ALGORITHMS, "eagle3")
    text = make_card(folder, ALL)
    assert f"# eagle3 speculator for {PUBLIC}" in text and "does not serve" in text


# ---- files ----


def test_our_own_card_is_written_anew_and_an_edited_one_stays(folder):
    assert write_card(folder, CardFacts())
    assert write_card(folder, ALL)
    assert "apache-2.0" in (folder / CARD).read_text()
    edited = (folder / CARD).read_text().replace("apache-2.0", "mit")
    (folder / CARD).write_text(edited)
    assert not write_card(folder, ALL)
    assert (folder / CARD).read_text() == edited


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text + "\nA line more.\n",
        lambda text: "A line more.\n" + text,
        lambda text: text.replace("Limits", "limits"),
        lambda text: "# Mine\n",
        lambda text: "",
    ],
)
def test_any_edit_makes_a_card_somebodys_own(folder, edit):
    write_card(folder, ALL)
    (folder / CARD).write_text(edit((folder / CARD).read_text()))
    assert not write_card(folder, CardFacts())


def test_nothing_is_left_beside_the_card(folder):
    before = {path.name for path in folder.iterdir()}
    write_card(folder, ALL)
    assert {path.name for path in folder.iterdir()} == before | {CARD}


def test_folder_without_speculator_is_refused(tmp_path, verifier_folder):
    with pytest.raises(SpeculatorError, match="no such folder"):
        write_card(tmp_path / "nowhere", ALL)
    with pytest.raises(SpeculatorError, match="not a speculator"):
        write_card(verifier_folder, ALL)
    assert not (verifier_folder / CARD).exists()


# ---- what is filled in on the way to the hub ----


@pytest.fixture
def local_card(verifier, verifier_folder, tmp_path) -> str:
    folder = save(tmp_path / "local", verifier, named=str(verifier_folder))
    return make_card(folder, CardFacts(data=DATA))


def test_completed_card_has_no_gap_and_is_still_ours(local_card):
    text = complete(local_card, "me/draft", PUBLIC, "mit")
    assert REPOSITORY not in text and VERIFIER not in text and UNKNOWN_LICENSE not in text
    data = parse(text).data
    assert (data.base_model, data.base_model_relation, data.license) == (PUBLIC, "adapter", "mit")
    assert f'vllm serve {PUBLIC} --speculative-config \'{{"model": "me/draft"}}\'' in text
    assert is_ours(text) and is_ours(local_card) and text.count(SEAL) == 1
    assert complete(text, "me/draft", PUBLIC, "mit") == text


def test_card_without_gaps_is_sent_as_it_is():
    text = "---\n# a comment\nlicense:   mit\n---\n# Mine\n"
    assert complete(text, "me/draft", PUBLIC) == text
    assert complete(text, "me/draft", PUBLIC, "mit") == text


def test_edited_card_keeps_its_edits_and_is_not_called_ours(local_card):
    edited = local_card.replace("## Limits", "## Known limits")
    text = complete(edited, "me/draft", PUBLIC)
    assert "## Known limits" in text and VERIFIER not in text
    assert not is_ours(text)


def test_base_model_that_somebody_stated_stays(local_card):
    stated = local_card.replace("---\n", "---\nbase_model: them/unquantized\n", 1)
    assert parse(complete(stated, "me/draft", PUBLIC)).data.base_model == "them/unquantized"


def test_licence_that_a_card_names_stays():
    text = "---\nlicense: mit\n---\n# Mine\n"
    assert parse(complete(text, "me/draft", PUBLIC, "apache-2.0")).data.license == "mit"


@pytest.mark.parametrize("front", ["license: [", "- mit", "model-index: 3"])
def test_front_matter_that_cannot_be_read_is_named(front):
    with pytest.raises(SpeculatorError, match=r"README\.md: its front matter cannot be read"):
        complete(f"---\n{front}\n---\n# Mine\n", "me/draft", PUBLIC)


# ---- facts of a store ----


def make_store(folder: Path, datasets, given=None) -> Path:
    options = {"data": {"datasets": datasets}} if datasets else {}
    store = DiskStore.create(folder, schema(verifier=PUBLIC), made_from=options)
    for number in range(3):
        example = generated(number, 8, store.schema)
        if given is not None:
            example = example.__class__(
                **{
                    **example.__dict__,
                    "num_prompt_tokens": given,
                    "loss_mask": torch.arange(8) >= given,
                }
            )
        store.write(example)
    store.close()
    return folder


def test_store_says_what_it_was_made_from(tmp_path):
    dataset = {"path": "them/chats", "split": "train"}
    facts = DataFacts.of_store(make_store(tmp_path / "states", [dataset], given=8))
    assert facts.datasets == (DatasetConfig(**dataset),)
    assert (facts.num_examples, facts.num_tokens, facts.num_trained) == (3, 24, 0)
    assert facts.answers_are_own is False


def test_answers_that_the_verifier_wrote_are_its_own(tmp_path):
    folder = make_store(tmp_path / "states", [{"path": "them/prompts"}], given=3)
    facts = DataFacts.of_store(folder)
    assert (facts.num_trained, facts.answers_are_own) == (15, True)


@pytest.mark.parametrize(("by", "own"), [(PUBLIC, True), ("them/other", False)])
def test_regenerated_answers_are_the_verifiers_own_who_wrote_them(tmp_path, by, own):
    stated = {"options": {"answers": {"verifier": by}}}
    (tmp_path / "own.jsonl.yaml").write_text(yaml.safe_dump(stated))
    datasets = [{"path": str(tmp_path / "own.jsonl")}]
    facts = DataFacts.of_store(make_store(tmp_path / "states", datasets, given=8))
    assert facts.answers_are_own is own


def test_store_that_does_not_say_its_data_is_refused(tmp_path):
    with pytest.raises(SpeculatorError, match="states no data sets"):
        DataFacts.of_store(make_store(tmp_path / "states", []))


@pytest.mark.parametrize("name", playground.SPECULATORS)
def test_cards_of_the_playground_are_those_of_this_writer(name):
    text = (playground.CHECKPOINTS / name / CARD).read_text()
    assert is_ours(text)
    assert "from speculators_core import SpeculatorModel\n" in text
