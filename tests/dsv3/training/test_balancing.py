import math

import pytest
import torch

from dsv3.training.balancing import pop_expert_load, router_rows, update_router_bias
from dsv3.training.state import Measured, StepSums
from mini_model.configuration_deepseek import DeepseekV3Config
from mini_model.modeling_deepseek import DeepseekV3ForCausalLM, DeepseekV3TopkRouter
from tests.training_inputs import MICRO


def routers(loads: list[list[int]]) -> list[tuple[int, DeepseekV3TopkRouter]]:
    config = DeepseekV3Config(**{**MICRO, "n_routed_experts": len(loads[0]), "n_group": 1, "topk_group": 1})
    made = [(layer, DeepseekV3TopkRouter(config)) for layer in range(1, len(loads) + 1)]
    for (_, router), load in zip(made, loads, strict=True):
        router.expert_load.copy_(torch.tensor(load))
    return made


def test_loads_are_summed_over_processes_and_then_zeroed():
    made = routers([[1, 2, 3, 4], [4, 3, 2, 1]])
    load = pop_expert_load(made, lambda tensor: 3 * tensor)
    assert load.tolist() == [[3, 6, 9, 12], [12, 9, 6, 3]]
    assert all(router.expert_load.sum() == 0 for _, router in made)


def test_the_bias_of_overloaded_experts_falls_of_underloaded_ones_rises_and_stays_at_the_mean():
    made = routers([[4, 0, 2, 2]])
    update_router_bias(made, torch.tensor([[4, 0, 2, 2]]), 0.001)
    expected = torch.tensor([-0.001, 0.001, 0.0, 0.0])
    assert torch.equal(made[0][1].e_score_correction_bias, expected)


def test_a_load_is_compared_with_the_mean_exactly_even_where_the_mean_is_no_integer():
    made = routers([[0, 0, 0]])
    update_router_bias(made, torch.tensor([[10**15, 10**15 + 1, 10**15]]), 1.0)
    assert made[0][1].e_score_correction_bias.tolist() == [1.0, -1.0, 1.0]


def test_a_rate_of_zero_freezes_the_bias():
    made = routers([[4, 0, 2, 2]])
    update_router_bias(made, torch.tensor([[4, 0, 2, 2]]), 0.0)
    assert made[0][1].e_score_correction_bias.abs().max() == 0


def test_the_bias_stays_fp32_in_a_bf16_model_and_moves_past_one_half():
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**MICRO)).to(torch.bfloat16)
    made = model.routers()[:1]
    for _ in range(600):
        update_router_bias(made, torch.tensor([[0, 4, 4, 4]]), 0.001)
    bias = made[0][1].e_score_correction_bias
    assert bias.dtype == torch.float32
    assert bias[0].item() == pytest.approx(0.6, rel=1e-4)  # 600 fp32 additions


def test_a_row_per_layer_says_what_its_experts_got():
    made = routers([[6, 2, 0, 0], [2, 2, 2, 2]])
    made[0][1].e_score_correction_bias.copy_(torch.tensor([-0.5, 0.25, 0.0, 0.0]))
    first, second = router_rows(made, torch.tensor([[6, 2, 0, 0], [2, 2, 2, 2]]), [2.5, 0.5], step=5)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert first == {
        "step": 5,
        "layer": 1,
        "max_vio": 2.0,
        "max_vio_batch": 2.5,
        "entropy": pytest.approx(entropy),
        "dead_experts": 2,
        "bias_min": -0.5,
        "bias_max": 0.25,
        "load_shares": "0.7500 0.2500 0.0000 0.0000",
    }
    assert second["dead_experts"] == 0
    assert second["layer"] == 2


def test_a_model_without_experts_has_nothing_to_balance():
    dense = DeepseekV3ForCausalLM(
        DeepseekV3Config(**{**MICRO, "first_k_dense_replace": 2, "num_nextn_predict_layers": 0})
    )
    load = pop_expert_load(dense.routers(), lambda tensor: tensor)
    update_router_bias(dense.routers(), load, 0.001)
    assert router_rows(dense.routers(), load, [], 1) == []


@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_token_is_counted_once_with_and_without_activation_checkpointing(checkpointing):
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**MICRO)).train()
    if checkpointing:
        model.activation_checkpointing_enable()
    tokens = torch.randint(0, 272, (3, 17))
    for _ in range(2):  # accumulation
        output = model(input_ids=tokens[:, :-1], shift_labels=tokens[:, 1:], mtp_loss_weight=0.3)
        output.loss.backward()
    load = pop_expert_load(model.routers(), lambda tensor: tensor)
    # Two experts per token; the MTP module has one position less.
    assert load.sum(dim=1).tolist() == [2 * 2 * 3 * 16, 2 * 2 * 3 * 15]


def test_a_window_averages_the_violations_of_its_batches_apart_from_those_of_its_sum():
    """Two batches that favour opposite experts violate balance each, and not together."""
    window = StepSums()
    for load in ([3, 1], [1, 3]):
        load_LE = torch.tensor([load])
        window.add(Measured({"total_loss": 0.0}, 0.0, False, load_LE, load_LE), elapsed_s=1.0)
    assert window.load_LE == [[4, 4]]
    assert window.max_vio_L == [1.0]
