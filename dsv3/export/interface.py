"""What the exported code offers beyond transformers' interface, for callers that don't import `mini_model`."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from torch import Tensor
from transformers.cache_utils import Cache


class Router(Protocol):
    """A router that counts the tokens of each of its experts."""

    expert_load: Tensor


class Trunk(Protocol):
    """The model without its head."""

    @property
    def layers(self) -> Sequence[Callable[..., Tensor]]:
        """The trunk's layers, and the MTP modules after them."""
        ...

    def embed_tokens(self, ids: Tensor, /) -> Tensor:
        """Return the tokens' embeddings."""
        ...

    def attention_context(
        self, embeds: Tensor, mask: Tensor | None, position_ids: Tensor | None, cache: Cache
    ) -> dict[str, Any]:
        """Return the keyword arguments of a layer."""
        ...

    def mtp_hidden_states(self, hidden: Tensor, embeds: Tensor, /, *, position_ids: Tensor | None) -> Iterator[Tensor]:
        """Yield, for depth k = 1, 2 …, the states that predict the token k + 1 positions on, k positions fewer."""
        ...

    def __call__(
        self,
        input_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool,
    ) -> Any:
        """Return an object with the normalized `last_hidden_state` of every position."""
        ...


class ExportedModel(Protocol):
    """The language model."""

    @property
    def model(self) -> Trunk:
        """The trunk."""
        ...

    def lm_head(self, hidden: Tensor, /) -> Tensor:
        """Return the logits of states."""
        ...

    def routers(self) -> list[tuple[int, Router]]:
        """Return (layer, router) of each mixture-of-experts layer."""
        ...

    def set_count_expert_load(self, enabled: bool) -> None:
        """Let the routers count in evaluation too, or not."""
        ...
