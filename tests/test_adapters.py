"""Adapters of a streamed model: those beside the experts work, those of experts are refused."""

import peft
import pytest
import tiny_models
import torch
import transformers.integrations.peft
from loaded import PROMPT, check_same, logits
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from expertflow import UnsupportedModelError, from_pretrained

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*target_parameters=",
    "ignore:.*(rank|alpha)_pattern keys",
    "ignore:.*with PEFT for a second time",
    "ignore:.*is_gradient_checkpointing",
)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A Qwen2-MoE checkpoint: it has dense layers and shared experts beside the streamed ones."""
    return tiny_models.make_checkpoint("qwen2_moe", tmp_path_factory.mktemp("qwen2_moe"))


@pytest.fixture
def model(path):
    return from_pretrained(path, progress=False)


def lora(path, tmp_path, **targets):
    """A plain model with a random adapter, and where that adapter is saved."""
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_pretrained(path)
    adapted = get_peft_model(plain, LoraConfig(init_lora_weights=False, **targets)).eval()
    adapted.save_pretrained(tmp_path)
    return adapted


@pytest.mark.parametrize(
    "targets",
    [{"target_modules": ["q_proj", "v_proj"]}, {"target_modules": "all-linear"}],
    ids=["attention", "all-linear"],
)
def test_adapters_outside_the_experts_work(model, path, tmp_path, targets):
    adapted = lora(path, tmp_path, **targets)
    before = logits(model)
    peft_model = PeftModel.from_pretrained(model, tmp_path)
    check_same(peft_model, adapted)
    assert (logits(peft_model) - before).abs().max() > 0.1
    assert peft_model.generate(input_ids=PROMPT, max_new_tokens=3).shape == (2, PROMPT.shape[1] + 3)
    peft_model.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(path), tmp_path / "again"
    )
    check_same(again, adapted)
    with pytest.raises(UnsupportedModelError, match="trained"):
        peft_model.train()


@pytest.mark.skipif(
    Version(peft.__version__) < Version(transformers.integrations.peft.MIN_PEFT_VERSION),
    reason=f"this transformers does not work with peft {peft.__version__}",
)
def test_adapters_load_through_transformers_too(model, path, tmp_path):
    adapted = lora(path, tmp_path, target_modules=["q_proj", "v_proj"])
    model.load_adapter(str(tmp_path))
    check_same(model, adapted)
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "again" / "model.safetensors").exists()
    with pytest.raises(UnsupportedModelError, match="state_dict"):
        model.state_dict()


@pytest.mark.parametrize("modules", [["q_proj"], None])
def test_adapters_of_experts_are_refused(model, path, tmp_path, modules):
    targets = {"target_modules": modules, "target_parameters": ["mlp.experts.gate_up_proj"]}
    lora(path, tmp_path, **targets)
    for attach in (
        lambda: PeftModel.from_pretrained(model, tmp_path),
        lambda: get_peft_model(model, LoraConfig(**targets)),
        lambda: model.load_adapter(str(tmp_path)),
    ):
        with pytest.raises(ValueError, match=r"experts|target_parameters"):
            attach()


def test_adapters_that_peft_turns_into_adapters_of_experts_are_refused(tmp_path):
    """Mixtral adapters from before transformers 5 name the experts' matrices w1, w2, w3."""
    tiny_models.make_checkpoint("mixtral", tmp_path)
    model = from_pretrained(tmp_path, progress=False)
    with pytest.raises(UnsupportedModelError, match="experts"):
        get_peft_model(model, LoraConfig(target_modules=["q_proj", "w1", "w2", "w3"]))
