"""Section `sample`: parameters of the stage of that name."""

from typing import Self

from pydantic import Field, model_validator

from dsv3.params.section import Section


class SampleParams(Section):
    """Section `sample`: what is generated."""

    prompts: list[str] = Field(min_length=1)
    """Beginnings that the model continues."""

    max_new_tokens: int = Field(ge=1)
    """Tokens generated per prompt."""

    do_sample: bool
    """False: the most probable token each time."""

    temperature: float = Field(ge=0.01, le=100)
    """Below 1 sharpens, above 1 flattens. At 0.01 nothing is left to chance (do_sample: false), at 100 all is."""

    top_k: int = Field(ge=0)
    """Keep the k most probable tokens; 0: all."""

    top_p: float = Field(gt=0, le=1)
    """Keep the smallest set of tokens whose probabilities sum to p."""

    num_return_sequences: int = Field(ge=1, le=1_000)
    """Continuations per prompt, which are generated in one batch."""

    speculative: bool
    """Let the multi-token prediction (MTP) modules draft; the text is the same (sampled: equally distributed)."""

    @model_validator(mode="after")
    def fits_together(self) -> Self:
        """Check the relations within the section."""
        if self.num_return_sequences > 1 and not self.do_sample:
            raise ValueError(
                f"num_return_sequences is {self.num_return_sequences}; must be 1 where do_sample is false, "
                "for all would be the same"
            )
        return self
