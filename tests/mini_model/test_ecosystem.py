"""What transformers' Trainer, adapters, tracing and loaders expect of a model."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config as StockConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3ForCausalLM as StockModel

from mini_model.configuration_deepseek import DeepseekV3Config
from mini_model.modeling_deepseek import DeepseekV3ForCausalLM, is_plain_linear

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


class LoRA(nn.Module):
    """A layer whose output gets a low-rank term, as PEFT wraps a linear layer."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Linear(base_layer.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, base_layer.out_features, bias=False)

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


class Wrapped(nn.Module):
    """A module within another, as PEFT wraps one with parameters of its own."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer

    def forward(self, *args, **kwargs):
        return self.base_layer(*args, **kwargs)


def hooked(layer):
    """A layer that gets its weight from a hook for the time of a call; before and after it there is none."""
    weight = layer.weight.detach().clone()

    def fetch(module, _args):
        module.weight = nn.Parameter(weight)

    def drop(module, _args, _output):
        module.weight = nn.Parameter(torch.full_like(weight, torch.nan))

    layer.register_forward_pre_hook(fetch)
    layer.register_forward_hook(drop)
    drop(layer, None, None)
    return layer


def offloaded(layer):
    """A layer whose `forward` is replaced, as accelerate does; its weight is elsewhere."""
    weight = layer.weight.detach().clone()
    layer.weight = nn.Parameter(torch.full_like(weight, torch.nan))
    layer.forward = lambda x: F.linear(x, weight)
    return layer


class Quantized(nn.Linear):
    """A linear layer whose stored numbers are not its weight, as in bitsandbytes or FP8."""

    def forward(self, x):
        return F.linear(x, self.weight * 2)


def quantized(layer):
    other = Quantized(layer.in_features, layer.out_features, bias=False)
    other.weight = nn.Parameter(layer.weight.detach() / 2)
    return other


UNUSUAL = {"adapter": LoRA, "hook": hooked, "offloaded": offloaded, "quantized": quantized}


@torch.no_grad()
@pytest.mark.parametrize("change", UNUSUAL.values(), ids=UNUSUAL)
def test_decoding_calls_a_layer_whose_weight_is_not_all_of_it(micro_model, token_ids, change):
    model, ids = micro_model().eval(), token_ids()
    for layer in model.model.layers:
        layer.self_attn.kv_b_proj = change(layer.self_attn.kv_b_proj)
    expected = model(ids, use_cache=False).logits
    prefix = model(ids[:, :-1], use_cache=True)
    last = model(ids[:, -1:], past_key_values=prefix.past_key_values).logits
    torch.testing.assert_close(last, expected[:, -1:], **TOLERANCE)


@pytest.mark.parametrize("change", UNUSUAL.values(), ids=UNUSUAL)
def test_the_loss_calls_an_output_head_whose_weight_is_not_all_of_it(micro_model, token_ids, change):
    model, ids = micro_model().eval(), token_ids()
    model.lm_head = change(model.lm_head)
    out = model(ids, labels=ids)
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


def test_a_loaded_model_still_decodes_on_the_latents(micro_model, tmp_path):
    micro_model().save_pretrained(tmp_path)
    model = DeepseekV3ForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"})
    assert all(is_plain_linear(layer.self_attn.kv_b_proj) for layer in model.model.layers)


def test_a_wrapped_router_counts_its_tokens(micro_model, token_ids):
    model, ids = micro_model(), token_ids()
    for layer in model.model.layers[1:]:
        layer.mlp.gate = Wrapped(layer.mlp.gate)
    model(ids, labels=ids).loss.backward()
    assert [router.expert_load.sum().item() for _, router in model.routers()] == [48, 48]


@pytest.mark.parametrize("return_dict", [True, False])
def test_the_loss_stands_first_and_the_logits_after_it(micro_model, token_ids, return_dict):
    model, ids = micro_model().eval(), token_ids()
    out = model(ids, return_dict=return_dict)
    assert out[0].shape == (2, 12, 61)
    losses = model(ids, labels=ids, return_dict=return_dict)
    assert losses[0].shape == ()
    assert torch.equal(losses[1], out[0])
    assert model.train()(ids, labels=ids, return_dict=return_dict)[0].shape == ()


def test_shift_labels_win_over_labels_as_in_stock(micro_model, token_ids):
    model, ids = micro_model(), token_ids()
    targets = torch.roll(ids, -1, dims=1)
    assert torch.equal(model(ids, labels=ids, shift_labels=targets).loss, model(ids, shift_labels=targets).loss)


def trainer(model, folder, rows, **arguments):
    settings = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "optim": "sgd", "lr_scheduler_type": "constant"}
    return Trainer(
        model,
        TrainingArguments(str(folder), **settings, **arguments),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=lambda rows: {name: torch.stack([row[name] for row in rows]) for name in rows[0]},
    )


@pytest.fixture
def padded_rows(token_ids):
    """Four sequences of 3, 6, 9 and 12 tokens, padded to 12."""
    ids = token_ids(4, 12)
    mask = torch.arange(12)[None] < torch.tensor([3, 6, 9, 12])[:, None]
    labels = ids.masked_fill(~mask, -100)
    return [
        {"input_ids": i, "attention_mask": m.long(), "labels": y} for i, m, y in zip(ids, mask, labels, strict=True)
    ]


def test_a_trainer_evaluates_a_loss_and_predicts_one_array(micro_model, padded_rows, tmp_path):
    predictions = trainer(micro_model(), tmp_path, padded_rows).predict(padded_rows)
    assert "test_loss" in predictions.metrics
    assert predictions.predictions.shape == (4, 12, 61)
    assert predictions.label_ids.shape == (4, 12)


def test_an_accumulated_padded_batch_trains_as_the_whole_batch(micro_model, padded_rows, tmp_path):
    weights = []
    for size, accumulation in ((4, 1), (1, 4)):
        model = micro_model()
        arguments = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        trainer(model, tmp_path, padded_rows, max_steps=1, learning_rate=1.0, save_strategy="no", **arguments).train()
        weights.append(model.model.norm.weight.detach())
    torch.testing.assert_close(*weights, **TOLERANCE)


def test_the_shares_of_every_loss_add_up_to_the_batchs(micro_model, padded_rows):
    model = micro_model(num_nextn_predict_layers=1)
    batch = {name: torch.stack([row[name] for row in padded_rows]) for name in padded_rows[0]}
    num_items = (batch["labels"][:, 1:] != -100).sum()
    settings = {"mtp_loss_weight": 0.3, "sequence_loss_weight": 0.0, "num_items_in_batch": num_items}
    whole = model(**batch, **settings)
    parts = [model(**{name: row[None] for name, row in rows.items()}, **settings) for rows in padded_rows]
    for name in ("loss", "cross_entropy_loss", "mtp_loss"):
        torch.testing.assert_close(sum(part[name] for part in parts), whole[name])
    mean = model(**batch)
    torch.testing.assert_close(whole.cross_entropy_loss, mean.loss)
    nothing = model(batch["input_ids"], labels=batch["labels"] * 0 - 100, num_items_in_batch=num_items).loss
    nothing.backward()
    assert nothing.item() == 0
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("kind", ["boolean", "added"])
def test_the_mtp_loss_reads_a_mask_of_four_dimensions(micro_model, token_ids, depth, kind):
    model, ids = micro_model(num_nextn_predict_layers=depth), token_ids(1, 11)
    positions = torch.cat([torch.arange(6), torch.arange(5)])[None]
    document = torch.tensor([0] * 6 + [1] * 5)
    mask = (document[:, None] == document[None]).tril()[None, None]
    if kind == "added":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    settings = {"labels": ids, "position_ids": positions, "mtp_loss_weight": 1.0}
    expected = model(ids, **settings).mtp_loss
    torch.testing.assert_close(model(ids, attention_mask=mask, **settings).mtp_loss, expected, **TOLERANCE)


def test_tracing_computes_what_was_traced(micro_model, token_ids):
    model, ids = micro_model().eval(), token_ids()
    model.config.use_cache, model.config.return_dict = False, False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's notes of what a trace fixes, and that tracing is deprecated
        traced = torch.jit.trace(model, (ids,))
    other = ids.flip(0)
    torch.testing.assert_close(traced(other)[0], model(other)[0], **TOLERANCE)


def test_mtp_modules_that_stock_left_out_are_not_loaded_at_random(micro_model, token_ids, tmp_path, monkeypatch):
    monkeypatch.setattr(StockModel, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.3\..*"])
    ours, ids = micro_model(num_nextn_predict_layers=1).eval(), token_ids()
    ours.save_pretrained(tmp_path / "ours")
    StockModel.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "stock")
    loaded, info = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "stock", output_loading_info=True)
    assert not info["missing_keys"]
    assert loaded.config.num_nextn_predict_layers == 0
    assert len(loaded.model.layers) == 3
    assert torch.equal(loaded.eval()(ids).logits, ours(ids).logits)
    kept = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "ours")
    assert kept.config.num_nextn_predict_layers == 1


@pytest.mark.parametrize("model_type", ["kimi_k2", "deepseek_v32", "deepseek_v4"])
def test_a_configuration_of_another_model_type_is_one_clear_error(micro_config, tmp_path, model_type):
    micro_config().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"deepseek_v3"', f'"{model_type}"'))
    for load in (DeepseekV3Config.from_pretrained, DeepseekV3ForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=f"^model_type is '{model_type}'; must be 'deepseek_v3'"):
            load(tmp_path)


def test_the_plans_of_tensor_and_expert_parallelism_are_stocks(micro_config):
    assert DeepseekV3Config.base_model_tp_plan == StockConfig.base_model_tp_plan
    assert DeepseekV3Config.base_model_ep_plan == StockConfig.base_model_ep_plan
    assert DeepseekV3ForCausalLM._tp_plan == StockModel._tp_plan
    modules = {name for name, _ in DeepseekV3ForCausalLM(micro_config()).model.named_modules()}
    assert {"layers.1.mlp.experts", "layers.1.mlp.shared_experts.up_proj", "layers.0.mlp.down_proj"} <= modules


@pytest.mark.parametrize("width", [20, 17])
def test_a_width_that_grouped_mm_cannot_multiply_takes_the_loop(micro_config, token_ids, tmp_path, width):
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(micro_config(moe_intermediate_size=width)).eval()
    assert (model.config._experts_implementation == "grouped_mm") == (width == 20)
    model.save_pretrained(tmp_path)
    halved = DeepseekV3ForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert halved.config._experts_implementation == "eager"
    for each in (model, halved):
        assert each(input_ids=token_ids(), labels=token_ids()).loss.isfinite()
