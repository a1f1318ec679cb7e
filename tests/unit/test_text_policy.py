"""Text-only policies: the chat as the tokenizer writes it, sampled and trained log-probs, what is refused, a whole
run."""

import json
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from tokenizers.processors import TemplateProcessing
from transformers import GPT2Config, GPT2LMHeadModel, Lfm2Config, Lfm2ForCausalLM, PreTrainedTokenizerBase

from tests import families
from unirg.check import check_vision
from unirg.cli import main
from unirg.errors import UserError
from unirg.grpo.forward import answer_logps
from unirg.policy import LoraConfig, Policy, PolicyConfig, load_policy, vision_tower
from unirg.processor import chat_text
from unirg.prompt import PromptConfig, build_messages
from unirg.recipe.schema import OptimiserConfig, VisionStage
from unirg.rollout.hf import HFSampler
from unirg.study import Study
from unirg.tiny import END_OF_TEXT, TURN_END

SHORT = PromptConfig(style="short")
STUDIES = [
    Study("a", indication="cough", impression="No acute disease."),
    Study("b", indication="cough and fever for days on end, with pain in the left side", impression="Pneumonia."),
    Study("c", findings="Small left pleural effusion.", impression="Effusion."),
]
# Strings only, as in Qwen2.5, Llama or SmolLM2: a list of parts cannot be added to a string.
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def gpt2(folder: Path) -> None:
    """Learnt positions, and token types that are embeddings."""
    families.save_text(folder, GPT2Config, GPT2LMHeadModel)


def lfm2(folder: Path) -> None:
    """Its first layer a convolution, whose state runs through the row."""
    families.save_text(folder, Lfm2Config, Lfm2ForCausalLM, layer_types=["conv", "full_attention"])


def write(folder: Path, build: families.Builder = families.llama, template: str = TEMPLATE, **names: Any) -> Path:
    """A text-only model's folder with this chat template; `names` are special tokens of the tokenizer."""
    torch.manual_seed(0)
    build(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    for name, token in names.items():
        setattr(tokenizer, name, token)
    tokenizer.save_pretrained(folder)
    return folder


def load(folder: Path, prompt: PromptConfig = SHORT, **settings: Any) -> Policy:
    return load_policy(PolicyConfig(model=str(folder), **settings), prompt)


def logps(policy: Policy, group: int = 2) -> torch.Tensor:
    answers = [[policy.answer_ids(study.impression or "")] * group for study in STUDIES]
    return answer_logps(policy, [policy.encode(study) for study in STUDIES], answers).logps_BT


def user_text(study: Study, prompt: PromptConfig = SHORT) -> str:
    return build_messages(study, prompt)[0]["content"][-1]["text"]


@pytest.fixture(scope="module", params=[families.llama, families.qwen2, gpt2, lfm2], ids=lambda build: build.__name__)
def policy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Policy:
    return load(write(tmp_path_factory.mktemp(request.param.__name__), request.param))


def test_sampled_log_probs_are_those_of_training(policy: Policy) -> None:
    prompts = [policy.encode(study) for study in STUDIES]
    early = replace(policy, stop_ids=tuple(range(0, 400, 9)))  # rows end, and leave the cache, at many lengths
    seeds = [[10 * i + g for g in range(4)] for i in range(len(STUDIES))]
    groups = HFSampler(early).sample(prompts, seeds, temperature=1.0, max_new_tokens=24)
    assert len({len(s.ids) for group in groups for s in group}) > 4
    scores = answer_logps(policy, prompts, [[s.ids for s in group] for group in groups])
    for row, s in enumerate(s for group in groups for s in group):
        torch.testing.assert_close(scores.logps_BT[row, : len(s.ids)], torch.tensor(s.logps), atol=2e-5, rtol=1e-5)
    scores.logps_BT.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in policy.model.parameters())


def test_the_prompt_is_read_as_the_model_by_hand_reads_it(policy: Policy) -> None:
    chat = [{"role": "user", "content": user_text(STUDIES[1])}]
    ids = policy.processor.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = policy.model.eval()(input_ids=ids).logits[0, -1].log_softmax(-1).max()
    prompt = policy.encode(STUDIES[1])
    assert prompt.ids_P.tolist() == ids[0].tolist() and not prompt.images and prompt.next_position == ids.shape[1]
    first = HFSampler(policy).sample([prompt], [[0]], temperature=0.0, max_new_tokens=1)[0][0]
    assert first.logps[0] == pytest.approx(float(expected), abs=1e-5)


def test_saved_and_loaded_again_it_is_what_it_was(policy: Policy, tmp_path: Path) -> None:
    policy.save(tmp_path)
    again = load(tmp_path)
    assert type(again.model) is type(policy.model) and isinstance(again.processor, PreTrainedTokenizerBase)
    assert torch.equal(logps(policy), logps(again))
    assert (again.eos_id, again.stop_ids, again.pad_id) == (policy.eos_id, policy.stop_ids, policy.pad_id)
    assert again.processor.chat_template == TEMPLATE
    assert not again.reads_images and again.banned_ids == () and vision_tower(again.base) is None


@pytest.mark.parametrize("in_template", [True, False])
def test_the_tokenizer_adds_nothing_to_the_chat(tmp_path: Path, in_template: bool) -> None:
    """Text-only chat templates are complete: what the tokenizer puts around plain text, it does not put around them."""
    template = "{{ bos_token }}" + TEMPLATE if in_template else TEMPLATE
    policy = load(write(tmp_path, template=template, bos_token=END_OF_TEXT))
    bos = policy.tokenizer.bos_token_id
    policy.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, bos)]
    )
    assert policy.tokenizer("cough")["input_ids"][0] == bos
    assert policy.encode(STUDIES[0]).ids_P.tolist().count(bos) == in_template


def test_the_turn_ends_where_the_template_ends_it(tmp_path: Path) -> None:
    """Not with the end of the text, which some templates put after the end of the last turn."""
    folder = write(tmp_path, template=TEMPLATE + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = END_OF_TEXT
    tokenizer.save_pretrained(folder)
    ends = tokenizer.convert_tokens_to_ids([END_OF_TEXT, TURN_END])
    transformers.GenerationConfig(eos_token_id=ends).save_pretrained(folder)
    policy = load(folder)
    assert policy.stop_ids == tuple(ends) and policy.eos_id == ends[1]


def test_a_dated_prompt_is_the_same_tomorrow(tmp_path: Path) -> None:
    dated = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "{{ 'Today Date: ' + date_string + '\n' }}"
    )
    policy = load(write(tmp_path, template=dated + TEMPLATE))
    text = chat_text(policy.processor, build_messages(STUDIES[0], SHORT), add_generation_prompt=True)
    assert text.startswith("Today Date: 26 Jul 2024\n")


def test_adapters_and_checkpointing(tmp_path: Path) -> None:
    folder = write(tmp_path / "model")
    plain = load(folder)
    adapted = load(folder, lora=LoraConfig(rank=4), gradient_checkpointing=True)
    torch.testing.assert_close(logps(adapted), logps(plain))
    with torch.no_grad():
        for name, p in adapted.model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    adapted.model.train()
    trained = logps(adapted)
    trained.sum().backward()
    grown = {name for name, p in adapted.model.named_parameters() if p.grad is not None}
    assert grown and all("lora_" in name for name in grown)
    assert not torch.allclose(trained, logps(plain), atol=1e-2)
    adapted.save(tmp_path / "merged")
    torch.testing.assert_close(logps(load(tmp_path / "merged")), trained, atol=1e-4, rtol=1e-4)


def test_films_are_refused_unless_the_prompt_leaves_them_out(tmp_path: Path, studies: list[Study]) -> None:
    folder = write(tmp_path)
    named = r"study s3: its prompt has 2 images, and LlamaForCausalLM reads text only; set prompt\.images=false"
    with pytest.raises(UserError, match=named):
        load(folder).encode(studies[3])
    for style in ("short", "unirg"):
        blind = load(folder, PromptConfig(style=style, images=False))
        without = replace(studies[3], images=())
        assert blind.encode(studies[3]).ids_P.equal(blind.encode(without).ids_P)
        assert "image" not in user_text(studies[3], blind.prompt)


def test_the_text_alone_before_a_policy_that_reads_images(tiny_policy: Policy, studies: list[Study]) -> None:
    blind = replace(tiny_policy, prompt=PromptConfig(style="short", images=False), _cache=OrderedDict())
    assert not blind.encode(studies[0]).images
    assert len(blind.encode(studies[0])) < len(tiny_policy.encode(studies[0]))
    prior = replace(studies[0], prior=studies[1])
    assert "prior images" in user_text(prior) and "prior images" not in user_text(prior, blind.prompt)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"image_size": 96}, r"policy\.image_size: LlamaForCausalLM reads text only; leave policy\.image_size out"),
        ({"freeze_vision": True}, r"policy\.freeze_vision: LlamaForCausalLM has no visual, vision_tower or vision_mod"),
    ],
)
def test_settings_of_a_vision_tower_are_refused(tmp_path: Path, settings: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        load(write(tmp_path), **settings)


def test_a_vision_stage_is_refused(tmp_path: Path, tiny_policy: Policy) -> None:
    stage = VisionStage(name="see", kind="vision", steps=1, optimiser=OptimiserConfig(learning_rate=1e-3))
    with pytest.raises(UserError, match=r"stage see: .* tower of the Qwen-VL kind, and LlamaForCausalLM reads text"):
        check_vision(load(write(tmp_path)), stage)
    check_vision(tiny_policy, stage)
    with pytest.raises(UserError, match=r"stage see: .* prompt\.images is false"):
        check_vision(replace(tiny_policy, prompt=PromptConfig(images=False)), stage)


def test_a_model_without_positions_is_refused(tmp_path: Path) -> None:
    def bloom(folder: Path) -> None:
        families.save_text(folder, transformers.BloomConfig, transformers.BloomForCausalLM)

    with pytest.raises(UserError, match=r"policy\.model: BloomForCausalLM takes no position_ids"):
        load(write(tmp_path, bloom))


FINDINGS = (
    "Small left pleural effusion.",
    "The lungs are clear.",
    "Right lower lobe opacity.",
    "The heart is enlarged.",
)
IMPRESSIONS = ("Effusion.", "No acute disease.", "Pneumonia.", "Cardiomegaly.")


def recipe(folder: Path, **row: Any) -> Path:
    """Findings in, impression out: two stages on a folder's text-only model; `row` is added to the second study."""
    rows = [{"id": f"t{i}", "findings": f, "impression": i_} for i, (f, i_) in enumerate(zip(FINDINGS, IMPRESSIONS))]
    rows[1] |= row
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    step = {"steps": 2, "studies_per_step": 2, "optimiser": {"learning_rate": 1e-3}}
    (folder / "own.py").write_text(
        "def length(candidates, references):\n    return [float(len(c)) for c in candidates]\n"
    )
    bleu = {"name": "bleu", "options": {"variant": "sentence4"}}
    settings = {
        "name": "text",
        "output": str(folder / "run"),
        "threads": 1,
        "data": {
            "adapter": "jsonl",
            "files": {"train": str(data), "dev": str(data)},
            "columns": {"indication": "findings"},
        },
        "prompt": {"style": "short"},
        "policy": {"model": str(write(folder / "model", families.qwen2))},
        "stages": [
            {"name": "sft", "kind": "sft", **step, "evaluate_every": 2, "keep": "best"},
            {
                "name": "grpo",
                "kind": "grpo",
                **step,
                "group_size": 4,
                "loss": {"kl": 0.1},
                "sampling": {"max_new_tokens": 12},
                "rewards": [{"name": f"{folder / 'own.py'}:length"}],
            },
        ],
        "evaluation": {"splits": ["dev"], "headline": "bleu", "metrics": [bleu], "draws": 20},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_a_run_from_findings_to_impressions(tmp_path: Path) -> None:
    assert main(["train", str(recipe(tmp_path))]) == 0
    run = tmp_path / "run"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(r["stage"], r["step"]) for r in records] == [("sft", 1), ("sft", 2), ("grpo", 1), ("grpo", 2)]
    assert "eval/bleu" in records[1]
    predictions = (run / "predictions" / "dev" / "grpo.jsonl").read_text().splitlines()
    assert json.loads(predictions[0])["reference"] == "Impression: Effusion."
    # The sampler's log-probs are those of the first forward: the same weights, in float32.
    assert records[2]["sampling/sampling_logp_difference/max"] < 1e-4
    final = transformers.AutoModelForCausalLM.from_pretrained(run / "stages" / "grpo" / "final")
    assert type(final) is transformers.Qwen2ForCausalLM
    start = transformers.AutoModelForCausalLM.from_pretrained(run / "stages" / "sft" / "final")
    assert not final.get_input_embeddings().weight.equal(start.get_input_embeddings().weight)
    assert "t0" in (run / "report.html").read_text()


def test_a_film_in_the_data_stops_the_run_before_it_begins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    Image.new("L", (32, 32)).save(tmp_path / "film.png")
    path = recipe(tmp_path, images=["film.png"])
    assert main(["train", str(path)]) == 2
    err = capsys.readouterr().err
    assert (
        len(err.splitlines()) == 1 and "study t1: its prompt has 1 image, and Qwen2ForCausalLM reads text only" in err
    )
    assert not (tmp_path / "run").exists()
    overrides = ["prompt.images=false", "evaluation.splits=[]"]
    assert main(["train", str(path), *overrides]) == 0
