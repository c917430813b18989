import dataclasses

from dsv3.tracking.metrics import METRICS
from dsv3.training.state import LOSS_PARTS
from mini_model.modeling_deepseek import DeepseekV3CausalLMOutput


def test_a_part_of_the_loss_is_a_metric_and_a_field_of_the_models_output():
    assert set(LOSS_PARTS) <= set(METRICS)
    assert set(LOSS_PARTS.values()) <= {field.name for field in dataclasses.fields(DeepseekV3CausalLMOutput)}
