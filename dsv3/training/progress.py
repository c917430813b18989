"""What a training shows while it runs."""

from tqdm import tqdm

from dsv3.training.loop import Run
from dsv3.training.setup import Choices


def progress_bar(run: Run, chosen: Choices) -> tqdm:
    """Return the bar that the main process shows, under a line that says how it computes."""
    is_hidden = not run.accelerator.is_main_process
    if not is_hidden:
        tqdm.write(chosen.summary())
    return tqdm(total=run.plan.total_steps, initial=run.state.step, unit="step", desc="train", disable=is_hidden)
