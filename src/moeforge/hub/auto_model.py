"""Our decoder as transformers' ``AutoModelForCausalLM`` gives it: ``generate``, ``Trainer``, PEFT and others take it.

What transformers' interface has and the decoder does not is refused, never ignored.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from moeforge.errors import UserError
from moeforge.hub.auto_config import MoeforgeConfig
from moeforge.models.decoder import Decoder, Output
from moeforge.models.domain import known

# The decoder is a module inside transformers' model; in the file its tensors have the names that all verbs know.
OURS_TO_THEIRS = WeightRenaming(r"^(embedding|blocks|norm|output)\.", r"decoder.\1.")
register_checkpoint_conversion_mapping(MoeforgeConfig.model_type, [OURS_TO_THEIRS], overwrite=True)


class _Layer:
    """One layer of transformers' cache, where a decoder's block expects its ``LayerCache``.

    It keeps every token, so that what transformers does to it (reorder, repeat, crop) is right, and shows the window.
    """

    def __init__(self, cache: Cache, index: int, window: int | None) -> None:
        self.cache, self.index, self.window = cache, index, window

    def append(self, *news: Tensor) -> tuple[Tensor, ...]:
        """Stores one or two tensors [B, heads, L, width], and returns what these tokens may look at."""
        values = news[1] if len(news) == 2 else news[0][..., :0]
        seen = self.cache.update(news[0], values, self.index)[: len(news)]
        if self.window is None:
            return seen
        return tuple(tensor[:, :, -(self.window - 1 + news[0].shape[2]) :] for tensor in seen)


class _Layers:
    """transformers' cache, where a decoder expects its own."""

    def __init__(self, cache: Cache, decoder: Decoder) -> None:
        """Layers that do not attend have no place in the cache: the first of those that do says its length."""
        if cache.is_compileable:
            raise UserError(f"a {type(cache).__name__} does not fit this model: leave cache_implementation out")
        attending = [depth for depth, layer in enumerate(decoder.config.applied_layers) if layer.attends]
        windows = [decoder.config.applied_layers[depth].window for depth in attending]
        self.layers = {d: _Layer(cache, i, w) for i, (d, w) in enumerate(zip(attending, windows, strict=True))}
        self.length = cache.get_seq_length()


class MoeforgeForCausalLM(PreTrainedModel, GenerationMixin):
    """A ``Decoder`` with next-token loss and cache."""

    config: MoeforgeConfig  # pyrefly: ignore[bad-override-mutable-attribute]
    config_class = MoeforgeConfig
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    gradient_checkpointing = False
    _supports_sdpa = True
    _no_split_modules = ["Block"]  # noqa: RUF012 - as transformers declares it
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012

    def __init__(self, config: MoeforgeConfig) -> None:
        super().__init__(config)
        self.decoder = Decoder(config.settings)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """The decoder's weights have started by its own rule, and ``from_pretrained`` refuses to leave one out."""

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As transformers does. Raises UserError with the names where tensors and config do not fit each other."""
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, found = loaded
        wrong = {kind: found[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched")}
        told = [f"{kind} {name}" for kind, names in wrong.items() for name in sorted(map(str, names))]
        if told:
            raise UserError(f"{args[0]}: {len(told)} weights do not fit the config: {'; '.join(told[:5])}")
        return (model, found) if output_loading_info else model

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.decoder.embedding

    def set_input_embeddings(self, value: Any) -> None:
        """Puts another embedding in its place."""
        self.decoder.embedding = value

    def get_output_embeddings(self) -> Any:
        """The output matrix; None where it is the embedding."""
        return self.decoder.output

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        """Puts another output matrix in its place."""
        self.decoder.output = new_embeddings

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As transformers does. Raises UserError for a model whose routers compare tokens."""
        if leaking := self.decoder.cannot_write:
            raise UserError(
                f"in {', '.join(leaking)} a token's experts depend on other tokens than itself, so text token by token "
                "is not what was trained; moeforge generate --unsafe-batch-dependent writes anyway"
            )
        prepare: Any = super().prepare_inputs_for_generation
        return prepare(*args, **kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        domain: str | None = None,
    ) -> Any:
        """[B, L] ids -> logits [B, L, V]; with ``labels`` [B, L], not shifted, -100 for none, also the mean loss.

        While training, the loss includes the routers' own balance losses by their weights (``aux_loss``).
        ``output_router_logits`` gives [B * L, E] of each layer with experts, None where its router has none. ``domain``
        names the text's, for models that route by it. Raises UserError for what this model cannot do.
        """
        config = self.config
        if input_ids is None or inputs_embeds is not None:
            raise UserError("this model reads input_ids, not inputs_embeds: its routers may look at the ids")
        if config.output_attentions if output_attentions is None else output_attentions:
            raise UserError("output_attentions: this model keeps no attention weights; leave it out")
        if config.output_hidden_states if output_hidden_states is None else output_hidden_states:
            raise UserError("output_hidden_states: this model hands on logits and router logits alone; leave it out")
        if (config.use_cache and not self.training) if use_cache is None else use_cache:
            past_key_values = DynamicCache(config=config) if past_key_values is None else past_key_values
        output = self._decode(input_ids, attention_mask, past_key_values, domain)
        loss, aux_loss = self._losses(output, labels, num_items_in_batch)
        wanted = config.output_router_logits if output_router_logits is None else output_router_logits
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        router_logits: Any = tuple(routing.logits for routing in output.routings.values()) if wanted else None
        found = MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=output.logits[:, kept] if isinstance(kept, slice | Tensor) else output.logits,
            past_key_values=past_key_values,
            router_logits=router_logits,
        )
        return found if (config.return_dict if return_dict is None else return_dict) else found.to_tuple()

    def _decode(
        self, input_ids: Tensor, attention_mask: Tensor | None, past: Cache | None, domain: str | None
    ) -> Output:
        if attention_mask is not None and attention_mask.ndim != 2:
            raise UserError(f"attention_mask has {attention_mask.ndim} dimensions: this model takes [batch, tokens]")
        leaking = self.decoder.cannot_write
        if leaking and attention_mask is not None and not bool(attention_mask.all()):
            raise UserError(f"{', '.join(leaking)} compare tokens, padding too: give rows of one length")
        self.decoder.recompute_activations = self.gradient_checkpointing and self.training
        return self.decoder(
            input_ids,
            attention_mask,
            cache=None if past is None else _Layers(past, self.decoder),
            known=known(self.decoder, domain, input_ids),
        )

    def _losses(
        self, output: Output, labels: Tensor | None, num_items_in_batch: Tensor | int | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """(loss, the part of it that balances experts); of several micro-batches each adds its share of tokens."""
        if labels is None:
            return None, None
        loss = self.loss_function(output.logits, labels, output.logits.shape[-1], num_items_in_batch)
        if not self.training:
            return loss, None
        routers, parts = self.decoder.routers, []
        for where, routing in output.by_name.items():
            weights, values = routers[where].loss_weights, routers[where].balance_losses(routing, len(labels))
            parts += [weights[name] * value for name, value in values.items()]
        if not parts:
            return loss, None
        share = 1 if num_items_in_batch is None else (labels[:, 1:] != -100).sum() / num_items_in_batch
        balance = torch.stack(parts).sum() * share
        return loss + balance, balance
